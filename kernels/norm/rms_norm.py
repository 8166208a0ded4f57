"""RMSNorm over the last dimension, with or without a residual add.

On a GPU the kernels of `rms_norm_triton` run, elsewhere torch, in few passes over memory.
Statistics are fp32. Backward keeps x (with a residual, only the sum) and one statistic per row,
never an fp32 copy of x.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.norm import rms_norm_triton
from kernels.runtime.autograd import (
    Dims,
    Op,
    Tensors,
    accumulation_dtype,
    check_floating,
    fold_rows,
    run,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import empty, operator

declare("rms_norm", TRITON, TORCH)


# References: plain torch, differentiable to any order


def rms_norm_reference(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """What `rms_norm` computes."""
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(dtype)
    return y.to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor]:
    """What `add_rms_norm` computes."""
    total = x + residual
    return rms_norm_reference(total, weight, eps=eps), total


# RMSNorm: y = x r w with r = (mean x^2 + eps)^-1/2


def _rms_forward(
    x: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = x.to(accumulation_dtype(x.dtype)).contiguous()  # and so is y, as from torch's norms
    r = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1] + eps)
    y = wide * r
    if weight is not None:
        y *= weight.to(y.dtype)
    return y.to(x.dtype), (r,)


def _rms_backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """dx = r g w - x r^3 mean(g w x), dw = sum over rows of g x r."""
    (x, weight), (r,) = tensors, residuals
    dx, dw = _rms_backward_wide(grad, x, weight, r, needs[1])
    return dx.to(x.dtype), dw


def _rms_backward_wide(
    grad: Tensor, x: Tensor, weight: Tensor | None, r: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx before rounding, and dw."""
    wide, g = x.to(r.dtype), grad.to(r.dtype)
    gx = g * wide
    if weight is None:
        dot, scaled = gx.sum(-1, keepdim=True), g * r
    else:
        w = weight.to(r.dtype)
        dot, scaled = (gx @ w).unsqueeze(-1), g * w * r
    dx = torch.addcmul(scaled, wide, r.pow(3) * dot, value=-1.0 / x.shape[-1])
    dw = None
    if weight is not None and needs_weight:
        rows = gx.reshape(-1, x.shape[-1])
        dw = (rows.t() @ r.reshape(-1)).to(weight.dtype)
    return dx, dw


