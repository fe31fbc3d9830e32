"""export: `bundle/`, complete by itself; linked as `bundles/<name>` at the end of every run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.graph import BuildContext
from pipeline.manifest import Manifest
from pipeline.report.drafter import summary_line as drafter_line
from pipeline.report.evaluation import summary_lines as speed_lines
from pipeline.report.quality_table import QualityRow, as_text, caption
from pipeline.report.quantized_inputs import vllm_obstacle
from pipeline.stages.assemble import assemble, extensions
from pipeline.stages.calibrate import SAMPLES
from pipeline.stages.evaluate import PLAN, RESULT
from pipeline.stages.export_drafter import drafters_facts

if TYPE_CHECKING:
    from pipeline.report.documents import Facts
    from pipeline.report.drafter import DrafterFacts

EXAMPLE_CHARACTERS = 1200


def build(context: BuildContext) -> None:
    """Writes `bundle/` in the form of docs/bundle-format.md."""
    from deploy.formats.bundle import write_manifest

    bundle = context.out / "bundle"
    components = assemble(context.inputs, bundle)
    drafters = drafters_facts(context, bundle)
    evaluation = _evaluation(context, bundle)
    rows = quality_rows(context)
    stats = _read_json(context.inputs["quantize"] / "stats.json")
    source = _read_json(context.inputs["target"] / "source.json")
    source["licence"] = context.config["licence"] or source["licence"]
    obstacle = _vllm_obstacle(bundle / "target")
    provenance = {**_provenance(context, source), "vllm": {"loads": obstacle is None, "obstacle": obstacle}}
    facts = _facts(context, rows, stats, source, provenance, drafters=drafters, evaluation=evaluation)
    _write_documents(bundle, facts)
    write_manifest(
        bundle,
        name=context.config["name"],
        components=components,
        provenance=provenance,
        licence=source["licence"],
        quality=[row.as_dict() for row in rows],
        extensions=extensions(context.inputs),
    )
    context.summary["quality"] = [row.as_dict() for row in rows]
    context.summary["table"] = [*as_text(rows), caption(rows)]
    if drafters:
        lines = [drafter_line(found.role, found.training.served, found.num_bytes) for found in drafters]
        context.summary["table"] += ["", *lines]
    if evaluation is not None:
        context.summary["table"] += ["", *speed_lines(evaluation)]
        context.summary["is_reproducible"] = False
    figures = {f"{row.label}/{key}": value for row in rows for key, value in row.as_dict().items()}
    context.tracker.summary(context.stage, {key: value for key, value in figures.items() if isinstance(value, float)})


def check(bundles: Path, name: str) -> None:
    """Raises ValueError when the bundle could not be linked as `bundles/<name>` in the end."""
    if Path(name).name != name:
        raise ValueError(f"name={name} is not a plain file name; the bundle is linked as {bundles}/<name>")
    try:
        bundles.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=bundles):
            pass
    except OSError as error:
        raise ValueError(
            f"bundles={bundles}: not writable ({error.strerror}); set bundles= to a writable directory"
        ) from error
    if (bundles / name).exists() and not (bundles / name).is_symlink():
        raise ValueError(
            f"bundles={bundles}: {bundles / name} exists and is not a link of ours; move it or choose another name"
        )


def publish(bundles: Path, name: str, artifact: Path, manifest: Manifest) -> list[str]:
    """Links `bundles/<name>` to the artifact's bundle, atomically; returns what to print last."""
    check(bundles, name)
    link, temporary = bundles / name, bundles / f".{name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath((artifact / "bundle").resolve(), bundles.resolve()))
    temporary.replace(link)
    return [
        "",
        *manifest.summary["table"],
        "",
        f"bundle: {link}",
        f'next:   python -m deploy generate {link} -p "Why is the sky blue?"',
        f"        python -m deploy inspect {link}",
    ]


