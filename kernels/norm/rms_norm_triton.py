# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `rms_norm` and `add_rms_norm`: rows that stay in registers."""

from __future__ import annotations

from typing import Any

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

MAX_DIM = 8192  # registers hold three rows: x, its gradient and the weight's gradient
MAX_FORWARD_DIM = 16384


# Pieces


@jit
def _piece(ptr, cols, DIM: tl.constexpr, KEEP: tl.constexpr):
    """Part of one row in fp32; 0 beyond DIM."""
    return tl.load(ptr + cols, mask=cols < DIM, other=0.0, eviction_policy=KEEP).to(tl.float32)


# Kernels


@jit
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    r_ptr,
    rows,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x r w with r = (mean x^2 + eps)^-1/2, where x includes the residual, rounded."""
    cols = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        w = leaf(weight_ptr, cols, DIM)
    for turn in tl.range(0, turns(rows, ROWS), num_stages=STAGES):
        row = first_row(turn, ROWS)
        x = read(x_ptr, row, cols, rows, X_STRIDE, DIM, WHOLE, "")
        if residual_ptr is not None:
            x += read(residual_ptr, row, cols, rows, RESIDUAL_STRIDE, DIM, WHOLE, "")
            x = x.to(total_ptr.dtype.element_ty)
            write(total_ptr, row, cols, rows, x, DIM, WHOLE)
            x = x.to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / DIM) + eps)
        tl.store(r_ptr + row, r, mask=row < rows)
        y = x * r[:, None]
        if weight_ptr is not None:
            y *= w
        write(y_ptr, row, cols, rows, y, DIM, WHOLE)


@jit
def rms_norm_backward_kernel(
    grad_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    r_ptr,
    dx_ptr,
    dw_ptr,
    y_ptr,
    rows,
    GRAD_STRIDE: tl.constexpr,
    GRAD_TOTAL_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With u = x r and v = g w: dx = r (v - u mean(v u)), plus the gradient of the total.

    dw_ptr: partial sums of g u, or None. y_ptr: forward's output, or None. dx_ptr may equal
    grad_ptr: dx needs a mean over the row's gradient, so the row is read before it is written.
    """
    cols = tl.arange(0, BLOCK)
    if weight_ptr is not None:
        w = leaf(weight_ptr, cols, DIM)
    if dw_ptr is not None:
        dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for turn in tl.range(0, turns(rows, ROWS), num_stages=STAGES):
        row = first_row(turn, ROWS)
        x = read(x_ptr, row, cols, rows, X_STRIDE, DIM, WHOLE, "evict_first")
        g = read(grad_ptr, row, cols, rows, GRAD_STRIDE, DIM, WHOLE, "evict_first")
        if grad_total_ptr is not None:
            more = read(
                grad_total_ptr, row, cols, rows, GRAD_TOTAL_STRIDE, DIM, WHOLE, "evict_first"
            )
        r = tl.load(r_ptr + row, mask=row < rows, other=0.0)[:, None]
        u = x * r
        v = g
        if weight_ptr is not None:
            v = g * w
        mean = tl.sum(v * u, 1)[:, None] * (1.0 / DIM)
        dx = (v - u * mean) * r
        if grad_total_ptr is not None:
            dx += more
        write(dx_ptr, row, cols, rows, dx, DIM, WHOLE)
        if y_ptr is not None:  # the same products as in forward: the same bits
            y = u
            if weight_ptr is not None:
                y = u * w
            write(y_ptr, row, cols, rows, y, DIM, WHOLE)
        if dw_ptr is not None:
            dw += g * u
    if dw_ptr is not None:
        share(dw_ptr, cols, dw, DIM)


