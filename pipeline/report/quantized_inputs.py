"""What is to be said of a target whose linear layers quantize their inputs: figures, errors by layer, who loads it."""

from __future__ import annotations

from typing import Any

from deploy.formats.quantization_config import Quantization, QuantizationGroup

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADING = ("layers", "4-bit", "columns", "output error", "worst", "input error", "beyond scale")


def summary_lines(stats: dict[str, Any]) -> list[str]:
    """Sentences for the model card and the report; none where inputs are left to the runtime. stats: `stats.json`."""
    figures = stats.get("inputs")
    if figures is None:
        return []
    lines = [
        f"4 bits for weights and inputs in {figures['int4_share']:.1%} of the linear layers' multiplications; "
        f"{figures['expansion']:.3f} times as many as without flattening."
    ]
    if "alpha" in figures:
        tried = figures.get("alpha_kl", {})
        others = "; KL of those tried: " + ", ".join(f"{a} {kl:.4f}" for a, kl in tried.items()) if tried else ""
        lines.append(f"SmoothQuant's α: {figures['alpha']}{others}.")
    if "saturation" in figures:
        lines.append(
            f"Held-out input values beyond the static scales: {figures['saturation']:.4%}, in the worst layer"
            f" {figures['saturation_worst']:.4%}."
        )
    return lines


def error_cells(stats: dict[str, Any]) -> list[list[str]]:
    """A table of errors by kind of layer, heading first; empty where there is nothing to tell."""
    layers: dict[str, dict[str, Any]] = stats.get("layers", {})
    if not layers:
        return []
    table = [list(HEADING)]
    for kind in KINDS:
        found = [layer for name, layer in layers.items() if name.endswith(kind)]
        errors = [layer["error"] for layer in found]
        rates = [layer["saturation"] for layer in found if layer["saturation"] is not None]
        table.append(
            [
                kind,
                f"{sum(layer['bits'] == 4 for layer in found)} of {len(found)}",
                f"{sum(layer['columns'] for layer in found) / len(found):.0f}",
                f"{sum(errors) / len(errors):.4f}",
                f"{max(errors):.4f}",
                f"{sum(layer['inputs_error'] for layer in found) / len(found):.4f}",
                f"{sum(rates) / len(rates):.4%}" if rates else "–",
            ]
        )
    return table


def vllm_obstacle(quantization: Quantization | None) -> str | None:
    """Why vLLM does not load a model of this quantization; None where it does."""
    for group in quantization.groups if quantization else ():
        if found := _obstacle(group):
            return found
    return None


def _obstacle(group: QuantizationGroup) -> str | None:
    if group.float_minimum:
        return "its grid has float minima (`weight_min`)"
    if group.flatten:
        return "its inputs are flattened (`input_flatten`)"
    if group.activations is None:
        return None
    if group.activations.bits == 4:
        return "its inputs have 4 bits"
    if group.bits == 4:
        return "its 4-bit weights with 8-bit inputs are packed, which vLLM's W4A8 kernels do not take"
    if group.group_size is not None or not group.symmetric:
        return "its 8-bit weights with quantized inputs are not symmetric with a scale per output channel"
    return None
