"""Cross-entropy straight from hidden states: logits [N, V] never exist.

Tokens are taken in chunks: a chunk's logits are made, turned into its share of the loss and (where
a gradient will be asked for) of the gradients, and dropped. Memory is O(chunk * V), whatever N is;
what is kept for backward is the gradients themselves, [N, D] and [V, D]. After "Cut Your Losses"
(arXiv 2411.09009) and Liger-Kernel (arXiv 2410.10989).

The gradient of the unembedding is summed over chunks in fp32 (V * D * 4 bytes while the loss is
computed): a bf16 sum would lose what each further chunk adds. On CPU only the labelled tokens are
multiplied: with loss on answers alone, that is a small part of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.cross_entropy import (
    capped,
    check_label_range,
    check_logits_and_labels,
    check_options,
    losses_and_gradients_,
    token_losses,
)
from kernels.functions import Op, accumulation_dtype, check_floating, run

_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}  # logits made at a time: 4 MB, 512 MB in fp32


# Kernel: chunked matmuls


def _takes_labelled_rows(device: str) -> bool:
    """How many there are can be read at no cost on a CPU; elsewhere it would stall the stream."""
    return device == "cpu"


def _chunked(
    hidden: Tensor,  # [N, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    grad: Tensor | None,  # scalar; None is 1
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    need_hidden: bool,
    need_unembed: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients times `grad` (empty where not needed)."""
    n, vocab = hidden.shape[0], unembed.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    valid = labels != ignore_index
    count = valid.sum().clamp(min=1).to(dtype)
    weight = (1.0 if grad is None else grad.to(dtype)) / count
    # either only the labelled rows are taken, or all of them with the others masked
    rows = valid.nonzero().squeeze(1) if _takes_labelled_rows(hidden.device.type) else None

    total = hidden.new_zeros((), dtype=dtype)
    d_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    d_unembed = torch.zeros_like(unembed, dtype=dtype) if need_unembed else hidden.new_empty(0)
    d_bias = unembed.new_zeros(vocab, dtype=dtype) if need_bias else hidden.new_empty(0)

    for start in range(0, n if rows is None else len(rows), chunk):
        here = slice(start, start + chunk) if rows is None else rows[start : start + chunk]
        h, y = hidden[here], labels[here]
        ok = valid[here] if rows is None else None
        if ok is not None:  # an unused row may hold NaN, and 0 * NaN would reach d_unembed
            h, y = h.masked_fill(~ok[:, None], 0.0), y.masked_fill(~ok, 0)
        z = torch.mm(h, unembed.t()).to(dtype)
        if bias is not None:
            z += bias
        if scale is not None:
            z *= scale
        gradients = need_hidden or need_unembed or need_bias
        losses, d = losses_and_gradients_(z, y, label_smoothing, z_loss, softcap, gradients)
        total += (losses if ok is None else losses.where(ok, 0.0)).sum()
        if d is None:
            continue
        if scale is not None:
            d *= scale
        if ok is not None:
            d.masked_fill_(~ok[:, None], 0.0)
        if need_bias:
            d_bias += d.sum(0)
        # entries in [-1, 1] go through the matmuls; the weight 1 / count comes after, in fp32
        d = d.to(hidden.dtype)
        if need_hidden:
            d_hidden[here] = (torch.mm(d, unembed).to(dtype) * weight).to(hidden.dtype)
        if need_unembed:
            d_unembed += torch.mm(d.t(), h)
    return (
        total / count,
        d_hidden,
        (d_unembed * weight).to(unembed.dtype) if need_unembed else d_unembed,
        (d_bias * weight).to(unembed.dtype if bias is None else bias.dtype)
        if need_bias
        else d_bias,
    )


# A custom op, so that the compiler sees one node and not an unrolled loop over chunks

_chunked_op = torch.library.custom_op("nanovision::linear_cross_entropy", _chunked, mutates_args=())


@_chunked_op.register_fake
def _(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    need_hidden: bool,
    need_unembed: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(unembed) if need_unembed else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else hidden.new_empty(0),
    )


# Reference: plain torch, differentiable to any order (its derivatives do keep O(N * V))


def linear_cross_entropy_reference(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float | None = None,
    chunk: int = 2**62,
    eager_grads: tuple[bool, bool, bool] = (False, False, False),
) -> Tensor:
    """What `linear_cross_entropy` computes; `chunk` bounds one tensor, `eager_grads` is unused."""
    del eager_grads
    dtype = accumulation_dtype(hidden.dtype)
    valid = labels != ignore_index
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        ok = valid[start : start + chunk]
        h = hidden[start : start + chunk].masked_fill(~ok[:, None], 0.0)
        y = labels[start : start + chunk].masked_fill(~ok, 0)
        z = torch.mm(h, unembed.t()).to(dtype)
        if bias is not None:
            z = z + bias
        if scale is not None:
            z = z * scale
        losses = token_losses(capped(z, softcap), y, label_smoothing, z_loss)
        total = total + losses.where(ok, 0.0).sum()
    return total / valid.sum().clamp(min=1)


