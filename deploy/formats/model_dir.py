"""A model directory: config.json and model.safetensors (or its shards), plain or quantized.

Everything is checked on opening, from headers and the little that says how inputs are quantized: each tensor that the
architecture needs is there with its shape, and nothing else is. Weights are then read one at a time.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats import packed
from deploy.formats.activations import INPUT_SUFFIXES, MAX_COLUMNS, LayerInputs, decode_inputs
from deploy.formats.architectures import LinearLayer, ModelShape, linear_layers, other_tensors, shared_inputs
from deploy.formats.errors import FormatError
from deploy.formats.packed import GroupedInt
from deploy.formats.quantization_config import PACK_FORMAT, Quantization, QuantizationGroup, parse_quantization_config
from deploy.formats.safetensors_file import SafetensorsFile, from_bfloat16

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Buffers that old checkpoints carry and that follow from config.json.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_FLOATS = ("F32", "F16", "BF16")
_SUFFIXES = {*packed.SUFFIXES, *packed.INT_SUFFIXES, *INPUT_SUFFIXES}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises FormatError naming the file when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: not a JSON object")
    return value


class _Shards:
    """The tensors of one or several safetensors files under their names."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self.files = files
        self._owner: dict[str, SafetensorsFile] = {}
        for file in files:
            for name in file.names():
                if name in self._owner:
                    raise FormatError(f"{file.path}: tensor {name!r} is also in {self._owner[name].path.name}")
                self._owner[name] = file

    @classmethod
    def open(cls, directory: Path) -> _Shards:
        if (directory / WEIGHTS_FILE).exists():
            return cls([SafetensorsFile(directory / WEIGHTS_FILE)])
        if not (directory / INDEX_FILE).exists():
            raise FormatError(f"{directory}: has neither {WEIGHTS_FILE} nor {INDEX_FILE}")
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
            raise FormatError(f"{directory / INDEX_FILE}: weight_map is missing or not a map of names to files")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or not (directory / name).exists():
                raise FormatError(f"{directory / INDEX_FILE}: shard {name!r} is not a file of this directory")
        shards = cls([SafetensorsFile(directory / name) for name in names])
        for tensor, name in weight_map.items():
            if tensor not in shards or shards.owner(tensor).path.name != name:
                raise FormatError(f"{directory / name}: tensor {tensor!r} is missing, though {INDEX_FILE} lists it")
        return shards

    def owner(self, name: str) -> SafetensorsFile:
        if name not in self._owner:
            raise FormatError(f"{self.files[0].path}: tensor {name!r} is missing")
        return self._owner[name]

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def names(self) -> list[str]:
        return list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner(name).shape(name)

    def dtype(self, name: str) -> str:
        return self.owner(name).dtype(name)

    def array(self, name: str) -> npt.NDArray[Any]:
        return self.owner(name).array(name)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        return self.owner(name).float32(name)