def quality_rows(context: BuildContext) -> list[QualityRow]:
    """The source, the bundle's own method, then the others in the order of the configuration."""
    precision = _read_json(context.inputs["target"] / "source.json")["precision"]
    rows: list[QualityRow] = []
    for role in [role for role in context.inputs if role.split("-")[0] == "quality"]:
        measured = _read_json(context.inputs[role] / "quality.json")
        model_role = role.replace("quality", "quantize", 1)
        stats = _read_json(context.inputs[model_role] / "stats.json")
        if not rows:
            rows.append(QualityRow("source", precision["bits_per_weight"], 0, measured["source"]))
        label = f"{stats['method']} (this bundle)" if role == "quality" else role.removeprefix("quality-")
        num_fallbacks = sum(len(layers) for layers in stats["fallbacks"].values())
        rows.append(QualityRow(label, stats["bits_per_weight"], num_fallbacks, measured["model"]))
    return rows


def _vllm_obstacle(model: Path) -> str | None:
    from deploy.formats.model_dir import ModelDirectory

    with ModelDirectory.open(model) as files:
        return vllm_obstacle(files.quantization)


def _evaluation(context: BuildContext, bundle: Path) -> dict[str, Any] | None:
    """What evaluate measured, whose plan goes into the bundle; None where it was left out."""
    if "evaluate" not in context.inputs:
        return None
    shutil.copyfile(context.inputs["evaluate"] / PLAN, bundle / PLAN)
    found = _read_json(context.inputs["evaluate"] / RESULT)
    assert isinstance(found, dict)
    return found


def _facts(
    context: BuildContext,
    rows: list[QualityRow],
    stats: dict[str, Any],
    source: dict[str, Any],
    provenance: dict[str, Any],
    *,
    drafters: list[DrafterFacts],
    evaluation: dict[str, Any] | None,
) -> Facts:
    from pipeline.report.documents import Facts

    return Facts(
        name=context.config["name"],
        rows=rows,
        source=source,
        stats=stats,
        method=context.config["methods"]["quantize"],
        samples=_sample_counts(context.inputs["calibrate"] / SAMPLES),
        examples=_examples(context.inputs["calibrate"] / SAMPLES),
        provenance=json.dumps(provenance, indent=2),
        obstacle=provenance["vllm"]["obstacle"],
        drafters=drafters,
        evaluation=evaluation,
    )


def _write_documents(bundle: Path, facts: Facts) -> None:
    from pipeline.report.documents import html_report, model_card

    (bundle / "README.md").write_text(model_card(facts), encoding="utf-8")
    (bundle / "report.html").write_text(html_report(facts), encoding="utf-8")


def _provenance(context: BuildContext, source: dict[str, Any]) -> dict[str, Any]:
    """Which source, by which stages: configs, seeds, code and package versions, and the contents' digests."""
    stages = {}
    for role, manifest in context.manifests.items():
        stages[role] = {
            "config": _in_order(manifest.config),
            "seed": manifest.seed,
            "version": manifest.version,
            "packages": _in_order(manifest.packages),
            "content": manifest.content,
        }
    files = _in_order(context.manifests["target"].fingerprints)
    found = {"source": source, "source_files": files}
    if "intermediate-source" in context.manifests:
        found["intermediate_source"] = _read_json(context.inputs["intermediate-source"] / "source.json")
        found["intermediate_source_files"] = _in_order(context.manifests["intermediate-source"].fingerprints)
    return {**found, "stages": stages}


def _in_order(values: dict[str, Any]) -> Any:
    """With sorted keys: a manifest that was read back has them sorted, one just built as the configuration has them."""
    return json.loads(json.dumps(values, sort_keys=True))


def _sample_counts(path: Path) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for record in _records(path):
        entry = counts.setdefault(f"{record['group']}, {record['split']}", {"samples": 0, "tokens": 0})
        entry["samples"] += 1
        entry["tokens"] += len(record["ids"])
    return counts


def _examples(path: Path) -> list[dict[str, str]]:
    """The first sample of each group."""
    found: dict[str, dict[str, str]] = {}
    for record in _records(path):
        text = record["text"][:EXAMPLE_CHARACTERS]
        found.setdefault(record["group"], {key: record[key] for key in ("group", "split", "source")} | {"text": text})
    return list(found.values())


def _records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
