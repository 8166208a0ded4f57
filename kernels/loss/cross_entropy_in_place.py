"""`cross_entropy(overwrite=True)`: the forward leaves the gradient where the logits were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy_torch import LossOptions, by_chunks, count_labelled
from kernels.loss.scale_triton import scale_rows
from kernels.runtime.autograd import (
    accumulation_dtype,
    is_batched,
    is_eager,
    is_last_backward,
    with_signature,
)
from kernels.runtime.operators import operator


def _overwrite(
    logits: Tensor,
    labels: Tensor,
    triton: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The loss and the count; logits become d loss / d logits (fp16: count times that)."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    count = count_labelled(labels, ignore_index).to(accumulation_dtype(logits.dtype))
    # 1 / count times a probability underflows in fp16: there the backward divides
    weight = None if logits.dtype == torch.float16 else count.reciprocal()
    if not triton:
        return by_chunks(logits, labels, options, weight, out=logits) / count, count
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    cross_entropy_triton.overwrite_rows(logits, labels, None, weight, losses, options)
    return losses.sum() / count, count


def _overwrite_fake(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty((), dtype=accumulation_dtype(logits.dtype))
    return loss, torch.empty_like(loss)


_overwrite_op = operator("cross_entropy_overwrite", fake=_overwrite_fake, mutates=("logits",))(
    _overwrite
)
_scale_op = operator("cross_entropy_scale", fake=lambda **_: None, mutates=("x",))(scale_rows)


def scaled(gradient: Tensor, factor: Tensor, triton: bool, last: bool = False) -> Tensor:
    """gradient * factor, in place if `last`; Triton then skips a factor of 1.

    For a backward whose forward computed the gradient; factor: the gradient of the loss.
    """
    if triton and is_eager(gradient) and not is_batched(factor):
        out = gradient if last else gradient.clone()
        _scale_op(out, factor)
        return out.detach()
    # in fp32: CUDA would first round an fp32 scalar to the dtype of the gradient
    out = (gradient.to(accumulation_dtype(gradient.dtype)) * factor).to(gradient.dtype)
    return gradient.copy_(out).detach() if last else out


@with_signature
class _Overwritten(torch.autograd.Function):
    """(logits, labels, triton, *options) -> (loss, count). Keeps the overwritten logits.

    Not an `Op`: it changes an input, and so has no formula to differentiate again.
    """

    @staticmethod
    def forward(logits: Tensor, labels: Tensor, triton: bool, *options: Any) -> Any:
        return _overwrite_op(logits, labels, triton, *options)

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
    """Marks logits as changed: differentiating through their new values raises RuntimeError.

    Not an `Op`: it exists for that error alone.
    """

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


def may_overwrite(logits: Tensor) -> bool:
    """Whether eager autograd alone will ask for a gradient of the logits.

    Never compiled: AOTAutograd (torch 2.13) loses the gradient of the loss where a mutated tensor
    turns out to be an input of its graph, which cannot be told from here.
    """
    return (
        torch.is_grad_enabled()
        and logits.requires_grad
        and is_eager(logits)
        and not torch._C._are_functorch_transforms_active()
    )


def overwriting_cross_entropy(
    logits: Tensor, labels: Tensor, triton: bool, options: LossOptions
) -> Tensor:
    """The loss; the logits become its gradient. Call it only if `may_overwrite`.

    Raises:
        ValueError: the logits are a leaf, or their rows are not contiguous or overlap.
    """
    _check_overwritable(logits)
    loss, _ = _Overwritten.apply(logits, labels, triton, *options)
    # The loss keeps its edge to the operation that made the logits; later uses get one to an error.
    with torch.autograd.grad_mode._unsafe_preserve_version_counter(logits):
        _Spent.apply(logits)
    return loss


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