def _eos_token_ids(directory: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end a text: generation_config.json's where it names any, else config.json's."""
    generation = directory / "generation_config.json"
    declared = read_json(generation).get("eos_token_id") if generation.exists() else None
    if declared is None:
        declared = config.get("eos_token_id")
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise FormatError(f"{directory}: eos_token_id={declared!r} is not a token id below {vocab_size}")
    return tuple(ids)


class ModelDirectory:
    """An opened model: `.shape`, `.quantization`, `.eos_token_ids`, and weights by name.

    Use `ModelDirectory.open(path)`. Raises FormatError naming the file and the reason.
    """

    def __init__(self, path: Path, config: dict[str, Any], shards: _Shards) -> None:
        self.path, self.config, self._shards = path, config, shards
        try:
            self.shape = ModelShape.from_config(config)
            raw = config.get("quantization_config")
            self.quantization: Quantization | None = None if raw is None else parse_quantization_config(raw)
        except FormatError as error:
            raise FormatError(f"{path / 'config.json'}: {str(error).removeprefix('config.json: ')}") from error
        self.eos_token_ids = _eos_token_ids(path, config, self.shape.vocab_size)
        self.layers = {layer.name: layer for layer in linear_layers(self.shape)}
        self._inputs: dict[str, LayerInputs] = {}
        self._check_tensors()

    @classmethod
    def open(cls, path: str | Path) -> ModelDirectory:
        directory = Path(path)
        if not directory.is_dir():
            raise FormatError(f"{directory}: no such directory")
        return cls(directory, read_json(directory / "config.json"), _Shards.open(directory))

    def __enter__(self) -> ModelDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for file in self._shards.files:
            file.close()

    def group(self, name: str) -> QuantizationGroup | None:
        """How linear layer `name` is packed; None when it is plain."""
        return None if self.quantization is None else self.quantization.for_layer(name)

    def _check_layer(self, layer: LinearLayer) -> set[str]:
        """Check one linear layer; the names of its tensors."""
        group = self.group(layer.name)
        if group is None:
            self._check_plain(f"{layer.name}.weight", (layer.num_out, layer.num_in))
            return {f"{layer.name}.weight"}
        is_packed, num_columns = group.format == PACK_FORMAT, layer.num_in
        if group.activations is not None:
            num_columns = self._check_inputs(layer, group)
        shape = (layer.num_out, num_columns)
        packed.check_packed(self._shards, layer.name, shape, group.group_size, group.bits, is_packed=is_packed)
        has_zeros = f"{layer.name}.weight_zero_point" in self._shards
        has_minimum = f"{layer.name}.weight_min" in self._shards
        if has_minimum != group.float_minimum or has_zeros == (group.symmetric or group.float_minimum):
            raise FormatError(
                f"layer {layer.name!r} has weight_zero_point: {has_zeros}, weight_min: {has_minimum}, "
                f"but config.json says symmetric={group.symmetric}, float minimum={group.float_minimum}"
            )
        suffixes = packed.SUFFIXES if is_packed else packed.INT_SUFFIXES
        return {f"{layer.name}.{suffix}" for suffix in (*suffixes, *self._input_suffixes(layer.name))}

    def _input_suffixes(self, name: str) -> list[str]:
        inputs = self._inputs.get(name)
        values = (None, None) if inputs is None else (inputs.scale, inputs.flatten)
        return [suffix for suffix, value in zip(INPUT_SUFFIXES, values, strict=True) if value is not None]

    def _check_inputs(self, layer: LinearLayer, group: QuantizationGroup) -> int:
        """Read and check how a layer's inputs are quantized; the number of its weight's columns."""
        assert group.activations is not None
        inputs = decode_inputs(self._shards, layer.name, group.activations, layer.num_in, is_flattened=group.flatten)
        self._inputs[layer.name] = inputs
        num_columns = layer.num_in if inputs.flatten is None else inputs.flatten.size
        if num_columns > MAX_COLUMNS:
            raise FormatError(
                f"layer {layer.name!r} has {num_columns} columns; with quantized inputs at most {MAX_COLUMNS}"
            )
        return num_columns

    def _check_shared_inputs(self) -> None:
        """What reads the same rows must quantize them alike: a runtime does it once."""
        for names in shared_inputs(self.shape):
            first = self._inputs.get(names[0])
            for name in names[1:]:
                other = self._inputs.get(name)
                if (first is None) != (other is None) or (first and other and not first.equals(other)):
                    raise FormatError(
                        f"layers {names[0]!r} and {name!r} read the same rows, but quantize them differently "
                        "(bits, scope, input_scale or input_flatten); give them one grid"
                    )

    def _check_plain(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._shards:
            raise FormatError(f"tensor {name!r} is missing")
        if self._shards.shape(name) != shape or self._shards.dtype(name) not in _FLOATS:
            raise FormatError(
                f"tensor {name!r} is {self._shards.dtype(name)} {list(self._shards.shape(name))}, "
                f"expected {' or '.join(_FLOATS)} {list(shape)}"
            )

    def _check_tensors(self) -> None:
        where = self._shards.files[0].path if len(self._shards.files) == 1 else self.path
        try:
            known: set[str] = set()
            for name, shape in other_tensors(self.shape).items():
                self._check_plain(name, shape)
                known.add(name)
            for layer in self.layers.values():
                known |= self._check_layer(layer)
            self._check_shared_inputs()
            if self.shape.tied_embeddings and "lm_head.weight" in self._shards:
                self._check_tied_head()
                known.add("lm_head.weight")
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        unknown = [name for name in self._shards.names() if name not in known and not _DERIVED.fullmatch(name)]
        if unknown:
            raise FormatError(
                f"{where}: tensor {unknown[0]!r} does not belong to a {self.shape.model_type} model of this "
                f"config.json ({len(unknown)} such tensors)"
            )

    def _check_tied_head(self) -> None:
        """A tied model may store its head a second time, if it is the same."""
        embedding = self._shards.array("model.embed_tokens.weight")
        head = self._shards.array("lm_head.weight")
        same_form = self._shards.dtype("lm_head.weight") == self._shards.dtype("model.embed_tokens.weight")
        if not same_form or not np.array_equal(embedding, head):
            raise FormatError("'lm_head.weight' differs from the embedding, though config.json ties them")

    def names(self) -> list[str]:
        return self._shards.names()

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def dtype(self, name: str) -> str:
        return self._shards.dtype(name)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Any tensor in the type that its file holds, read-only; BF16 as its uint16 bits.

        A view of the mapped file, which outlives `close`; a copy where the file does not align the tensor.
        """
        view = self._shards.array(name)
        return view if view.flags.aligned else view.copy()

    def linear(self, name: str) -> GroupedInt | npt.NDArray[np.float32]:
        """Weight [out, in] of linear layer `name` (without `.weight`): codes, or float32 when plain.

        Where the layer's inputs are flattened, it has a column for each copy.
        """
        if name not in self.layers:
            raise ValueError(f"{self.path}: {name!r} is not a linear layer of this model")
        group = self.group(name)
        if group is None:
            return self.float32(f"{name}.weight")
        try:
            is_packed = group.format == PACK_FORMAT
            return packed.decode(self._shards, name, group.group_size, group.bits, is_packed=is_packed)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from error

    def inputs(self, name: str) -> LayerInputs | None:
        """How the inputs of linear layer `name` are quantized; None where its file leaves that to the runtime."""
        return self._inputs.get(name)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """Any float tensor, whole, as float32."""
        return self._shards.float32(name)

    def rows_float32(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Chosen rows of a float matrix as float32 [len(rows), columns]; the rest is not read."""
        chosen = self._shards.array(name)[rows]
        return from_bfloat16(chosen) if self.dtype(name) == "BF16" else chosen.astype(np.float32)

    def release(self, name: str) -> None:
        """Let the pages of tensor `name`, or of all tensors of linear layer `name`, be dropped."""
        for candidate in (name, *(f"{name}.{suffix}" for suffix in _SUFFIXES)):
            if candidate in self._shards:
                self._shards.owner(candidate).release(candidate)

    def num_parameters(self) -> int:
        """Weights and biases as the architecture counts them; tied embeddings once."""
        others = sum(int(np.prod(shape)) for shape in other_tensors(self.shape).values())
        return others + sum(layer.num_out * layer.num_in for layer in self.layers.values())
