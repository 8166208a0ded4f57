# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""`int8_linear` of few rows, in Triton: bound by reading the weight.

The weight goes from memory to registers in 16-byte loads, all in flight at once, is widened there,
and meets the rows of x in tensor cores. The warps of a program divide the columns; only their sums
pass through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.quantised.int8_matmul import launch_early, scaled
from kernels.runtime.launch import IN_INTERPRETER, capability, dot, jit, processors, tl, triton

ONE_BLOCK = 2048  # entries of a row that `int8_linear_row_kernel` takes


@jit
def _widened(w, x):
    """The int8 w in x's dtype, which is exact: bf16 has 8 bits."""
    if IN_INTERPRETER:  # whose int8 to bf16 keeps the bits
        return w.to(tl.float32)
    return w.to(x.dtype)


@jit
def _weights(
    weight_ptr,
    start,
    valid,
    inner,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[STEPS * HALVES * WARPS * 32, 16] weights: 16 bytes per thread, the tile of one tensor core
    instruction per warp. Rows from `valid` and columns from `inner` on are 0."""
    p = tl.arange(0, STEPS * HALVES * WARPS * 32)  # step, half, warp, eighth, quarter
    row = p // (32 * WARPS) % HALVES * 8 + p // 4 % 8
    step = p // (32 * WARPS * HALVES)
    col = start + step * (WARPS * 64) + p // 32 % WARPS * 64 + p % 4 * 16
    ptr = weight_ptr + (row * inner + col)[:, None] + tl.arange(0, 16)
    if EVEN:
        return tl.load(ptr, cache_modifier=".cg")
    mask = (row < valid)[:, None] & (col[:, None] + tl.arange(0, 16) < inner)
    return tl.load(ptr, mask=mask, other=0, cache_modifier=".cg")


@jit
def _rows_of_x(
    x_ptr,
    start,
    rows,
    inner,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[STEPS * 2 * WARPS * 32, 8] entries of x: per thread, those of its weights' columns."""
    p = tl.arange(0, STEPS * 2 * WARPS * 32)  # step, t, warp, eighth, quarter
    row = (p // 4 % 8)[:, None]
    step = p // (64 * WARPS)
    col = start + step * (WARPS * 64) + p // 32 % WARPS * 64 + p % 4 * 16
    col = (col + p // (32 * WARPS) % 2 * 8)[:, None] + tl.arange(0, 8)
    mask = row < rows
    if not EVEN:
        mask = mask & (col < inner)
    return tl.load(x_ptr + row * inner + col, mask=mask, other=0.0)


@jit
def _add_dot(
    acc,
    raw,
    x,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """acc [WARPS, 8 * HALVES, 8] += weights . x, each warp on its own columns."""
    # A thread of a tensor core instruction holds columns 4q..4q+3 and 16+4q..19+4q of 32. A sum may
    # take its terms in any order: under the same permutation of columns in both operands, these are
    # 16 neighbours in memory, and nothing moves between threads.
    x = x.reshape(STEPS, 2, WARPS, 8, 4, 2, 4)  # step t warp eighth q half four
    x = x.permute(2, 0, 1, 5, 4, 6, 3).reshape(WARPS, STEPS * 64, 8)
    w = raw.reshape(STEPS, HALVES, WARPS, 8, 4, 2, 2, 4)  # step halves warp eighth q t half four
    w = w.permute(2, 1, 3, 0, 5, 6, 4, 7).reshape(WARPS, HALVES * 8, STEPS * 64)
    return dot(_widened(w, x), x, acc, "tf32")


@jit
def int8_linear_row_kernel(
    x_ptr,  # [inner]
    weight_ptr,  # [outs, inner] int8
    scale_ptr,  # [outs]
    bias_ptr,  # [outs] or None
    out_ptr,  # [outs]
    rows,  # 1
    outs,
    inner,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """SIZE outputs of one row by multiply and add; a block holds a row of the weight."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    col = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    k = tl.arange(0, BLOCK)
    at = weight_ptr + col.to(tl.int64)[:, None] * inner + k[None, :]
    known = col < outs
    if EVEN:
        w = tl.load(at, cache_modifier=".cg")
    else:
        mask = known[:, None] & (k < inner)[None, :]
        w = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
    scale = tl.load(scale_ptr + col, mask=known, other=0.0, cache_modifier=".cg").to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=known, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PDL:  # only leaves are read before this, and past L1: see `int8_linear_few_kernel`
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + k, mask=k < inner, other=0.0).to(tl.float32)
    y = tl.sum(w.to(tl.float32) * x[None, :], 1) * scale
    if bias_ptr is not None:
        y += bias
    tl.store(out_ptr + col, y.to(out_ptr.dtype.element_ty), mask=known)


@jit
def int8_linear_few_kernel(
    x_ptr,  # [rows, inner] bf16 or fp16
    weight_ptr,  # [outs, inner] int8
    scale_ptr,  # [outs]
    bias_ptr,  # [outs] or None
    out_ptr,  # [rows, outs]
    rows,
    outs,
    inner,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """8 * HALVES outputs of up to 8 rows per program; its warps divide the columns.

    CHUNKS times STEPS * WARPS * 64 columns; the next chunk loads while one is multiplied.
    EVEN: nothing to mask.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    size: tl.constexpr = 8 * HALVES
    chunk: tl.constexpr = STEPS * WARPS * 64
    first = tl.program_id(0) * size
    col = first + tl.arange(0, size)
    weight_ptr += first.to(tl.int64) * inner
    raw = _weights(weight_ptr, 0, outs - first, inner, STEPS, WARPS, HALVES, EVEN)
    scale = tl.load(scale_ptr + col, mask=col < outs, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col < outs, other=0.0, cache_modifier=".cg")
    if PDL:
        # Leaves were read while the kernel ahead may still run: it makes x, and no leaf. (A kernel
        # that makes leaves must not let others start early; torch's own do not. After those, this
        # one starts when they have ended, but without the usual flush of L1: hence .cg.)
        tl.extra.cuda.gdc_wait()
    x = _rows_of_x(x_ptr, 0, rows, inner, STEPS, WARPS, EVEN)
    acc = tl.zeros([WARPS, size, 8], tl.float32)
    for i in tl.static_range(CHUNKS):  # unrolled: a loop would unpack the chunk that it carries
        if i + 1 < CHUNKS:
            begin = (i + 1) * chunk
            next_raw = _weights(weight_ptr, begin, outs - first, inner, STEPS, WARPS, HALVES, EVEN)
            next_x = _rows_of_x(x_ptr, begin, rows, inner, STEPS, WARPS, EVEN)
        acc = _add_dot(acc, raw, x, STEPS, WARPS, HALVES)
        if i + 1 < CHUNKS:
            raw = next_raw
            x = next_x
    y = tl.sum(acc, 0) * scale.to(tl.float32)[:, None]
    if bias_ptr is not None:
        y += bias.to(tl.float32)[:, None]
    row = tl.arange(0, 8)[None, :]
    mask = (row < rows) & (col < outs)[:, None]
    tl.store(out_ptr + row * outs + col[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def int8_linear_rows_kernel(
    x_ptr,  # [rows, inner] bf16 or fp16
    weight_ptr,  # [outs, inner] int8
    scale_ptr,  # [outs]
    bias_ptr,  # [outs] or None
    out_ptr,  # [rows, outs]
    rows,
    outs,
    inner,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows times BN rows of the weight, widened in registers."""
    row = tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    base = weight_ptr + tl.minimum(col, outs - 1).to(tl.int64) * inner
    # rows beyond the last repeat it: a mask would keep x out of the pipeline
    x_ptrs = x_ptr + tl.minimum(row, rows - 1)[:, None] * inner + k[None, :]
    weight_ptrs = base[:, None] + k[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    if SWAP:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, inner, BK):
        if EVEN:
            w = tl.load(weight_ptrs)
            x = tl.load(x_ptrs)
        else:
            inside = (start + k < inner)[None, :]
            w = tl.load(weight_ptrs, mask=inside, other=0)
            x = tl.load(x_ptrs, mask=inside, other=0.0)
        w = _widened(w, x)
        if SWAP:
            acc = dot(w, x.T, acc, "tf32")
        else:
            acc = dot(x, w.T, acc, "tf32")
        weight_ptrs += BK
        x_ptrs += BK
    if PDL:  # not earlier: the next kernel's programs would take this one's room and only wait
        tl.extra.cuda.gdc_launch_dependents()
    if SWAP:
        acc = tl.trans(acc)
    y = scaled(acc, None, scale_ptr, bias_ptr, row, col, rows, outs)
    out = out_ptr + row[:, None] * outs + col[None, :]
    mask = (row < rows)[:, None] & (col < outs)[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Few:
    """How `int8_linear_few_kernel` is launched: see there."""

    steps: int
    warps: int
    halves: int = 2


@dataclass(frozen=True)
class Rows:
    """How `int8_linear_rows_kernel` is launched."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool = False


def is_few(rows: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether these kernels serve, and are the fastest: they need 16-byte loads."""
    return rows <= 64 and inner % 16 == 0 and dtype in (torch.bfloat16, torch.float16)


def few_config(outs: int, inner: int, device: torch.device) -> Few:
    """For up to 8 rows; measured on an H200: about 1.5 times as fast as bf16 torch.mm."""
    warps = 4 if inner <= 2048 else 8
    steps = triton.next_power_of_2(triton.cdiv(inner, 64 * warps))
    return Few(min(steps, 8 if capability(device) >= (9, 0) else 4), warps)


def rows_config(rows: int, outs: int, programs: int) -> Rows:
    """For 9 to 64 rows; measured on an H200: never slower than bf16 torch.mm."""
    wide = outs >= 32 * programs
    if rows <= 16:
        return Rows(16, 16, 256, 1, 4, swap=True)
    if rows <= 32:
        return Rows(32, 32, 128, 4, 4, swap=True) if wide else Rows(32, 16, 256, 2, 3, swap=True)
    return Rows(64, 64, 256, 4, 3, swap=True) if wide else Rows(64, 16, 128, 4, 4)


def few(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ (weight * scale).T + bias where `is_few`: [rows, outs]."""
    if x.shape[0] == 1 and weight.shape[1] <= ONE_BLOCK:
        return one_row(x, weight, scale, bias)
    return (few_rows if x.shape[0] <= 8 else many_few_rows)(x, weight, scale, bias)


def _launch(
    kernel: Any,
    size: int,
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None],  # x and weight contiguous
    **constants: Any,
) -> Tensor:
    """[rows, outs] by a kernel whose programs compute `size` outputs each."""
    (rows, inner), outs = operands[0].shape, operands[1].shape[0]
    out = operands[0].new_empty(rows, outs)
    arguments = (*operands, out, rows, outs, inner)
    launch_early(kernel, triton.cdiv(outs, size), *arguments, **constants)
    return out


def one_row(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x @ (weight * scale).T + bias for one row of up to ONE_BLOCK entries: [1, outs]."""
    outs, inner = weight.shape
    block = triton.next_power_of_2(inner)
    size = min(64, 4 * ONE_BLOCK // block)
    return _launch(
        int8_linear_row_kernel,
        size,
        (x, weight, scale, bias),
        num_warps=4,
        num_stages=1,
        SIZE=size,
        BLOCK=block,
        EVEN=inner == block and outs % size == 0,
    )


def few_rows(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, config: Few | None = None
) -> Tensor:
    """x @ (weight * scale).T + bias for up to 8 rows: [rows, outs]."""
    outs, inner = weight.shape
    config = config or few_config(outs, inner, x.device)
    chunk, size = config.steps * config.warps * 64, 8 * config.halves
    return _launch(
        int8_linear_few_kernel,
        size,
        (x, weight, scale, bias),
        num_warps=config.warps,
        num_stages=1,
        STEPS=config.steps,
        WARPS=config.warps,
        HALVES=config.halves,
        CHUNKS=triton.cdiv(inner, chunk),
        EVEN=inner % chunk == 0 and outs % size == 0,
    )


def many_few_rows(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, config: Rows | None = None
) -> Tensor:
    """The same for up to 64 rows."""
    outs, inner = weight.shape
    config = config or rows_config(x.shape[0], outs, processors(x.device))
    return _launch(
        int8_linear_rows_kernel,
        config.bn,
        (x, weight, scale, bias),
        num_warps=config.warps,
        num_stages=config.stages,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        SWAP=config.swap,
        EVEN=inner % config.bk == 0,
    )
