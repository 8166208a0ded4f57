# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# ruff: noqa: SIM300 -- which it takes for Yoda's
# mypy: allow-untyped-defs
"""The Triton kernel of `adamw_`: one launch for many leaves, each number moved once.

A program takes `BLOCK` elements of one leaf. Where the leaves lie is read from tables on the
device: what stays from step to step is uploaded once (`Plan`), the gradients' addresses and the
step's numbers with one small copy a step. Nothing is compiled again when the learning rate changes,
and nothing waits.

Addresses that come out of a table tell the compiler nothing. A program therefore looks at them: if
all are multiples of 16 bytes and its block is full, it moves `VECTOR` elements at once, with no
mask (a mask that may end anywhere makes loads of single elements); else it goes through its block
in small pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.launch import IN_INTERPRETER, constant, jit, launch, tl

BLOCK, WARPS = 2048, 8  # elements a program; 8 a thread
COLUMNS = constant(6)  # of a leaf's row: param, exp_avg, exp_avg_sq, copy, elements, name
HEADER = constant(4)  # before the gradients' addresses: rate, two bias corrections, key
BF16_MAX = constant(torch.finfo(torch.bfloat16).max)
TYPES = {} if tl is None else {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@jit
def _mix(h):
    """lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/), on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@jit
def number(table, at):
    """An fp32 number that lies in the low half of an int64."""
    return tl.load(table + at).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def pointer_to(address, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """For vectors of 16 bytes of fp32, of `VECTOR` elements of 16 bits."""
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16 if TYPE == tl.float32 else 2 * VECTOR)


@jit
def nearest(x):
    """fp32 to bf16, ties to even."""
    if IN_INTERPRETER:  # it cuts off
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, even, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 -- what follows an `if` without `else` is compiled too
        return x.to(tl.bfloat16)


@jit
def _rounded(x, noise, TYPE: tl.constexpr):
    """x in TYPE; in bf16, up with the probability of what is cut off, by 16 random bits. From the
    largest number of bf16 on, and for NaN, to the nearest: what is finite there stays finite."""
    if TYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True) + noise
        drawn = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where(tl.abs(x) < BF16_MAX, drawn, nearest(x))
    else:  # noqa: RET505
        return x


@jit
def _advance(
    p_ptr, m_ptr, v_ptr, c_ptr, g_ptr,  # where the piece begins
    at, inside, place, key,  # offsets, their mask or None; what the noise is made of
    scale_ptr, step_ptr, decay,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The step of one piece of a leaf."""
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
    if p_ptr.dtype.element_ty == tl.bfloat16:  # an ulp of fp32 is nothing here: no slow path
        root = tl.sqrt(v)
    else:
        root = tl.sqrt_rn(v)
    p -= rate * first * m / (root * second + EPS)

    one = _mix(place ^ key)  # not computed where all is fp32
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
    leaf = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    row = leaves_ptr + leaf * COLUMNS
    p, m, v, c = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    g = tl.load(step_ptr + HEADER + leaf)
    left = tl.load(row + 4) - start
    decay = tl.load(decays_ptr + leaf)
    # a leaf of more than 2^32 elements goes on with another key
    key = _mix(tl.load(step_ptr + 3).to(tl.uint32) + tl.load(row + 5).to(tl.uint32))
    key = _mix(key + (start >> 32).to(tl.uint32))
    place = start.to(tl.uint32)
    if (((p | m | v | c | g) & 15) == 0) & (left >= BLOCK):
        at = tl.arange(0, BLOCK)
        _advance(
            pointer_to(p, PARAM, VECTOR) + start,
            pointer_to(m, MOMENT, VECTOR) + start,
            pointer_to(v, MOMENT, VECTOR) + start,
            pointer_to(c, tl.bfloat16, VECTOR) + start,
            pointer_to(g, GRAD, VECTOR) + start,
            at, None, place + at.to(tl.uint32), key,
            scale_ptr, step_ptr, decay, BETA1, BETA2, EPS, COPY,
        )  # fmt: skip
    else:
        stop = tl.minimum(left, BLOCK).to(tl.int32)
        piece = 0
        while piece < stop:
            at = piece + tl.arange(0, PIECE)
            _advance(
                p.to(tl.pointer_type(PARAM)) + start,
                m.to(tl.pointer_type(MOMENT)) + start,
                v.to(tl.pointer_type(MOMENT)) + start,
                c.to(tl.pointer_type(tl.bfloat16)) + start,
                g.to(tl.pointer_type(GRAD)) + start,
                at, at < stop, place + at.to(tl.uint32), key,
                scale_ptr, step_ptr, decay, BETA1, BETA2, EPS, COPY,
            )  # fmt: skip
            piece += PIECE


@dataclass(frozen=True)
class Plan:
    """What does not change from step to step, on the device."""

    leaves: Tensor  # int64 [leaves, COLUMNS]
    decays: Tensor  # fp32 [leaves]
    chunks: Tensor  # int32 [programs, 2]
    block: int  # elements a program


def make_plan(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    decays: Sequence[float],
    names: Sequence[int],
    block: int = BLOCK,
) -> Plan:
    """The tables of these leaves; names: what tells their noise apart."""
    device = params[0].device
    rows = [
        [p.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if c is None else c.data_ptr(), p.numel(), i]
        for p, m, v, c, i in zip(params, exp_avgs, exp_avg_sqs, copies, names, strict=True)
    ]
    counts = torch.tensor([-(-p.numel() // block) for p in params])
    leaf = torch.repeat_interleave(torch.arange(len(params)), counts)
    chunk = torch.arange(len(leaf)) - (counts.cumsum(0) - counts)[leaf]
    return Plan(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(decays, dtype=torch.float32).to(device),
        torch.stack([leaf, chunk], 1).to(torch.int32).to(device),
        block,
    )


def step_table(grads: Sequence[Tensor], numbers: Sequence[float], key: int) -> Tensor:
    """What changes: fp32 numbers as bits, the key of the rounding, the gradients' addresses."""
    words = [*bits_of(*numbers), key, *(grad.data_ptr() for grad in grads)]
    return upload(words, grads[0].device)


def bits_of(*numbers: float) -> tuple[int, ...]:
    """fp32 numbers as what `number` reads."""
    return struct.unpack(f"<{len(numbers)}i", struct.pack(f"<{len(numbers)}f", *numbers))


def upload(words: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 on the device, without waiting."""
    table = torch.tensor(words, dtype=torch.int64)
    # The allocator of pinned memory hands a block out again only when its copy has been made.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def adamw_launch(
    plan: Plan,
    step: Tensor,
    scale: Tensor | None,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    param: torch.dtype,
    grad: torch.dtype,
    moment: torch.dtype,
    copy: bool,
    vector: int | None = None,
    num_warps: int = WARPS,
) -> None:
    """One step over the leaves of a plan. vector: elements that a thread moves at once; left out,
    what fills 16 bytes of the states' widest type."""
    if vector is None:
        vector = 4 if torch.float32 in (param, moment) else 8
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
        PARAM=TYPES[param],
        GRAD=TYPES[grad],
        MOMENT=TYPES[moment],
        COPY=copy,
        BLOCK=plan.block,
        PIECE=min(plan.block, 32 * num_warps),
        VECTOR=vector,
        num_warps=num_warps,
    )
