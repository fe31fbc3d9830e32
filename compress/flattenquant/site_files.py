"""What sites can have, kept on disk: one file a site, so that measuring can stop anywhere and be read many times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.flattenquant.choice import BITS, SiteOptions
from compress.flattenquant.flatten import counts_of, flatten_index
from compress.flattenquant.splits import Split
from deploy.formats.safetensors_file import SafetensorsFile, write_safetensors


def site_file(directory: Path, first: str) -> Path:
    """The file of the site whose first layer is the module `first`."""
    return directory / f"{first}.safetensors"


def write_options(path: Path, options: SiteOptions) -> None:
    """A half-written file never has that name."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for bits in BITS:
        split = options.splits[bits]
        tensors[f"counts_{bits}"] = counts_of(split.index).numpy().astype(np.int32)
        tensors[f"threshold_{bits}"] = np.array([split.threshold])
        tensors[f"error_{bits}"] = np.array([options.errors[bits]])
    write_safetensors(path, tensors)


def read_options(path: Path) -> SiteOptions:
    """What `write_options` wrote, in every bit."""
    splits, errors = {}, {}
    with SafetensorsFile(path) as file:
        for bits in BITS:
            counts = torch.from_numpy(file.array(f"counts_{bits}").astype(np.int64))
            splits[bits] = Split(flatten_index(counts), float(file.array(f"threshold_{bits}")[0]))
            errors[bits] = float(file.array(f"error_{bits}")[0])
    return SiteOptions(splits, errors)
