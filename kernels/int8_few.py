# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""`int8_linear` of few rows, in Triton: bound by reading the weight.

Every byte of it goes from memory to registers in 16-byte loads, all under way at once, is widened
there, and meets the rows of x in tensor cores. Nothing passes through shared memory but the sums of
a program's warps, which divide the columns among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import launch as _launch
from kernels.launch import capability, jit, launch, tl, triton

INTERPRETED = tl.constexpr(_launch.INTERPRETED) if tl is not None else None


@jit
def _dot(w, x, acc):
    """acc + w . x, with w int8 and x of 16 bits; every int8 is a bf16 exactly."""
    if INTERPRETED:  # which multiplies the bits of a bf16
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc)
    return tl.dot(w.to(x.dtype), x, acc)


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
    """[STEPS * HALVES * WARPS * 32, 16] weights: 16 bytes a thread, a tile of one tensor core
    instruction a warp. Rows from `valid` and columns from `inner` on are 0."""
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
def _add_dot(
    acc,
    raw,
    x_ptr,
    start,
    rows,
    inner,
    STEPS: tl.constexpr,
    WARPS: tl.constexpr,
    HALVES: tl.constexpr,
    EIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
    SYNC: tl.constexpr,
):
    """acc [WARPS, 8 * HALVES, 8 * EIGHTS] += weights . x, every warp on columns of its own."""
    p = tl.arange(0, STEPS * 2 * EIGHTS * WARPS * 32)  # step, t, eights, warp, eighth, quarter
    row = p // (32 * WARPS) % EIGHTS * 8 + p // 4 % 8
    step = p // (64 * WARPS * EIGHTS)
    col = start + step * (WARPS * 64) + p // 32 % WARPS * 64 + p % 4 * 16
    col += p // (32 * WARPS * EIGHTS) % 2 * 8
    mask = (row < rows)[:, None]
    if not EVEN:
        mask = mask & (col[:, None] + tl.arange(0, 8) < inner)
    x = tl.load(x_ptr + (row * inner + col)[:, None] + tl.arange(0, 8), mask=mask, other=0.0)
    if SYNC:
        tl.debug_barrier()
    # A thread of a tensor core instruction holds columns 4q..4q+3 and 16+4q..19+4q of 32. Sums do
    # not mind the order of their terms: with the same permutation of the columns in both operands,
    # these are 16 neighbours in memory, and nothing moves between threads.
    x = x.reshape(STEPS, 2, EIGHTS, WARPS, 8, 4, 2, 4)  # step t eights w eighth q half four
    x = x.permute(3, 0, 1, 6, 5, 7, 2, 4).reshape(WARPS, STEPS * 64, EIGHTS * 8)
    w = raw.reshape(STEPS, HALVES, WARPS, 8, 4, 2, 2, 4)  # step halves warp eighth q t half four
    w = w.permute(2, 1, 3, 0, 5, 6, 4, 7).reshape(WARPS, HALVES * 8, STEPS * 64)
    if x.dtype != tl.float32:
        return _dot(w, x, acc)
    # fp32 in tensor cores without loss: three bf16 parts hold its 24 bits
    for _ in tl.static_range(3):
        part = x.to(tl.bfloat16)
        acc = _dot(w, part, acc)
        wide = part.to(tl.float32)
        x = tl.where(tl.abs(wide) == float("inf"), 0.0, x - wide)
    return acc


