"""The operators of `fp8_linear`: rounding to float8, and products of float8 matrices.

On a GPU the kernels of `fp8_triton` round and torch._scaled_mm multiplies. Elsewhere torch
rounds, and float8 numbers are multiplied as fp32 ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.quantised import fp8_triton
from kernels.runtime.autograd import accumulation_dtype
from kernels.runtime.operators import operator

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-126  # a scale: its reciprocal is finite
Triple = tuple[Tensor, Tensor, Tensor]


def scale_of(x: Tensor, dtype: torch.dtype, dims: int | None) -> Tensor:
    """The largest magnitude of x / the largest number of dtype, or 1 if x is zero: fp32, over
    the whole of x (dims None) or over one dimension, which is kept."""
    size = x.detach().abs().float()
    amax = size.amax() if dims is None else size.amax(dims, keepdim=True)
    # Divides by a tensor: for a number, a GPU multiplies by its reciprocal, and an error in the
    # last bit of a scale rounds ties the other way (5.25 / 448 has two bits: ties are frequent).
    scale = amax / amax.new_full((), fp8_triton.LARGEST[dtype])
    scale = torch.where(scale < SMALLEST, SMALLEST, scale)  # NaN is not less
    return torch.where(amax == 0, 1.0, scale)


def round_to(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.float() * scale.reciprocal()).to(dtype)


def widen(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = accumulation_dtype(dtype)
    return (codes.to(wide) * scale.to(wide)).to(dtype)


# Rounding, an operator: a compiler may merge equal calls. Outputs that are not wanted are empty.


def _quantize_fake(x: Tensor, scaling: str, turned: bool, **_: Any) -> Triple:
    rows, cols = x.shape
    across = (cols, up16(rows)) if turned else (0, 0)
    scale = x.new_empty(() if scaling == "tensor" else (rows, 1), dtype=torch.float32)
    return _codes(x, rows, cols), _codes(x, *across), scale


@operator("fp8_quantize", fake=_quantize_fake)
def quantize(x: Tensor, scaling: str, turned: bool, triton: bool) -> Triple:
    """x [R, C] in e4m3: codes [R, C], their transpose [C, R up to a multiple of 16], scale."""
    return _quantize(x, E4M3, scaling, triton, turned=turned)


def _quantize_backward_fake(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scaling: str,
    needs_input: bool,
    needs_weight: bool,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, outs), inner = grad.shape, weight.shape[1]
    tensor = scaling == "tensor"
    straight = (rows, outs) if needs_input else (0, 0)
    across = (outs, up16(rows)) if needs_weight and tensor else (0, 0)
    weights = (inner, outs) if needs_input else (0, 0)
    scales = (1, inner) if needs_input and not tensor else (0,)
    return (
        _codes(grad, *straight, dtype=E5M2),
        _codes(grad, *across, dtype=E5M2),
        grad.new_empty(() if tensor else (rows, 1), dtype=torch.float32),
        _codes(weight, *weights),
        weight_scale.new_empty(scales),
    )


@operator("fp8_quantize_backward", fake=_quantize_backward_fake)
def quantize_backward(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    scaling: str,
    needs_input: bool,
    needs_weight: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient [R, O] in e5m2, its transpose and scale; the transposed weight [I, O] in e4m3
    and its scales (empty for "tensor": the given one holds).

    One operator, so that the copy of the weight depends on the gradient: otherwise a compiler could
    make it in forward, and keep it.
    """
    straight, turned = needs_input, needs_weight and scaling == "tensor"
    codes, across, scale = _quantize(grad, E5M2, scaling, triton, straight=straight, turned=turned)
    weights, weight_scales = _codes(weight, 0, 0), weight_scale.new_empty(0)
    if needs_input:
        given = weight_scale if scaling == "tensor" else None
        by = "tensor" if scaling == "tensor" else "column"
        _, weights, weight_scales = _quantize(
            weight, E4M3, by, triton, straight=False, turned=True, given=given
        )
    return codes, across, scale, weights, weight_scales


def _codes(x: Tensor, *shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


def up16(n: int) -> int:
    return -(-n // 16) * 16


def _quantize(
    x: Tensor,
    dtype: torch.dtype,
    scaling: str,
    triton: bool,
    *,
    straight: bool = True,
    turned: bool = False,
    given: Tensor | None = None,
) -> Triple:
    """Codes of x, their transpose, and the scale unless it is given.

    scaling: "tensor", "row" (straight codes only) or "column" (transposed ones only).
    """
    x = x.contiguous()
    codes: Tensor | None = None
    across: Tensor | None = None
    scale: Tensor | None = None
    if not triton or x.numel() == 0:
        codes, across, scale = _quantize_torch(x, dtype, scaling, turned, given)
    elif scaling == "tensor":
        codes, across, scale = fp8_triton.quantize(x, dtype, straight, turned, given)
    elif scaling == "column":
        across, scale = fp8_triton.quantize_columns(x, dtype)
    else:
        codes, scale = fp8_triton.quantize_rows(x, dtype)
    empty = _codes(x, 0, 0, dtype=dtype)
    return (
        codes if codes is not None and straight else empty,
        empty if across is None else across,
        x.new_empty(0, dtype=torch.float32) if scale is None else scale,
    )


def _quantize_torch(
    x: Tensor, dtype: torch.dtype, scaling: str, turned: bool, given: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dims = {"tensor": None, "row": 1, "column": 0}[scaling]
    scale = given
    if scale is None:
        shape = [1 if dims is not None and i == dims else n for i, n in enumerate(x.shape)]
        empty = torch.ones([] if dims is None else shape, device=x.device)
        scale = scale_of(x, dtype, dims) if x.numel() else empty
    codes, across = round_to(x, scale, dtype), None
    if turned:  # as bytes, since few operations know float8
        padding = (0, up16(x.shape[0]) - x.shape[0])
        across = F.pad(codes.view(torch.uint8).t(), padding).contiguous().view(dtype)
    return codes, across, scale if given is None else None


# Products


def product(
    a: Tensor,  # [M, K] float8
    b: Tensor,  # [N, K] float8: torch._scaled_mm wants the summed dimension contiguous in both
    a_scale: Tensor,  # scalar, or [M, 1]
    b_scale: Tensor,  # scalar, or [1, N]
    dtype: torch.dtype,
    fast: bool,
    triton: bool,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """a b^T + bias [M, N] in dtype. torch 2.11 needs K and N to be multiples of 16.

    fast: sums stay in the accumulators of the tensor cores, which keep about 14 bits of mantissa on
    Hopper (arXiv 2412.19437), instead of moving to fp32 registers every few instructions. That is
    enough for the forward: e4m3 keeps 4 bits. Gradients are sums over thousands of outputs or
    tokens, with cancellation, and their errors add up in the weights.
    """
    if triton and a.is_cuda and 0 not in (*a.shape, *b.shape):
        fused = bias is not None and dtype != torch.float32  # what cuBLAS adds
        y = torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_scale,
            scale_b=b_scale,
            bias=bias.to(dtype) if bias is not None and fused else None,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        return y if bias is None or fused else y + bias.to(dtype)
    wide = accumulation_dtype(dtype)
    y = (a.to(wide) @ b.to(wide).t()) * a_scale * b_scale
    return (y if bias is None else y + bias.to(wide)).to(dtype)
