"""Cross-entropy of dense logits, with z-loss, label smoothing and logit softcap.

On a GPU the kernels of `cross_entropy_triton` run: the loss reads the logits once, and its gradient
reads them again and is a new tensor; with `overwrite`, both come from one read and the gradient
takes the place of the logits. Elsewhere torch works in chunks of rows. For logits that need not
exist at all, see `kernels.linear_cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy_in_place import may_overwrite, overwriting_cross_entropy
from kernels.loss.cross_entropy_torch import (
    LossOptions,
    by_chunks,
    count_labelled,
    cross_entropy_reference,
)
from kernels.runtime.autograd import (
    Op,
    accumulation_dtype,
    can_read,
    check_device,
    check_floating,
    is_eager,
    run,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator

declare("cross_entropy", TRITON, TORCH)

# Triton: one operator per direction, so that a compiler sees one node each


def _forward_kernel(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number of labelled tokens, and what the backward needs of each row."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    count = count_labelled(labels, ignore_index)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    top, total = torch.empty_like(losses), torch.empty_like(losses)
    logits = _row_major(logits)
    cross_entropy_triton.forward_rows(logits, labels, None, losses, top, total, options)
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
    """weight * d loss / d logits."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    logits = _row_major(logits)
    return cross_entropy_triton.backward_rows(logits, labels, weight, top, total, options)


def _row_major(logits: Tensor) -> Tensor:
    """The logits, copied unless the entries of a row are adjacent (rows may lie apart)."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _forward_fake(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalar = logits.new_empty((), dtype=torch.float32)
    row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return scalar, torch.empty_like(scalar), row, torch.empty_like(row)


_forward_op = operator("cross_entropy_forward", fake=_forward_fake)(_forward_kernel)
_backward_op = operator(
    "cross_entropy_backward", fake=lambda logits, **_: logits.new_empty(logits.shape)
)(_backward_kernel)


# Autograd


def _forward(
    logits: Tensor, labels: Tensor, *, triton: bool, options: LossOptions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    if triton:
        loss, *residuals = _forward_op(logits, labels, *options)
        return loss, tuple(residuals)
    total = by_chunks(logits, labels, options)
    return total / (labels != options.ignore_index).sum().clamp(min=1), ()


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    triton: bool,
    options: LossOptions,
) -> tuple[Tensor, None]:
    if triton:
        count, top, total = residuals
        return _backward_op(*tensors, grad / count, top, total, *options), None
    logits, labels = tensors
    count = (labels != options.ignore_index).sum().clamp(min=1)
    out = torch.empty_like(logits)
    by_chunks(logits, labels, options, grad.to(accumulation_dtype(logits.dtype)) / count, out)
    return out, None


def _formula(logits: Tensor, labels: Tensor, *, triton: bool, options: LossOptions) -> Tensor:
    return cross_entropy_reference(logits, labels, options)


OP = Op("cross_entropy", _formula, _forward, _backward)


# Public


@allow_in_graph
def _apply(logits: Tensor, labels: Tensor, triton: bool, overwrite: bool, *options: Any) -> Tensor:
    check_hidden()
    if overwrite and may_overwrite(logits):
        return overwriting_cross_entropy(logits, labels, triton, LossOptions(*options))
    return run(OP, logits, labels, triton=triton, options=LossOptions(*options))


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
    and s = label_smoothing, the loss of a token is

        lse - (1 - s) * z[label] - s * mean(z) + z_loss * lse^2

    Tokens whose label is `ignore_index` have no loss and a zero gradient, whatever their logits
    are (NaN too). Without any labelled token the loss is 0, with zero gradients.

    Args:
        logits: [N, V], any floating dtype; arithmetic is fp32 (fp64 for fp64).
        labels: [N] int64 in [0, V), or `ignore_index`.
        label_smoothing: s in [0, 1), as `torch.nn.functional.cross_entropy` defines it.
        z_loss: coefficient of lse^2; PaLM (arXiv 2204.02311, section 5) uses 1e-4.
        softcap: bound on the magnitude of logits; Gemma 2 (arXiv 2408.00118) uses 30.
        overwrite: write the gradient over the logits while the loss is computed, if autograd
            will ask for a gradient (otherwise they stay as they are). This saves one read of the
            logits and a second tensor of their size. Only first derivatives are available, and
            the logits must be the result of an operation. An operation that saved the logits for
            its own gradient, or uses them afterwards, raises an error in the backward. Inside
            `torch.func` transforms and `torch.compile` it has no effect.
        check_labels: check labels on an accelerator too. For debugging: it stalls the device.
            Without it, a label outside [0, V) makes the loss NaN there.

    Returns:
        A scalar, fp32 (fp64 if logits are fp64).

    Raises:
        ValueError: wrong shapes, dtypes, devices or options; on CPU also a label outside [0, V),
            which the message names (unless labels cannot be read: compiled, vmapped or meta);
            `overwrite` of a leaf, or of logits whose rows are not contiguous or overlap.
        RuntimeError: in the backward, a use of the logits that `overwrite` does not allow.

    >>> import torch
    >>> round(float(cross_entropy(torch.zeros(2, 8), torch.tensor([3, -100]))), 4)
    2.0794
    """
    check_logits_and_labels("cross_entropy", "logits", logits, labels)
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    check_label_range("cross_entropy", labels, logits.shape[1], ignore_index, check_labels)
    triton = choose("cross_entropy", str(logits.device), logits.dtype) == "triton"
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    return _apply(logits, labels, triton, overwrite, *options)


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
    """Raises ValueError for the first label outside the vocabulary, where labels can be read.

    stall: also read labels on an accelerator, which has to finish its work first.
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
