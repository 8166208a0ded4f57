"""Symmetric int8 weights with one fp32 scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_weight(w: Tensor) -> tuple[Tensor, Tensor]:
    """``w [..., O, I]``, floating-point -> ``(q int8 [..., O, I], scale fp32 [..., O, 1])`` with
    ``q * scale ~ w``.

    scale = max |row| / 127 in fp32 (1 for a zero row); q = w / scale, rounded half to even and
    clamped to +-127, so |q * scale - w| <= scale / 2 up to fp32 rounding (Jacob et al. 2017,
    https://arxiv.org/abs/1712.05877, without a zero point). A row with a NaN or infinity gets a
    non-finite scale. Raises ValueError if w is not a floating-point matrix or a stack of them.
    """
    if w.ndim < 2 or not w.is_floating_point():
        raise ValueError(f"int8 needs a floating-point matrix, not {w.dtype} {list(w.shape)}")
    w = w.float()
    scale = w.abs().amax(dim=-1, keepdim=True) / 127  # [..., O, 1]
    scale = torch.where(scale == 0, 1.0, scale)
    q = (w / scale).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def dequantize_weight(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q [..., O, I] * scale [..., O, 1]``, multiplied in fp32 and cast to ``dtype``."""
    return (q.float() * scale).to(dtype)
