"""The FLOPs of a training step, and the peak FLOP/s of a device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from core import Batch, VLMConfig

# Dense bf16 tensor-core peaks with fp32 accumulation, in FLOP/s, from the vendor's data sheets
# (without sparsity). The first name that is part of the device's name counts.
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
    """Peak FLOP/s of a device in matrix products, or None if unknown.

    GPU: the data sheet's bf16 figure for any ``dtype``, so that MFU shows the cost of fp32. CPU:
    measured in ``dtype``, for 0.1 s.
    """
    if device.type == "cpu":
        return _measured(dtype)
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@lru_cache
def _measured(dtype: torch.dtype, size: int = 768) -> float:
    """The best of at least 10 ``[size, size]`` products: the first one compiles kernels."""
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    best, runs, until = float("inf"), 0, time.perf_counter() + 0.1
    while runs < 10 or time.perf_counter() < until:
        start = time.perf_counter()
        a @ b
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 2 * size**3 / best


@dataclass(frozen=True)
class Load:
    """The lengths of a batch's documents (tokens) and pictures (patches), without padding."""

    documents: Tensor
    pictures: Tensor

    @property
    def tokens(self) -> int:
        return int(self.documents.sum())


def measure_load(model: VLMConfig, batch: Batch, pad: int) -> Load:
    """The load of a CPU batch; pad: the padding token."""
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
    """FLOPs of one training step on a batch of this load, without recomputation.

    A frozen part costs less: its weights need no gradient (2/3), and if nothing before it is
    trained, neither do its inputs (1/3). learns: the trained parts, of text, vision and projector.
    adapters: only adapters are trained.
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


# Cached, because each step asks for them: 0.05 ms instead of 0.3 for `small`.
@lru_cache(1024)
def _per_token(model: VLMConfig, context: int) -> float:
    return model.flops_per_token(context)


@lru_cache(1024)
def _per_patch(model: VLMConfig, context: int) -> float:
    return model.flops_per_patch(context)


def _context(lengths: Tensor) -> float:
    """The mean over positions of the length of their segment."""
    return float(lengths.double().square().sum() / lengths.sum().clamp(min=1))
