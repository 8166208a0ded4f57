# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""The Triton kernel of `adamw_`: one launch for many leaves, each number moved once.

A program takes `BLOCK` elements of one leaf. Where the leaves lie is read from tables on the
device: what stays from step to step is uploaded once (`Plan`), the gradients' addresses and the
step's numbers with one small copy a step. Nothing is compiled again when the learning rate changes,
and nothing waits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import constant, jit, launch, tl

BLOCK, WARPS = 2048, 8  # elements a program; 8 a thread: 16 bytes of bf16
COLUMNS = constant(5)  # of a leaf's row: param, exp_avg, exp_avg_sq, copy, elements
HEADER = constant(4)  # before the gradients' addresses: rate, two bias corrections, key
_TYPES = {} if tl is None else {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


@jit
def _mix(h):
    """lowbias32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/), on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@jit
def _number(table, at):
    """An fp32 number that lies in the low half of an int64."""
    return tl.load(table + at).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _address(table, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table + at)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(TYPE))


@jit
def _write(ptr, at, inside, x, noise, STOCHASTIC: tl.constexpr):
    """x in the dtype of ptr: to the nearest, or up with the probability of what is cut off, for
    which noise holds 16 random bits."""
    if STOCHASTIC:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + noise, bits)  # the carry would make a number of a NaN
        x = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


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
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    leaf = tl.load(chunks_ptr + 2 * tl.program_id(0)).to(tl.int64)
    block = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    row = leaf * COLUMNS
    start = block * BLOCK
    p_ptr = _address(leaves_ptr, row, PARAM, ALIGNED) + start
    m_ptr = _address(leaves_ptr, row + 1, MOMENT, ALIGNED) + start
    v_ptr = _address(leaves_ptr, row + 2, MOMENT, ALIGNED) + start
    g_ptr = _address(step_ptr, HEADER + leaf, GRAD, ALIGNED) + start
    at = tl.arange(0, BLOCK)  # from start: offsets of 32 bits
    inside = at < tl.load(leaves_ptr + row + 4) - start
    p = tl.load(p_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        g *= tl.load(scale_ptr)

    rate, first, second = _number(step_ptr, 0), _number(step_ptr, 1), _number(step_ptr, 2)
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    p -= rate * tl.load(decays_ptr + leaf) * p
    p -= rate * first * m / (tl.sqrt_rn(v) * second + EPS)

    PARAM_BF16: tl.constexpr = PARAM.primitive_bitwidth == 16  # noqa: N806
    MOMENT_BF16: tl.constexpr = MOMENT.primitive_bitwidth == 16  # noqa: N806
    one = tl.zeros([BLOCK], tl.uint32)
    two = one
    if PARAM_BF16 or MOMENT_BF16:
        key = tl.load(step_ptr + 3).to(tl.uint32)
        # a leaf of more than 2^32 elements goes on with another key
        here = _mix(_mix(key + leaf.to(tl.uint32)) + (start >> 32).to(tl.uint32))
        one = _mix((start.to(tl.uint32) + at.to(tl.uint32)) ^ here)
        two = _mix(one + 0x9E3779B9)
    _write(p_ptr, at, inside, p, one & 0xFFFF, PARAM_BF16)
    _write(m_ptr, at, inside, m, one >> 16, MOMENT_BF16)
    _write(v_ptr, at, inside, v, two & 0xFFFF, MOMENT_BF16)
    if COPY:
        c_ptr = _address(leaves_ptr, row + 3, tl.bfloat16, ALIGNED) + start
        tl.store(c_ptr + at, p.to(tl.bfloat16), mask=inside)


@dataclass(frozen=True)
class Plan:
    """What does not change from step to step, on the device."""

    leaves: Tensor  # int64 [leaves, COLUMNS]
    decays: Tensor  # fp32 [leaves]
    chunks: Tensor  # int32 [programs, 2]
    aligned: bool  # every address is a multiple of 16 bytes


def make_plan(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    decays: Sequence[float],
    block: int = BLOCK,
) -> Plan:
    device = params[0].device
    rows = [
        [p.data_ptr(), m.data_ptr(), v.data_ptr(), 0 if c is None else c.data_ptr(), p.numel()]
        for p, m, v, c in zip(params, exp_avgs, exp_avg_sqs, copies, strict=True)
    ]
    counts = torch.tensor([-(-p.numel() // block) for p in params])
    leaf = torch.repeat_interleave(torch.arange(len(params)), counts)
    chunk = torch.arange(len(leaf)) - (counts.cumsum(0) - counts)[leaf]
    return Plan(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(decays, dtype=torch.float32).to(device),
        torch.stack([leaf, chunk], 1).to(torch.int32).to(device),
        all(address % 16 == 0 for row in rows for address in row[:4]),
    )


def step_table(grads: Sequence[Tensor], numbers: Sequence[float], key: int) -> Tensor:
    """What changes: fp32 numbers as bits, the key of the rounding, the gradients' addresses."""
    bits = struct.unpack(f"<{len(numbers)}i", struct.pack(f"<{len(numbers)}f", *numbers))
    words = [*bits, key, *(grad.data_ptr() for grad in grads)]
    table = torch.tensor(words, dtype=torch.int64)
    device = grads[0].device
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
    aligned: bool,
    block: int = BLOCK,
    num_warps: int = WARPS,
) -> None:
    """One step over the leaves of a plan; aligned: the gradients too are."""
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
        PARAM=_TYPES[param],
        GRAD=_TYPES[grad],
        MOMENT=_TYPES[moment],
        COPY=copy,
        ALIGNED=plan.aligned and aligned,
        BLOCK=block,
        num_warps=num_warps,
    )
