"""Attention as a formula: plain torch, right everywhere, O(N^2) in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.autograd import accumulation_dtype


def attention_reference(
    q: Tensor,  # [N, H, Dh]
    k: Tensor,  # [N, Hk, Dh]
    v: Tensor,  # [N, Hk, Dh]
    cu_seqlens: Tensor | None,  # [S + 1]; not read if there is a length
    *,
    causal: bool,
    window: int | None,
    scale: float,
    length: int | None = None,
) -> Tensor:
    """What `attention` computes, in the accumulation dtype: plain torch, any order.

    All tensors may have leading dimensions more, the same in each: examples.
    """
    if q.ndim > 3:

        def one(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
            return attention_reference(
                q, k, v, cu_seqlens, causal=causal, window=window, scale=scale, length=length
            )

        dims = (0, 0, 0, None if cu_seqlens is None else 0)
        return torch.func.vmap(one, dims)(q, k, v, cu_seqlens)
    n, heads = q.shape[:2]
    groups = heads // k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    size = n if length is None else length
    index = torch.arange(size, device=q.device)
    gap = index[:, None] - index
    seen = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
    if length is None:
        assert cu_seqlens is not None
        document = (cu_seqlens[1:] <= index[:, None]).sum(-1)
        seen = seen & (document[:, None] == document)
    if window is not None:
        seen = seen & (gap.abs() < window)
    rows = (1, n) if length is None else (n // length, length)
    q, k, v = (x.unflatten(0, rows) for x in (q, k, v))  # [B, T, heads, Dh]
    grouped = q.to(dtype).unflatten(2, (-1, groups))  # [B, T, Hk, G, Dh]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", grouped, k.to(dtype)) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v.to(dtype))
    return out.flatten(2, 3).flatten(0, 1).to(q.dtype)
