"""A GGUF's own grids as ours: `keep` takes a file's 4-bit codes as they are, `q4_0` makes llama.cpp's from floats.

Block layouts are ggml's (`ggml-common.h`): Q4_0 {half d; 16 bytes}, Q4_1 {half d; half m; 16 bytes}, Q8_0 {half d; 32
bytes}, Q4_K {half d; half dmin; 12 bytes of 6-bit scales and minima; 128 bytes}. In the 4-bit types a byte holds two
values half a block apart.
"""

from collections.abc import Callable, Iterable

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K, quantize

from compress.grids import QuantizedLayers
from compress.target.gguf_source import FULL_PRECISION, GgufFile, GgufTensor, hugging_face_names, row_order
from compress.target.gguf_source import unpermute_rows as unpermute
from deploy.formats.packed import GroupedInt
from deploy.formats.safetensors_file import from_bfloat16, to_bfloat16

GROUP = 32
LOSSY_REGRID = "no 4-bit grid in the file, to int8 groups of 32"


def keep(file: GgufFile, layer_names: Iterable[str], num_layers: int) -> QuantizedLayers:
    """The file's own grid for every linear layer: 4-bit types code for code, Q8_0 too, other types to int8.

    layer_names: Hugging Face module names. Layers in full precision are left out: like the embedding, whatever its
    type, they are written in bfloat16 (compress/write.py), to which F16, F32 and a Q8_0 embedding are rounded.
    5- and 6-bit types have no form here that holds them exactly; they are rounded to int8 and counted as a fallback.
    """
    names = hugging_face_names(file, num_layers)
    result = QuantizedLayers({})
    for layer in layer_names:
        tensor = file.tensor(names[f"{layer}.weight"])
        if tensor.kind.name in FULL_PRECISION:
            continue
        if tensor.kind not in _EXACT:
            result.fallbacks.setdefault(LOSSY_REGRID, []).append(layer)
        weight = _EXACT.get(tensor.kind, _to_int8)(tensor)
        num_heads = row_order(file, f"{layer}.weight")
        result.layers[layer] = weight if num_heads is None else _unpermuted(weight, num_heads)
    return result


def q4_0(weight: np.ndarray) -> GroupedInt:
    """llama.cpp's Q4_0 of a float32 matrix [out, in]: groups of 32, the signed extreme at code 0, scale in fp16."""
    blocks = quantize(np.ascontiguousarray(weight, dtype=np.float32), Kind.Q4_0)
    return _from_q4_0(GgufTensor("", Kind.Q4_0, weight.shape, blocks))


def _from_q4_0(tensor: GgufTensor) -> GroupedInt:
    halves, codes = _blocks(tensor, num_halves=1, num_bytes=16)
    return GroupedInt.from_zero_point(_nibbles(codes, tensor), halves[..., 0], 8, bits=4, group_size=GROUP)


def _from_q4_1(tensor: GgufTensor) -> GroupedInt:
    halves, codes = _blocks(tensor, num_halves=2, num_bytes=16)
    return GroupedInt(_nibbles(codes, tensor), halves[..., 0].copy(), halves[..., 1].copy(), 4, GROUP)


def _from_q8_0(tensor: GgufTensor) -> GroupedInt:
    halves, codes = _blocks(tensor, num_halves=1, num_bytes=32)
    unsigned = (codes.view(np.int8).astype(np.int16) + 128).astype(np.uint8).reshape(tensor.shape)
    return GroupedInt.from_zero_point(unsigned, halves[..., 0], 128, bits=8, group_size=GROUP)


def _from_q4_k(tensor: GgufTensor) -> GroupedInt:
    num_rows, num_columns = tensor.shape
    blocks = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1, 144)
    halves = blocks[:, :4].copy().view(np.float16).astype(np.float32)
    scales, minima = Q4_K.get_scale_min(blocks[:, 4:16])
    shape = (num_rows, num_columns // GROUP)
    scale = (halves[:, :1] * scales.reshape(-1, 8).astype(np.float32)).reshape(shape)
    minimum = -(halves[:, 1:] * minima.reshape(-1, 8).astype(np.float32)).reshape(shape)
    packed = blocks[:, 16:].reshape(-1, 4, 32)
    codes = np.stack([packed & 0x0F, packed >> 4], axis=2).reshape(num_rows, num_columns)
    return GroupedInt(codes, scale, minimum, 4, GROUP)


def _to_int8(tensor: GgufTensor) -> GroupedInt:
    """Symmetric int8 of the dequantized values: scale = max|w|/127 per group, rounded to bfloat16 first."""
    values = tensor.float32().reshape(tensor.shape[0], -1, GROUP)
    scale = from_bfloat16(to_bfloat16(np.abs(values).max(-1) / np.float32(127)))
    safe = np.where(scale == 0, np.float32(1), scale)[..., None]
    codes = (np.clip(np.rint(values / safe), -127, 127) + 128).astype(np.uint8).reshape(tensor.shape)
    return GroupedInt.from_zero_point(codes, scale, 128, bits=8, group_size=GROUP)


_EXACT: dict[Kind, Callable[[GgufTensor], GroupedInt]] = {
    Kind.Q4_0: _from_q4_0,
    Kind.Q4_1: _from_q4_1,
    Kind.Q8_0: _from_q8_0,
    Kind.Q4_K: _from_q4_k,
}


def _blocks(tensor: GgufTensor, *, num_halves: int, num_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """(fp16 header values as float32 [out, groups, num_halves], code bytes [out, groups, num_bytes])."""
    num_rows, num_columns = tensor.shape
    shape = (num_rows, num_columns // GROUP, 2 * num_halves + num_bytes)
    raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(shape)
    halves = raw[..., : 2 * num_halves].copy().view(np.float16).astype(np.float32)
    return halves, np.ascontiguousarray(raw[..., 2 * num_halves :])


def _nibbles(codes: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    return np.concatenate([codes & 0x0F, codes >> 4], axis=-1).reshape(tensor.shape)


def _unpermuted(weight: GroupedInt, num_heads: int) -> GroupedInt:
    zeros = None if weight.zero_point is None else unpermute(weight.zero_point, num_heads)
    return GroupedInt(
        unpermute(weight.q, num_heads),
        unpermute(weight.scale, num_heads),
        unpermute(weight.minimum, num_heads),
        weight.bits,
        weight.group_size,
        zeros,
    )
