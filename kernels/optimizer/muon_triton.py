# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The two Triton kernels of Muon's step: from gradients to a stack, from a stack to params.

Leaves lie anywhere; the stack between them is one tensor, so that products can be batched. Each
launch uploads a table of addresses without waiting. `leaves_triton` says how programs divide the
leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernels.optimizer.leaves_triton import (
    BLOCK,
    WARPS,
    bits_of,
    nearest,
    number,
    pointer_to,
    triton_type,
    upload,
)
from kernels.runtime.launch import constant, jit, launch, tl

GATHERED = constant(3)  # of a leaf's row: momentum, gradient, place in the stack
MOVED = constant(5)  # param, place in the stack, copy, what the param keeps, the step's length
# VECTOR: elements that a thread moves at once, 16 bytes of fp32
SIZES: dict[str, Any] = {"BLOCK": BLOCK, "PIECE": 32 * WARPS, "VECTOR": 4, "num_warps": WARPS}


@jit
def _gathered(m, g, x, start, GRAD: tl.constexpr, VECTOR: tl.constexpr):
    """Element `start` of momentum, gradient and stack."""
    return (
        pointer_to(m, tl.float32, VECTOR) + start,
        pointer_to(g, GRAD, VECTOR) + start,
        pointer_to(x, tl.bfloat16, VECTOR) + start,
    )


@jit
def _blend(pointers, at, inside, scale_ptr, NEW: tl.constexpr):
    """The momentum of a piece, and the direction of Nesterov's method."""
    m_ptr, g_ptr, x_ptr = pointers
    m = tl.load(m_ptr + at, mask=inside)
    g = tl.load(g_ptr + at, mask=inside).to(tl.float32)
    if scale_ptr is not None:
        g *= tl.load(scale_ptr)
    m += NEW * (g - m)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(x_ptr + at, nearest(m + NEW * (g - m)), mask=inside)


@jit
def gather_kernel(
    table_ptr,  # int64 [leaves, GATHERED]
    scale_ptr,  # fp32 scalar, or None
    size,  # elements of every leaf
    NEW: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Momentum and stack entry of one block of a leaf."""
    row = table_ptr + tl.program_id(1) * GATHERED
    m, g, x = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = size - start
    if (((m | g | x) & 15) == 0) & (left >= BLOCK):
        pointers = _gathered(m, g, x, start, GRAD, VECTOR)
        _blend(pointers, tl.arange(0, BLOCK), None, scale_ptr, NEW)
    else:
        pointers = _gathered(m, g, x, start, GRAD, 0)
        stop = tl.minimum(left, BLOCK).to(tl.int32)
        piece = 0
        while piece < stop:
            at = piece + tl.arange(0, PIECE)
            _blend(pointers, at, at < stop, scale_ptr, NEW)
            piece += PIECE


@jit
def _moved(p, x, c, start, VECTOR: tl.constexpr):
    """Element `start` of param, stack and copy."""
    return (
        pointer_to(p, tl.float32, VECTOR) + start,
        pointer_to(x, tl.bfloat16, VECTOR) + start,
        pointer_to(c, tl.bfloat16, VECTOR) + start,
    )


@jit
def _move(pointers, at, inside, keep, length, COPY: tl.constexpr):
    p_ptr, x_ptr, c_ptr = pointers
    p = tl.load(p_ptr + at, mask=inside)
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    p = p * keep - length * x
    tl.store(p_ptr + at, p, mask=inside)
    if COPY:
        tl.store(c_ptr + at, nearest(p), mask=inside)


@jit
def move_kernel(
    table_ptr,  # int64 [leaves, MOVED]
    size,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Param and copy of one block of a leaf."""
    row = table_ptr + tl.program_id(1) * MOVED
    p, x, c = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    keep, length = number(row, 3), number(row, 4)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = size - start
    if (((p | x | c) & 15) == 0) & (left >= BLOCK):
        _move(_moved(p, x, c, start, VECTOR), tl.arange(0, BLOCK), None, keep, length, COPY)
    else:
        pointers = _moved(p, x, c, start, 0)
        stop = tl.minimum(left, BLOCK).to(tl.int32)
        piece = 0
        while piece < stop:
            at = piece + tl.arange(0, PIECE)
            _move(pointers, at, at < stop, keep, length, COPY)
            piece += PIECE


def gather_launch(
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    stack: Tensor,
    momentum: float,
    scale: Tensor | None,
) -> None:
    """Gradients of one dtype, contiguous; stack: bf16 [leaves, ...]."""
    rows = [
        [m.data_ptr(), g.data_ptr(), x.data_ptr()]
        for m, g, x in zip(momenta, grads, stack, strict=True)
    ]
    size = momenta[0].numel()
    grid = (-(-size // BLOCK), len(rows))
    table, grad = upload(rows, stack.device), triton_type(grads[0].dtype)
    launch(gather_kernel, grid, table, scale, size, NEW=1 - momentum, GRAD=grad, **SIZES)


def move_launch(
    params: Sequence[Tensor],
    stack: Tensor,
    keeps: Sequence[float],
    lengths: Sequence[float],
    copies: Sequence[Tensor] | None,
) -> None:
    """fp32 params; stack: bf16 [leaves, ...], contiguous."""
    copied = [0] * len(params) if copies is None else [c.data_ptr() for c in copies]
    rows = [
        [p.data_ptr(), x.data_ptr(), c, *bits_of(keep, length)]
        for p, x, c, keep, length in zip(params, stack, copied, keeps, lengths, strict=True)
    ]
    size = params[0].numel()
    grid = (-(-size // BLOCK), len(rows))
    table = upload(rows, stack.device)
    launch(move_kernel, grid, table, size, COPY=copies is not None, **SIZES)
