"""Cross-entropy of dense logits, with z-loss, label smoothing and logit softcap.

No Triton kernel yet: forward and backward are torch, in chunks of rows so that the fp32 copies of
bf16 logits stay small. For logits that need not exist at all, see `kernels.linear_cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import Op, accumulation_dtype, can_read, check_device, check_floating, run

_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # logits at a time: 1 MB, 256 MB in fp32


# Reference: plain torch, differentiable to any order


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """Gemma-2's logit softcap, cap * tanh(z / cap)."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def token_losses(
    z: Tensor,  # [n, V], softcapped, in the accumulation dtype
    labels: Tensor,  # [n], every one in [0, V)
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Losses [n]: -(1 - s) log p_label - s * mean_v log p_v + z_loss * (log sum exp)^2."""
    lse = z.logsumexp(-1)
    loss = lse - (1.0 - label_smoothing) * z.gather(-1, labels[:, None]).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """What `cross_entropy` computes, as one expression."""
    valid = labels != ignore_index
    # masked before any arithmetic: an ignored row may hold NaN, and 0 * NaN is NaN in a backward
    z = logits.masked_fill(~valid[:, None], 0.0).to(accumulation_dtype(logits.dtype))
    y = labels.masked_fill(~valid, 0)
    losses = token_losses(capped(z, softcap), y, label_smoothing, z_loss)
    return losses.where(valid, 0.0).sum() / valid.sum().clamp(min=1)


# Fast paths


def losses_and_gradients_(
    z: Tensor,  # [n, V] logits in the accumulation dtype; overwritten
    labels: Tensor,  # [n], every one in [0, V)
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """`token_losses(capped(z))` [n] and, if asked for, their gradients to z [n, V].

    One exp an entry serves both; the losses are the same bits with and without gradients.
    """
    y = labels[:, None]
    z = capped(z, softcap)
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


def _forward(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    dtype = accumulation_dtype(logits.dtype)
    valid = labels != ignore_index
    y = labels.masked_fill(~valid, 0)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for rows in _row_chunks(logits):
        z = logits[rows].to(dtype, copy=True)
        losses, _ = losses_and_gradients_(z, y[rows], label_smoothing, z_loss, softcap, False)
        total += losses.where(valid[rows], 0.0).sum()
    return total / valid.sum().clamp(min=1), ()


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, None]:
    logits, labels = tensors
    dtype = accumulation_dtype(logits.dtype)
    valid = labels != ignore_index
    y = labels.masked_fill(~valid, 0)
    weight = grad.to(dtype) / valid.sum().clamp(min=1)
    out = torch.empty_like(logits)
    for rows in _row_chunks(logits):
        z = logits[rows].to(dtype, copy=True)
        _, d = losses_and_gradients_(z, y[rows], label_smoothing, z_loss, softcap, True)
        assert d is not None
        out[rows] = d.mul_(weight).masked_fill_(~valid[rows][:, None], 0.0)
    return out, None


def _row_chunks(logits: Tensor) -> list[slice]:
    n, vocab = logits.shape
    if torch.compiler.is_compiling():
        return [slice(0, n)]  # compiled, the arithmetic fuses and there is no fp32 copy to bound
    budget = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cuda"])
    step = max(1, budget // max(1, vocab))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


OP = Op("cross_entropy", cross_entropy_reference, _forward, _backward)


@allow_in_graph
def _apply(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    return run(
        OP,
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


# Public


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean cross-entropy over labelled tokens, in nats.

    With z = softcap * tanh(logits / softcap) (z = logits without a softcap), lse = log sum exp z
    and s = label_smoothing, a token costs

        lse - (1 - s) * z[label] - s * mean(z) + z_loss * lse^2

    and tokens whose label is `ignore_index` cost nothing and get a zero gradient, whatever their
    logits hold (NaN too). No labelled token: the loss is 0, with zero gradients.

    Args:
        logits: [N, V], any floating dtype; arithmetic is fp32 (fp64 for fp64).
        labels: [N] int64 in [0, V), or `ignore_index`.
        label_smoothing: s in [0, 1), as `torch.nn.functional.cross_entropy` defines it.
        z_loss: coefficient of lse^2, PaLM (arXiv 2204.02311, section 5) uses 1e-4.
        softcap: logit cap in logit units, Gemma 2 (arXiv 2408.00118) uses 30.

    Returns:
        A scalar, fp32 (fp64 if logits are fp64).

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on CPU also a label outside [0, V),
            naming it (unless labels cannot be read: compiled, vmapped or meta).

    >>> import torch
    >>> round(float(cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))), 4)
    2.0794
    """
    check_logits_and_labels("cross_entropy", "logits", logits, labels)
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    check_label_range("cross_entropy", labels, logits.shape[1], ignore_index)
    return _apply(logits, labels, ignore_index, label_smoothing, z_loss, softcap)


def check_logits_and_labels(where: str, name: str, rows: Tensor, labels: Tensor) -> None:
    check_floating(where, **{name: rows})
    check_device(where, name, rows, "labels", labels)
    if rows.ndim != 2:
        raise ValueError(f"{where}: {name} must be 2-D, got shape {tuple(rows.shape)}.")
    if labels.dtype != torch.int64:
        raise ValueError(f"{where}: labels must be int64, got {labels.dtype}.")
    if labels.ndim != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{where}: labels must have shape [{rows.shape[0]}] to match {name} "
            f"{tuple(rows.shape)}, got {tuple(labels.shape)}."
        )


def check_options(where: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"{where}: label_smoothing must be in [0, 1), got {label_smoothing}.")
    if z_loss < 0.0:
        raise ValueError(f"{where}: z_loss must be >= 0, got {z_loss}.")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"{where}: softcap must be > 0 (or None for none), got {softcap}.")


def check_label_range(where: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """ValueError naming the first label outside the vocabulary, where labels can be read."""
    if not can_read(labels) or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: label {int(labels[at])} at position {at} is outside the vocabulary of "
            f"{vocab} tokens; labels must be in [0, {vocab}) or {ignore_index} (no loss)."
        )
