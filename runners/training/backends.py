"""The lines at the start of a run about its kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kernels.attention.backends import AttentionCall
from kernels.runtime.dispatch import choose, requested, select, why_not

_FLASH_NAMES = {
    "flash-attn-4": "flash-attn 4",
    "flash-attn": "flash-attn 2",
    "torch-varlen": "torch varlen",
    "cudnn": "cuDNN",
    "triton": "triton",
}


def report_backends(
    device: str,
    dtype: torch.dtype,
    attentions: Mapping[str, Mapping[str, Any]],
    operations: Sequence[str],
    *,
    fused_loss: bool = True,
    flash_attention: bool = True,
    fused_kernels: bool = True,
    compiling: bool = False,
) -> list[str]:
    """The backends that a run uses: one line per optimisation, with the reason if it is off.

    No kernel runs here. If a library fails its proof later, a warning says so.

    Args:
        device: where the model runs.
        dtype: of attention's inputs.
        attentions: for each of the model's attentions, by name, the known fields of
            `AttentionCall` (head_dim, group, max_seqlen, length). Attentions with the same
            backend share a line.
        operations: which of rms_norm, layer_norm, swiglu and rope the model has.
        fused_loss, flash_attention, fused_kernels: the user's flags.

    >>> text = {"text": {"head_dim": 64}}
    >>> off = {"flash_attention": False, "fused_kernels": False}
    >>> for line in report_backends("cpu", torch.float32, text, (), **off): print(line)
    Using fused cross-entropy (torch, in chunks)
    Flash attention off; using padded attention (torch)
    Fused kernels off
    """
    loss = "Fused loss off"
    if fused_loss:
        chosen = choose("linear_cross_entropy", device, dtype)
        loss = f"Using fused cross-entropy ({'torch, in chunks' if chosen == 'torch' else chosen})"
    calls = {
        name: AttentionCall(device, dtype, compiling=compiling, **known)
        for name, known in attentions.items()
    }
    lines = [loss, *_report_attention(calls, flash_attention)]
    if not fused_kernels:
        return [*lines, "Fused kernels off"]
    served: dict[str, list[str]] = {}
    for op in operations:
        backend = "asked" if requested(op) == "torch" else choose(op, device, dtype)
        served.setdefault(backend, []).append(op)
    said = {
        "triton": "Using fused kernels (triton)",
        "asked": "Fused kernels off, torch was asked for",
        "torch": f"No fused kernels: {why_not('rms_norm', 'triton', device, dtype)}; using torch, "
        "with backwards that recompute",
    }
    return lines + [f"{said[b]}: {', '.join(served[b])}" for b in said if b in served]


def _report_attention(calls: Mapping[str, AttentionCall], wanted: bool) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, call in calls.items():
        names.setdefault(select("attention", call, prove=False), []).append(name)
    lines = []
    for backend, served in names.items():
        of = f" for {', '.join(served)}" if len(names) > 1 else ""
        if backend in _FLASH_NAMES:
            lines.append(f"Using flash attention ({_FLASH_NAMES[backend]}){of}")
            continue
        why = ""
        if wanted:
            asked = requested("attention")
            first = calls[served[0]]
            why = f": {asked} was asked for" if asked else ""
            why = why or f": {why_not('attention', 'torch-varlen', *first)}"
        lines.append(f"Flash attention off{why}; using {backend} attention (torch){of}")
    return lines