@jit
def int8_linear_few_kernel(
    x_ptr,  # [rows, inner]
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
    EIGHTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    SYNC: tl.constexpr,
    PDL: tl.constexpr,
):
    """8 * HALVES outputs of up to 8 * EIGHTS rows a program; its warps divide the columns.

    CHUNKS times STEPS * WARPS * 64 columns, the next chunk under way while one is multiplied.
    EVEN: nothing to mask.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    size: tl.constexpr = 8 * HALVES
    chunk: tl.constexpr = STEPS * WARPS * 64
    first = tl.program_id(0) * size
    weight_ptr += first.to(tl.int64) * inner
    raw = _weights(weight_ptr, 0, outs - first, inner, STEPS, WARPS, HALVES, EVEN)
    col = first + tl.arange(0, size)
    scale = tl.load(scale_ptr + col, mask=col < outs, other=0.0, cache_modifier=".cg")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=col < outs, other=0.0, cache_modifier=".cg")
    if PDL:
        # Leaves were read while the kernel ahead may still run: it makes x, and no leaf. (One that
        # makes leaves and lets others start early would be a mistake; torch's own do not. After
        # those this starts when they have left, but without the usual flush of L1: hence .cg.)
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([WARPS, size, 8 * EIGHTS], tl.float32)
    for i in tl.static_range(CHUNKS):  # unrolled: a chunk that a loop carried would be unpacked
        if i + 1 < CHUNKS:
            ahead = _weights(
                weight_ptr, (i + 1) * chunk, outs - first, inner, STEPS, WARPS, HALVES, EVEN
            )
        acc = _add_dot(
            acc, raw, x_ptr, i * chunk, rows, inner, STEPS, WARPS, HALVES, EIGHTS, EVEN, SYNC
        )
        if i + 1 < CHUNKS:
            raw = ahead
    y = tl.sum(acc, 0) * scale.to(tl.float32)[:, None]
    if bias_ptr is not None:
        y += bias.to(tl.float32)[:, None]
    row = tl.arange(0, 8 * EIGHTS)[None, :]
    mask = (row < rows) & (col < outs)[:, None]
    tl.store(out_ptr + row * outs + col[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def int8_linear_rows_kernel(
    x_ptr,  # [rows, inner]
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
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows times BN rows of the weight, widened on their way."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    base = weight_ptr + tl.minimum(col, outs - 1).to(tl.int64) * inner
    if PREFETCH:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [base, inner],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    x_ptrs = x_ptr + row[:, None] * inner + k[None, :]
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
            x = tl.load(x_ptrs, mask=(row < rows)[:, None], other=0.0)
        else:
            inside = (start + k < inner)[None, :]
            w = tl.load(weight_ptrs, mask=inside, other=0)
            x = tl.load(x_ptrs, mask=(row < rows)[:, None] & inside, other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if SWAP:
            acc = tl.dot(w.to(x.dtype), x.T, acc)
        else:
            acc = tl.dot(x, w.to(x.dtype).T, acc)
        weight_ptrs += BK
        x_ptrs += BK
    if SWAP:
        acc = tl.trans(acc)
    y = acc * tl.load(scale_ptr + col, mask=col < outs, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < outs, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * outs + col[None, :]
    mask = (row < rows)[:, None] & (col < outs)[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Few:
    """How `int8_linear_few_kernel` is launched: see there. pdl: where the device knows it."""

    steps: int
    warps: int
    halves: int = 2
    sync: bool = False
    pdl: bool = True


def is_few(rows: int, inner: int, dtype: torch.dtype) -> bool:
    """Whether `few_rows` is the fastest: it wants 16-byte loads."""
    limit = 16 if dtype == torch.float32 else 64  # TODO-FIGURE
    return rows <= limit and inner % 16 == 0


def few_config(rows: int, outs: int, inner: int) -> Few:
    eights = triton.next_power_of_2(triton.cdiv(rows, 8))
    if eights > 2:
        return Few(1, 8, 4 if eights == 4 else 8)  # TODO-FIGURE
    warps = 4 if inner <= 2048 else 8 if inner <= 4096 else 16
    steps = min(8, triton.next_power_of_2(triton.cdiv(inner, 64 * warps)))
    return Few(steps, warps)  # TODO-FIGURE


def few_rows(
    x: Tensor,  # [rows, inner], contiguous
    weight: Tensor,  # [outs, inner], contiguous
    scale: Tensor,
    bias: Tensor | None,
    config: Few | None = None,
) -> Tensor:
    """x @ (weight * scale).T + bias for up to 64 rows: [rows, outs]."""
    (rows, inner), outs = x.shape, weight.shape[0]
    config = config or few_config(rows, outs, inner)
    eights = triton.next_power_of_2(triton.cdiv(rows, 8))
    chunk, size = config.steps * config.warps * 64, 8 * config.halves
    out = x.new_empty(rows, outs)
    pdl = config.pdl and capability(x.device) >= (9, 0)
    launch(
        int8_linear_few_kernel,
        (triton.cdiv(outs, size),),
        x,
        weight,
        scale,
        bias,
        out,
        rows,
        outs,
        inner,
        num_warps=config.warps,
        num_stages=1,
        pdl=pdl,
        STEPS=config.steps,
        WARPS=config.warps,
        HALVES=config.halves,
        EIGHTS=eights,
        CHUNKS=triton.cdiv(inner, chunk),
        EVEN=inner % chunk == 0 and outs % size == 0,
        SYNC=config.sync,
        PDL=pdl,
    )
    return out


@dataclass(frozen=True)
class Rows:
    """How `int8_linear_rows_kernel` is launched."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    swap: bool = False
    prefetch: bool = True
    pdl: bool = True


def many_few_rows(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, config: Rows
) -> Tensor:
    (rows, inner), outs = x.shape, weight.shape[0]
    out = x.new_empty(rows, outs)
    hopper = capability(x.device) >= (9, 0)
    launch(
        int8_linear_rows_kernel,
        (triton.cdiv(outs, config.bn),),
        x,
        weight,
        scale,
        bias,
        out,
        rows,
        outs,
        inner,
        num_warps=config.warps,
        num_stages=config.stages,
        pdl=config.pdl and hopper,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        SWAP=config.swap,
        EVEN=inner % config.bk == 0,
        PREFETCH=config.prefetch and hopper,
        PDL=config.pdl and hopper,
    )
    return out
