"""Rotary position embedding in the half-split (NeoX) convention, optionally with QK-norm.

On a GPU the kernels of `rope_triton` run, with q and k in one launch per direction. The rotation is
linear in x, and its transpose is the rotation by the opposite angle. So one Function is its own
backward, to any order, and saves only the shared tables. With QK-norm, backward keeps q and k and
recomputes the norms.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.norm.rms_norm import rms_norm_reference
from kernels.rope import rope_triton
from kernels.runtime.autograd import (
    Dims,
    Op,
    Tensors,
    accumulation_dtype,
    can_read,
    check_device,
    check_floating,
    fold_all,
    nested_forward_mode,
    run,
    vmap_rule,
    with_signature,
)
from kernels.runtime.dispatch import TORCH, TRITON, choose, declare
from kernels.runtime.dynamo import allow_in_graph, check_hidden
from kernels.runtime.operators import empty, operator

declare("rope", TRITON, TORCH)

# References: plain torch, differentiable to any order (in the tables too)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """What `rope` computes without weights."""
    dtype = accumulation_dtype(q.dtype)
    half = q.shape[-1] // 2
    c, s = (_rows(table, positions).to(dtype) for table in (cos, sin))
    if cos.shape[1] == half:
        c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
    if inverse:  # the transpose: each half takes the other's sine
        s = -torch.roll(s, half, -1)
    # (a, b) -> (a c - b s, b c2 + a s2), both halves in one pass
    s = torch.cat((-s[..., :half], s[..., half:]), -1)
    c, s = c.unsqueeze(-2), s.unsqueeze(-2)  # [N, 1, Dh]
    # widened before multiplying: on CPU bf16 * fp32 takes 5 times as long
    wide_q, wide_k = q.to(dtype), k.to(dtype)
    rotated_q = wide_q * c + torch.roll(wide_q, half, -1) * s
    rotated_k = wide_k * c + torch.roll(wide_k, half, -1) * s
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def _rows(table: Tensor, positions: Tensor) -> Tensor:
    """table [T, X], positions [..., N] -> [..., N, X]."""
    return table.index_select(0, positions.reshape(-1)).reshape(*positions.shape, table.shape[1])


def rope_qk_norm_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What `rope` computes with weights: it rounds once, after the rotation."""
    dtype = accumulation_dtype(q.dtype)
    normed_q = rms_norm_reference(q.to(dtype), q_weight, eps=eps)
    normed_k = rms_norm_reference(k.to(dtype), k_weight, eps=eps)
    rotated_q, rotated_k = rope_reference(normed_q, normed_k, cos, sin, positions)
    return rotated_q.to(q.dtype), rotated_k.to(k.dtype)


def _backward_fake(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, needs_weights: bool, **_: Any
) -> tuple[Tensor, ...]:
    weights = (empty(weight, needs_weights) for weight in (q_weight, k_weight))
    return (empty(q, True), empty(k, True), *weights)


_rope_op = operator("rope", fake=lambda q, k, **_: (empty(q, True), empty(k, True)))(
    rope_triton.rope_turn
)
_backward_op = operator("rope_qk_norm_backward", fake=_backward_fake)(
    rope_triton.rope_qk_norm_backward
)


# The plain form


def _fold(shared: int, batch_size: int, dims: Dims, tensors: Tensors) -> Tensors | None:
    """Examples become further tokens if they share weights and tables, before the positions."""
    ends = slice(-1 - shared, -1)
    if any(dim is not None for dim in dims[ends]):
        return None
    firsts, last = slice(0, ends.start), slice(-1, None)
    front, back = (fold_all(batch_size, dims[part], tensors[part]) for part in (firsts, last))
    return front + tensors[ends] + back


