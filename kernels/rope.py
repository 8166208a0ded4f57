"""Rotary position embedding, half-split (NeoX) convention.

No Triton kernel yet. The rotation is linear in x and its transpose is the rotation by the opposite
angle, so one Function is its own backward (to any order), and keeps only the shared tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo import allow_in_graph

from kernels.functions import (
    accumulation_dtype,
    batch_first,
    can_read,
    check_device,
    check_floating,
    each_example,
    nested_forward_mode,
    with_signature,
)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """What `rope` computes: plain torch, differentiable to any order (in the tables too)."""
    dtype = accumulation_dtype(q.dtype)
    c = cos.index_select(0, positions).to(dtype)
    s = sin.index_select(0, positions).to(dtype)
    if inverse:
        s = -s
    # (a, b) -> (a c - b s, b c + a s), both halves in one pass
    c, s = torch.cat((c, c), -1).unsqueeze(1), torch.cat((-s, s), -1).unsqueeze(1)  # [N, 1, Dh]
    # widened before multiplying: on CPU bf16 * fp32 takes 5 times as long
    wide_q, wide_k, half = q.to(dtype), k.to(dtype), q.shape[-1] // 2
    turned_q = wide_q * c + torch.roll(wide_q, half, -1) * s
    turned_k = wide_k * c + torch.roll(wide_k, half, -1) * s
    return turned_q.to(q.dtype), turned_k.to(k.dtype)


@with_signature
class _Rotate(torch.autograd.Function):
    """Gradients flow to q and k alone."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return rope_reference(q, k, cos, sin, positions, inverse=inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tables, ctx.inverse = inputs[2:]
        ctx.save_for_backward(*tables)
        ctx.save_for_forward(*tables)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        back = _Rotate.apply(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
        return (*back, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent_q: Tensor, tangent_k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _Rotate.apply(tangent_q, tangent_k, *ctx.saved_tensors, ctx.inverse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], Any]:
        *tensors, inverse = args
        *dims, _ = in_dims
        if dims[2] is None and dims[3] is None:  # shared tables: examples are more tokens
            batched = [
                batch_first(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)
            ]
            q, k, positions = (batched[i].flatten(0, 1) for i in (0, 1, 4))
            outs = _Rotate.apply(q, k, tensors[2], tensors[3], positions, inverse)
            return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outs), (0, 0)
        outs = each_example(
            lambda *example: _Rotate.apply(*example, inverse),
            info.batch_size,
            tuple(dims),
            tuple(tensors),
        )
        return outs, (0, 0)


@allow_in_graph
def _apply(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    if nested_forward_mode():
        return rope_reference(q, k, cos, sin, positions)
    return _Rotate.apply(q, k, cos, sin, positions, False)


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns the pairs (x[i], x[i + Dh/2]) of each head by the angle of its position.

    RoFormer (arXiv 2104.09864) with the halves split as GPT-NeoX and Hugging Face's Llama do.
    Arithmetic is fp32 (fp64 for fp64), rounded once at the end.

    Args:
        q: [N, H, Dh], any floating dtype; Dh even.
        k: [N, Hk, Dh].
        cos, sin: [T, Dh/2] tables (fp32), one row a position. Constants: no gradient flows to them.
        positions: [N] int64 in [0, T).

    Returns:
        q and k turned, in their own dtypes.

    Raises:
        ValueError: wrong shapes, dtypes or devices, tables that require a gradient; on CPU also a
            position outside [0, T) (unless positions cannot be read: compiled, vmapped or meta).

    >>> import torch
    >>> x = torch.tensor([[[1.0, 0.0]]])
    >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])  # cos and sin of 90 degrees
    >>> rope(x, x, *quarter, torch.tensor([0]))[0].tolist()
    [[[0.0, 1.0]]]
    """
    check_floating("rope", q=q, k=k, cos=cos, sin=sin)
    check_device("rope", "q", q, "positions", positions)
    n, _, dim = _three_dims("q", q)
    if dim % 2:
        raise ValueError(f"rope: the head size must be even, got q {tuple(q.shape)}.")
    if _three_dims("k", k) != (n, k.shape[1], dim):
        raise ValueError(
            f"rope: k must have shape [{n}, Hk, {dim}] to match q {tuple(q.shape)}, "
            f"got {tuple(k.shape)}."
        )
    if cos.ndim != 2 or cos.shape[1] != dim // 2 or cos.shape != sin.shape:
        raise ValueError(
            f"rope: cos and sin must have shape [T, {dim // 2}] for head size {dim}, "
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
    if can_read(positions) and n:
        low, high = (int(end) for end in torch.aminmax(positions))
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"rope: position {low if low < 0 else high} is outside the tables of "
                f"{cos.shape[0]} positions; make longer cos and sin tables."
            )
    return _apply(q, k, cos, sin, positions)


def _three_dims(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 3:
        raise ValueError(f"rope: {name} must be [N, heads, head size], got {tuple(x.shape)}.")
    return x.shape[0], x.shape[1], x.shape[2]
