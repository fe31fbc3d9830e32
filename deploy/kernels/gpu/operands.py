"""Checks that the linear kernels share: a wrong shape would read foreign memory."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_TYPES = (torch.float16, torch.bfloat16)
OUT_TYPES = (*HALF_TYPES, torch.float32)


def check_input(x: Tensor, num_in: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless x is contiguous, [rows >= 1, num_in] and of one of `dtypes`."""
    if x.dim() != 2 or x.shape[0] == 0 or x.shape[1] != num_in:
        raise ValueError(f"x has shape {list(x.shape)}; the layer reads [rows, {num_in}] of at least one row")
    if x.dtype not in dtypes:
        raise ValueError(f"x is {x.dtype}; use {' or '.join(str(dtype) for dtype in dtypes)}")
    if not x.is_contiguous():
        raise ValueError(f"x of shape {list(x.shape)} has strides {x.stride()}; make it contiguous")


def output_for(x: Tensor, num_out: int, out: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`out` where it fits (ValueError where not), or a new tensor [rows, num_out] of `out_dtype`."""
    if out_dtype not in OUT_TYPES:
        raise ValueError(f"out_dtype={out_dtype} is not supported; use {' or '.join(map(str, OUT_TYPES))}")
    shape = (x.shape[0], num_out)
    if out is None:
        return torch.empty(shape, dtype=out_dtype, device=x.device)
    if tuple(out.shape) != shape or out.dtype != out_dtype or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}; this call writes contiguous {out_dtype} "
            f"{list(shape)} on {x.device}"
        )
    return out


def resolve_dtype(x: Tensor, out: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """What is written: `out_dtype` where given, else the type of `out`, else that of x."""
    return out_dtype or (out.dtype if out is not None else x.dtype)


def check_static_scale(scale: Tensor) -> None:
    """Raise ValueError unless `scale` is one number in fp32."""
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}; a static scale is one float32")


def check_bias(bias: Tensor | None, num_out: int) -> None:
    """Raise ValueError unless bias, where there is one, is contiguous and [num_out]."""
    if bias is not None and (tuple(bias.shape) != (num_out,) or not bias.is_contiguous()):
        raise ValueError(f"bias has shape {list(bias.shape)}; the layer writes {num_out} outputs")
