import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.formats.errors import FormatError
from deploy.formats.safetensors_file import (
    MAX_HEADER_BYTES,
    BFloat16,
    SafetensorsFile,
    from_bfloat16,
    to_bfloat16,
    write_safetensors,
)


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_is_written_loads_with_the_safetensors_package(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {
        "odd": rng.integers(0, 255, (3, 5), dtype=np.uint8),
        "wide": rng.standard_normal((7, 3)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "brain": BFloat16(to_bfloat16(rng.standard_normal((2, 3)).astype(np.float32))),
        "long": np.array([-1, 2**40], dtype=np.int64),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "scalar": np.array(3.5, dtype=np.float32),
        "strided": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    }
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    theirs = safetensors.torch.load_file(path)
    ours = SafetensorsFile(path)
    assert set(theirs) == set(ours.names()) == set(tensors)
    assert ours.metadata == {"format": "pt"}
    for name, value in tensors.items():
        if isinstance(value, BFloat16):
            assert theirs[name].dtype == torch.bfloat16
            assert np.array_equal(theirs[name].view(torch.uint16).numpy(), value.bits)
            assert np.array_equal(ours.array(name), value.bits)
        else:
            assert np.array_equal(theirs[name].numpy(), value)
            assert np.array_equal(ours.array(name), value)
            assert ours.array(name).dtype == value.dtype


def test_what_the_safetensors_package_writes_can_be_read(tmp_path):
    path = tmp_path / "model.safetensors"
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    safetensors.torch.save_file({"a": values, "b": torch.arange(3)}, path)
    with SafetensorsFile(path) as file:
        assert file.dtype("a") == "BF16"
        assert file.shape("a") == (5, 7)
        assert np.array_equal(file.float32("a"), values.float().numpy())
        assert np.array_equal(file.array("b"), [0, 1, 2])


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": np.ones(3, dtype=np.float32), "a": np.zeros(2, dtype=np.int64)}
    write_safetensors(tmp_path / "one", tensors)
    write_safetensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_released_pages_read_the_same_again(tmp_path):
    path = tmp_path / "f"
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    write_safetensors(path, {"small": np.ones(3, np.float32), "x": values})
    with SafetensorsFile(path) as file:
        view = file.array("x")
        file.release("x")
        assert np.array_equal(view, values)
    assert np.array_equal(view, values)


def test_a_closed_file_refuses_to_read(tmp_path):
    write_safetensors(tmp_path / "f", {"x": np.ones(3, np.float32)})
    file = SafetensorsFile(tmp_path / "f")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.array("x")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_to_bfloat16_equals_torchs(patterns):
    bits = np.array(patterns, dtype=np.uint32)
    values = bits.view(np.float32)
    ours = from_bfloat16(to_bfloat16(values))
    theirs = torch.tensor(bits.view(np.int32)).view(torch.float32).to(torch.bfloat16).float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_bfloat16_overflow_is_infinity_and_nan_with_a_low_payload_stays_nan():
    bits = np.array([0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], dtype=np.uint32)
    assert np.array_equal(from_bfloat16(to_bfloat16(bits.view(np.float32))), [np.inf, np.nan, np.nan], equal_nan=True)


REFUSED = {
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, b"\0" * 12, "overlaps"),
    "hole": ({"a": entry(), "b": entry(begin=12, end=20)}, b"\0" * 20, "hole"),
    "truncated": ({"a": entry()}, b"\0" * 4, "truncated"),
    "trailing": ({"a": entry()}, b"\0" * 12, "follow the last"),
    "past the end": ({"a": entry(shape=(2**40,), end=2**42)}, b"\0" * 8, "truncated"),
    "negative": ({"a": entry(begin=-8, end=0)}, b"\0" * 8, "data_offsets"),
    "reversed": ({"a": entry(begin=8, end=0)}, b"\0" * 8, "needs 8"),
    "length": ({"a": entry(end=12)}, b"\0" * 12, "needs 8"),
    "dtype": ({"a": entry(dtype="F4")}, b"\0" * 8, "unsupported dtype 'F4'"),
    "dtype that is a list": ({"a": entry(dtype=["F32"])}, b"\0" * 8, "unsupported dtype"),
    "shape": ({"a": entry(shape=(-2,))}, b"\0" * 8, "shape"),
    "huge shape": ({"a": entry(shape=(2**62, 2**62))}, b"\0" * 8, "needs"),
    "boolean offset": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, b"\0", "data_offsets"),
    "extra key": ({"a": entry() | {"x": 1}}, b"\0" * 8, "exactly"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "array header": ([], b"", "not a JSON object"),
    "duplicate": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b"", "duplicate"),
    "many duplicates": (b"{%s}" % (b'"a":0,"b":0,' * 200_000)[:-1], b"", "duplicate key"),
    "not json": (b"\xff\xfe{", b"", "not valid JSON"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_header_is_refused_by_file_and_reason(tmp_path, case):
    header, data, reason = REFUSED[case]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(FormatError, match=reason) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0", struct.pack("<Q", 50) + b"{}"])
def test_a_truncated_file_is_refused(tmp_path, content):
    path = tmp_path / "short"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="truncated"):
        SafetensorsFile(path)


def test_an_oversized_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "big"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(FormatError, match="exceeds"):
        SafetensorsFile(path)


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="complex"):
        write_safetensors(tmp_path / "f", {"x": np.zeros(2, dtype=np.complex64)})
    with pytest.raises(OSError):
        write_safetensors(tmp_path / "nowhere" / "f", {"x": np.zeros(2, dtype=np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_integers_are_not_taken_for_floats(tmp_path):
    write_safetensors(tmp_path / "f", {"x": np.zeros(2, dtype=np.int32)})
    with pytest.raises(FormatError, match="I32"):
        SafetensorsFile(tmp_path / "f").float32("x")
