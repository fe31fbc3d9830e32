"""Opening a GGUF file: what it says about itself, and what damaged files are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from compress.target.gguf_source import GgufFile, unpermute_rows
from compress.target.sources import find_source


def test_precision_counts_elements_by_type_and_bits_by_bytes(tiny: Any, tmp_path: Path) -> None:
    model = tiny.Gguf(kinds={"q_proj": Kind.Q4_0, "down_proj": Kind.Q4_1})
    found = GgufFile(model.write(tmp_path / "model.gguf")).precision()
    num_q4_0, num_q4_1 = 2 * 96 * 96, 2 * 96 * 160
    total = sum(values.size for values in model.shape.tensors().values())
    rest = total - num_q4_0 - num_q4_1
    assert found["elements_by_type"] == {"F32": rest, "Q4_0": num_q4_0, "Q4_1": num_q4_1}
    assert found["bits_per_weight"] == pytest.approx((32 * rest + 4.5 * num_q4_0 + 5 * num_q4_1) / total)
    assert found["lossy"] is True


def test_sixteen_bit_files_are_not_lossy(tiny: Any, tmp_path: Path) -> None:
    path = tiny.Gguf(kinds={"q_proj": Kind.F16, "k_proj": Kind.BF16}).write(tmp_path / "model.gguf")
    assert GgufFile(path).precision()["lossy"] is False


def test_unpermuting_undoes_the_order_that_llama_cpp_writes(tiny: Any) -> None:
    shape = tiny.Shape(heads=3, kv_heads=3, head_dim=10)
    rows = np.random.default_rng(4).standard_normal((30, 7))
    stored = tiny.to_gguf_order(shape, "x.q_proj.weight", rows)
    assert not np.array_equal(stored, rows)
    np.testing.assert_array_equal(unpermute_rows(stored, 3), rows)


def test_a_file_cut_anywhere_is_one_sentence_naming_the_path(tiny: Any, tmp_path: Path) -> None:
    content = tiny.Gguf(kinds={"q_proj": Kind.Q4_0}).write(tmp_path / "whole.gguf").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "cut.gguf"
    for size in [4, 5, 8, 23, 24, 25, 40, *sorted(rng.integers(41, len(content) - 64, 40).tolist())]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"^target\.path=.*cut\.gguf is not a complete GGUF file .*again$"):
            GgufFile(path)


def test_another_magic_is_refused_when_the_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(60))
    with pytest.raises(ValueError, match=r"target\.path=.*is not a GGUF file \(wrong magic\)"):
        find_source("gguf", str(path), None, None)


def test_an_architecture_without_support_is_named_with_those_that_have_it(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = tiny.Gguf().write(path).read_bytes()
    path.write_bytes(content.replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match=r"target\.path=.*'mamba'; supported: llama, qwen2, qwen3"):
        GgufFile(path)
