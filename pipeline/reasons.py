"""Why a stage runs: the difference between the key it has now and the nearest earlier artifact's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.manifest import Key, Manifest

ABSENT = "absent"
NUM_SHOWN = 4


def differences(old: Key, new: Key, roles: dict[str, str] | None = None) -> list[str]:
    """One phrase per difference, e.g. `quantize.bits 8 → 4`, `input calibrate changed`.

    roles: role → instance of the stage that fills it now, named where it differs from the role.
    """
    stages = roles or {}
    found = [f"{new.stage}.{change}" for change in _changes(_flatten(old.config), _flatten(new.config))]
    if old.seed != new.seed:
        found.append(f"seed {old.seed} → {new.seed}")
    for role in sorted(old.inputs.keys() | new.inputs.keys()):
        if old.inputs.get(role) != new.inputs.get(role):
            suffix = f" ({stages[role]})" if stages.get(role, role) != role else ""
            verb = "added" if role not in old.inputs else "removed" if role not in new.inputs else "changed"
            found.append(f"input {role}{suffix} {verb}")
    for name in sorted(old.fingerprints.keys() | new.fingerprints.keys()):
        if old.fingerprints.get(name) != new.fingerprints.get(name):
            found.append(f"{name} changed")
    if old.version != new.version:
        found.append(f"stage version {old.version} → {new.version}")
    found += [f"package {change}" for change in _changes(old.packages, new.packages)]
    return found


def why_missing(new: Key, earlier: Iterable[Manifest], roles: dict[str, str] | None = None) -> str:
    """Reason for a build, relative to the nearest of the `earlier` artifacts of the same instance.

    Nearest: fewest differences, then newest.
    """
    ranked = [(differences(manifest.key, new, roles), manifest.built) for manifest in earlier]
    if not ranked:
        return "never built"
    newest_first = sorted(ranked, key=lambda entry: entry[1], reverse=True)
    nearest = min(newest_first, key=lambda entry: len(entry[0]))[0]
    shown = ", ".join(nearest[:NUM_SHOWN])
    hidden = len(nearest) - NUM_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`name old → new` for every name whose value differs."""
    changed = [name for name in sorted(old.keys() | new.keys()) if _shown(old, name) != _shown(new, name)]
    return [f"{name} {_shown(old, name)} → {_shown(new, name)}" for name in changed]


def _shown(values: dict[str, Any], name: str) -> str:
    return str(_as_json(values[name])) if name in values else ABSENT


def _as_json(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value
