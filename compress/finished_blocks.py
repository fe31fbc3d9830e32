"""Layers that a pass of GPTQ has finished, on disk block by block, so that an interrupted pass goes on behind them.

A block's layers are kept together: while it is calibrated all of them are unquantized, so half a block would change
what the other half sees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from compress.recipes import codes_of, grid_of
from deploy.formats.safetensors_file import SafetensorsFile, write_safetensors

CODES = "codes"
Notes = dict[str, Any]
"""JSON values."""


def write_block(directory: Path, layers: Mapping[str, nn.Linear], notes: Mapping[str, Notes]) -> None:
    """A file for these quantized layers; a half-written one never has its name. notes: by layer, given back later."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, layer in layers.items():
        tensors[f"{name}/{CODES}"] = codes_of(layer)
        tensors |= {f"{name}/{key}": value.detach().numpy() for key, value in _grid_parameters(layer).items()}
    metadata = {name: json.dumps(notes[name]) for name in layers}
    write_safetensors(directory / f"{next(iter(layers))}.safetensors", tensors, metadata)


def restore_blocks(directory: Path, layers: Mapping[str, nn.Linear]) -> dict[str, Notes]:
    """Quantizes those of `layers` that `directory` has as they were, in every bit. Returns their notes by name."""
    notes = {}
    for path in sorted(directory.glob("*.safetensors")):
        with SafetensorsFile(path) as file:
            for name, told in file.metadata.items():
                _restore(layers[name], file, name)
                notes[name] = json.loads(told)
    return notes


def _restore(layer: nn.Linear, file: SafetensorsFile, name: str) -> None:
    for key, parameter in _grid_parameters(layer).items():
        parameter.data.copy_(torch.from_numpy(file.array(f"{name}/{key}").copy()))
    codes = file.array(f"{name}/{CODES}")
    layer.weight.data.copy_(torch.from_numpy(grid_of(layer, codes).dequantize()))


def _grid_parameters(layer: nn.Linear) -> dict[str, nn.Parameter]:
    """Scales and zero points of its weight and, where they are static, its inputs."""
    return {key: value for key, value in layer.named_parameters(recurse=False) if key not in ("weight", "bias")}
