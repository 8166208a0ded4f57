# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `layer_norm`: rows that stay in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.norm.rows_triton import (
    backward_config,
    first_row,
    flatten,
    forward_config,
    leaf,
    programs_for,
    read,
    share,
    statistic,
    sums,
    tile_constants,
    turns,
    write,
)
from kernels.runtime.launch import jit, launch, tl
from kernels.runtime.operators import empty

MAX_DIM = 8192  # longer rows do not fit into registers, and no model has them


@jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    r_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = c r w + b with c = x - mean x and r = (mean c^2 + eps)^-1/2."""
    cols = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        w = leaf(weight_ptr, cols, DIM)
    if bias_ptr is not None:
        b = leaf(bias_ptr, cols, DIM)
    for turn in tl.range(0, turns(rows, ROWS), num_stages=STAGES):
        row = first_row(turn, ROWS)
        x = read(x_ptr, row, cols, rows, X_STRIDE, DIM, WHOLE, "")
        mean = tl.sum(x, 1) * (1.0 / DIM)
        c = x - mean[:, None]
        if DIM < BLOCK:
            c = tl.where((cols < DIM)[None, :], c, 0.0)
        r = tl.rsqrt(tl.sum(c * c, 1) * (1.0 / DIM) + eps)
        tl.store(mean_ptr + row, mean, mask=row < rows)
        tl.store(r_ptr + row, r, mask=row < rows)
        y = c * r[:, None]
        if weight_ptr is not None:
            y *= w
        if bias_ptr is not None:
            y += b
        write(y_ptr, row, cols, rows, y, DIM, WHOLE)


@jit
def layer_norm_backward_kernel(
    grad_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    r_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    GRAD_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With u = c r and v = g w: dx = r (v - mean v - u mean(v u)).

    dw_ptr, db_ptr: partial sums of g u and of g, or None.
    """
    cols = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        w = leaf(weight_ptr, cols, DIM)
    if dw_ptr is not None:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    if db_ptr is not None:
        db = tl.zeros([ROWS, BLOCK], tl.float32)
    for turn in tl.range(0, turns(rows, ROWS), num_stages=STAGES):
        row = first_row(turn, ROWS)
        x = read(x_ptr, row, cols, rows, X_STRIDE, DIM, WHOLE, "evict_first")
        g = read(grad_ptr, row, cols, rows, GRAD_STRIDE, DIM, WHOLE, "evict_first")
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)[:, None]
        u = (x - mean) * r  # not 0 beyond DIM, but v and g are
        v = g
        if weight_ptr is not None:
            v = g * w
        mean_v = tl.sum(v, 1)[:, None] * (1.0 / DIM)
        mean_vu = tl.sum(v * u, 1)[:, None] * (1.0 / DIM)
        write(dx_ptr, row, cols, rows, (v - mean_v - u * mean_vu) * r, DIM, WHOLE)
        if dw_ptr is not None:
            dw += g * u
        if db_ptr is not None:
            db += g
    if dw_ptr is not None:
        share(dw_ptr, cols, dw, DIM)
    if db_ptr is not None:
        share(db_ptr, cols, db, DIM)


# Host


def layer_norm_forward(
    x: Tensor,  # [..., D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] in x.dtype; mean and r [..., 1] in fp32."""
    config = forward_config(x)
    y, mean, r = x.new_empty(x.shape), statistic(x), statistic(x)
    flat = flatten(x)
    launch(
        layer_norm_forward_kernel,
        (programs_for(flat, config),),
        flat,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        mean,
        r,
        flat.shape[0],
        eps,
        num_warps=config.warps,
        X_STRIDE=flat.stride(0),
        **tile_constants(flat, config),
    )
    return y, mean, r


def layer_norm_backward(
    grad: Tensor,  # [..., D]
    x: Tensor,  # [..., D]
    weight: Tensor | None,  # [D]
    bias: Tensor | None,  # [D]
    mean: Tensor,  # [..., 1]
    r: Tensor,  # [..., 1]
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., D] in x.dtype, and dw and db [D] in their dtypes (empty if not needed)."""
    config = backward_config(x)
    dx = x.new_empty(x.shape)
    flat, grads = flatten(x), flatten(grad)
    programs = programs_for(flat, config)
    weighted, biased = needs_weight and weight is not None, needs_bias and bias is not None
    wanted = [x for x, want in ((weight, weighted), (bias, biased)) if want]
    partials = x.new_empty((len(wanted), programs, x.shape[-1]), dtype=torch.float32)
    launch(
        layer_norm_backward_kernel,
        (programs,),
        grads,
        flat,
        None if weight is None else weight.contiguous(),
        mean,
        r,
        dx,
        partials[0] if weighted else None,
        partials[-1] if biased else None,
        flat.shape[0],
        num_warps=config.warps,
        GRAD_STRIDE=grads.stride(0),
        X_STRIDE=flat.stride(0),
        **tile_constants(flat, config),
    )
    summed = sums(partials, *wanted) if wanted else []
    return dx, summed[0] if weighted else empty(x), summed[-1] if biased else empty(x)
