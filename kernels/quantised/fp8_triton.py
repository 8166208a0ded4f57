# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernels of `fp8_linear`: the largest entry, and float8 codes in one layout or both.

Tensor cores multiply float8 matrices with the summed dimension contiguous in both operands, so
training needs most matrices twice: straight and transposed. `quantize` reads a tile once and writes
it both ways.

Codes leave a kernel as bytes: `float8_e4m3fn` and `float8_e5m2` tensors are views of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.launch import IN_INTERPRETER, constant, jit, launch, processors, tl, triton

# The largest finite number of each format.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALLEST = constant(2.0**-126)  # a scale: its reciprocal is finite

# Four numbers to four codes in a register. Inline PTX, because CUDA 12.8's ptxas miscompiles
# Triton's own casts where bytes are needed both together and one by one: an H200 gave wrong codes.
_FOUR = """{{
.reg .b16 low, high;
cvt.rn.satfinite.{0}x2.f32 low, $2, $1;
cvt.rn.satfinite.{0}x2.f32 high, $4, $3;
mov.b32 $0, {{low, high}};
}}"""
_TO_E4M3, _TO_E5M2 = constant(_FOUR.format("e4m3")), constant(_FOUR.format("e5m2"))

# Pieces


@jit
def _magnitude(x):
    """The bits of |x| in fp32. As integers they are ordered like the numbers, with NaN on top, so
    that a maximum does not depend on the order and never loses a NaN."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _scale(bits, LARGEST: tl.constexpr):
    """The scale and its reciprocal, from the bits of the largest magnitude. NaN stays NaN; infinity
    has the reciprocal 0, which turns infinite entries into NaN."""
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    scale = tl.where(amax == 0, 1.0, scale)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@jit
def _code(x, E5M2: tl.constexpr):
    """fp32 to the bits of float8, to the nearest, half to even; |x| is at most the largest number,
    up to a rounding error."""
    if not IN_INTERPRETER:
        return tl.inline_asm_elementwise(
            _TO_E5M2 if E5M2 else _TO_E4M3, "=r,r,r,r,r", [x], tl.uint8, is_pure=True, pack=4
        )
    # The interpreter's own cast rounds halves up, and wrongly at powers of two.
    mantissa = 2 if E5M2 else 3
    bias = 15 if E5M2 else 7
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    half = (1 << (22 - mantissa)) - 1 + ((size >> (23 - mantissa)) & 1)
    normal = ((size + half) >> (23 - mantissa)) - ((127 - bias) << mantissa)
    # below the normal numbers codes are multiples of one step; adding 2^23 steps rounds to it
    shifted = (tl.abs(x) + (128.0 if E5M2 else 16384.0)).to(tl.int32, bitcast=True)
    small = shifted - (0x43000000 if E5M2 else 0x46800000)
    code = tl.where(size < ((128 - bias) << 23), small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


# Kernels


@jit
def fp8_amax_kernel(x_ptr, parts_ptr, size, BLOCK: tl.constexpr):
    """Program p: the largest magnitude among blocks p, p + programs, ..., as bits."""
    most = tl.zeros([BLOCK], tl.int32)
    here = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(here, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        most = tl.maximum(most, _magnitude(tl.load(x_ptr + index, mask=index < size, other=0.0)))
    tl.store(parts_ptr + tl.program_id(0), tl.max(most, 0))


@jit
def fp8_column_amax_kernel(x_ptr, parts_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The same per column; program (c, p) takes tiles p, p + programs, ... of its columns."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    most = tl.zeros([ROWS, COLS], tl.int32)
    for start in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (col < cols)[None, :]
        x = tl.load(x_ptr + row * cols + col[None, :], mask=inside, other=0.0)
        most = tl.maximum(most, _magnitude(x))
    tl.store(parts_ptr + tl.program_id(1) * cols + col, tl.max(most, 0), mask=col < cols)


@jit
def fp8_quantize_kernel(
    x_ptr,
    parts_ptr,
    given_ptr,
    scale_ptr,
    codes_ptr,
    turned_ptr,
    rows,
    cols,
    turned_stride,
    LARGEST: tl.constexpr,
    E5M2: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One tile, straight and transposed (each unless its pointer is None).

    Unless the scale is given, every program computes it from the parts of `fp8_amax_kernel`, a
    kilobyte in cache, which saves a launch.
    """
    tiles = tl.cdiv(cols, COLS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0)
    if BY_COLUMN:
        part = tl.arange(0, PARTS_BLOCK)[:, None]
        known = (part < PARTS) & (col < cols)[None, :]
        bits = tl.max(tl.load(parts_ptr + part * cols + col[None, :], mask=known, other=0), 0)
        scale, inverse = _scale(bits, LARGEST)
        if tl.program_id(0) < tiles:
            tl.store(scale_ptr + col, scale, mask=col < cols)
        codes = _code(x.to(tl.float32) * inverse[None, :], E5M2)
    elif given_ptr is not None:
        inverse = tl.div_rn(tl.full([1, 1], 1.0, tl.float32), tl.load(given_ptr))
        codes = _code(x.to(tl.float32) * inverse, E5M2)
    else:
        part = tl.arange(0, PARTS_BLOCK)
        bits = tl.max(tl.load(parts_ptr + part, mask=part < PARTS, other=0), 0)
        scale, inverse = _scale(tl.full([1, 1], 0, tl.int32) + bits, LARGEST)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + tl.zeros([1, 1], tl.int32), scale)
        codes = _code(x.to(tl.float32) * inverse, E5M2)
    if codes_ptr is not None:
        tl.store(codes_ptr + row[:, None] * cols + col[None, :], codes, mask=inside)
    if turned_ptr is not None:  # rows beyond the last are zeros here: they pad a sum
        place = col.to(tl.int64)[:, None] * turned_stride + row[None, :]
        inside = (col < cols)[:, None] & (row < turned_stride)[None, :]
        tl.store(turned_ptr + place, tl.trans(codes), mask=inside)


