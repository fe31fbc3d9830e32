"""quality: `quality.json`, one quantized model against its source on every held-out group."""

from __future__ import annotations

import json
from typing import Any

from pipeline.graph import BuildContext
from pipeline.stages.calibrate import SAMPLES


def build(context: BuildContext) -> None:
    """Writes `quality.json`: {"model": {group: Quality}, "source": {group: Quality}}."""
    from compress.calibration.samples import read_samples
    from compress.load import load_float32
    from compress.quality import measure

    samples = read_samples(context.inputs["calibrate"] / SAMPLES, "heldout")
    groups: dict[str, list[tuple[int, ...]]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.ids)
    source = load_float32(context.inputs["target"] / "model")
    model = load_float32(context.inputs["quantize"] / "model")
    found: dict[str, dict[str, Any]] = {"model": {}, "source": {}}
    num_tokens = sum(len(ids) - 1 for sequences in groups.values() for ids in sequences)
    with context.progress(num_tokens, f"{context.stage} on held-out {', '.join(groups)}", "tokens") as bar:
        for group, sequences in groups.items():
            model_quality, source_quality = measure(source, model, sequences, on_tokens=bar.update)
            found["model"][group], found["source"][group] = model_quality.as_dict(), source_quality.as_dict()
    (context.out / "quality.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    context.summary.update(found["model"])
    flat = {f"{group}/{key}": value for group, values in found["model"].items() for key, value in values.items()}
    context.tracker.summary(context.stage, flat)