def fold_norm(batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples become further rows if they share weight and bias."""
    (x, *leaves), (dim, *others) = tensors, dims
    if x is None or dim is None or any(other is not None for other in others):
        return None
    return (x.movedim(dim, 0), *leaves)


def fake_leaf(x: Tensor, leaf: Tensor | None, needs: bool) -> Tensor:
    return empty(x) if leaf is None or not needs else empty(leaf, True)


def fake_statistic(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_fake(x: Tensor, residual: Tensor | None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x, True), empty(x, residual is not None), fake_statistic(x)


def _rms_backward_fake(
    x: Tensor, weight: Tensor | None, needs_weight: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    return empty(x, True), fake_leaf(x, weight, needs_weight)


_rms_op = operator("rms_norm", fake=_rms_fake)(rms_norm_triton.rms_norm_forward)
_rms_backward_op = operator("rms_norm_backward", fake=_rms_backward_fake)(
    rms_norm_triton.rms_norm_backward
)


def _rms_forward_triton(
    x: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, _, r = _rms_op(x, None, weight, eps)
    return y, (r,)


def _rms_backward_triton(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    return _rms_backward_op(grad, None, *tensors, *residuals, needs[1])


RMS_NORM = Op(
    "rms_norm", rms_norm_reference, _rms_forward, _rms_backward, fold=fold_norm, vmappable=True
)
RMS_NORM_TRITON = Op(
    "rms_norm", rms_norm_reference, _rms_forward_triton, _rms_backward_triton, fold=fold_norm
)


@allow_in_graph
def _apply_rms_norm(x: Tensor, weight: Tensor | None, eps: float, triton: bool) -> Tensor:
    return run(RMS_NORM_TRITON if triton else RMS_NORM, x, weight, eps=eps)


# RMSNorm of a sum (`Op.of_sum`). Backward keeps neither x nor the residual, only their sum, which
# lives on as the residual stream.


def _total_formula(total: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm_reference(total, weight, eps=eps), total


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    total = x + residual
    normed, statistics = _rms_forward(total, weight, eps=eps)
    return (normed, total), statistics


def _add_backward(
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    (grad, grad_total), (total, weight), (r,) = grads, tensors, residuals
    dx, dw = _rms_backward_wide(grad, total, weight, r, needs[1])
    return (dx + grad_total).to(total.dtype), dw


def _add_forward_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, *, eps: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    normed, total, r = _rms_op(x, residual, weight, eps)
    return (normed, total), (r,)


def _add_backward_triton(
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor | None],
    residuals: tuple[Tensor, ...],
    *,
    eps: float,
) -> tuple[Tensor | None, ...]:
    return _rms_backward_op(*grads, *tensors, *residuals, needs[1])


ADD_RMS_NORM = Op(
    "add_rms_norm",
    _total_formula,
    _add_forward,
    _add_backward,
    outputs=2,
    of_sum=True,
    fold=partial(fold_rows, 2),
    vmappable=True,
)
ADD_RMS_NORM_TRITON = replace(
    ADD_RMS_NORM, forward=_add_forward_triton, backward=_add_backward_triton, vmappable=False
)


@allow_in_graph
def _apply_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, triton: bool
) -> tuple[Tensor, Tensor]:
    op = ADD_RMS_NORM_TRITON if triton else ADD_RMS_NORM
    return run(op, x, residual, weight, eps=eps)


# Public


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467).

    Statistics and arithmetic are fp32 (fp64 for fp64 x), rounded once at the end.

    Args:
        x: [..., D], any floating dtype.
        weight: [D], any floating dtype (fp32 with a bf16 x is fine), or None for 1.

    Returns:
        [..., D] in x.dtype.

    Raises:
        ValueError: a weight that is not [D], a dtype that is not floating point, two devices.

    >>> import torch
    >>> rms_norm(torch.tensor([3.0, 4.0]), eps=0.0).square().mean().item()
    1.0
    """
    check_norm("rms_norm", x, eps, weight=weight)
    triton = choose("rms_norm", str(x.device), x.dtype) == "triton"
    return _apply_rms_norm(x, weight, eps, triton)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of a residual stream and its update: (norm(x + residual), x + residual).

    The sum is rounded once, to x.dtype, before the norm. Each direction is one pass over memory;
    backward keeps the sum and one fp32 number per row instead of x and residual.

    Args:
        x, residual: [..., D], of one floating dtype.
        weight: [D], any floating dtype, or None for 1.

    Returns:
        (normed, total), both [..., D] in x.dtype.

    Raises:
        ValueError: as `rms_norm`; x and residual that differ in shape or dtype.

    >>> import torch
    >>> normed, total = add_rms_norm(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]))
    >>> total
    tensor([3., 4.])
    """
    check_norm("add_rms_norm", x, eps, weight=weight)
    check_floating("add_rms_norm", x=x, residual=residual)
    check_residual("add_rms_norm", x, residual)
    triton = choose("rms_norm", str(x.device), x.dtype) == "triton"
    return _apply_add_rms_norm(x, residual, weight, eps, triton)


def check_norm(where: str, x: Tensor, eps: float, **leaves: Tensor | None) -> None:
    check_floating(where, x=x, **leaves)
    if x.ndim == 0:
        raise ValueError(f"{where}: x must have at least one dimension, got a scalar.")
    if eps < 0.0:
        raise ValueError(f"{where}: eps must be >= 0, got {eps}.")
    for name, leaf in leaves.items():
        if leaf is not None and tuple(leaf.shape) != (x.shape[-1],):
            raise ValueError(
                f"{where}: {name} must have shape [{x.shape[-1]}] to match x {tuple(x.shape)}, "
                f"got {tuple(leaf.shape)}."
            )


def check_residual(where: str, x: Tensor, residual: Tensor | None) -> None:
    """ValueError unless the two may be added without a cast."""
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ValueError(
            f"{where}: x is {tuple(x.shape)} {x.dtype} but residual is "
            f"{tuple(residual.shape)} {residual.dtype}; they must be alike."
        )
