# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernel that multiplies a gradient by the gradient of its loss, in place."""

from __future__ import annotations

from torch import Tensor

from kernels.runtime.launch import jit, launch, processors, tl, triton


@jit
def cross_entropy_scale_kernel(x_ptr, factor_ptr, stride, cols, tiles, total, BLOCK: tl.constexpr):
    """x *= factor, in place; reads and writes nothing if the factor is 1."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        begin = tl.program_id(0).to(tl.int64)
        for turn in range(tl.cdiv(total - begin, tl.num_programs(0))):
            at = begin + turn * tl.num_programs(0)
            col = (at % tiles) * BLOCK + tl.arange(0, BLOCK)
            ptr = x_ptr + (at // tiles) * stride + col
            x = tl.load(ptr, mask=col < cols, other=0.0).to(tl.float32)
            tl.store(ptr, (x * factor).to(x_ptr.dtype.element_ty), mask=col < cols)


def scale_rows(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place; x has contiguous rows or columns.

    The device reads the factor: if it is 1, no program reads or writes x.
    """
    if x.ndim == 2 and x.stride(0) < x.stride(1):
        x = x.t()
    flat = x.view(1, -1) if x.is_contiguous() else x
    rows, cols = flat.shape
    block = min(8192, triton.next_power_of_2(max(cols, 16)))
    tiles = triton.cdiv(cols, block)
    total = rows * tiles
    launch(
        cross_entropy_scale_kernel,
        (min(total, processors(x.device) * 8),),
        flat,
        factor,
        flat.stride(0),
        cols,
        tiles,
        total,
        num_warps=8,
        BLOCK=block,
    )
