"""A hash that makes noise of numbers: no state, the same on every device, in every order."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

LOW = 0xFFFFFFFF  # 32 bits
Word = TypeVar("Word", int, Tensor)


def lowbias32(h: Word) -> Word:
    """Mixes numbers below 2^32 (Wellons 2018, https://nullprogram.com/blog/2018/07/31/): int, or
    an int64 tensor, whose overflow leaves the lower bits right.

    >>> lowbias32(1), lowbias32(2)
    (1753845952, 3507691905)
    """
    h = (h ^ (h >> 16)) * 0x7FEB352D & LOW
    h = (h ^ (h >> 15)) * 0x846CA68B & LOW
    return h ^ (h >> 16)
