"""Attention on a CPU: documents of like length laid side by side, as batches of small matrices.

Documents that already lie so are not even copied. They cannot touch each other at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.autograd import Op, accumulation_dtype, run
from kernels.runtime.dynamo import allow_in_graph
from kernels.runtime.operators import operator

# Documents up to _SMALL tokens go through batched matmuls, longer ones through torch's CPU flash
# kernel. Measured on one core, bf16, forward + backward: 68 documents of 60 tokens, 4 heads of 32:
# 5.4 ms against 38 ms; 4 of 512 tokens: 32 against 31; 1 of 2048, heads of 64: 379 against 99.
_SMALL = 256
# Up to this length the probabilities are kept for backward (at most this many entries a head and
# token, in the dtype of q); beyond it they are computed again.
_KEEP = 128


# Where each document goes


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Documents computed together, as [count, length]."""

    count: int
    length: int
    start: int  # first row, if the documents lie side by side already
    rows: Tensor | None  # [count * length] rows to gather, else None
    unused: Tensor | None  # [count * length, 1, 1] True past a document's end; None if full
    bias: Tensor | None  # [count, 1, length]: -inf past a document's end; None if full

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)


@dataclass(frozen=True, eq=False)
class _Plan:
    buckets: tuple[_Bucket, ...]
    restore: Tensor | None  # [N] where each row lies in the buckets' outputs; None: in order


@functools.lru_cache(maxsize=32)  # once a batch, then shared by all layers
def _make_plan(bounds: tuple[int, ...]) -> _Plan:
    documents = [(a, b - a) for a, b in itertools.pairwise(bounds) if b > a]
    with torch.inference_mode(False):  # the plan outlives the call that made it
        runs: list[list[int]] = []  # [start, count, length] of neighbours of equal length
        for start, length in documents:
            if runs and runs[-1][2] == length:
                runs[-1][1] += 1
            else:
                runs.append([start, 1, length])
        if len(runs) <= 2:  # images of one size, say, and padding at the end
            return _Plan(tuple(_Bucket(c, n, s, None, None, None) for s, c, n in runs), None)

        buckets, offset = [], 0
        restore = torch.empty(bounds[-1], dtype=torch.int64)
        for group in _group(documents):
            length = max(n for _, n in group)
            if length <= _SMALL:
                length = _round_up(length)
            starts, lengths = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
            step = torch.arange(length)
            used = step < lengths
            slots = torch.arange(len(group) * length).view(len(group), length)
            restore[(starts + step)[used]] = slots[used] + offset
            offset += slots.numel()
            full = bool(used.all())
            buckets.append(
                _Bucket(
                    count=len(group),
                    length=length,
                    start=0,
                    # past its end a document repeats its last row: finite if the document is
                    rows=(starts + torch.minimum(step, lengths - 1)).flatten(),
                    unused=None if full else ~used.view(-1, 1, 1),
                    bias=None if full else torch.zeros(used.shape).where(used, -torch.inf)[:, None],
                )
            )
        return _Plan(tuple(buckets), restore)


def _round_up(length: int) -> int:
    return -length % 8 + length


