"""`quantization_config` of config.json: which layers are packed, how, in compressed-tensors' words.

Field names and matching rules follow compressed-tensors 0.19 (`quant_config.py`, `quant_scheme.py`, `utils/match.py`).
A group with float minima carries the extra key `weights.minimum = "float"`, one with flattened inputs
`input_activations.flatten = true`: compressed-tensors forbids unknown keys there, so transformers and vLLM refuse such
a file loudly instead of computing something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.formats.activations import ActivationGrid
from deploy.formats.errors import FormatError

QUANT_METHOD = "compressed-tensors"
PACK_FORMAT, INT_FORMAT, MIXED_FORMAT = "pack-quantized", "int-quantized", "mixed-precision"
COMPRESSED_TENSORS_VERSION = "0.19.0"


@dataclass(frozen=True)
class QuantizationGroup:
    """Layers that share a grid.

    targets: exact layer names, `re:` patterns (matched from the beginning) or "Linear" for all. group_size: None for a
    scale per output channel, which needs `activations`. symmetric and float_minimum exclude each other; neither means
    integer zero points. activations: how inputs are quantized, None where the file leaves that to the runtime.
    flatten: inputs are flattened; needs activations of scope "tensor".
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    symmetric: bool
    float_minimum: bool = False
    activations: ActivationGrid | None = None
    flatten: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} is not supported; use 4 or 8")
        if self.group_size is not None and self.group_size <= 0:
            raise ValueError(f"group_size={self.group_size} must be positive")
        if self.group_size is None and self.activations is None:
            raise ValueError("a scale per output channel needs activations; use groups of 32, 64 or 128")
        if self.flatten and (self.activations is None or self.activations.scope != "tensor"):
            raise ValueError("flatten needs activations of scope 'tensor'")
        if self.symmetric and self.float_minimum:
            raise ValueError("a group cannot be symmetric and have float minima")
        if not self.targets:
            raise ValueError("a quantization group needs at least one target")

    @property
    def format(self) -> str:
        """compressed-tensors' name of the form in which the weights are stored."""
        return INT_FORMAT if self.bits == 8 and self.activations is not None else PACK_FORMAT


