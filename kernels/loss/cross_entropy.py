"""Cross-entropy of dense logits, with z-loss, label smoothing and logit softcap.

On a GPU the kernels of `kernels.loss.cross_entropy_triton` run: the loss reads the logits once, its
gradient reads them again and is a new tensor, or (`overwrite`) both come of one read and the
gradient takes the place of the logits. Elsewhere it is torch, in chunks of rows so that the fp32
copies of bf16 logits stay small. For logits that need not exist at all, see
`kernels.linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loss import cross_entropy_triton
from kernels.runtime.autograd import (
    Op,
    accumulation_dtype,
    can_read,
    check_device,
    check_floating,
    run,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator

declare("cross_entropy", TRITON, TORCH)

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


def _by_chunks(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The losses' sum; `weight` (None is 1) times its gradient goes to `out`, if that is given."""
    dtype = accumulation_dtype(logits.dtype)
    valid = labels != ignore_index
    y = labels.masked_fill(~valid, 0)
    total = torch.zeros((), dtype=dtype, device=logits.device)
    for rows in _row_chunks(logits):
        z = logits[rows].to(dtype, copy=True)
        gradients = out is not None
        losses, d = losses_and_gradients_(z, y[rows], label_smoothing, z_loss, softcap, gradients)
        total += losses.where(valid[rows], 0.0).sum()
        if out is None:
            continue
        assert d is not None
        if weight is not None:
            d *= weight
        out[rows] = d.masked_fill_(~valid[rows][:, None], 0.0)
    return total


def _forward(
    logits: Tensor, labels: Tensor, *, ignore_index: int, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    total = _by_chunks(logits, labels, ignore_index, **options)
    return total / (labels != ignore_index).sum().clamp(min=1), ()


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    ignore_index: int,
    **options: Any,
) -> tuple[Tensor, None]:
    logits, labels = tensors
    count = (labels != ignore_index).sum().clamp(min=1)
    weight = grad.to(accumulation_dtype(logits.dtype)) / count
    out = torch.empty_like(logits)
    _by_chunks(logits, labels, ignore_index, **options, weight=weight, out=out)
    return out, None


