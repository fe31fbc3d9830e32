"""Text files are UTF-8 on every machine: whatever reads or writes one says so, or its bytes hang on the locale."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "compress", "train", "deploy")
MODE_AT = {"open": 1, ".open": 0, ".fdopen": 1, ".TemporaryFile": 0, ".NamedTemporaryFile": 0}
"""Where a call has its mode: the builtin `open` behind the file, a path's own at the front."""
TEXT_MODES = {"": ("open", ".open", ".fdopen"), "b": (".TemporaryFile", ".NamedTemporaryFile")}
"""What a call without a mode opens: text, or bytes."""


def name_of(call: ast.Call) -> str:
    function = call.func
    return f".{function.attr}" if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_text(call: ast.Call) -> bool:
    """Whether the call opens a text file; `X.open(file)`, whose first argument is no mode, is another function."""
    name = name_of(call)
    if name in (".read_text", ".write_text"):
        return True
    if name not in MODE_AT:
        return False
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "mode"), None)
    mode = given or (call.args[MODE_AT[name]] if len(call.args) > MODE_AT[name] else None)
    if mode is None:
        return name in TEXT_MODES[""]
    is_literal = isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    return is_literal and "b" not in mode.value and set(mode.value) <= set("rwxat+")  # type: ignore[union-attr]


def without_encoding(source: str) -> Iterator[int]:
    """Lines of the calls that open a text file and do not say in which encoding."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and is_text(node) and "encoding" not in {each.arg for each in node.keywords}:
            yield node.lineno


def test_calls_that_need_an_encoding_are_told_from_others() -> None:
    needing = ["p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "p.open()", "p.open('a')"]
    needing += ["p.open(mode='r')", "tempfile.TemporaryFile('w')", "os.fdopen(d, 'w')"]
    others = ["p.open('rb')", "open(p, 'wb')", "Bundle.open(path)", "os.open(p, os.O_RDONLY)", "TemporaryFile(dir=d)"]
    others += [f"{call[:-1]}, encoding='utf-8')" for call in needing if not call.endswith("()")]
    assert [call for call in needing if not list(without_encoding(call))] == []
    assert [call for call in others if list(without_encoding(call))] == []


def test_every_text_file_has_its_encoding_named() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []
