"""How much arithmetic a batch takes, and how much the device could do in the same time."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from core import Batch, VLMConfig

# Dense bf16 tensor-core peaks with fp32 accumulation, in FLOP/s, from the vendor's data sheets
# (without sparsity). The first name that occurs in the device's own is taken.
PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can do in matmuls of ``dtype``, or None if unknown.

    GPUs: the data sheet's bf16 figure, whatever ``dtype`` is (using fp32 is a choice that MFU
    should show). CPU: measured, 0.1 s.
    """
    if device.type == "cpu":
        return _measured(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@lru_cache
def _measured(dtype: torch.dtype, size: int = 768) -> float:
    """The best of repeated ``[size, size]`` matmuls, 10 at least: the first compiles kernels."""
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    best, runs, until = float("inf"), 0, time.perf_counter() + 0.1
    while runs < 10 or time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * size**3 / best


@dataclass(frozen=True)
class Load:
    """What really lies in a batch: lengths of documents (tokens) and of pictures (patches)."""

    documents: Tensor
    pictures: Tensor

    @property
    def tokens(self) -> int:
        return int(self.documents.sum())


def measure_load(model: VLMConfig, batch: Batch, pad: int) -> Load:
    """The load of a batch that still lies on the CPU; pad: the token that fills rows up."""
    tokens, ends = batch["tokens"], batch["cu_seqlens"].long()
    lengths, starts = ends.diff(), ends[:-1]
    documents = lengths[(lengths > 0) & (tokens[starts.clamp(max=len(tokens) - 1)] != pad)]
    if "patches" not in batch or model.vision is None or model.projector is None:
        return Load(documents, documents.new_zeros(0))
    slots, ends = batch["image_slots"], batch["image_cu_seqlens"].long()
    if model.projector.kind == "mlp":
        first = ends[:-1] // model.vision.merge**2
    else:
        first = torch.arange(len(ends) - 1) * model.projector.queries
    used = slots[first.clamp(max=len(slots) - 1)] < len(tokens)
    lengths = ends.diff()
    return Load(documents, lengths[(lengths > 0) & used])


def training_flops(
    model: VLMConfig, load: Load, learns: Iterable[str], *, adapters: bool = False
) -> float:
    """Operations of one training step on a batch of this load, recomputation not counted.

    A frozen part costs less: its weights need no gradient (2/3), and where nothing before it
    learns the gradient does not pass it either (1/3). learns: which of text, vision and
    projector do. adapters: they alone do, beside weights that are frozen.
    """
    learns = set(learns)
    through = 2 / 3 if learns & {"vision", "projector"} else 1 / 3
    full = 2 / 3 if adapters else 1.0
    share = full if "text" in learns else through
    flops = share * load.tokens * _per_token(model, round(_context(load.documents)))
    if len(load.pictures):
        share = full if "vision" in learns else 1 / 3
        patches, context = int(load.pictures.sum()), round(_context(load.pictures))
        flops += share * patches * _per_patch(model, context)
    return flops


# Of every step again: 0.3 ms for `small`, 0.05 where they are remembered.
@lru_cache(1024)
def _per_token(model: VLMConfig, context: int) -> float:
    return model.flops_per_token(context)


@lru_cache(1024)
def _per_patch(model: VLMConfig, context: int) -> float:
    return model.flops_per_patch(context)


def _context(lengths: Tensor) -> float:
    """Mean length of the segment that a position lies in."""
    return float(lengths.double().square().sum() / lengths.sum().clamp(min=1))
