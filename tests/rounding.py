"""How far results may lie from the right ones, by what is added up: the same on every CPU and GPU.

A sum of numbers no larger than `size`, of `terms` terms, is off by at most `terms` ulps of `size`,
in whatever order it is made and whether or not a product and a sum are rounded as one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulps(dtype: torch.dtype, terms: int) -> float:
    """What a sum of so many terms of order 1 may be off.

    Of n such sums in a row, sqrt(n) times as much: their roundings go either way.
    """
    return terms * torch.finfo(dtype).eps


# Of a model of the tests: some 16 sums in a row, there and back, of up to 64 terms
MODEL = 64 * 4
FP32, FP64 = (ulps(dtype, MODEL) for dtype in (torch.float32, torch.float64))


def attention_bounds(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, causal: bool, off: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What out, dq, dk and dv of one document may be off, in fp64, entry by entry, where its scores
    q k' are off by `off` of a query's largest and other sums are fp32's: q, g [N, H, Dh], k, v
    [N, Hk, Dh].

    A weight is off by the factor e^(2 d), d of its score and d of the log-sum-exp. Forward's sum to
    1 all the same, so that out moves by what values differ from it; backward's do not.
    """
    group = q.shape[1] // k.shape[1]
    q, g, k, v = (x.double().transpose(0, 1) for x in (q, g, k, v))  # [heads, N, Dh]
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    scores = q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf"))
    weights = scores.softmax(-1)
    out = weights @ v
    unit = ulps(torch.float32, q.shape[1] + q.shape[2] + 8)  # of sums over keys and entries
    seen = scores.abs().masked_fill(scores.isinf(), 0.0)
    ratio = torch.expm1(2.0 * off * seen.amax(-1, keepdim=True)) + unit  # [heads, N, 1]
    apart = torch.stack([(v - out[:, i : i + 1]).abs() for i in range(out.shape[1])], 1)
    d_out = ratio * torch.einsum("hij,hijd->hid", weights, apart) + unit * (weights @ v.abs())
    d_values = (ratio * weights).mT @ g.abs()
    slope = g @ v.mT - (g * out).sum(-1, keepdim=True)  # of the loss by a weight
    d_slope = unit * (g.abs() @ v.abs().mT)
    d_slope = d_slope + (g.abs() * (d_out + unit * out.abs())).sum(-1, keepdim=True)
    d_scores = weights * (ratio * slope.abs() + (1 + ratio) * d_slope)
    size = weights * slope.abs()
    d_q = d_scores @ k.abs() + unit * (size @ k.abs())
    d_k = d_scores.mT @ q.abs() + unit * (size.mT @ q.abs())
    d_k, d_values = (x.unflatten(0, (-1, group)).sum(1) for x in (d_k, d_values))
    # weights that fp32 has as 0
    least = torch.finfo(torch.float32).tiny * float(k.abs().max() * g.abs().max()) * 2.0**20
    bounds = (d_out, d_q, d_k, d_values)
    return tuple(x.transpose(0, 1) + least for x in bounds)  # type: ignore[return-value]