@jit
def fp8_quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    cols,
    LARGEST: tl.constexpr,
    E5M2: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
):
    """One row with its own scale; a row longer than a block is read twice."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    if ONCE:
        x = tl.load(x_ptr + row * cols + col, mask=col < cols, other=0.0).to(tl.float32)
        scale, inverse = _scale(tl.max(_magnitude(x), 0, keep_dims=True), LARGEST)
        tl.store(codes_ptr + row * cols + col, _code(x * inverse, E5M2), mask=col < cols)
    else:
        most = tl.zeros([BLOCK], tl.int32)
        for start in range(0, cols, BLOCK):
            x = tl.load(x_ptr + row * cols + start + col, mask=start + col < cols, other=0.0)
            most = tl.maximum(most, _magnitude(x))
        scale, inverse = _scale(tl.max(most, 0, keep_dims=True), LARGEST)
        for start in range(0, cols, BLOCK):
            inside = start + col < cols
            x = tl.load(x_ptr + row * cols + start + col, mask=inside, other=0.0).to(tl.float32)
            codes = _code(x * inverse, E5M2)
            tl.store(codes_ptr + row * cols + start + col, codes, mask=inside)
    tl.store(scale_ptr + row + tl.zeros([1], tl.int32), scale)


# Host


@dataclass(frozen=True)
class Fp8Tile:
    """A program's tile, and its warps."""

    rows: int
    cols: int
    warps: int


# not measured; 128 bytes of a row of the transposed copy make a whole cache line
BOTH = Fp8Tile(128, 64, 8)
AMAX_BLOCK, AMAX_WARPS, AMAX_PROGRAMS = 8192, 8, 4  # programs per multiprocessor
COLUMN_PARTS = 32


