"""Cross-entropy in torch: the differentiable formula, and the fast path by chunks of rows.

Chunks bound the fp32 copies of bf16 logits. `linear_cross_entropy` shares the arithmetic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.runtime.autograd import accumulation_dtype

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # logits at a time: 1 MB, 256 MB in fp32


class LossOptions(NamedTuple):
    """The terms of the loss, in the order in which operators take them."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


# Reference: differentiable to any order


def token_losses(z: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """Losses [n] of logits [n, V] in the accumulation dtype and labels [n] in [0, V).

    -(1 - s) log p_label - s * mean_v log p_v + z_loss * (log sum exp)^2, with s = label_smoothing.
    """
    z = _capped(z, options.softcap)
    lse = z.logsumexp(-1)
    loss = lse - (1.0 - options.label_smoothing) * z.gather(-1, labels[:, None]).squeeze(-1)
    if options.label_smoothing:
        loss = loss - options.label_smoothing * z.mean(-1)
    if options.z_loss:
        loss = loss + options.z_loss * lse.square()
    return loss


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    """Gemma-2's logit softcap, cap * tanh(z / cap)."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def cross_entropy_reference(logits: Tensor, labels: Tensor, options: LossOptions) -> Tensor:
    """What `cross_entropy` computes, as one expression."""
    valid = labels != options.ignore_index
    # masked before any arithmetic: an ignored row may hold NaN, and 0 * NaN is NaN in a backward
    z = logits.masked_fill(~valid[:, None], 0.0).to(accumulation_dtype(logits.dtype))
    losses = token_losses(z, labels.masked_fill(~valid, 0), options)
    return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


# Fast path


def losses_and_gradients_(
    z: Tensor, labels: Tensor, options: LossOptions, gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """`token_losses` [n] and, if asked for, their gradients with respect to z [n, V].

    z is overwritten. One exp per entry serves both, and the losses have the same bits with and
    without gradients.
    """
    _, label_smoothing, z_loss, softcap = options
    y = labels[:, None]
    z = _capped(z, softcap)
    target = z.gather(1, y)
    mean = z.mean(-1, keepdim=True) if label_smoothing else None
    slope = 1.0 - (z / softcap).square() if softcap is not None and gradients else None
    top = z.amax(-1, keepdim=True)
    d = z.sub_(top).exp_()
    total = d.sum(-1, keepdim=True)
    lse = top + total.log()
    losses = lse - (1.0 - label_smoothing) * target
    if mean is not None:
        losses = losses - label_smoothing * mean
    if z_loss:
        losses = losses + z_loss * lse.square()
    if not gradients:
        return losses.squeeze(1), None
    d *= (1.0 + 2.0 * z_loss * lse) / total if z_loss else 1.0 / total
    d.scatter_(1, y, d.gather(1, y) - (1.0 - label_smoothing))
    if label_smoothing:
        d -= label_smoothing / z.shape[1]
    if slope is not None:
        d *= slope
    return losses.squeeze(1), d


def by_chunks(
    logits: Tensor,
    labels: Tensor,
    options: LossOptions,
    weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of the losses; `out`, if given, receives its gradient times `weight` (None is 1)."""
    dtype = accumulation_dtype(logits.dtype)
    valid = labels != options.ignore_index
    y = labels.masked_fill(~valid, 0)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for rows in _row_chunks(logits):
        z = logits[rows].to(dtype, copy=True)
        losses, d = losses_and_gradients_(z, y[rows], options, out is not None)
        total += losses.where(valid[rows], 0.0).sum()
        if out is None:
            continue
        assert d is not None
        if weight is not None:
            d *= weight
        out[rows] = d.masked_fill_(~valid[rows][:, None], 0.0)
    return total


def _row_chunks(logits: Tensor) -> list[slice]:
    n, vocab = logits.shape
    if torch.compiler.is_compiling():
        return [slice(0, n)]  # compiled, the arithmetic fuses and there is no fp32 copy to bound
    budget = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cuda"])
    step = max(1, budget // max(1, vocab))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def count_labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """The number of labelled tokens, at least 1: an fp32 scalar on the device of labels."""
    return (labels != ignore_index).sum().clamp(min=1).to(torch.float32)
