"""Cross-entropy straight from hidden states: logits [N, V] never exist.

Tokens are taken in chunks. A chunk's logits are computed, turned into its share of the loss and (if
autograd will ask for them) of the gradients, and dropped. Memory is O(chunk * V) for any N; the
backward keeps the gradients themselves, [N, D] and [V, D]. After "Cut Your Losses" (arXiv
2411.09009) and Liger-Kernel (arXiv 2410.10989).

On a GPU one matmul writes a chunk's logits into a buffer that all chunks share, in the dtype of
hidden; `cross_entropy_overwrite_kernel` turns them into their gradient in place, and two matmuls
use that. Nothing waits for the device, so that a CUDA graph can capture the whole.

The gradient of the unembedding is summed over chunks in fp32 (V * D * 4 bytes while the loss is
computed) unless the caller asks for a bf16 sum, which rounds at every chunk. On a CPU only the
labelled tokens are multiplied, which are few if only answers have labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kernels.linear.linear import add_product
from kernels.loss import cross_entropy_triton
from kernels.loss.cross_entropy import check_label_range, check_logits_and_labels, check_options
from kernels.loss.cross_entropy_in_place import scaled
from kernels.loss.cross_entropy_torch import (
    LossOptions,
    count_labelled,
    losses_and_gradients_,
    token_losses,
)
from kernels.loss.scale_triton import scale_rows
from kernels.runtime.autograd import (
    BoundOp,
    ForwardFunction,
    Op,
    accumulation_dtype,
    check_floating,
    is_last_backward,
    run,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import operator

declare("linear_cross_entropy", TRITON, TORCH)


class LinearLossSettings(NamedTuple):
    """What the operator takes besides tensors, in its order; `LossOptions` first."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    scale: float | None
    chunk: int
    narrow: bool  # sum the gradient of the unembedding in its own dtype
    triton: bool

    @property
    def loss(self) -> LossOptions:
        return LossOptions(*self[:4])


Needs = Sequence[bool]  # which gradients: of hidden, unembed, bias
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}  # torch, fp32 logits at a time: 4 MB, 512 MB
_CHUNK_BYTES = 2**30  # Triton; half of that was slower in a training step


# Chunked matmuls, torch


def _takes_labelled_rows(device: str) -> bool:
    """A CPU can count the labelled rows at no cost; elsewhere that would stall the stream."""
    return device == "cpu"


