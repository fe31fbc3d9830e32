"""A quantized model as a directory: the target's configuration, packed layers, everything else in 16 bits."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.activations import LayerInputs
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.packed import GroupedInt, ScaleDtype, encode
from deploy.formats.quantization_config import QuantizationGroup, quantization_config
from deploy.formats.safetensors_file import BFloat16, from_bfloat16, to_bfloat16, write_safetensors


def write_quantized(
    target: Path,
    layers: Mapping[str, GroupedInt],
    out: Path,
    *,
    inputs: Mapping[str, LayerInputs] | None = None,
    norms: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Writes `out` in compressed-tensors' form: pack-quantized, int-quantized where 8-bit layers quantize their inputs.

    target: the unquantized model directory; layers: module name → weight, for the layers that were quantized. inputs:
    module name → how a layer's inputs are quantized; norms: tensor name → weight in place of the target's. Other
    matrices are rounded to bfloat16; vectors (norms, biases) too, unless that would change them.
    """
    inputs, norms = inputs or {}, norms or {}
    out.mkdir(parents=True, exist_ok=True)
    with ModelDirectory.open(target) as files:
        tensors: dict[str, npt.NDArray[Any] | BFloat16] = {}
        is_whole = set(layers) == set(files.layers)
        for name in files.names():
            module = name.removesuffix(".weight")
            if module in layers:
                weight, quantized = layers[module], inputs.get(module)
                dtype = _scale_dtype(weight)
                tensors |= encode(module, weight, dtype, symmetric=_is_symmetric(weight), inputs=quantized)
            else:
                tensors[name] = _sixteen_bits(norms[name] if name in norms else files.float32(name))
                files.release(name)
        write_safetensors(out / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    if layers:
        config["quantization_config"] = quantization_config(_groups(layers, inputs, is_whole=is_whole))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (target / "generation_config.json").is_file():
        shutil.copyfile(target / "generation_config.json", out / "generation_config.json")


def stored_bits_per_weight(layers: Mapping[str, GroupedInt], inputs: Mapping[str, LayerInputs] | None = None) -> float:
    """Bits a quantized weight takes in the file, its group's scale and zero point or minimum included.

    inputs: as of `write_quantized`; the columns that flattening adds count as bits of the weights that they repeat.
    """
    bits, count = 0.0, 0
    for name, weight in layers.items():
        scale_bits = 32 if _scale_dtype(weight) == "F32" else 16
        zero_bits = scale_bits if weight.zero_point is None else 0 if _is_symmetric(weight) else weight.bits
        bits += weight.q.size * weight.bits + weight.scale.size * (scale_bits + zero_bits)
        flattened = (inputs or {}).get(name)
        count += weight.shape[0] * ((flattened and flattened.num_channels) or weight.shape[1])
    return bits / count if count else 16.0


def _groups(
    layers: Mapping[str, GroupedInt], inputs: Mapping[str, LayerInputs], *, is_whole: bool
) -> list[QuantizationGroup]:
    """One group where all of a model's layers are alike; otherwise each kind lists its layers by name.

    is_whole: `layers` are all linear layers of the model.
    """
    by_kind: dict[QuantizationGroup, list[str]] = {}
    for name, weight in layers.items():
        by_kind.setdefault(_group(weight, inputs.get(name), ("Linear",)), []).append(name)
    if is_whole and len(by_kind) == 1:
        return list(by_kind)
    return [replace(kind, targets=tuple(names)) for kind, names in by_kind.items()]


def _group(weight: GroupedInt, inputs: LayerInputs | None, targets: tuple[str, ...]) -> QuantizationGroup:
    is_whole_row = inputs is not None and weight.group_size == weight.shape[1]
    return QuantizationGroup(
        targets,
        weight.bits,
        None if is_whole_row else weight.group_size,
        _is_symmetric(weight),
        float_minimum=weight.zero_point is None,
        activations=None if inputs is None else inputs.grid,
        flatten=inputs is not None and inputs.flatten is not None,
    )


def _is_symmetric(weight: GroupedInt) -> bool:
    return weight.zero_point is not None and bool(np.all(weight.zero_point == 1 << (weight.bits - 1)))


def _scale_dtype(weight: GroupedInt) -> ScaleDtype:
    """The smallest type that holds the scales (and float minima) exactly."""
    values = [weight.scale] if weight.zero_point is not None else [weight.scale, weight.minimum]
    if all(np.array_equal(from_bfloat16(to_bfloat16(v)), v) for v in values):
        return "BF16"
    with np.errstate(over="ignore"):
        return "F16" if all(np.array_equal(v.astype(np.float16).astype(np.float32), v) for v in values) else "F32"


def _sixteen_bits(values: np.ndarray) -> np.ndarray | BFloat16:
    bits = to_bfloat16(values)
    if values.ndim == 1 and not np.array_equal(from_bfloat16(bits), values):
        return values
    return BFloat16(bits)
