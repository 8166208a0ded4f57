"""Weights as int8 with one scale per output channel."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight [O, I]`` -> ``(int8 [O, I], scale fp32 [O, 1])``, symmetric: weight ~ int8 * scale.

    scale = max |row| / 127 (1 for a row of zeros); rounding half to even, in fp32. The error is at
    most scale / 2 per element.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest == 0, torch.ones_like(largest), largest / 127)
    return (rows / scale).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_weight(quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``int8 [O, I]`` and ``scale [O, 1]`` -> ``[O, I]`` in ``dtype``, multiplied in fp32."""
    return (quantized.float() * scale.float()).to(dtype)