def quantize(
    x: Tensor,
    dtype: torch.dtype,
    straight: bool = True,
    turned: bool = False,
    given: Tensor | None = None,
    config: Fp8Tile = BOTH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """x [R, C] with one scale: codes [R, C], their transpose [C, R up to a multiple of 16], padded
    with zeros, and the scale, an fp32 scalar. Codes that are not wanted are None.

    given: the scale, if it is known; then x is read once instead of twice, and None is returned.

    Bytes per 16-bit entry: 2 for the scale, 2 + 1 for one layout, 2 + 2 for both.
    """
    parts = scale = None
    if given is None:
        parts = _largest(x)
        scale = x.new_empty((), dtype=torch.float32)
    return (*_quantize(x, dtype, parts, given, scale, straight, turned, config), scale)


def quantize_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, C] with a scale per column: codes [C, R up to a multiple of 16] of its transpose, and
    the scales [1, C]."""
    rows, cols = x.shape
    count = min(COLUMN_PARTS, triton.cdiv(rows, 32))
    parts = x.new_empty((count, cols), dtype=torch.int32)
    grid = (triton.cdiv(cols, 64), count)
    launch(fp8_column_amax_kernel, grid, x, parts, rows, cols, num_warps=4, ROWS=32, COLS=64)
    scale = x.new_empty((1, cols), dtype=torch.float32)
    _, turned = _quantize(x, dtype, parts, None, scale, False, True, BOTH)
    assert turned is not None
    return turned, scale


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [R, C] with a scale per row: codes [R, C] and the scales [R, 1]."""
    rows, cols = x.shape
    codes = x.new_empty((rows, cols), dtype=torch.uint8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    block = min(8192, triton.next_power_of_2(cols))
    launch(
        fp8_quantize_rows_kernel,
        (rows,),
        x,
        codes,
        scale,
        cols,
        num_warps=min(8, max(1, block // 512)),
        LARGEST=LARGEST[dtype],
        E5M2=dtype == torch.float8_e5m2,
        BLOCK=block,
        ONCE=cols <= block,
    )
    return codes.view(dtype), scale


def _largest(x: Tensor) -> Tensor:
    """Bits of the largest magnitudes, one per program."""
    size = x.numel()
    programs = min(triton.cdiv(size, AMAX_BLOCK), AMAX_PROGRAMS * processors(x.device))
    parts = x.new_empty(programs, dtype=torch.int32)
    launch(fp8_amax_kernel, (programs,), x, parts, size, num_warps=AMAX_WARPS, BLOCK=AMAX_BLOCK)
    return parts


def _quantize(
    x: Tensor,
    dtype: torch.dtype,
    parts: Tensor | None,  # [parts], or [parts, C] for a scale per column
    given: Tensor | None,
    scale: Tensor | None,
    straight: bool,
    turned: bool,
    config: Fp8Tile,
) -> tuple[Tensor | None, Tensor | None]:
    """The codes of x and their transpose, each unless it is not wanted."""
    rows, cols = x.shape
    count = 1 if parts is None else parts.shape[0]
    padded = triton.cdiv(rows, 16) * 16
    codes = x.new_empty((rows, cols), dtype=torch.uint8) if straight else None
    across = x.new_empty((cols, padded), dtype=torch.uint8) if turned else None
    launch(
        fp8_quantize_kernel,
        (triton.cdiv(padded, config.rows) * triton.cdiv(cols, config.cols),),
        x,
        parts,
        given,
        scale,
        codes,
        across,
        rows,
        cols,
        padded,
        num_warps=config.warps,
        LARGEST=LARGEST[dtype],
        E5M2=dtype == torch.float8_e5m2,
        PARTS=count,
        PARTS_BLOCK=triton.next_power_of_2(count),
        BY_COLUMN=parts is not None and parts.ndim == 2,
        ROWS=config.rows,
        COLS=config.cols,
    )
    return tuple(c if c is None else c.view(dtype) for c in (codes, across))  # type: ignore[return-value]