# Autograd


def _forward(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    eager_grads: tuple[bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss, *grads = _chunked_op(
        hidden,
        unembed,
        bias,
        labels,
        None,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        scale,
        chunk,
        *eager_grads,
    )
    return loss, tuple(g for g, wanted in zip(grads, eager_grads, strict=True) if wanted)


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    eager_grads: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    ready: list[Tensor | None] = [None, None, None, None]
    made = iter(residuals)
    for i, wanted in enumerate(eager_grads):
        if wanted:
            g = next(made)
            ready[i] = (g * grad).to(g.dtype)
    missing = tuple(need and g is None for need, g in zip(needs[:3], ready[:3], strict=True))
    if any(missing):
        _, *grads = _chunked_op(
            *tensors,
            grad,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            scale,
            chunk,
            *missing,
        )
        ready = [g if m else r for g, m, r in zip(grads, missing, ready[:3], strict=True)] + [None]
    return tuple(ready)


OP = Op("linear_cross_entropy", linear_cross_entropy_reference, _forward, _backward)


@allow_in_graph
def _apply(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    eager_grads: tuple[bool, bool, bool],
) -> Tensor:
    return run(
        OP,
        hidden,
        unembed,
        bias,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        scale=scale,
        chunk=chunk,
        eager_grads=eager_grads,
    )


# Public


def linear_cross_entropy(
    hidden: Tensor,
    unembed: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(scale * (hidden @ unembed.T + bias), labels, ...)` without the logits.

    The matmuls run in the dtype of hidden, the rest in fp32, as the dense form does. Where
    gradients will be asked for, they are computed with the loss, from the same logits (three
    matmuls, not four); under `torch.no_grad` only the loss is. Derivatives of higher order go
    through a plain formula, which keeps O(N * V) in pieces of [chunk, V].

    Args:
        hidden: [N, D], any floating dtype.
        unembed: [V, D], same dtype.
        labels: [N] int64 in [0, V), or `ignore_index`: no loss, and a zero gradient for that row
            whatever it holds (NaN too).
        scale: factor on the logits, before the softcap (Cohere's and Granite's logit scale).
        bias: [V], added before the scale.
        chunk: tokens at a time; None chooses it so that a chunk's fp32 logits take 4 MB on CPU and
            512 MB on an accelerator.
        ignore_index, label_smoothing, z_loss, softcap: as in `kernels.cross_entropy`.

    Returns:
        A scalar, fp32 (fp64 if hidden is fp64): the mean over labelled tokens; 0 if there is none.

    Raises:
        ValueError: as `kernels.cross_entropy`; also an unembed or bias that does not fit hidden.

    >>> import torch
    >>> hidden, unembed = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(float(linear_cross_entropy(hidden, unembed, torch.tensor([3, -100]))), 4)
    2.0794
    """
    where = "linear_cross_entropy"
    check_logits_and_labels(where, "hidden", hidden, labels)
    check_floating(where, hidden=hidden, unembed=unembed, bias=bias)
    check_options(where, label_smoothing, z_loss, softcap)
    if unembed.ndim != 2 or unembed.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{where}: unembed must have shape [V, {hidden.shape[1]}] to match hidden "
            f"{tuple(hidden.shape)}, got {tuple(unembed.shape)}."
        )
    if unembed.dtype != hidden.dtype:
        raise ValueError(
            f"{where}: hidden is {hidden.dtype} but unembed is {unembed.dtype}; cast one of them."
        )
    if bias is not None and tuple(bias.shape) != (unembed.shape[0],):
        raise ValueError(
            f"{where}: bias must have shape [{unembed.shape[0]}], got {tuple(bias.shape)}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where}: chunk must be at least 1 token, got {chunk}.")
    check_label_range(where, labels, unembed.shape[0], ignore_index)
    if chunk is None:
        chunk = default_chunk(unembed.shape[0], hidden.device.type)
    # fp16 gradients wait for the backward: loss scaling has to come before they are rounded
    eager = torch.is_grad_enabled() and hidden.dtype != torch.float16
    eager_grads = (
        eager and hidden.requires_grad,
        eager and unembed.requires_grad,
        eager and bias is not None and bias.requires_grad,
    )
    return _apply(
        hidden,
        unembed,
        bias,
        labels,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        scale,
        chunk,
        eager_grads,
    )


def default_chunk(vocab: int, device: str) -> int:
    """Tokens at a time, in multiples of 64 so that the matmuls keep their tiles full."""
    budget = _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cuda"])
    return max(64, budget // max(1, vocab) // 64 * 64)
