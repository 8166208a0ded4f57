"""Groups: neighbouring sites computed by one fused function, unless a rule opens them.

The numbers are those of the sites one after the other. The fused function saves memory: it keeps no
activation that is cheap to recompute, and the backward of its consumer recomputes it in passing.

A group is a site of kind ``group`` that declares its members. Its function asks ``site.open``
whether a rule has to be called at a member, and ``site.in_group`` for the params of a linear whose
rules need no call. To add a group (for decoding: norm, q, k, v, rotary embedding and the write to a
cache; attention, o and the residual), write the plain body, call it under ``site("group", ...)``,
and take the fused kernel where no member is open.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

import kernels
from core.forward import Site
from core.model.layers import linear, rms_norm, swiglu, weight_of
from params.tree import Tree


def attention_in(
    site: Site, norm: str, p: Tree, linears: Mapping[str, Tree], x: Tensor, *, eps: float
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The group ``attn_in``: RMS norm, then q, k and v. Arguments as of :func:`norm_linears`."""

    def run(_: Tree, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return norm_linears(site, norm, p, linears, x, eps=eps)

    members = (("norm", norm), *(("linear", at) for at in linears))
    return site("group", run, {}, x, at="attn_in", members=members)


def norm_mlp(
    site: Site,
    norm: str,
    mlp: str,
    p: Tree,
    leaves: Tree,
    x: Tensor,
    residual: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The group ``mlp``: x + residual, RMS norm, gated MLP: x ``[N, D]`` -> the same, and the sum.

    Fused, it keeps the outputs of gate and up, and its last backward writes gradients over them. A
    rule at the group may call it with ``keep=False``, which recomputes them in backward.

    norm, mlp: paths of the sites; p: the norm's params; leaves: those of gate, up and down.
    """
    linears = {f"{mlp}.{name}": leaves[name] for name in ("gate", "up", "down")}
    members = (("norm", norm), ("glu", mlp), *(("linear", at) for at in linears))
    biased = any("bias" in each for each in linears.values())
    *into, (down, last) = linears.items()

    def run(_: Tree, x: Tensor, residual: Tensor, keep: bool = True) -> tuple[Tensor, Tensor]:
        ruled = any(site.rules_at(kind, at) for kind, at in members)
        if ruled or biased or residual.dtype != x.dtype:
            (gate, up), total = norm_linears(site, norm, p, dict(into), x, residual, eps=eps)
            return glu_linear(site, mlp, down, last, gate, up), total
        gate, up, out = (weight_of(each) for each in linears.values())
        return kernels.add_norm_gated_mlp(x, residual, p["weight"], gate, up, out, eps, keep)

    return site("group", run, {}, x, residual, at=mlp, members=members)


def norm_linears(
    site: Site,
    norm: str,
    p: Tree,
    linears: Mapping[str, Tree],
    x: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """x + residual, RMS norm, then several linears: x ``[N, D]`` -> ``[N, O]`` each, and the sum
    (x itself without a residual), which continues the residual stream.

    The fused function keeps the sum, not its norm, and its backward adds the branches' gradients.
    Adapters are further linears of the same norm.

    norm, keys of linears: paths of the sites; p: the norm's params.
    """
    if residual is not None and residual.dtype != x.dtype:
        x, residual = x + residual, None  # in the wider dtype
    if site.open("norm", norm) or any(site.open("linear", at) for at in linears):
        x = x if residual is None else x + residual
        h = site("norm", partial(rms_norm, eps=eps), p, x, at=norm)
        return tuple(site("linear", linear, each, h, at=at) for at, each in linears.items()), x

    members = [site.in_group(each, at) for at, each in linears.items()]
    branches = [branch for _, joining in members for branch in joining]
    weights = [weight_of(leaves) for leaves, _ in members]
    biases = [*(leaves.get("bias") for leaves, _ in members), *(None for _ in branches)]
    thin = [branch.weight.to(weights[0].dtype) for branch in branches]
    outs, x = kernels.add_norm_linears(x, residual, p["weight"], [*weights, *thin], biases, eps)
    beside = iter(outs[len(members) :])
    results = []
    for (_, joining), y in zip(members, outs, strict=False):
        for branch in joining:
            y = branch.join(y, next(beside))
        results.append(y)
    return tuple(results), x


def glu_linear(site: Site, glu: str, down: str, p: Tree, gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU, then a linear: gate, up ``[N, F]`` -> ``[N, D]``. Fused, it keeps gate and up alone.

    glu, down: paths of the sites; p: the linear's params.
    """
    if site.open("glu", glu) or site.open("linear", down):
        return site("linear", linear, p, site("glu", swiglu, {}, gate, up, at=glu), at=down)
    p, branches = site.in_group(p, down)
    y = kernels.glu_linear(gate, up, weight_of(p), p.get("bias"))
    for branch in branches:
        y = branch.join(y, kernels.glu_linear(gate, up, branch.weight.to(y.dtype)))
    return y
