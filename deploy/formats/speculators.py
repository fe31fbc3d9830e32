"""An EAGLE-3 head as a directory: config.json, model.safetensors and training.json.

The first two are the form of vLLM's speculators library (`eagle_config`); exactly these tensors, where H is the hidden
size, V the target's vocabulary and D the draft vocabulary:

    fc.weight                                     BF16 [H, H·number of feature layers]
    layers.0.self_attn.{q,k,v}_proj.weight        BF16 [heads·head size, 2H]
    layers.0.self_attn.o_proj.weight              BF16 [H, heads·head size]
    layers.0.mlp.{gate,up,down}_proj.weight       BF16
    layers.0.{input_layernorm,hidden_norm,post_attention_layernorm}.weight, norm.weight   BF16 [H]
    lm_head.weight                                BF16 [D, H]
    d2t                                           I64 [D]    target id − draft id; ids ascend
    t2d                                           BOOL [V]   whether the draft vocabulary has the token
    embed_tokens.weight                           BF16 [V, H]   only with embedding "copy"

training.json (`eagle_record`) says for which target and tokenizer the head was trained, and how.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.formats.architectures import ModelShape
from deploy.formats.eagle_config import EagleConfig
from deploy.formats.eagle_record import Owner, TrainingRecord, parse_record, record_json
from deploy.formats.errors import FormatError
from deploy.formats.model_dir import read_json
from deploy.formats.safetensors_file import BFloat16, SafetensorsFile, to_bfloat16, write_safetensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
RECORD_FILE = "training.json"
EMBEDDING = "embed_tokens.weight"


def tensor_contract(config: EagleConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the file: name → its dtype and shape."""
    shape = config.layer
    hidden, inner = shape.hidden_size, shape.intermediate_size
    num_q, num_kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    weights: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, hidden * len(config.feature_layers)),
        "layers.0.self_attn.q_proj.weight": (num_q, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": (num_kv, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": (num_kv, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, num_q),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.hidden_norm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
    }
    if config.embedding == "copy":
        weights[EMBEDDING] = (shape.vocab_size, hidden)
    contract: dict[str, tuple[str, tuple[int, ...]]] = {name: ("BF16", size) for name, size in weights.items()}
    return contract | {"d2t": ("I64", (config.draft_vocab_size,)), "t2d": ("BOOL", (shape.vocab_size,))}


def write_eagle(
    directory: Path,
    config: EagleConfig,
    weights: Mapping[str, npt.NDArray[np.float32]],
    draft_ids: npt.NDArray[np.int64],
    owner: Owner,
    training: TrainingRecord,
) -> None:
    """Write a head; the same arguments give the same bytes.

    weights: float32 under the names of `tensor_contract`, rounded to bfloat16 here. draft_ids: int64 [D], the target's
    ids in the draft vocabulary, ascending. Raises FormatError for a tensor that is missing, unknown, misshapen or not
    finite, and for ids that are no draft vocabulary.
    """
    contract = tensor_contract(config)
    expected = {name: size for name, (dtype, size) in contract.items() if dtype == "BF16"}
    _check_names(set(weights), set(expected))
    for name, size in expected.items():
        if weights[name].shape != size:
            raise FormatError(f"tensor {name!r} is {list(weights[name].shape)}, expected {list(size)}")
        _check_finite(name, weights[name])
    ids = np.ascontiguousarray(draft_ids, dtype=np.int64)
    vocab_size = config.layer.vocab_size
    if ids.shape != (config.draft_vocab_size,) or np.any(np.diff(ids) <= 0) or ids[0] < 0 or ids[-1] >= vocab_size:
        raise FormatError(f"draft_ids must be {config.draft_vocab_size} ascending ids below {vocab_size}")
    has_token = np.zeros(vocab_size, dtype=np.bool_)
    has_token[ids] = True
    tensors: dict[str, npt.NDArray[Any] | BFloat16] = {
        name: BFloat16(to_bfloat16(values)) for name, values in weights.items()
    }
    tensors |= {"d2t": ids - np.arange(len(ids)), "t2d": has_token}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / WEIGHTS_FILE, tensors)
    _write_json(directory / CONFIG_FILE, config.to_json())
    _write_json(directory / RECORD_FILE, record_json(owner, training))


