"""The import rules of docs/architecture.md, read from the source: arrows between packages point one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "compress", "train", "deploy")
HEAVY = {"torch", "transformers", "llmcompressor", "compressed_tensors", "datasets", "peft", "accelerate", "wandb"}
HEAVY |= {"triton"}
FORMATS = "deploy.formats"
# Formats are files: numpy and the standard library, jinja2 for the chat template, tokenizers for tokenizer.json.
FORMATS_MAY_IMPORT = {"numpy", "jinja2", "tokenizers", "deploy"}
STDLIB_EXCEPTIONS = {"__future__"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports; with `top_level_only`, those that its import triggers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazily = set()
    if top_level_only:
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        lazily = {id(inner) for function in functions for inner in ast.walk(function)}
        guards = (
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        lazily |= {id(inner) for guard in guards for inner in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in lazily:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_names(path, node)


def _from_names(path: Path, node: ast.ImportFrom) -> Iterator[str]:
    module = node.module or ""
    if node.level:
        package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
        module = ".".join((*package, module)).rstrip(".")
    yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violations(package: str, forbidden: list[str], allowed: list[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if any(inside(name, other) for other in forbidden) and not any(inside(name, other) for other in allowed)
    ]


@pytest.mark.parametrize("package", ["compress", "train", "deploy"])
def test_no_package_imports_the_pipeline_or_a_sibling_but_for_the_formats(package: str) -> None:
    others = [other for other in PACKAGES if other != package]
    assert violations(package, others, [FORMATS]) == []


def test_no_source_imports_the_tests() -> None:
    assert [line for package in PACKAGES for line in violations(package, ["tests"], [])] == []


def is_for_gpus(path: Path) -> bool:
    """Whether a file of `deploy` belongs to the GPU backend, which may import torch and triton."""
    inside_deploy = path.relative_to(ROOT / "deploy").as_posix()
    return inside_deploy.startswith(("kernels/gpu/", "runtime/gpu_"))


def test_deploy_imports_no_training_library() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("deploy")
        for name in imported(path)
        if name.partition(".")[0] in HEAVY - ({"torch", "triton"} if is_for_gpus(path) else set())
    ]
    assert found == []


def test_deploy_loads_the_gpu_backend_only_where_it_is_used() -> None:
    """Importing any other file of `deploy` imports none of it, and so neither torch nor triton."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("deploy")
        for name in imported(path, top_level_only=True)
        if not is_for_gpus(path) and name.startswith(("deploy.kernels.gpu", "deploy.runtime.gpu_"))
    ]
    assert found == []


def test_formats_need_little_beyond_numpy() -> None:
    import sys

    for path in sources("deploy/formats"):
        roots = {name.partition(".")[0] for name in imported(path)}
        extra = roots - sys.stdlib_module_names - FORMATS_MAY_IMPORT - STDLIB_EXCEPTIONS
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_only_the_tracker_imports_wandb() -> None:
    tracker = ROOT / "pipeline" / "tracking" / "wandb_run.py"
    users = [path for package in PACKAGES for path in sources(package) if "wandb" in set(imported(path))]
    assert users == [tracker]


def test_pipeline_modules_load_no_heavy_library_when_imported() -> None:
    """A run that reuses everything must not pay for torch; stages import inside their functions."""
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("pipeline")
        for name in imported(path, top_level_only=True)
        if name.partition(".")[0] in HEAVY
    ]
    assert found == []