@jit
def rms_norm_long_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    r_ptr,
    eps,
    X_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For rows too long for registers: two passes in pieces, the second one from the caches."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, DIM, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _piece(x_ptr + row * X_STRIDE, cols, DIM, "evict_last")
        if residual_ptr is not None:
            x += _piece(residual_ptr + row * RESIDUAL_STRIDE, cols, DIM, "evict_first")
            x = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * DIM + cols, x, mask=cols < DIM)
            x = x.to(tl.float32)
        squares += x * x
    r = tl.rsqrt(tl.sum(squares, 0) * (1.0 / DIM) + eps)
    tl.store(r_ptr + row, r)
    tl.debug_barrier()  # another thread may read what this one wrote to total
    for start in range(0, DIM, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if residual_ptr is not None:
            x = _piece(total_ptr + row * DIM, cols, DIM, "")
        else:
            x = _piece(x_ptr + row * X_STRIDE, cols, DIM, "evict_first")
        y = x * r
        if weight_ptr is not None:
            y *= _piece(weight_ptr, cols, DIM, "evict_last")
        tl.store(y_ptr + row * DIM + cols, y.to(y_ptr.dtype.element_ty), mask=cols < DIM)


@jit
def rms_norm_long_backward_kernel(
    grad_ptr,
    grad_total_ptr,
    x_ptr,
    weight_ptr,
    r_ptr,
    dx_ptr,
    dw_ptr,
    y_ptr,
    rows,
    GRAD_STRIDE: tl.constexpr,
    GRAD_TOTAL_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `rms_norm_backward_kernel`, in pieces; the sums of g u live in memory (the caches)."""
    share_ptr = dw_ptr  # this program's row of the partial sums
    if dw_ptr is not None:
        share_ptr += tl.program_id(0).to(tl.int64) * DIM
    for turn in range(turns(rows, 1)):
        row = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
        r = tl.load(r_ptr + row)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, DIM, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            u = _piece(x_ptr + row * X_STRIDE, cols, DIM, "evict_last") * r
            v = _piece(grad_ptr + row * GRAD_STRIDE, cols, DIM, "evict_last")
            y = u
            if weight_ptr is not None:
                w = _piece(weight_ptr, cols, DIM, "evict_last")
                v *= w
                y = u * w
            products += v * u
            if y_ptr is not None:
                tl.store(y_ptr + row * DIM + cols, y.to(y_ptr.dtype.element_ty), mask=cols < DIM)
        mean = tl.sum(products, 0) * (1.0 / DIM)
        for start in range(0, DIM, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            u = _piece(x_ptr + row * X_STRIDE, cols, DIM, "evict_first") * r
            g = _piece(grad_ptr + row * GRAD_STRIDE, cols, DIM, "evict_first")
            v = g
            if weight_ptr is not None:
                v = g * _piece(weight_ptr, cols, DIM, "evict_last")
            dx = (v - u * mean) * r
            if grad_total_ptr is not None:
                dx += _piece(grad_total_ptr + row * GRAD_TOTAL_STRIDE, cols, DIM, "evict_first")
            tl.store(dx_ptr + row * DIM + cols, dx.to(dx_ptr.dtype.element_ty), mask=cols < DIM)
            if dw_ptr is not None:
                before = tl.load(share_ptr + cols, mask=(cols < DIM) & (turn > 0), other=0.0)
                tl.store(share_ptr + cols, before + g * u, mask=cols < DIM)
        tl.debug_barrier()  # the next turn reads the sums that this one wrote


# Host


def _long(x: Tensor, block: int = 4096) -> dict[str, Any]:
    """Constants of a kernel that takes a row in pieces. Pieces of 8192 would spill in fp32."""
    return {"DIM": x.shape[1], "BLOCK": block, "num_warps": 16}


def rms_norm_forward(
    x: Tensor,  # [..., D]
    residual: Tensor | None,  # like x
    weight: Tensor | None,  # [D]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and x + residual [..., D] in x.dtype (empty without one), and r [..., 1] in fp32."""
    config = forward_config(x)
    y, r = x.new_empty(x.shape), statistic(x)
    total = None if residual is None else x.new_empty(x.shape)
    flat = flatten(x)
    more = None if residual is None else flatten(residual)
    weight = None if weight is None else weight.contiguous()
    strides: dict[str, Any] = {
        "X_STRIDE": flat.stride(0),
        "RESIDUAL_STRIDE": 0 if more is None else more.stride(0),
    }
    if x.shape[-1] > MAX_FORWARD_DIM:
        launch(
            rms_norm_long_forward_kernel,
            (flat.shape[0],),
            *(flat, more, weight, y, total, r, eps),
            **strides,
            **_long(flat),
        )
    else:
        launch(
            rms_norm_forward_kernel,
            (programs_for(flat, config),),
            *(flat, more, weight, y, total, r, flat.shape[0], eps),
            num_warps=config.warps,
            **strides,
            **tile_constants(flat, config),
        )
    return y, empty(x) if total is None else total, r


def rms_norm_backward(
    grad: Tensor,  # [..., D]
    grad_total: Tensor | None,  # like grad
    x: Tensor,  # [..., D], the norm's input
    weight: Tensor | None,  # [D]
    r: Tensor,  # [..., 1]
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., D] in x.dtype, and dw [D] in weight.dtype (empty if not needed)."""
    dx = x.new_empty(x.shape)
    dw = _backward(grad, grad_total, x, weight, r, dx, None, needs_weight)
    return dx, empty(x) if dw is None else dw


def rms_norm_backward_(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    r: Tensor,
    needs_weight: bool,
    needs_value: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `rms_norm_backward`, and with `needs_value` also forward's output, to the bit.

    dx takes grad's memory if grad is contiguous and of x's dtype.
    """
    own = grad.is_contiguous() and grad.dtype == x.dtype
    dx = grad if own else x.new_empty(x.shape)
    y = x.new_empty(x.shape) if needs_value else None
    return dx, _backward(grad, grad_total, x, weight, r, dx, y, needs_weight), y


def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    r: Tensor,
    dx: Tensor,
    y: Tensor | None,
    needs_weight: bool,
) -> Tensor | None:
    """Writes dx and y; returns dw."""
    config = backward_config(x)
    flat, grads = flatten(x), flatten(grad)
    more = None if grad_total is None else flatten(grad_total)
    programs = programs_for(flat, config)
    leaves = 1 if needs_weight and weight is not None else 0
    partials = x.new_empty((leaves, programs, x.shape[-1]), dtype=torch.float32)
    long = x.shape[-1] > MAX_DIM
    if long:  # with a second output, pieces of 4,096 would spill
        constants = _long(flat, 4096 if y is None else 2048)
    else:
        constants = {"num_warps": config.warps, **tile_constants(flat, config)}
    launch(
        rms_norm_long_backward_kernel if long else rms_norm_backward_kernel,
        (programs,),
        grads,
        more,
        flat,
        None if weight is None else weight.contiguous(),
        r,
        dx,
        partials[0] if leaves else None,
        y,
        flat.shape[0],
        GRAD_STRIDE=grads.stride(0),
        GRAD_TOTAL_STRIDE=0 if more is None else more.stride(0),
        X_STRIDE=flat.stride(0),
        **constants,
    )
    return sums(partials, weight)[0] if leaves and weight is not None else None
