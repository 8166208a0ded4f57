# ruff: noqa: N803 -- constexprs are upper case, as everywhere in Triton
# mypy: allow-untyped-defs
"""One launch for many leaves: pieces that the optimizers' Triton kernels share.

A program takes `BLOCK` elements of one leaf, and reads the addresses of leaves from a table on the
device. The compiler knows nothing about such addresses. A program therefore tests them: if all are
multiples of 16 bytes and its block is full, it moves vectors without a mask (masks would split the
loads into single elements); otherwise it goes through its block in small pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import IN_INTERPRETER, jit, tl

BLOCK, WARPS = 2048, 8  # elements per program; 8 per thread


@jit
def number(table, at):
    """An fp32 number in the low half of an int64."""
    return tl.load(table + at).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def pointer_to(address, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """VECTOR: 16-bit elements that a thread moves at once (fp32: 16 bytes); 0: any alignment."""
    pointer = address.to(tl.pointer_type(TYPE))
    if VECTOR:
        return tl.multiple_of(pointer, 16 if tl.float32 == TYPE else 2 * VECTOR)
    else:  # noqa: RET505 -- what follows an `if` without `else` is compiled too
        return pointer


@jit
def nearest(x):
    """fp32 to bf16, ties to even."""
    if IN_INTERPRETER:  # whose cast truncates
        bits = x.to(tl.uint32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(x == x, even, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505
        return x.to(tl.bfloat16)


def triton_type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def bits_of(*numbers: float) -> tuple[int, ...]:
    """fp32 numbers as the words that `number` reads."""
    return struct.unpack(f"<{len(numbers)}i", struct.pack(f"<{len(numbers)}f", *numbers))


def upload(words: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The words as int64 on the device, without waiting."""
    table = torch.tensor(words, dtype=torch.int64)
    # The allocator reuses a block of pinned memory only after its copy has finished.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