def _group(documents: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Documents (start, length) split into buckets of like length, at the least cost.

    Short ones: dynamic programming over lengths in steps of 8, a bucket of count documents costing
    count * length^2 and a fixed overhead. Long ones: equal lengths only.
    """
    overhead = 8192  # scores a head: what launching one more bucket's operations costs
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, length in documents:
        key = _round_up(length) if length <= _SMALL else length
        by_length.setdefault(key, []).append((start, length))
    groups = [group for key, group in by_length.items() if key > _SMALL]
    short = sorted(key for key in by_length if key <= _SMALL)
    counts = [0, *itertools.accumulate(len(by_length[key]) for key in short)]
    best: list[tuple[int, int]] = [(0, 0)]  # least cost of the first j lengths, last bucket's start
    for j in range(1, len(short) + 1):
        size = short[j - 1] ** 2
        best.append(
            min((best[i][0] + (counts[j] - counts[i]) * size + overhead, i) for i in range(j))
        )
    end = len(short)
    while end:
        begin = best[end][1]
        groups.append([d for key in short[begin:end] for d in by_length[key]])
        end = begin
    return groups


@functools.lru_cache(maxsize=64)
def _band(
    length: int, causal: bool, window: int | None, groups: int, dtype: torch.dtype
) -> Tensor | None:
    """[groups * length, length] of 0 where a query sees a key of its document and -inf elsewhere.

    None if it sees them all.
    """
    if not causal and (window is None or window >= length):
        return None
    with torch.inference_mode(False):
        step = torch.arange(length)
        gap = step[:, None] - step
        seen = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
        if window is not None:
            seen &= gap.abs() < window
        band = torch.zeros(length, length, dtype=dtype).where(seen, -torch.inf)
        return band.repeat(groups, 1)


# Arithmetic of one bucket. Query heads that share a key head are rows of one matrix:
# q [B, G * L, Dh], k and v [B, L, Dh] with B = documents * key heads.


def _split(x: Tensor, bucket: _Bucket, key_heads: int, zero_unused: bool = False) -> Tensor:
    """[N, H, Dh] -> [count * Hk, G * L, Dh]."""
    if bucket.rows is None:
        x = x[bucket.span]
    else:
        x = x.index_select(0, bucket.rows)
        if zero_unused and bucket.unused is not None:
            x = x.masked_fill(bucket.unused, 0.0)
    x = x.unflatten(0, (bucket.count, bucket.length)).transpose(1, 2)
    return x.reshape(bucket.count * key_heads, -1, x.shape[-1])


def _join(parts: Sequence[Tensor], plan: _Plan, heads: int) -> Tensor:
    """The inverse of `_split` over all buckets."""
    rows = [
        part.reshape(bucket.count, heads, bucket.length, part.shape[-1]).transpose(1, 2)
        for part, bucket in zip(parts, plan.buckets, strict=True)
    ]
    if len(rows) == 1:
        joined = rows[0].flatten(0, 1)
    else:
        joined = torch.cat([part.flatten(0, 1) for part in rows])
    return joined if plan.restore is None else joined.index_select(0, plan.restore)


def _bias(
    bucket: _Bucket,
    causal: bool,
    window: int | None,
    groups: int,
    key_heads: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """What is added to the scores: broadcastable to [count * Hk, G * L, L], or None."""
    band = _band(bucket.length, causal, window, groups, dtype)
    if causal or bucket.bias is None:
        return band  # causal queries never reach past their document's end
    ends = bucket.bias.to(dtype).repeat_interleave(key_heads, 0)
    if band is None:
        return ends
    # a query past its document's end may see no key at all, and softmax would give NaN there
    blind = ends.mT.repeat(1, groups, 1) == -torch.inf
    return (ends + band).masked_fill(blind, 0.0)


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention weights [B, G * L, L] in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    # fp32 scores: a bf16 score of 10 is off by up to 0.03, and so is the weight by 3%
    q, k = q.to(dtype), k.to(dtype).mT
    if bias is None:
        return torch.softmax(torch.bmm(q, k) * scale, -1)
    return torch.softmax(torch.baddbmm(bias, q, k, alpha=scale), -1)


def _padded_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bounds: tuple[int, ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """`padded` as plain torch, differentiable to any order; never through the flash kernel."""
    plan = _make_plan(bounds)
    heads, key_heads = q.shape[1], k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    parts = []
    for bucket in plan.buckets:
        qb, kb, vb = (_split(x, bucket, key_heads) for x in (q, k, v))
        bias = _bias(bucket, causal, window, heads // key_heads, key_heads, dtype)
        parts.append(torch.bmm(_weights(qb, kb, bias, scale).to(q.dtype), vb))
    return _join(parts, plan, heads)


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> list[Tensor]:
    """The output, then what backward wants."""
    plan = _make_plan(tuple(bounds))
    heads, key_heads = q.shape[1], k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    parts, residuals = [], []
    for bucket in plan.buckets:
        qb, kb, vb = (_split(x, bucket, key_heads) for x in (q, k, v))
        if bucket.length > _SMALL:
            out, lse = _flash_forward(qb, kb, vb, bucket, key_heads, causal, window, scale)
            residuals += [out, lse]
            parts.append(out.flatten(0, 1))
            continue
        bias = _bias(bucket, causal, window, heads // key_heads, key_heads, dtype)
        weights = _weights(qb, kb, bias, scale).to(q.dtype)
        if bucket.length <= _KEEP:
            residuals.append(weights)
        parts.append(torch.bmm(weights, vb))
    return [_join(parts, plan, heads), *residuals]


# One operation for policies of what backward keeps (transforms.checkpoint). It reads `bounds`.
operator("padded_attention", fake=None, kind="attention")(_padded)


def _padded_forward(
    q: Tensor, k: Tensor, v: Tensor, **static: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    out, *residuals = torch.ops.nanovision.padded_attention(q, k, v, **static)
    return out, tuple(residuals)


def _padded_backward(
    grad: Tensor,
    needs: tuple[bool, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    residuals: tuple[Tensor, ...],
    *,
    bounds: tuple[int, ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """With weights P: dV = P' g, dS = P * (g V' - rowsum), dQ = scale dS K, dK = scale dS' Q."""
    q, k, v = tensors
    plan = _make_plan(bounds)
    heads, key_heads = q.shape[1], k.shape[1]
    dtype = accumulation_dtype(q.dtype)
    kept = iter(residuals)
    dq: list[Tensor] = []
    dk: list[Tensor] = []
    dv: list[Tensor] = []
    for bucket in plan.buckets:
        qb, kb, vb = (_split(x, bucket, key_heads) for x in (q, k, v))
        gb = _split(grad, bucket, key_heads, zero_unused=True)
        if bucket.length > _SMALL:
            grads = _flash_backward(
                gb, qb, kb, vb, next(kept), next(kept), bucket, key_heads, causal, window, scale
            )
        else:
            if bucket.length <= _KEEP:
                weights = next(kept)
            else:
                bias = _bias(bucket, causal, window, heads // key_heads, key_heads, dtype)
                weights = _weights(qb, kb, bias, scale).to(q.dtype)
            d_weights = torch.bmm(gb, vb.mT)
            ds = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            grads = (
                torch.bmm(ds, kb) * scale,
                torch.bmm(ds.mT, qb) * scale,
                torch.bmm(weights.mT, gb),
            )
        for parts, part in zip((dq, dk, dv), grads, strict=True):
            parts.append(part)
    return _join(dq, plan, heads), _join(dk, plan, key_heads), _join(dv, plan, key_heads)


# Long documents: torch's CPU flash kernel, O(length) memory. All of a bucket are of one length.


def _flash_layout(
    x: Tensor, bucket: _Bucket, key_heads: int, groups: int
) -> Tensor:  # [count * Hk, G' * L, Dh] -> [count, H, L, Dh]
    x = x.reshape(bucket.count, key_heads, -1, bucket.length, x.shape[-1])
    return x.expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bucket: _Bucket,
    key_heads: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    groups = q.shape[1] // bucket.length
    q, k, v = (_flash_layout(x, bucket, key_heads, groups) for x in (q, k, v))
    mask = None if window is None else _band(bucket.length, causal, window, 1, q.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bucket: _Bucket,
    key_heads: int,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q.shape[1] // bucket.length
    grad, q, k, v = (_flash_layout(x, bucket, key_heads, groups) for x in (grad, q, k, v))
    mask = None if window is None else _band(bucket.length, causal, window, 1, q.dtype)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal and mask is None, attn_mask=mask, scale=scale
    )
    shared = (bucket.count * key_heads, groups, bucket.length, q.shape[-1])
    return (
        dq.reshape(bucket.count * key_heads, -1, q.shape[-1]),
        dk.reshape(shared).sum(1),
        dv.reshape(shared).sum(1),
    )


PADDED = Op("padded attention", _padded_formula, _padded_forward, _padded_backward)


@allow_in_graph
def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[int, ...],
    causal: bool,
    window: int | None,
    scale: float,
) -> Tensor:
    """Attention of the documents between `bounds`, which end at N; all of q, k, v on a CPU."""
    return run(PADDED, q, k, v, bounds=bounds, causal=causal, window=window, scale=scale)
