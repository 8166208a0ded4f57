"""Log-probabilities of the labels, one per token, straight from hidden states.

Tokens are taken in chunks, as in `kernels.linear_cross_entropy`: memory is O(chunk * V) for any N.
The backward computes a chunk's logits again, since the gradient of each token arrives only then:
four matmuls instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.linear.linear import add_product
from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy import check_label_range, check_logits_and_labels, check_options
from kernels.loss.cross_entropy_torch import LossOptions, losses_and_gradients_, token_losses
from kernels.loss.linear_cross_entropy import check_unembed, chunk_within
from kernels.runtime.autograd import Op, accumulation_dtype, run
from kernels.runtime.dispatch import choose
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator


class LogprobSettings(NamedTuple):
    """What the operators take besides tensors, in their order."""

    ignore_index: int
    softcap: float | None
    scale: float | None
    chunk: int
    triton: bool

    @property
    def loss(self) -> LossOptions:
        return LossOptions(self.ignore_index, softcap=self.softcap)


Needs = Sequence[bool]  # which gradients: of hidden, unembed, bias


# Reference: plain torch, differentiable to any order


def token_logprobs_reference(
    hidden: Tensor,  # [N, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    *,
    settings: LogprobSettings,
) -> Tensor:
    """What `token_logprobs` computes; `chunk` bounds one tensor."""
    valid = labels != settings.ignore_index
    parts = []
    for start in range(0, max(1, hidden.shape[0]), settings.chunk):
        ok = valid[start : start + settings.chunk]
        # masked before any arithmetic: an ignored row may hold NaN
        h = hidden[start : start + settings.chunk].masked_fill(~ok[:, None], 0.0)
        y = labels[start : start + settings.chunk].masked_fill(~ok, 0)
        z = torch.mm(h, unembed.t()).to(accumulation_dtype(hidden.dtype))
        z = z if bias is None else z + bias
        z = z if settings.scale is None else z * settings.scale
        parts.append((-token_losses(z, y, settings.loss)).where(ok, 0.0))
    return torch.cat(parts)


# By chunks


def _logprobs(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    triton: bool,
) -> Tensor:
    settings = LogprobSettings(ignore_index, softcap, scale, chunk, triton)
    out = hidden.new_zeros(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))
    for start in range(0, hidden.shape[0], chunk):
        here = slice(start, start + chunk)
        losses, _ = _losses(hidden[here], unembed, bias, labels[here], settings, gradients=False)
        out[here] = -losses
    return out


def _logprobs_backward(
    grad: Tensor,  # [N]
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float | None,
    chunk: int,
    triton: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, unembed and bias (empty where not needed)."""
    settings = LogprobSettings(ignore_index, softcap, scale, chunk, triton)
    need_hidden, need_unembed, need_bias = needs
    dtype = accumulation_dtype(hidden.dtype)
    d_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    d_unembed = torch.zeros_like(unembed, dtype=dtype) if need_unembed else hidden.new_empty(0)
    d_bias = unembed.new_zeros(len(unembed), dtype=dtype) if need_bias else hidden.new_empty(0)
    weight = -grad.to(dtype).masked_fill(labels == ignore_index, 0.0)
    for start in range(0, hidden.shape[0], chunk):
        here = slice(start, start + chunk)
        ok = labels[here] != ignore_index
        h = hidden[here].masked_fill(~ok[:, None], 0.0)  # 0 * NaN would reach d_unembed
        _, d = _losses(h, unembed, bias, labels[here], settings, gradients=True)
        assert d is not None
        d = (d.to(dtype) * weight[here, None]).to(hidden.dtype)
        if need_bias:
            d_bias += d.sum(0, dtype=dtype)
        if need_hidden:
            torch.mm(d, unembed, out=d_hidden[here])
        if need_unembed:
            add_product(d_unembed, d.t(), h, first=start == 0)
    d_bias = d_bias.to(unembed.dtype if bias is None else bias.dtype)
    return d_hidden, d_unembed.to(unembed.dtype), d_bias


def _losses(
    h: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    settings: LogprobSettings,
    gradients: bool,
) -> tuple[Tensor, Tensor | None]:
    """The losses [n] of a chunk (0 without a label), and their gradients by hidden @ unembed.T."""
    ok = labels != settings.ignore_index
    z = torch.mm(h, unembed.t())
    if settings.triton:
        losses = z.new_empty(len(z), dtype=torch.float32)
        if gradients:
            cross_entropy_triton.overwrite_rows(
                z, labels, bias, None, losses, settings.loss, settings.scale
            )
            return losses, z
        cross_entropy_triton.forward_rows(
            z, labels, bias, losses, None, None, settings.loss, settings.scale
        )
        return losses, None
    z = z.masked_fill(~ok[:, None], 0.0).to(accumulation_dtype(h.dtype))
    z = z if bias is None else z + bias
    z = z if settings.scale is None else z * settings.scale
    y = labels.masked_fill(~ok, 0)
    losses, d = losses_and_gradients_(z, y, settings.loss, gradients)
    if d is not None and settings.scale is not None:
        d *= settings.scale
    return losses.where(ok, 0.0), d


def _fake(hidden: Tensor, **_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden.dtype))


def _backward_fake(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, needs: Needs, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_unembed, need_bias = needs
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(unembed) if need_unembed else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else hidden.new_empty(0),
    )


_op = operator("token_logprobs", fake=_fake)(_logprobs)
_backward_op = operator("token_logprobs_backward", fake=_backward_fake)(_logprobs_backward)


def _forward(
    *tensors: Tensor | None, settings: LogprobSettings
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _op(*tensors, *settings), ()


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    settings: LogprobSettings,
) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad, *tensors, *settings, list(needs[:3]))
    return (*(g if need else None for g, need in zip(grads, needs[:3], strict=True)), None)


OP = Op("token_logprobs", token_logprobs_reference, _forward, _backward)


@allow_in_graph
def _apply(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, labels: Tensor, *settings: Any
) -> Tensor:
    check_hidden()
    return run(OP, hidden, unembed, bias, labels, settings=LogprobSettings(*settings))


def token_logprobs(
    hidden: Tensor,
    unembed: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    chunk: int | None = None,
    memory: int | None = None,
) -> Tensor:
    """`log_softmax(softcap(scale * (hidden @ unembed.T + bias)))` at the labels, without logits.

    Args:
        hidden: [N, D], any floating dtype.
        unembed: [V, D], same dtype.
        labels: [N] int64 in [0, V), or `ignore_index`: 0, and a zero gradient for that row whatever
            its values (NaN too).
        ignore_index, softcap, scale, bias, chunk, memory: as of `kernels.linear_cross_entropy`.

    Returns:
        [N], fp32 (fp64 if hidden is fp64).

    Raises:
        ValueError: as `kernels.linear_cross_entropy`.

    >>> import torch
    >>> hidden, unembed = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> token_logprobs(hidden, unembed, torch.tensor([3, -100])).exp().tolist()
    [0.125, 1.0]
    """
    where = "token_logprobs"
    check_logits_and_labels(where, "hidden", hidden, labels)
    check_options(where, 0.0, 0.0, softcap)
    check_unembed(where, hidden, unembed, bias, chunk, memory)
    check_label_range(where, labels, unembed.shape[0], ignore_index)
    triton = choose("linear_cross_entropy", str(hidden.device), hidden.dtype) == "triton"
    if chunk is None:
        chunk = chunk_within(memory, unembed.shape[0], hidden, triton)
    settings = LogprobSettings(ignore_index, softcap, scale, chunk, triton)
    return _apply(hidden, unembed, bias, labels, *settings)
