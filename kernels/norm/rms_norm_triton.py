# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `rms_norm` and `add_rms_norm`: rows that stay in registers.

A program takes tiles of ROWS whole rows in turn, [ROWS, BLOCK] with BLOCK the next power of two, so
that each row comes from memory once a direction. The backward's programs are few and fixed in
number: each sums its share of the weight's gradient in fp32 registers and leaves it as one row of
`partials`, which a second, small kernel adds up. No atomics: the same bits each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import jit, launch, processors, tl, triton

MAX_DIM = 8192  # of a row in registers, three times: itself, its gradient, the weight's gradient
MAX_FORWARD_DIM = 16384


# Pieces


@jit
def first_row(turn, ROWS: tl.constexpr):
    """This program's rows in its given turn; int64, for what they are multiplied by."""
    tile = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
    return tile * ROWS + tl.arange(0, ROWS)


@jit
def turns(rows, ROWS: tl.constexpr):
    return tl.cdiv(tl.cdiv(rows, ROWS) - tl.program_id(0), tl.num_programs(0))


@jit
def read(
    ptr,
    row,
    cols,
    rows,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """A tile in fp32; 0 outside. WHOLE: nothing is outside."""
    at = ptr + (row * STRIDE)[:, None] + cols[None, :]
    if WHOLE:
        x = tl.load(at, eviction_policy=KEEP)
    else:
        mask = (row < rows)[:, None] & (cols < DIM)[None, :]
        x = tl.load(at, mask=mask, other=0.0, eviction_policy=KEEP)
    return x.to(tl.float32)


@jit
def write(ptr, row, cols, rows, x, DIM: tl.constexpr, WHOLE: tl.constexpr):
    at = ptr + (row * DIM)[:, None] + cols[None, :]
    if WHOLE:
        tl.store(at, x.to(ptr.dtype.element_ty))
    else:
        mask = (row < rows)[:, None] & (cols < DIM)[None, :]
        tl.store(at, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def _piece(ptr, cols, DIM: tl.constexpr, KEEP: tl.constexpr):
    """Part of one row in fp32; 0 beyond DIM."""
    return tl.load(ptr + cols, mask=cols < DIM, other=0.0, eviction_policy=KEEP).to(tl.float32)


@jit
def leaf(ptr, cols, DIM: tl.constexpr):
    """A weight or bias, [1, BLOCK] in fp32: in two dimensions to be laid out like a row of x."""
    col = cols[None, :]
    return tl.load(ptr + col, mask=col < DIM, other=0.0).to(tl.float32)


@jit
def share(ptr, cols, total, DIM: tl.constexpr):
    """Leaves this program's sum over rows in its own row of the partial sums [programs, DIM]."""
    at = ptr + tl.program_id(0).to(tl.int64) * DIM + cols
    tl.store(at, tl.sum(total, 0), mask=cols < DIM)


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
    """y = x r w, r = (mean x^2 + eps)^-1/2; with a residual x is first x + residual, rounded."""
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
    """With u = x r and v = g w: dx = r (v - u mean(v u)), plus the total's own gradient.

    dw_ptr: partial sums of g u, or None. y_ptr: what forward wrote, or None. dx may lie where grad
    does: a row's dx comes from a mean over its whole gradient, and so after every read of it.
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
        if y_ptr is not None:  # by the same products as in forward
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
    """A row too long for registers, in pieces, twice: the second time it is found in the caches."""
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
    tl.debug_barrier()  # what one thread wrote to total, another may read
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
    """As `rms_norm_backward_kernel`, in pieces; the sums of g u are kept in memory (the caches)."""
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
        tl.debug_barrier()  # the next turn reads the sums that this one has written


@jit
def rms_norm_sum_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    programs,
    DIM: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums over dimension 1 of partials [2, programs, DIM], or of [1, ...] without second_ptr."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    base = partials_ptr + tl.program_id(1).to(tl.int64) * programs * DIM
    total = tl.zeros([STEP, COLS], tl.float32)
    for start in range(0, programs, STEP):
        row = start + tl.arange(0, STEP)
        mask = (row < programs)[:, None] & (cols < DIM)[None, :]
        total += tl.load(base + (row * DIM)[:, None] + cols[None, :], mask=mask, other=0.0)
    out = tl.sum(total, 0)
    mask = cols < tl.where(tl.program_id(1) == 0, DIM, 0)
    tl.store(first_ptr + cols, out.to(first_ptr.dtype.element_ty), mask=mask)
    if second_ptr is not None:
        mask = cols < tl.where(tl.program_id(1) == 1, DIM, 0)
        tl.store(second_ptr + cols, out.to(second_ptr.dtype.element_ty), mask=mask)


# Host


@dataclass(frozen=True)
class Config:
    """How a kernel over rows is launched.

    rows: a tile; warps: a program; stages: of the software pipeline (1 is none); programs: an SM,
    each taking tiles in turn (0: one program a tile).
    """

    rows: int
    warps: int
    stages: int = 1
    programs: int = 0


def _block(x: Tensor) -> int:
    return triton.next_power_of_2(max(x.shape[-1], 1))


def forward_config(x: Tensor) -> Config:
    """A program a tile.

    On an H200, bf16, 16,384 rows: 2,048 entries 3,966 GB/s (2 or 8 warps: 3,958 and 3,714), 8,192
    entries with 8 warps 4,036 (16: 3,311), 128 entries 3,897; a copy: 4,041.
    """
    block = _block(x)
    return Config(max(1, 2048 // block), min(16, max(4, block // 1024)))


def backward_config(x: Tensor) -> Config:
    """Few programs, so that few partial sums are left, and three tiles on their way in each.

    On an H200, bf16, GB/s with the sum of the partials: 2,048 entries 3,774 (one row a tile 3,698,
    two stages 2,911), 8,192 entries 4,131 (four stages 3,749), 128 entries in tiles of 64 rows
    3,728 (of 16: 2,004).
    """
    block = _block(x)
    if block <= 512:
        config = Config(8192 // block, 8, 3, 1)
    elif block <= 4096:
        config = Config(4096 // block, 4, 3, 2)
    else:
        config = Config(1, 8, 3, 1)
    wide = config.rows * block * x.element_size() > 2**14  # three such tiles do not fit
    return replace(config, stages=2) if wide else config


def flatten(x: Tensor) -> Tensor:
    """[..., D] as [rows, D] with contiguous rows; copied only if it has to be."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_constants(x: Tensor, config: Config) -> dict[str, Any]:
    """Constants of a tile; x [rows, D]."""
    rows, dim = x.shape
    block = _block(x)
    whole = dim == block and rows % config.rows == 0
    return {
        "DIM": dim,
        "ROWS": config.rows,
        "BLOCK": block,
        "WHOLE": whole,
        "STAGES": config.stages,
    }


def _long(x: Tensor, block: int = 4096) -> dict[str, Any]:
    """Constants of a kernel that takes a row in pieces. Of 8192, fp32 rows would spill."""
    return {"DIM": x.shape[1], "BLOCK": block, "num_warps": 16}


def programs_for(x: Tensor, config: Config) -> int:
    tiles = triton.cdiv(x.shape[0], config.rows) if x.numel() else 0
    most = processors(x.device) * config.programs
    return min(tiles, most) if most else tiles


def statistic(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def rms_norm_forward(
    x: Tensor,  # [..., D]
    residual: Tensor | None,  # as x
    weight: Tensor | None,  # [D]
    eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y and x + residual [..., D] in x.dtype, and r [..., 1] in fp32."""
    config = config or forward_config(x)
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
    return y, total, r


def rms_norm_backward(
    grad: Tensor,  # [..., D]
    grad_total: Tensor | None,  # as grad
    x: Tensor,  # [..., D]: what was normed
    weight: Tensor | None,  # [D]
    r: Tensor,  # [..., 1]
    needs_weight: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx [..., D] in x.dtype, dw [D] in weight.dtype."""
    dx = x.new_empty(x.shape)
    return dx, _backward(grad, grad_total, x, weight, r, dx, None, needs_weight, config)


def rms_norm_backward_(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    r: Tensor,
    needs_weight: bool,
    needs_value: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `rms_norm_backward`, and what forward gave, to the bit, if it is asked for.

    grad's memory becomes dx where it can: contiguous, of x's dtype.
    """
    own = grad.is_contiguous() and grad.dtype == x.dtype
    dx = grad if own else x.new_empty(x.shape)
    y = x.new_empty(x.shape) if needs_value else None
    return dx, _backward(grad, grad_total, x, weight, r, dx, y, needs_weight, config), y


def _backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    r: Tensor,
    dx: Tensor,
    y: Tensor | None,
    needs_weight: bool,
    config: Config | None,
) -> Tensor | None:
    """Writes dx and y; gives dw."""
    config = config or backward_config(x)
    flat, grads = flatten(x), flatten(grad)
    more = None if grad_total is None else flatten(grad_total)
    programs = programs_for(flat, config)
    leaves = 1 if needs_weight and weight is not None else 0
    partials = x.new_empty((leaves, programs, x.shape[-1]), dtype=torch.float32)
    long = x.shape[-1] > MAX_DIM
    if long:  # pieces of 4,096 would spill with another output
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


def sums(
    partials: Tensor, *like: Tensor | None, cols: int | None = None, step: int | None = None
) -> list[Tensor]:
    """Partial sums [leaves, programs, D] added up: one [D] a leaf, in that leaf's dtype.

    cols, step: of the tile that a program reads at a time, 2,048 numbers if not said.
    """
    leaves, programs, dim = partials.shape
    # 528 partials of 2,048 on an H200: 8 columns 3.0 us, 16 3.4, 32 4.8, 64 7.7
    cols = cols or max(8, min(128, triton.next_power_of_2(dim) // 512))
    outs = [partials.new_empty(dim, dtype=leaf.dtype) for leaf in like if leaf is not None]
    launch(
        rms_norm_sum_kernel,
        (triton.cdiv(dim, cols), leaves),
        partials,
        outs[0],
        outs[1] if leaves > 1 else None,
        programs,
        num_warps=4,
        DIM=dim,
        COLS=cols,
        STEP=step or (128 if cols <= 16 else 2048 // cols),
    )
    return outs