@with_signature
class _Rotate(torch.autograd.Function):
    """(inverse, triton, q, k, cos, sin, positions) -> q and k rotated, differentiable in these.

    Not an `Op`, which would save q and k for backward.
    """

    @staticmethod
    def forward(inverse: bool, triton: bool, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        if triton:
            return _rope_op(*tensors[:2], None, None, *tensors[2:], 0.0, inverse)
        return rope_reference(*tensors, inverse=inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.inverse, ctx.triton, _, _, *tables = inputs
        ctx.save_for_backward(*tables)
        ctx.save_for_forward(*tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = _Rotate.apply(not ctx.inverse, ctx.triton, *grads, *ctx.saved_tensors)
        return (None, None, *back, None, None, None)

    @staticmethod
    def jvp(ctx: Any, _inverse: None, _triton: None, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        return _Rotate.apply(ctx.inverse, ctx.triton, *tangents[:2], *ctx.saved_tensors)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], inverse: bool, triton: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = _fold(2, info.batch_size, in_dims[2:], tensors)
        return vmap_rule(_Rotate, (inverse, triton), folded, info, in_dims[2:], tensors)


@allow_in_graph
def _apply(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, triton: bool
) -> tuple[Tensor, Tensor]:
    check_hidden()
    if nested_forward_mode():
        return rope_reference(q, k, cos, sin, positions)
    return _Rotate.apply(False, triton, q, k, cos, sin, positions)


# With QK-norm

Grads = tuple[Tensor | None, ...]


def _forward(*tensors: Tensor, eps: float) -> tuple[tuple[Tensor, Tensor], tuple[()]]:
    return rope_qk_norm_reference(*tensors, eps=eps), ()


def _backward(
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, ...],
    _: tuple[()],
    *,
    eps: float,
) -> Grads:
    """With t = g rotated back, u = x r and v = t w: dx = r (v - u mean(v u)), dw = sum t u."""
    q, k, q_weight, k_weight, cos, sin, positions = tensors
    dtype = accumulation_dtype(q.dtype)
    rotated = rope_reference(
        grads[0].to(dtype), grads[1].to(dtype), cos, sin, positions, inverse=True
    )
    d_heads, d_weights = [], []
    for t, x, weight in zip(rotated, (q, k), (q_weight, k_weight), strict=True):
        wide = x.to(dtype)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        u, v = wide * r, t * weight.to(dtype)
        d_heads.append((r * (v - u * (v * u).mean(-1, keepdim=True))).to(x.dtype))
        d_weights.append((t * u).flatten(0, -2).sum(0).to(weight.dtype))
    return (*d_heads, *d_weights, None, None, None)


def _forward_triton(*tensors: Tensor, eps: float) -> tuple[tuple[Tensor, Tensor], tuple[()]]:
    return _rope_op(*tensors, eps, False), ()


def _backward_triton(
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, ...],
    _: tuple[()],
    *,
    eps: float,
) -> Grads:
    return (*_backward_op(*grads, *tensors, eps, needs[2] or needs[3]), None, None, None)


def _fold_backward(
    batch_size: int, needs: tuple[bool, ...], dims: Dims, saved: Tensors
) -> Tensors | None:
    """Each example has a weight gradient of its own, where one call would return their sum."""
    return None if needs[2] or needs[3] else _fold(4, batch_size, dims, saved)


QK_NORM = Op(
    "rope",
    rope_qk_norm_reference,
    _forward,
    _backward,
    outputs=2,
    fold=partial(_fold, 4),
    fold_backward=_fold_backward,
    vmappable=True,
)
QK_NORM_TRITON = replace(
    QK_NORM, forward=_forward_triton, backward=_backward_triton, vmappable=False
)


@allow_in_graph
def _apply_qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    op = QK_NORM_TRITON if triton else QK_NORM
    return run(op, q, k, q_weight, k_weight, cos, sin, positions, eps=eps)


# Public


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + Dh/2]) of each head by the angle of its position.

    RoFormer (arXiv 2104.09864) with half-split pairs, as in GPT-NeoX and Hugging Face's Llama.
    With weights, an RMS norm of each head comes first (QK-norm: Qwen3, Gemma-3), in the same pass
    over memory. Arithmetic is fp32 (fp64 for fp64), rounded once at the end.

    Args:
        q: [N, H, Dh], any floating dtype; Dh even. On a GPU the kernel reads slices of one
            projection [N, ...] in place, without a copy.
        k: [N, Hk, Dh].
        cos, sin: [T, Dh/2] tables (fp32), one row per position; or [T, Dh] as in Hugging Face,
            where a row's first half rotates x[:Dh/2] and its second x[Dh/2:]. They are constants
            and get no gradient.
        positions: [N] int64 in [0, T).
        q_weight, k_weight: [Dh] each, any floating dtype, or None for no norm.
        eps: of the norms: x / sqrt(mean(x^2) + eps) * weight.

    Returns:
        q and k rotated, in their own dtypes.

    Raises:
        ValueError: wrong shapes, dtypes or devices, tables that require a gradient, one weight
            without the other; on a CPU also a position outside [0, T), unless positions are
            compiled, vmapped or meta. On a GPU the heads at such a position are NaN.

    >>> import torch
    >>> x = torch.tensor([[[1.0, 0.0]]])
    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])  # cos and sin of 90 degrees
    >>> rope(x, x, *quarter, torch.tensor([0]))[0].tolist()
    [[[0.0, 1.0]]]
    """
    check_floating("rope", q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    check_device("rope", "q", q, "positions", positions)
    n, _, dim = _three_dims("q", q)
    if dim % 2:
        raise ValueError(f"rope: the head size must be even, got q {tuple(q.shape)}.")
    if _three_dims("k", k) != (n, k.shape[1], dim):
        raise ValueError(
            f"rope: k must have shape [{n}, Hk, {dim}] to match q {tuple(q.shape)}, "
            f"got {tuple(k.shape)}."
        )
    if cos.ndim != 2 or cos.shape[1] not in (dim // 2, dim) or cos.shape != sin.shape:
        raise ValueError(
            f"rope: cos and sin must have shape [T, {dim // 2}] or [T, {dim}] for head size {dim}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}."
        )
    if positions.dtype != torch.int64 or tuple(positions.shape) != (n,):
        raise ValueError(
            f"rope: positions must be int64 of shape [{n}], "
            f"got {positions.dtype} {tuple(positions.shape)}."
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(
            "rope: cos and sin are constants, but one of them requires a gradient; detach them."
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError(
            f"rope: {'q' if q_weight is None else 'k'}_weight is missing; QK-norm takes two."
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (dim,):
            raise ValueError(
                f"rope: {name} must have shape [{dim}] for head size {dim}, "
                f"got {tuple(weight.shape)}."
            )
    if eps < 0.0:
        raise ValueError(f"rope: eps must be >= 0, got {eps}.")
    if can_read(positions) and n:
        low, high = (int(end) for end in torch.aminmax(positions))
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"rope: position {low if low < 0 else high} is outside the tables of "
                f"{cos.shape[0]} positions; make longer cos and sin tables."
            )
    triton = choose("rope", str(q.device), torch.promote_types(q.dtype, k.dtype)) == "triton"
    if q_weight is None or k_weight is None:
        return _apply(q, k, cos, sin, positions, triton)
    return _apply_qk_norm(q, k, q_weight, k_weight, cos, sin, positions, eps, triton)


def _three_dims(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 3:
        raise ValueError(f"rope: {name} must be [N, heads, head size], got {tuple(x.shape)}.")
    return x.shape[0], x.shape[1], x.shape[2]
