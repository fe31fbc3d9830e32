"""Options of sites as files."""

from pathlib import Path

import torch

from compress.flattenquant.choice import SiteOptions
from compress.flattenquant.flatten import flatten_index
from compress.flattenquant.site_files import read_options, site_file, write_options
from compress.flattenquant.splits import Split


def test_what_is_read_is_what_was_written_in_every_bit(tmp_path: Path) -> None:
    splits = {
        4: Split(flatten_index(torch.tensor([3, 1, 0, 2])), 1 / 3),
        8: Split(flatten_index(torch.tensor([1, 1, 1, 1])), 0.1 + 0.2),
    }
    options = SiteOptions(splits, {4: 2 / 3, 8: 1e-300})
    path = site_file(tmp_path, "model.layers.10.mlp.down_proj")
    write_options(path, options)
    found = read_options(path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.layers.10.mlp.down_proj.safetensors"]
    assert found.errors == options.errors
    for bits, split in splits.items():
        assert torch.equal(found.splits[bits].index, split.index)
        assert found.splits[bits].index.dtype == split.index.dtype
        assert found.splits[bits].threshold == split.threshold