class EagleDirectory:
    """An opened head: `.config`, `.owner`, `.training`, `.draft_ids`, and weights by name.

    Use `EagleDirectory.open(path, target)`. Raises FormatError naming the file and the reason.
    """

    def __init__(self, path: Path, config: EagleConfig, file: SafetensorsFile, record: Mapping[str, Any]) -> None:
        self.path, self.config, self._file = path, config, file
        self.contract = tensor_contract(config)
        try:
            self.owner, self.training = parse_record(record)
        except FormatError as error:
            raise FormatError(f"{path / RECORD_FILE}: {error}") from error
        try:
            self._check_tensors()
            self.draft_ids = self._read_draft_ids()
        except FormatError as error:
            raise FormatError(f"{path / WEIGHTS_FILE}: {error}") from error

    @classmethod
    def open(cls, path: str | Path, target: ModelShape) -> EagleDirectory:
        """The head at `path`, whose configuration must fit `target`; whose head it is, `owner.check` says."""
        directory = Path(path)
        if not directory.is_dir():
            raise FormatError(f"{directory}: no such directory")
        raw = read_json(directory / CONFIG_FILE)
        try:
            config = EagleConfig.from_json(raw)
            config.check_target(target)
        except FormatError as error:
            raise FormatError(f"{directory / CONFIG_FILE}: {error}") from error
        if not (directory / WEIGHTS_FILE).is_file():
            raise FormatError(f"{directory / WEIGHTS_FILE}: no such file")
        return cls(directory, config, SafetensorsFile(directory / WEIGHTS_FILE), read_json(directory / RECORD_FILE))

    def __enter__(self) -> EagleDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A weight of the contract as float32. Raises FormatError when a value is not finite."""
        values = self._file.float32(name)
        try:
            _check_finite(name, values)
        except FormatError as error:
            raise FormatError(f"{self.path / WEIGHTS_FILE}: {error}") from error
        return values

    def array(self, name: str) -> npt.NDArray[Any]:
        """A tensor in the type that its file holds, read-only; BF16 as its uint16 bits.

        A view of the mapped file, which outlives it; a copy where the file does not align the tensor.
        """
        view = self._file.array(name)
        return view if view.flags.aligned else view.copy()

    def release(self, name: str) -> None:
        """Let the pages of tensor `name` be dropped."""
        self._file.release(name)

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """All weights, under their names, as float32; without the embedding where it is the target's."""
        return {name: self.float32(name) for name, (dtype, _) in self.contract.items() if dtype == "BF16"}

    def num_parameters(self) -> int:
        """Numbers in the head's own weights; the target's embedding is not among them, not even as a copy."""
        sizes = [size for name, (dtype, size) in self.contract.items() if dtype == "BF16" and name != EMBEDDING]
        return sum(int(np.prod(size)) for size in sizes)

    def _check_tensors(self) -> None:
        _check_names(set(self._file.names()), set(self.contract))
        for name, (dtype, size) in self.contract.items():
            found = (self._file.dtype(name), self._file.shape(name))
            if found != (dtype, size):
                raise FormatError(f"tensor {name!r} is {found[0]} {list(found[1])}, expected {dtype} {list(size)}")

    def _read_draft_ids(self) -> npt.NDArray[np.int64]:
        offsets = self._file.array("d2t")
        ids = offsets.astype(np.int64) + np.arange(len(offsets))
        has_token = np.frombuffer(self._file.array("t2d").tobytes(), dtype=np.uint8)
        if not np.array_equal(np.flatnonzero(has_token), ids):
            raise FormatError(
                f"d2t and t2d name different draft vocabularies ({len(ids)} ids, {np.count_nonzero(has_token)} marks)"
            )
        return ids


def _check_names(found: set[str], expected: set[str]) -> None:
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing or unknown:
        raise FormatError(f"tensors missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}")


def _check_finite(name: str, values: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise FormatError(f"tensor {name!r} holds values that are not finite")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
