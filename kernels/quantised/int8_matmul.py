# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""`int8_linear` of many rows, in Triton: bound by arithmetic.

Rows of x are rounded to int8 and multiplied by the int8 weight, with all scales applied to the sums
in registers; or the weight is widened once, and cuBLAS multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import (
    IN_INTERPRETER,
    capability,
    constant,
    jit,
    launch,
    processors,
    tl,
    triton,
)

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

ROUND = constant(12582912.0)  # 1.5 * 2^23: see `_rounded`


# Pieces


@jit
def _rounded(x):
    """x, of magnitude below 2^22, to the nearest int8, half to even: adding 1.5 * 2^23 removes the
    fraction and leaves the integer in the low bits."""
    return (x + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _quotient(x, step, inverse):
    """x / step as IEEE rounds it, given inverse = 1 / step so rounded (Markstein 1990)."""
    if IN_INTERPRETER:  # whose fma rounds twice
        return x / step
    q = x * inverse
    return tl.fma(tl.fma(-q, step, x), inverse, q)


@jit
def _tile_of(pid, rows, outs, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile): down GROUP row tiles, then right: L2 then serves both operands."""
    down = tl.cdiv(rows, BM)
    across = tl.cdiv(outs, BN)
    group = pid // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = pid % (GROUP * across)
    return group * GROUP + inside % height, inside // height


@jit
def scaled(acc, step_ptr, scale_ptr, bias_ptr, row, col, rows, outs):
    """Sums to outputs in fp32: times the row's step (if any) and the column's scale, plus bias."""
    y = acc.to(tl.float32)
    if step_ptr is not None:
        y *= tl.load(step_ptr + row, mask=row < rows, other=0.0)[:, None]
    y *= tl.load(scale_ptr + col, mask=col < outs, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < outs, other=0.0).to(tl.float32)[None, :]
    return y


# Kernels


@jit
def int8_linear_quantize_kernel(
    x_ptr,  # [rows, inner]
    out_ptr,  # [rows, stride] int8
    step_ptr,  # [rows] fp32
    inner,
    stride,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A row to int8 with one step, amax / 127 (1 if the row is 0); zeros up to the stride.

    ONCE: the row fits in one block, and is read from memory once.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * inner
    out_ptr += row * stride
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + col, mask=col < inner, other=0.0).to(tl.float32)
    amax = tl.reduce(tl.abs(x), 0, _larger)
    if not ONCE:
        for start in range(BLOCK, inner, BLOCK):
            more = tl.load(x_ptr + start + col, mask=start + col < inner, other=0.0)
            amax = _larger(amax, tl.reduce(tl.abs(more.to(tl.float32)), 0, _larger))
    step = tl.where(amax == 0.0, 1.0, tl.div_rn(amax, 127.0))
    inverse = tl.div_rn(1.0, step)
    tl.store(step_ptr + row, step)
    tl.store(out_ptr + col, _rounded(_quotient(x, step, inverse)), mask=col < stride)
    if not ONCE:
        for start in range(BLOCK, stride, BLOCK):
            more = tl.load(x_ptr + start + col, mask=start + col < inner, other=0.0)
            q = _rounded(_quotient(more.to(tl.float32), step, inverse))
            tl.store(out_ptr + start + col, q, mask=start + col < stride)


@jit
def int8_linear_matmul_kernel(
    q_ptr,  # [rows, stride] int8
    step_ptr,  # [rows] fp32
    weight_ptr,  # [outs, inner] int8
    scale_ptr,  # [outs]
    bias_ptr,  # [outs] or None
    out_ptr,  # [rows, outs]
    rows,
    outs,
    inner,
    stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of outputs from int8 x int8 with int32 sums."""
    tile_m, tile_n = _tile_of(tl.program_id(0), rows, outs, BM, BN, GROUP)
    row = tile_m * BM + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row_in = tl.minimum(row, rows - 1).to(tl.int64)
    col_in = tl.minimum(col, outs - 1).to(tl.int64)
    q_ptrs = q_ptr + row_in[:, None] * stride + k[None, :]
    weight_ptrs = weight_ptr + col_in[None, :] * inner + k[:, None]
    acc = tl.zeros([BM, BN], tl.int32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for start in range(0, inner, BK):
        if EVEN:
            q = tl.load(q_ptrs)
            w = tl.load(weight_ptrs)
        else:
            q = tl.load(q_ptrs, mask=(start + k < inner)[None, :], other=0)
            w = tl.load(weight_ptrs, mask=(start + k < inner)[:, None], other=0)
        acc = tl.dot(q, w, acc, out_dtype=tl.int32)
        q_ptrs += BK
        weight_ptrs += BK
    y = scaled(acc, step_ptr, scale_ptr, bias_ptr, row, col, rows, outs)
    out = out_ptr + row.to(tl.int64)[:, None] * outs + col[None, :]
    mask = (row < rows)[:, None] & (col < outs)[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def int8_linear_matmul_tma_kernel(
    q_desc,  # [rows, stride] int8, boxes [BM, BK]
    weight_desc,  # [outs, inner] int8, boxes [BN, BK]
    out_desc,  # [rows, outs], boxes [BM, BN / PARTS]
    step_ptr,  # [rows] fp32
    scale_ptr,  # [outs]
    bias_ptr,  # [outs] or None
    rows,
    outs,
    inner,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same by the tensor memory accelerator. A program takes tile after tile; the next one
    loads while it writes."""
    tiles = tl.cdiv(rows, BM) * tl.cdiv(outs, BN)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _tile_of(tile, rows, outs, BM, BN, GROUP)
        acc = tl.zeros([BM, BN], tl.int32)
        for start in range(0, inner, BK):
            q = q_desc.load([tile_m * BM, start])
            w = weight_desc.load([tile_n * BN, start])
            acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
        row = tile_m * BM + tl.arange(0, BM)
        col = tile_n * BN + tl.arange(0, BN)
        y = scaled(acc, step_ptr, scale_ptr, bias_ptr, row, col, rows, outs)
        if PARTS == 1:
            out_desc.store([tile_m * BM, tile_n * BN], y.to(out_desc.dtype))
        else:  # by halves, which needs half the shared memory
            left, right = y.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
            out_desc.store([tile_m * BM, tile_n * BN], left.to(out_desc.dtype))
            out_desc.store([tile_m * BM, tile_n * BN + BN // 2], right.to(out_desc.dtype))


@jit
def int8_linear_widen_kernel(
    weight_ptr,  # [outs, inner] int8
    scale_ptr,  # [outs]
    out_ptr,  # [outs, inner]
    outs,
    inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """weight * scale, rounded once to the dtype of the output: a tile."""
    across = tl.cdiv(inner, COLS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    at = row.to(tl.int64)[:, None] * inner + col[None, :]
    mask = (row < outs)[:, None] & (col < inner)[None, :]
    scale = tl.load(scale_ptr + row, mask=row < outs, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + at, mask=mask, other=0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=mask)


# Host


@dataclass(frozen=True)
class Tile:
    """A matmul's tile [bm, bn] (rows, outputs) in steps of bk, and how it is launched.

    group: tiles down before the next column of tiles; tma: by descriptors, one program per SM which
    takes tiles in turn and writes the output in `parts`.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    tma: bool = False
    parts: int = 1


def launch_early(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """`launch`, which starts before the kernel ahead has ended (from Hopper on: see `launch`)."""
    pdl = capability(next(x.device for x in args if isinstance(x, Tensor))) >= (9, 0)
    launch(kernel, (programs,), *args, pdl=pdl, PDL=pdl, **constants)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [rows, inner] as int8 [rows, inner up to a multiple of 16] and their steps [rows].

    x = int8 * step, with step = amax / 127 (1 for a row of zeros); to the nearest, half to even.
    """
    rows, inner = x.shape
    stride = triton.cdiv(inner, 16) * 16
    q = torch.empty(rows, stride, dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = min(16384, triton.next_power_of_2(stride))
    launch_early(
        int8_linear_quantize_kernel,
        rows,
        x,
        q,
        step,
        inner,
        stride,
        num_warps=min(16, max(1, block // 512)),
        BLOCK=block,
        ONCE=stride <= block,
    )
    return q, step


def matmul_config(
    rows: int, outs: int, inner: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile, measured with 4,096 rows on an H200: about 1.5 times as fast as bf16 torch.mm."""
    if inner % 16:  # loads of single bytes
        return Tile(64, 64, 32, 4, 2)
    if rows <= 64:
        return Tile(triton.next_power_of_2(max(rows, 16)), 128, 128, 4, 4)  # not measured
    if capability(device)[0] != 9 or dtype == torch.float32:
        return Tile(128, 128, 64, 8, 3)
    wide = triton.cdiv(rows, 128) * triton.cdiv(outs, 256) >= processors(device)
    if wide and outs % 8 == 0:  # rows of a descriptor begin at multiples of 16 bytes
        return Tile(128, 256, 128, 8, 4, tma=True, parts=2)
    return Tile(128, 128, 128, 4, 3)


def matmul_rows(
    q: Tensor,  # [rows, stride] int8
    step: Tensor,  # [rows] fp32
    weight: Tensor,  # [outs, inner], contiguous
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Tile | None = None,
) -> Tensor:
    """(q * step) @ (weight * scale).T + bias with int32 sums: [rows, outs] in `dtype`."""
    (rows, stride), (outs, inner) = q.shape, weight.shape
    out = torch.empty(rows, outs, dtype=dtype, device=q.device)
    config = config or matmul_config(rows, outs, inner, dtype, q.device)
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(outs, config.bn)
    sizes: dict[str, Any] = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "GROUP": config.group,
    }
    if config.tma:
        launch_early(
            int8_linear_matmul_tma_kernel,
            min(tiles, processors(q.device)),
            TensorDescriptor.from_tensor(q, [config.bm, config.bk]),
            TensorDescriptor.from_tensor(weight, [config.bn, config.bk]),
            TensorDescriptor.from_tensor(out, [config.bm, config.bn // config.parts]),
            step,
            scale,
            bias,
            rows,
            outs,
            inner,
            **sizes,
            PARTS=config.parts,
        )
    else:
        pointers = (q, step, weight, scale, bias, out)
        even = inner % config.bk == 0
        kernel = int8_linear_matmul_kernel
        launch_early(kernel, tiles, *pointers, rows, outs, inner, stride, **sizes, EVEN=even)
    return out


def widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale [outs, inner], contiguous, rounded once to `dtype`."""
    outs, inner = weight.shape
    out = torch.empty(outs, inner, dtype=dtype, device=weight.device)
    cols = min(2048, triton.next_power_of_2(inner))
    rows = 8192 // cols
    grid = (triton.cdiv(outs, rows) * triton.cdiv(inner, cols),)
    arguments = (weight, scale, out, outs, inner)
    launch(int8_linear_widen_kernel, grid, *arguments, num_warps=8, ROWS=rows, COLS=cols)
    return out
