"""`deploy inspect`: what a bundle holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from deploy.commands import options as o
from deploy.commands.bench_tables import table
from deploy.formats.bundle import Bundle, Manifest
from deploy.formats.components import HEAD_ROLES, Component, Drafter
from deploy.kernels.cpu.library import describe_choice
from deploy.runtime.modes import available_modes
from deploy.runtime.plan_file import PlanFile, read_plan_file


def inspect(
    bundle: o.BundlePath,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest as it is.")] = False,
) -> None:
    """Show what a bundle holds (models, precision, sizes, quality, licence, provenance) and what would run it."""
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    if as_json:
        typer.echo((bundle / "manifest.json").read_text(encoding="utf-8"), nl=False)
        return
    total = sum(record.num_bytes for record in manifest.files.values())
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    facts = [("licence", manifest.licence), ("files", f"{len(manifest.files)}, {total / 1e6:.1f} MB")]
    facts.append(("extensions", ", ".join(manifest.extensions) or "none"))
    facts.append(("chat template", manifest.chat_template[:16]))
    facts.append(("modes", ", ".join(available_modes(opened))))
    facts.append(("runtime", _runtime()))
    console.print(_facts(manifest.name, facts))
    target_bytes = next(item.num_bytes for item in manifest.components if item.role == "target")
    for item in manifest.components:
        rows = _model_facts(item) if item.drafter is None else _drafter_facts(item, item.drafter, target_bytes)
        console.print(_facts(f"{item.role} ({item.path}/)", rows))
    plan = read_plan_file(opened)
    if plan is not None:
        console.print(_plan_table(plan))
    if manifest.quality:
        console.print(_quality_table(manifest))
    if manifest.provenance:
        console.print(_facts("Provenance", _provenance_facts(manifest.provenance)))


def _plan_table(plan: PlanFile) -> Table:
    """What each mode gave where the plan was made; `deploy tune` and `deploy bench` say what it is here."""
    machine = plan.machine
    where = f"{machine.get('cpu')}, {machine.get('isa')}, {machine.get('threads')} threads"
    made = table(f"Plan, as measured on {where}", "mode", "tok/s", "predicted", "τ", "accepted up to each position")
    for mode, found in plan.modes.items():
        name = f"{mode} (fastest)" if mode == plan.choice else mode
        cells = (_format(found.get(key)) for key in ("decode_tok_s", "predicted_tok_s", "tau"))
        made.add_row(name, *cells, " / ".join(map(_format, found.get("survival") or ())))
    return made


def _model_facts(item: Component) -> list[tuple[str, str]]:
    return [
        ("architecture", item.architecture),
        ("precision", item.precision),
        ("parameters", f"{item.num_parameters / 1e6:.1f} M"),
        ("size", f"{item.num_bytes / 1e6:.1f} MB"),
        ("context", f"{item.context_length} tokens"),
    ]


def _drafter_facts(item: Component, drafter: Drafter, target_bytes: int) -> list[tuple[str, str]]:
    """A model's facts, and its worth as a drafter: held-out conversations, greedy, weights as they are served."""
    shares, above = drafter.acceptance.by_position, HEAD_ROLES.get(item.role, "target")
    layers = ", ".join(map(str, drafter.feature_layers))
    return [
        *_model_facts(item),
        ("of the target", f"{item.num_bytes / target_bytes:.1%} of its size"),
        ("draft vocabulary", f"{drafter.draft_vocab_size} tokens"),
        *([("reads", f"what enters layers {layers} of the {above}")] if layers else []),
        ("acceptance", " / ".join(f"{share:.3f}" for share in shares) + " by position"),
        ("τ", f"{drafter.acceptance.tau:.2f} tokens a call of the target at {len(shares)} drafted"),
        ("MBSU", f"{drafter.mbsu:.2f}, the speed-up if only memory traffic counted"),
        ("trained on", f"{above} {drafter.target[:16]}"),
    ]


def _runtime() -> str:
    """The native kernels of this machine; why there are none is no reason not to show the bundle."""
    try:
        return describe_choice()
    except (ValueError, OSError) as error:
        return f"none: {error}"


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _quality_table(manifest: Manifest) -> Table:
    """A row per method; measures of one kind of text ("prose/kl", …) share a column."""
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for row in manifest.quality for key in row):
        columns.setdefault(key.split("/")[0], []).append(key)
    measures = next(([key.split("/")[1] for key in keys] for keys in columns.values() if "/" in keys[0]), [])
    table = Table(title=f"Quality ({' / '.join(measures)})", title_justify="left")
    for column, keys in columns.items():
        is_text = any(isinstance(row.get(keys[0]), str) for row in manifest.quality)
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for row in manifest.quality:
        table.add_row(*(" / ".join(_format(row.get(key)) for key in keys) for keys in columns.values()))
    return table


def _settings(value: object) -> str:
    """A JSON value on one line: `method=gptq bits=4 …`, without what is not set."""
    if isinstance(value, dict):
        pairs = (
            (key, f"({_settings(item)})" if isinstance(item, dict) else _settings(item)) for key, item in value.items()
        )
        return " ".join(f"{key}={item}" for key, item in pairs if item not in ("", "()"))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else _format(value)


def _provenance_facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One line a fact; of a stage only its configuration."""
    facts = []
    for key, value in provenance.items():
        if key == "stages" and isinstance(value, dict):
            for name, stage in value.items():
                facts.append(
                    (f"stage {name}", _settings(stage.get("config", {}) if isinstance(stage, dict) else stage))
                )
        elif isinstance(value, dict):
            facts += [(f"{key}: {name}", _settings(item)) for name, item in value.items()]
        else:
            facts.append((key, _settings(value)))
    return [(name, text) for name, text in facts if text]


def _facts(title: str, facts: list[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for key, value in facts:
        table.add_row(key, value)
    return table