def _row_chunks(logits: Tensor) -> list[slice]:
    n, vocab = logits.shape
    if torch.compiler.is_compiling():
        return [slice(0, n)]  # compiled, the arithmetic fuses and there is no fp32 copy to bound
    budget = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS["cuda"])
    step = max(1, budget // max(1, vocab))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


OP = Op("cross_entropy", cross_entropy_reference, _forward, _backward)


# The same through Triton, a custom op a direction: the compiler sees one node each


def _forward_kernel(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, how many tokens have a label (at least 1), and what the backward needs of rows."""
    count = labelled(labels, ignore_index)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    top, total = torch.empty_like(losses), torch.empty_like(losses)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    cross_entropy_triton.forward_rows(
        _row_major(logits), labels, None, losses, top, total, *options
    )
    return losses.sum() / count, count, top, total


def _backward_kernel(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    top: Tensor,
    total: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> Tensor:
    options = (ignore_index, label_smoothing, z_loss, softcap)
    return cross_entropy_triton.backward_rows(
        _row_major(logits), labels, weight, top, total, *options
    )


def labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """How many tokens have a label, at least 1: fp32, on the device."""
    return (labels != ignore_index).sum().clamp(min=1).to(torch.float32)


def _row_major(logits: Tensor) -> Tensor:
    """The logits, copied if a row's entries are not next to each other (rows may lie apart)."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _forward_fake(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return scalar, torch.empty_like(scalar), row, torch.empty_like(row)


_forward_op = operator("cross_entropy_forward", fake=_forward_fake)(_forward_kernel)
_backward_op = operator(
    "cross_entropy_backward", fake=lambda logits, **_: logits.new_empty(logits.shape)
)(_backward_kernel)


def _forward_triton(
    logits: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss, *residuals = _forward_op(logits, labels, *options.values())
    return loss, tuple(residuals)


def _backward_triton(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, ...],
    **options: Any,
) -> tuple[Tensor, None]:
    count, top, total = residuals
    return _backward_op(*tensors, grad / count, top, total, *options.values()), None


OP_TRITON = Op("cross_entropy", cross_entropy_reference, _forward_triton, _backward_triton)


# In place: the forward leaves the gradient where the logits were


def _overwrite(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and the count; logits become d loss / d logits (fp16: count times that)."""
    count = labelled(labels, ignore_index).to(accumulation_dtype(logits.dtype))
    # 1 / count times a probability underflows in fp16: there it waits for the loss scale
    weight = None if logits.dtype == torch.float16 else count.reciprocal()
    options = (ignore_index, label_smoothing, z_loss, softcap)
    if not triton:
        return _by_chunks(logits, labels, *options, weight=weight, out=logits) / count, count
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    cross_entropy_triton.overwrite_rows(logits, labels, None, weight, losses, *options)
    return losses.sum() / count, count


def _overwrite_fake(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


_overwrite_op = operator("cross_entropy_overwrite", fake=_overwrite_fake, mutates=("logits",))(
    _overwrite
)
_scale_op = operator("cross_entropy_scale", fake=lambda **_: None, mutates=("x",))(
    cross_entropy_triton.scale_rows
)


def scaled(gradient: Tensor, factor: Tensor, triton: bool, last: bool = False) -> Tensor:
    """gradient * factor; in place if nobody asks again, and by Triton at no cost if that is 1."""
    if triton and is_eager(gradient) and not _is_batched(factor):
        out = gradient if last else gradient.clone()
        _scale_op(out, factor)
        return out.detach()
    # in fp32: an fp32 scalar on CUDA is else rounded to the gradient's dtype first
    out = (gradient.to(accumulation_dtype(gradient.dtype)) * factor).to(gradient.dtype)
    return gradient.copy_(out).detach() if last else out


def _is_batched(x: Tensor) -> bool:
    """Whether x stands for many tensors: under `torch.func`, or in `is_grads_batched`."""
    legacy: bool = torch._C._functorch.is_legacy_batchedtensor(x)
    return legacy or torch._C._are_functorch_transforms_active()


def is_last_backward(grad: Tensor) -> bool:
    """Inside a Function's backward: whether what the Function saved will not be asked for again."""
    return (
        is_eager(grad)  # a compiler plans memory itself
        and not _is_batched(grad)
        and not torch.is_grad_enabled()
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )


@with_signature
class _Overwritten(torch.autograd.Function):
    """(logits, labels, triton, *options) -> (loss, count). Keeps the overwritten logits."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, triton: bool, *options: Any) -> Any:
        return _overwrite_op(logits, labels, *options, triton)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.triton, ctx.inputs = inputs[2], len(inputs)
        ctx.save_for_backward(inputs[0], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _count: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cross_entropy(overwrite=True) has first derivatives only: leave overwrite off "
                "where create_graph=True asks for more."
            )
        gradient, count = ctx.saved_tensors
        factor = grad / count if gradient.dtype == torch.float16 else grad
        last = is_last_backward(grad)
        return (scaled(gradient, factor, ctx.triton, last), *(None,) * (ctx.inputs - 1))


@with_signature
class _Spent(torch.autograd.Function):
    """Marks logits as changed: whoever differentiates through what they are now gets an error."""

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return logits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "cross_entropy(overwrite=True) wrote the gradient over these logits, and they were "
            "used again afterwards: use them before, or leave overwrite off."
        )


def _may_overwrite(logits: Tensor) -> bool:
    """Whether a gradient will be asked for, by eager autograd alone.

    Not compiled: AOTAutograd loses the loss's gradient (torch 2.13) where a mutated tensor turns
    out to be an input of its graph, which cannot be told from here.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and is_eager(logits)
        and not torch._C._are_functorch_transforms_active()
    )


def is_eager(x: Tensor) -> bool:
    """Whether x is a tensor with values, not one that a compiler traces with."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def _check_overwritable(logits: Tensor) -> None:
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad:
        raise ValueError(
            "cross_entropy: logits that are a leaf (or a view of one) cannot be overwritten, "
            "their values would be lost; leave overwrite off."
        )
    rows, vocab = logits.shape
    if (logits.stride(1) != 1 and vocab > 1) or (logits.stride(0) < vocab and rows > 1):
        raise ValueError(
            "cross_entropy: overwrite needs logits whose rows are contiguous and apart, got "
            f"strides {logits.stride()} for shape {tuple(logits.shape)}."
        )


def _apply_overwriting(logits: Tensor, labels: Tensor, triton: bool, *options: Any) -> Tensor:
    _check_overwritable(logits)
    loss, _ = _Overwritten.apply(logits, labels, triton, *options)
    # the loss has its edge to what made the logits; whatever comes later gets one to an error
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(logits):
        _Spent.apply(logits)
    return loss


@allow_in_graph
def _apply(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    triton: bool,
    overwrite: bool,
) -> Tensor:
    check_hidden()
    if overwrite and _may_overwrite(logits):
        options = (ignore_index, label_smoothing, z_loss, softcap)
        return _apply_overwriting(logits, labels, triton, *options)
    return run(
        OP_TRITON if triton else OP,
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
    overwrite: bool = False,
    check_labels: bool = False,
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
        overwrite: write the gradient over the logits while the loss is computed, where a gradient
            will be asked for (else they stay as they are): one read of the logits less, and no
            second tensor of their size. Afterwards the logits hold the gradient: read them before.
            Derivatives of first order only, of logits that some operation made; who saved the
            logits for another gradient, or uses them again, gets an error in the backward. Inside
            `torch.func` transforms and `torch.compile` it changes nothing.
        check_labels: look for labels outside [0, V) on an accelerator too. For debugging: it
            stalls the device. Without it such a label makes the loss NaN there.

    Returns:
        A scalar, fp32 (fp64 if logits are fp64).

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on CPU also a label outside [0, V),
            naming it (unless labels cannot be read: compiled, vmapped or meta); `overwrite` for
            a leaf, or for logits whose rows are not contiguous or lie over each other.
        RuntimeError: in the backward, what `overwrite` does not allow.

    >>> import torch
    >>> round(float(cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))), 4)
    2.0794
    """
    check_logits_and_labels("cross_entropy", "logits", logits, labels)
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    check_label_range("cross_entropy", labels, logits.shape[1], ignore_index, check_labels)
    triton = choose("cross_entropy", str(logits.device), logits.dtype) == "triton"
    return _apply(logits, labels, ignore_index, label_smoothing, z_loss, softcap, triton, overwrite)


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


def check_label_range(
    where: str, labels: Tensor, vocab: int, ignore_index: int, stall: bool = False
) -> None:
    """ValueError naming the first label outside the vocabulary, where labels can be read.

    With `stall`, an accelerator's labels are read too, for which it has to finish its work.
    """
    readable = can_read(labels) or (
        stall
        and is_eager(labels)
        and labels.device.type not in ("cpu", "meta")
        and not torch._C._functorch.is_functorch_wrapped_tensor(labels)
    )
    if not readable or labels.numel() == 0:
        return
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: label {int(labels[at])} at position {at} is outside the vocabulary of "
            f"{vocab} tokens; labels must be in [0, {vocab}) or {ignore_index} (no loss)."
        )
