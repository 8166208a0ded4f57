# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernel of `adamw_`: one launch for many leaves, each number moved once.

What stays from step to step is uploaded once (`AdamWPlan`); one small copy per step brings the
addresses of the gradients and the numbers of the step. A new learning rate compiles nothing, and
nothing waits for the device. `leaves_triton` says how programs divide the leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
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

COLUMNS = constant(6)  # of a leaf's row: param, exp_avg, exp_avg_sq, copy, elements, name
HEADER = constant(4)  # before the gradients' addresses: rate, two bias corrections, key
BF16_MAX = constant(torch.finfo(torch.bfloat16).max)


@jit
def _mix(h):
    """lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/), on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@jit
def _rounded(x, noise, TYPE: tl.constexpr):
    """x in TYPE; to bf16 stochastically by 16 random bits: up with the probability of the fraction
    that is cut off. From the largest bf16 on, and for NaN, to the nearest, so that x stays finite.
    """
    if tl.bfloat16 == TYPE:
        bits = x.to(tl.uint32, bitcast=True) + noise
        drawn = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where(tl.abs(x) < BF16_MAX, drawn, nearest(x))
    else:  # noqa: RET505 -- what follows an `if` without `else` is compiled too
        return x


@jit
def _pointers(
    addresses,
    start,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    GRAD: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Element `start` of param, moments, copy and gradient."""
    p, m, v, c, g = addresses
    return (
        pointer_to(p, PARAM, VECTOR) + start,
        pointer_to(m, MOMENT, VECTOR) + start,
        pointer_to(v, MOMENT, VECTOR) + start,
        pointer_to(c, tl.bfloat16, VECTOR) + start,
        pointer_to(g, GRAD, VECTOR) + start,
    )


@jit
def _advance(
    pointers,  # of `_pointers`
    at,  # offsets
    inside,  # their mask, or None
    place,  # offsets in the whole leaf: with the key, the source of the noise
    key,
    scale_ptr,
    step_ptr,
    decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    COPY: tl.constexpr,
):
    """The step of one piece of a leaf."""
    p_ptr, m_ptr, v_ptr, c_ptr, g_ptr = pointers
    p = tl.load(p_ptr + at, mask=inside).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside).to(tl.float32)
    if scale_ptr is not None:
        g *= tl.load(scale_ptr)
    rate, first, second = number(step_ptr, 0), number(step_ptr, 1), number(step_ptr, 2)

    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    p -= rate * decay * p
    if p_ptr.dtype.element_ty == tl.bfloat16:  # rounding to bf16 hides the last bit of fp32
        root = tl.sqrt(v)
    else:
        root = tl.sqrt_rn(v)
    p -= rate * first * m / (root * second + EPS)

    one = _mix(place ^ key)  # dead code if every leaf is fp32
    two = one * 0x9E3779B1  # its high half depends on all of one
    tl.store(p_ptr + at, _rounded(p, one & 0xFFFF, p_ptr.dtype.element_ty), mask=inside)
    tl.store(m_ptr + at, _rounded(m, one >> 16, m_ptr.dtype.element_ty), mask=inside)
    tl.store(v_ptr + at, _rounded(v, two >> 16, v_ptr.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(c_ptr + at, nearest(p), mask=inside)


@jit
def adamw_kernel(
    leaves_ptr,  # int64 [leaves, COLUMNS]
    decays_ptr,  # fp32 [leaves]
    chunks_ptr,  # int32 [programs, 2]: the leaf, and which of its blocks
    step_ptr,  # int64 [HEADER + leaves]
    scale_ptr,  # fp32 scalar, or None
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The step of one block of a leaf."""
    leaf = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    row = leaves_ptr + leaf * COLUMNS
    p, m, v, c = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    g = tl.load(step_ptr + HEADER + leaf)
    left = tl.load(row + 4) - start
    decay = tl.load(decays_ptr + leaf)
    # each 2^32 elements of a leaf have a key of their own
    key = _mix(tl.load(step_ptr + 3).to(tl.uint32) + tl.load(row + 5).to(tl.uint32))
    key = _mix(key + (start >> 32).to(tl.uint32))
    place = start.to(tl.uint32)
    where = (p, m, v, c, g)
    if (((p | m | v | c | g) & 15) == 0) & (left >= BLOCK):
        ptrs = _pointers(where, start, PARAM, MOMENT, GRAD, VECTOR)
        at = tl.arange(0, BLOCK)
        spot = place + at.to(tl.uint32)
        _advance(ptrs, at, None, spot, key, scale_ptr, step_ptr, decay, BETA1, BETA2, EPS, COPY)
    else:
        ptrs = _pointers(where, start, PARAM, MOMENT, GRAD, 0)
        stop = tl.minimum(left, BLOCK).to(tl.int32)
        piece = 0
        while piece < stop:
            at = piece + tl.arange(0, PIECE)
            inside = at < stop
            spot = place + at.to(tl.uint32)
            _advance(
                ptrs, at, inside, spot, key, scale_ptr, step_ptr, decay, BETA1, BETA2, EPS, COPY
            )
            piece += PIECE


class AdamWPlan(NamedTuple):
    """What does not change from step to step, on the device."""

    leaves: Tensor  # int64 [leaves, COLUMNS]
    decays: Tensor  # fp32 [leaves]
    chunks: Tensor  # int32 [programs, 2]
    block: int  # elements per program


class LeafTypes(NamedTuple):
    """What the leaves of one launch have in common."""

    param: torch.dtype
    grad: torch.dtype
    moment: torch.dtype
    copy: bool  # whether they have bf16 copies


@functools.lru_cache(maxsize=16)  # a training run has one plan per group
def make_plan(
    rows: tuple[tuple[int, ...], ...],
    decays: tuple[float, ...],
    device: torch.device,
    block: int = BLOCK,
) -> AdamWPlan:
    """The tables of leaves with these rows of `COLUMNS` numbers and these weight decays.

    The arguments hold everything that a plan depends on: if memory is freed and reused, its new
    leaves get a plan of their own unless they are the same size.
    """
    counts = torch.tensor([-(-elements // block) for *_, elements, _ in rows])
    leaf = torch.repeat_interleave(torch.arange(len(rows)), counts)
    chunk = torch.arange(len(leaf)) - (counts.cumsum(0) - counts)[leaf]
    return AdamWPlan(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(decays, dtype=torch.float32).to(device),
        torch.stack([leaf, chunk], 1).to(torch.int32).to(device),
        block,
    )


def step_table(grads: Sequence[Tensor], numbers: Sequence[float], key: int) -> Tensor:
    """What changes: fp32 numbers as bits, the key of the rounding, the addresses of gradients."""
    words = [*bits_of(*numbers), key, *(grad.data_ptr() for grad in grads)]
    return upload(words, grads[0].device)


def adamw_launch(
    plan: AdamWPlan,
    step: Tensor,
    scale: Tensor | None,
    types: LeafTypes,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    num_warps: int = WARPS,
) -> None:
    """One step over the leaves of a plan."""
    launch(
        adamw_kernel,
        (len(plan.chunks),),
        plan.leaves,
        plan.decays,
        plan.chunks,
        step,
        scale,
        BETA1=beta1,
        BETA2=beta2,
        EPS=eps,
        PARAM=triton_type(types.param),
        GRAD=triton_type(types.grad),
        MOMENT=triton_type(types.moment),
        COPY=types.copy,
        BLOCK=plan.block,
        PIECE=min(plan.block, 32 * num_warps),
        # per thread, 16 bytes of the widest state
        VECTOR=4 if torch.float32 in (types.param, types.moment) else 8,
        num_warps=num_warps,
    )