def _chunked(
    hidden: Tensor,  # [N, D]
    unembed: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N]
    grad: Tensor | None,  # scalar; None is 1
    settings: LinearLossSettings,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients times `grad` (empty where not needed)."""
    options, scale, chunk = settings.loss, settings.scale, settings.chunk
    n, vocab = hidden.shape[0], unembed.shape[0]
    need_hidden, need_unembed, need_bias = needs
    dtype = accumulation_dtype(hidden.dtype)
    valid = labels != options.ignore_index
    count = valid.sum().clamp(min=1).to(dtype)
    weight = (1.0 if grad is None else grad.to(dtype)) / count
    # either only the labelled rows are taken, or all of them with the others masked
    rows = valid.nonzero().squeeze(1) if _takes_labelled_rows(hidden.device.type) else None

    total = hidden.new_zeros((), dtype=dtype)
    d_hidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    wide = unembed.dtype if settings.narrow else dtype
    d_unembed = torch.zeros_like(unembed, dtype=wide) if need_unembed else hidden.new_empty(0)
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
        losses, d = losses_and_gradients_(z, y, options, any(needs))
        total += (losses if ok is None else losses.where(ok, 0.0)).sum()
        if d is None:
            continue
        if scale is not None:
            d *= scale
        if ok is not None:
            d.masked_fill_(~ok[:, None], 0.0)
        if need_bias:
            d_bias += d.sum(0)
        # the matmuls see entries in [-1, 1]; the weight 1 / count comes after, in fp32
        d = d.to(hidden.dtype)
        if need_hidden:
            d_hidden[here] = (torch.mm(d, unembed).to(dtype) * weight).to(hidden.dtype)
        if need_unembed:
            d_unembed += torch.mm(d.t(), h)
    if need_unembed:
        d_unembed = (d_unembed * weight).to(unembed.dtype)
    if need_bias:
        d_bias = (d_bias * weight).to(unembed.dtype if bias is None else bias.dtype)
    return total / count, d_hidden, d_unembed, d_bias


# Chunked matmuls around a Triton kernel


def _fused(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    settings: LinearLossSettings,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_chunked` computes, with a chunk's logits and an fp32 sum as its only buffers."""
    options, scale = settings.loss, settings.scale
    n, vocab = hidden.shape[0], unembed.shape[0]
    need_hidden, need_unembed, need_bias = needs
    count = count_labelled(labels, options.ignore_index)
    weight = count.reciprocal() if grad is None else grad.to(torch.float32) / count
    late = hidden.dtype == torch.float16  # a weighted entry would underflow in fp16
    losses = hidden.new_empty(n, dtype=torch.float32)

    # A row without a label may hold NaN, and 0 * NaN would reach the gradient of the unembedding.
    # The clean rows lie in the memory of the gradient of hidden, which replaces them by chunks.
    clean, d_hidden = hidden, hidden.new_empty(0)
    if need_unembed:
        clean = hidden.masked_fill((labels == options.ignore_index)[:, None], 0.0)
    if need_hidden:
        d_hidden = clean if need_unembed else torch.empty_like(hidden)
    d_unembed, d_bias = hidden.new_empty(0), hidden.new_empty(0)

    rows = _even_chunk(n, settings.chunk)
    single = rows >= n and not late  # nothing to sum: cuBLAS rounds its own fp32 sum once
    # rows start at multiples of 128 bytes, else the matmuls are slow
    buffer = hidden.new_empty(rows, -(-vocab // 64) * 64)[:, :vocab]
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        h, y, out = clean[here], labels[here], losses[here]
        z = buffer[: h.shape[0]]
        torch.mm(h, unembed.t(), out=z)
        if not any(needs):
            cross_entropy_triton.forward_rows(z, y, bias, out, None, None, options, scale)
            continue
        given = None if late else weight
        cross_entropy_triton.overwrite_rows(z, y, bias, given, out, options, scale)
        if need_bias:
            part = z.sum(0, dtype=torch.float32)
            d_bias = d_bias.add_(part) if start else part
        if need_unembed:
            if start == 0:
                dtype = unembed.dtype if settings.narrow or single else torch.float32
                d_unembed = torch.empty_like(unembed, dtype=dtype)
            add_product(d_unembed, z.t(), h, first=start == 0)
        if need_hidden:
            torch.mm(z, unembed, out=d_hidden[here])
    if n == 0:
        d_unembed = torch.zeros_like(unembed) if need_unembed else d_unembed
        d_bias = unembed.new_zeros(vocab) if need_bias else d_bias
    del buffer
    if late:
        for gradient in (d_hidden, d_unembed, d_bias):
            scale_rows(gradient, weight)
    d_bias = d_bias.to(unembed.dtype if bias is None else bias.dtype)
    return losses.sum() / count, d_hidden, d_unembed.to(unembed.dtype), d_bias


def _even_chunk(n: int, chunk: int) -> int:
    """The smallest chunk that needs no more chunks, in multiples of 128 if there are several."""
    even = -(-n // max(1, -(-n // chunk)))
    return max(1, n if chunk >= n else min(chunk, -(-even // 128) * 128))


# An operator, so that a compiler sees one node and not an unrolled loop over chunks


def _loss_and_gradients(
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
    narrow: bool,
    triton: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_fused` or `_chunked`, as an operator."""
    settings = LinearLossSettings(
        ignore_index, label_smoothing, z_loss, softcap, scale, chunk, narrow, triton
    )
    return (_fused if triton else _chunked)(hidden, unembed, bias, labels, grad, settings, needs)


def _fake(
    hidden: Tensor, unembed: Tensor, bias: Tensor | None, needs: Needs, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_unembed, need_bias = needs
    return (
        hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype)),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(unembed) if need_unembed else hidden.new_empty(0),
        torch.empty_like(bias) if need_bias and bias is not None else hidden.new_empty(0),
    )


_op = operator("linear_cross_entropy", fake=_fake)(_loss_and_gradients)


# Reference: plain torch, differentiable to any order (its derivatives do keep O(N * V))


def linear_cross_entropy_reference(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    settings: LinearLossSettings,
    **_: Any,
) -> Tensor:
    """What `linear_cross_entropy` computes; `chunk` bounds one tensor."""
    options, scale, chunk = settings.loss, settings.scale, settings.chunk
    dtype = accumulation_dtype(hidden.dtype)
    valid = labels != options.ignore_index
    total = torch.zeros((), dtype=dtype, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        ok = valid[start : start + chunk]
        h = hidden[start : start + chunk].masked_fill(~ok[:, None], 0.0)
        z = torch.mm(h, unembed.t()).to(dtype)
        if bias is not None:
            z = z + bias
        if scale is not None:
            z = z * scale
        losses = token_losses(z, labels[start : start + chunk].masked_fill(~ok, 0), options)
        total = total + losses.where(ok, 0.0).sum()
    return total / valid.sum().clamp(min=1)


# Autograd


def _forward(
    *tensors: Tensor | None, settings: LinearLossSettings, eager: Needs
) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss, *grads = _op(*tensors, None, *settings, eager)
    return loss, tuple(g for g, wanted in zip(grads, eager, strict=True) if wanted)


def _backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    settings: LinearLossSettings,
    eager: Needs,
    last: bool = False,
) -> tuple[Tensor | None, ...]:
    """last: the residuals will not be asked for again, and may become the gradients."""
    ready: list[Tensor | None] = [None, None, None]
    made = iter(residuals)
    for i, wanted in enumerate(eager):
        g = next(made) if wanted else None
        if g is not None and needs[i]:
            ready[i] = scaled(g, grad, settings.triton, last)
    missing = [need and g is None for need, g in zip(needs[:3], ready, strict=True)]
    if any(missing):
        _, *grads = _op(*tensors, grad, *settings, missing)
        ready = [g if m else r for g, m, r in zip(grads, missing, ready, strict=True)]
    return (*ready, None)


OP = Op("linear_cross_entropy", linear_cross_entropy_reference, _forward, _backward)


@with_signature
class _WithReadyGradients(ForwardFunction):
    """Its last backward hands over the gradients that the forward computed, without copies."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, call = cotangents[0], ctx.call
        if grad is None or not is_last_backward(grad):
            return ForwardFunction.backward(ctx, *cotangents)
        needs, saved = tuple(ctx.needs_input_grad[1:]), ctx.saved_tensors
        tensors, residuals = saved[: ctx.count], saved[ctx.count :]
        grads = call.op.backward(grad, needs, tensors, residuals, **call.static, last=True)
        return (None, *(g if need else None for g, need in zip(grads, needs, strict=True)))


@allow_in_graph
def _apply(
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    eager: Needs,
    *settings: Any,
) -> Tensor:
    check_hidden()
    static = {"settings": LinearLossSettings(*settings), "eager": eager}
    if torch._C._are_functorch_transforms_active():
        return run(OP, hidden, unembed, bias, labels, **static)
    return _WithReadyGradients.apply(BoundOp(OP, static), hidden, unembed, bias, labels)[0]


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
    memory: int | None = None,
    accumulate: Literal["fp32", "bf16"] = "fp32",
    check_labels: bool = False,
) -> Tensor:
    """`cross_entropy(scale * (hidden @ unembed.T + bias), labels, ...)` without the logits.

    The matmuls run in the dtype of hidden, the rest in fp32, as in the dense form. If autograd
    will ask for gradients, they are computed with the loss, from the same logits (three matmuls
    instead of four). Derivatives of higher order go through a plain formula, which keeps O(N * V)
    in pieces of [chunk, V].

    Args:
        hidden: [N, D], any floating dtype.
        unembed: [V, D], same dtype.
        labels: [N] int64 in [0, V), or `ignore_index`: no loss, and a zero gradient for that row
            whatever its values (NaN too).
        scale: factor on the logits, before the softcap (Cohere's and Granite's logit scale).
        bias: [V], added before the scale.
        chunk: tokens at a time, at most.
        memory: bytes for a chunk's logits, instead of `chunk`. Logits have the dtype of hidden in
            the Triton path (V rounded up to a multiple of 64); the torch path keeps them in fp32
            and makes two copies. By default 1 GiB, in the torch path 512 MiB, on a CPU 4 MiB.
            Smaller chunks are slower: each one reads and writes the sum of the unembedding's
            gradient.
        accumulate: dtype of that sum. "fp32" takes another V * D * 4 bytes while the loss is
            computed. "bf16" (for bf16 weights) takes none, since the sum is the gradient itself,
            and rounds once per chunk.
        check_labels: as in `kernels.cross_entropy`.
        ignore_index, label_smoothing, z_loss, softcap: as in `kernels.cross_entropy`.

    Returns:
        A scalar, fp32 (fp64 if hidden is fp64): the mean over labelled tokens, 0 without any.

    Raises:
        ValueError: as `kernels.cross_entropy`; an unembed or bias that does not fit hidden;
            both `chunk` and `memory`, or a memory that cannot hold the logits of one token.

    >>> import torch
    >>> hidden, unembed = torch.zeros(2, 4), torch.zeros(8, 4)
    >>> round(float(linear_cross_entropy(hidden, unembed, torch.tensor([3, -100]))), 4)
    2.0794
    """
    where = "linear_cross_entropy"
    check_logits_and_labels(where, "hidden", hidden, labels)
    check_options(where, label_smoothing, z_loss, softcap)
    check_unembed(where, hidden, unembed, bias, chunk, memory)
    if accumulate not in ("fp32", "bf16"):
        raise ValueError(f"{where}: accumulate must be 'fp32' or 'bf16', got {accumulate!r}.")
    narrow = accumulate == "bf16"
    if narrow and unembed.dtype != torch.bfloat16:
        raise ValueError(f"{where}: accumulate='bf16' is for bf16 weights, got {unembed.dtype}.")
    check_label_range(where, labels, unembed.shape[0], ignore_index, check_labels)
    triton = choose("linear_cross_entropy", str(hidden.device), hidden.dtype) == "triton"
    if chunk is None:
        chunk = chunk_within(memory, unembed.shape[0], hidden, triton)
    # fp16 gradients wait for the backward: loss scaling has to come before they are rounded
    now = torch.is_grad_enabled() and hidden.dtype != torch.float16
    eager = tuple(now and x is not None and x.requires_grad for x in (hidden, unembed, bias))
    settings = LinearLossSettings(
        ignore_index, label_smoothing, z_loss, softcap, scale, chunk, narrow, triton
    )
    return _apply(hidden, unembed, bias, labels, eager, *settings)


def check_unembed(
    where: str,
    hidden: Tensor,
    unembed: Tensor,
    bias: Tensor | None,
    chunk: int | None,
    memory: int | None,
) -> None:
    check_floating(where, hidden=hidden, unembed=unembed, bias=bias)
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
    if chunk is not None and memory is not None:
        raise ValueError(f"{where}: give chunk or memory, not both.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{where}: chunk must be at least 1 token, got {chunk}.")


def chunk_within(memory: int | None, vocab: int, hidden: Tensor, triton: bool) -> int:
    """The number of tokens whose logits fit in `memory` bytes (None: the default).

    A multiple of 64 or 128 if possible, so that the matmuls fill their tiles.
    """
    if triton:
        token = -(-vocab // 64) * 64 * hidden.element_size()
        budget = _CHUNK_BYTES if memory is None else memory
    else:
        token = max(1, vocab) * accumulation_dtype(hidden.dtype).itemsize
        budget = 4 * _CHUNK_ELEMENTS.get(hidden.device.type, _CHUNK_ELEMENTS["cuda"])
        budget = budget if memory is None else memory
    if memory is not None and memory < token:
        raise ValueError(
            f"linear_cross_entropy: memory must hold the logits of one token, {token} bytes, "
            f"got {memory}."
        )
    chunk = max(1, budget // token)
    step = 128 if triton else 64
    if memory is None:
        return max(step, chunk // step * step)
    return chunk // step * step or chunk