def _matches(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else name == target


@dataclass(frozen=True)
class Quantization:
    """A model's quantization: groups in file order, and layers left alone."""

    groups: tuple[QuantizationGroup, ...]
    ignore: tuple[str, ...] = ()

    def for_layer(self, name: str) -> QuantizationGroup | None:
        """The group of linear layer `name`; None when it is stored in 16 or 32 bits.

        Exact names win over patterns, patterns over "Linear", as in compressed-tensors.
        """
        if any(_matches(name, target) for target in self.ignore):
            return None
        for is_kind in (
            lambda target: not target.startswith("re:") and target != "Linear",
            lambda target: target.startswith("re:"),
        ):
            for group in self.groups:
                if any(is_kind(target) and _matches(name, target) for target in group.targets):
                    return group
        return next((group for group in self.groups if "Linear" in group.targets), None)


def _arguments(bits: int, strategy: str, **other: Any) -> dict[str, Any]:
    """compressed-tensors' QuantizationArgs."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": bits,
        "observer": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    } | other


def _inputs_dict(group: QuantizationGroup) -> dict[str, Any] | None:
    grid = group.activations
    if grid is None:
        return None
    is_static = grid.scope == "tensor"
    arguments = _arguments(
        grid.bits, grid.scope, dynamic=not is_static, observer="static_minmax" if is_static else None
    )
    return arguments | {"flatten": True} if group.flatten else arguments


def _group_dict(group: QuantizationGroup) -> dict[str, Any]:
    weights = _arguments(
        group.bits,
        "channel" if group.group_size is None else "group",
        group_size=group.group_size,
        observer="memoryless_minmax",
        symmetric=group.symmetric,
        zp_dtype=None if group.symmetric or group.float_minimum else "torch.int8",
    )
    if group.float_minimum:
        weights["minimum"] = "float"
    return {
        "format": group.format,
        "input_activations": _inputs_dict(group),
        "output_activations": None,
        "targets": list(group.targets),
        "weights": weights,
    }


def quantization_config(groups: Sequence[QuantizationGroup], ignore: Sequence[str] = ("lm_head",)) -> dict[str, Any]:
    """The dict for `config["quantization_config"]`, as llmcompressor 0.14 writes it."""
    if not groups:
        raise ValueError("quantization_config needs at least one group; leave the key out of a plain model")
    formats = {group.format for group in groups}
    return {
        "config_groups": {f"group_{index}": _group_dict(group) for index, group in enumerate(groups)},
        "format": formats.pop() if len(formats) == 1 else MIXED_FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS_VERSION,
    }


def _expect(value: object, expected: Sequence[object], where: str) -> None:
    if not any(type(value) is type(item) and value == item for item in expected):  # 4.0 bits are not 4 bits
        supported = ", ".join(repr(item) for item in expected)
        raise FormatError(f"quantization_config.{where}={value!r} is not supported; supported: {supported}")


def _parse_inputs(raw: object, where: str) -> tuple[ActivationGrid | None, bool]:
    """The grid of a group's inputs, and whether they are flattened."""
    if raw is None:
        return None, False
    if not isinstance(raw, Mapping):
        raise FormatError(f"quantization_config.{where}={raw!r} is not an object")
    _expect(raw.get("type", "int"), ("int",), f"{where}.type")
    _expect(raw.get("num_bits"), (4, 8), f"{where}.num_bits")
    _expect(raw.get("symmetric", True), (True,), f"{where}.symmetric")
    _expect(raw.get("strategy"), ("tensor", "token"), f"{where}.strategy")
    _expect(raw.get("group_size"), (None,), f"{where}.group_size")
    _expect(raw.get("actorder"), (None, False), f"{where}.actorder")
    is_token = raw["strategy"] == "token"
    _expect(raw.get("dynamic", False), (is_token,), f"{where}.dynamic")
    _expect(raw.get("flatten"), (None, False) if is_token else (None, False, True), f"{where}.flatten")
    return ActivationGrid(raw["num_bits"], raw["strategy"]), bool(raw.get("flatten"))


def _parse_group_size(weights: Mapping[str, Any], grid: ActivationGrid | None, where: str) -> int | None:
    # Without quantized inputs a scale per output has no use here.
    _expect(weights.get("strategy"), ("group",) if grid is None else ("group", "channel"), f"{where}.strategy")
    size = weights.get("group_size")
    if weights["strategy"] == "channel":
        _expect(size, (None, -1), f"{where}.group_size")
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
        raise FormatError(f"quantization_config.{where}.group_size={size!r} is not a positive integer")
    return size


def _parse_group(key: str, raw: object, default_format: str) -> QuantizationGroup:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("weights"), Mapping):
        raise FormatError(f"quantization_config.config_groups.{key} has no weights")
    weights, where = raw["weights"], f"config_groups.{key}"
    grid, is_flattened = _parse_inputs(raw.get("input_activations"), f"{where}.input_activations")
    _expect(raw.get("output_activations"), (None,), f"{where}.output_activations")
    _expect(weights.get("type", "int"), ("int",), f"{where}.weights.type")
    _expect(weights.get("num_bits"), (4, 8), f"{where}.weights.num_bits")
    _expect(weights.get("dynamic", False), (False,), f"{where}.weights.dynamic")
    _expect(weights.get("actorder"), (None, False, "weight", "static"), f"{where}.weights.actorder")
    _expect(weights.get("minimum"), (None, "float"), f"{where}.weights.minimum")
    size = _parse_group_size(weights, grid, f"{where}.weights")
    targets = raw.get("targets")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise FormatError(f"quantization_config.{where}.targets={targets!r} is not a list of names")
    symmetric, minimum = bool(weights.get("symmetric", True)), weights.get("minimum") == "float"
    group = QuantizationGroup(tuple(targets), weights["num_bits"], size, symmetric, minimum, grid, is_flattened)
    _expect(raw.get("format") or default_format, (group.format,), f"{where}.format")
    return group


def parse_quantization_config(raw: object) -> Quantization:
    """Read what `quantization_config` or llmcompressor wrote.

    Raises FormatError naming the key, its value and what is supported; nothing that would change the numbers is
    skipped (other activation schemes and strategies, transforms, sparsity, quantized KV caches).
    """
    if not isinstance(raw, Mapping):
        raise FormatError(f"quantization_config={raw!r} is not an object")
    _expect(raw.get("quant_method"), (QUANT_METHOD,), "quant_method")
    _expect(raw.get("format"), (PACK_FORMAT, INT_FORMAT, MIXED_FORMAT), "format")
    _expect(raw.get("kv_cache_scheme"), (None,), "kv_cache_scheme")
    _expect(raw.get("quantization_status", "compressed"), ("compressed",), "quantization_status")
    _expect(raw.get("sparsity_config") or {}, ({},), "sparsity_config")
    _expect(raw.get("transform_config") or {}, ({},), "transform_config")
    groups, ignore = raw.get("config_groups"), raw.get("ignore") or []
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("quantization_config.config_groups is missing or empty")
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise FormatError(f"quantization_config.ignore={ignore!r} is not a list of names")
    parsed = tuple(_parse_group(key, group, raw["format"]) for key, group in groups.items())
    for group in parsed:
        _expect(raw["format"], (group.format, MIXED_FORMAT), "format")
    for pattern in (*ignore, *(target for group in parsed for target in group.targets)):
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise FormatError(f"quantization_config: pattern {pattern!r} is not valid: {error}") from error
    return Quantization(parsed, tuple(ignore))
