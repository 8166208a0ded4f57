# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""What Triton kernels over the rows of a matrix share: tiles of whole rows, and sums over rows.

A program takes tiles of ROWS whole rows in turn, [ROWS, BLOCK] with BLOCK the next power of two, so
that it reads each row from memory once. To sum over rows, each of a fixed number of programs leaves
the fp32 sum of its share as one row of `partials`, and a second, small kernel adds these up. There
are no atomics, so the result is deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import jit, launch, processors, tl, triton

# Pieces


@jit
def first_row(turn, ROWS: tl.constexpr):
    """This program's rows in a turn, in int64: offsets of elements may exceed 32 bits."""
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
    """A tile in fp32, with 0 outside the matrix. WHOLE: no tile extends beyond it."""
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
def leaf(ptr, cols, DIM: tl.constexpr):
    """A weight or bias in fp32, [1, BLOCK]: two dimensions give it the layout of a row of x."""
    col = cols[None, :]
    return tl.load(ptr + col, mask=col < DIM, other=0.0).to(tl.float32)


@jit
def share(ptr, cols, total, DIM: tl.constexpr):
    """Stores this program's sum over rows in its own row of the partial sums [programs, DIM]."""
    at = ptr + tl.program_id(0).to(tl.int64) * DIM + cols
    tl.store(at, tl.sum(total, 0), mask=cols < DIM)


# Kernel


@jit
def sum_partials_kernel(
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
class NormLaunch:
    """How a kernel over rows is launched.

    rows: per tile. warps: per program. stages: of the software pipeline; 1 means no pipeline.
    programs: per multiprocessor, each taking tiles in turn; 0 means one program per tile.
    """

    rows: int
    warps: int
    stages: int = 1
    programs: int = 0


def _block(x: Tensor) -> int:
    return triton.next_power_of_2(max(x.shape[-1], 1))


def forward_config(x: Tensor) -> NormLaunch:
    """One program per tile."""
    block = _block(x)
    return NormLaunch(max(1, 2048 // block), min(16, max(4, block // 1024)))


def backward_config(x: Tensor) -> NormLaunch:
    """Few programs, which leave few partial sums, and a pipeline of three tiles in each."""
    block = _block(x)
    if block <= 512:
        config = NormLaunch(8192 // block, 8, 3, 1)
    elif block <= 4096:
        config = NormLaunch(4096 // block, 4, 3, 2)
    else:
        config = NormLaunch(1, 8, 3, 1)
    wide = config.rows * block * x.element_size() > 2**14  # three such tiles do not fit
    return replace(config, stages=2) if wide else config


def flatten(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] with contiguous rows; a copy only where necessary."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def tile_constants(x: Tensor, config: NormLaunch) -> dict[str, Any]:
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


def programs_for(x: Tensor, config: NormLaunch) -> int:
    tiles = triton.cdiv(x.shape[0], config.rows) if x.numel() else 0
    most = processors(x.device) * config.programs
    return min(tiles, most) if most else tiles


def statistic(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def sums(partials: Tensor, *like: Tensor | None) -> list[Tensor]:
    """Adds up partial sums [leaves, programs, D]: one [D] per leaf, in its dtype."""
    leaves, programs, dim = partials.shape
    cols = max(8, min(128, triton.next_power_of_2(dim) // 512))
    outs = [partials.new_empty(dim, dtype=leaf.dtype) for leaf in like if leaf is not None]
    launch(
        sum_partials_kernel,
        (triton.cdiv(dim, cols), leaves),
        partials,
        outs[0],
        outs[1] if leaves > 1 else None,
        programs,
        num_warps=4,
        DIM=dim,
        COLS=cols,
        STEP=128 if cols <= 16 else 2048 // cols,
    )
    return outs
