"""Replaces norms, gated MLPs, attention and rotary embeddings of a foreign module by kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import kernels
from core.foreign.rotary import takes_tables
from core.forward import Forward, Rule
from core.sites import NormForm, SiteInfo
from params.tree import Tree
from transforms.legal import check_legal

FUSED = ("norm", "glu", "attention", "rope")
GLUS: dict[str | None, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": kernels.swiglu,
    "gelu_tanh": kernels.geglu,  # gelu by its error function has no kernel
}


def fuse_kernels(forward: Forward, *, skip: Sequence[str] = ()) -> Forward:
    """Runs norms, ``act(gate) * up``, rotary embeddings and attention on the kernels here.

    The numbers are the same up to rounding. The kernels are innermost at their sites, in any order
    of transforms. An attention call with a mask, with dropout, or with different lengths of
    queries and keys still goes to ``F.scaled_dot_product_attention``; a rotary call whose tables
    are differentiated or rotate only part of a head, to the module's own function. Native forwards
    call the kernels anyway, and are returned with this transform on record.

    skip: path patterns of sites to leave out. A norm or glu of unknown form is left out with a
    warning that names it. Raises ValueError if a pattern matches nothing, or a foreign module has
    no norm, glu, attention or rope.
    """
    check_legal(forward, "fuse_kernels")
    skipped = set(forward.select(FUSED, tuple(skip)))
    sites = [s for s in forward.sites if s.foreign and s.kind in FUSED]
    wanted = [s for s in sites if s not in skipped]
    table = _replacements(wanted)
    if not wanted and any(s.foreign for s in forward.sites):
        have = ", ".join(sorted({f"{s.kind} {s.path}" for s in forward.sites})[:20])
        raise ValueError(
            f"fuse_kernels finds no norm, glu, attention or rope to fuse, among: {have}"
        )
    if left := sorted({f"{s.kind} {s.path}" for s in wanted if (s.kind, s.path) not in table}):
        warnings.warn(f"fuse_kernels leaves as they are: {', '.join(left)}", stacklevel=2)

    def wrap(kind: str, f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return partial(CALLS[kind], f) if kind in CALLS else table[kind, path]

    def chosen(site: SiteInfo) -> bool:
        return (site.kind, site.path) in table

    for kind in sorted({kind for kind, _ in table}):
        rule = Rule(kind, partial(wrap, kind), chosen, "fuse_kernels", stage="kernel")
        forward = forward.with_rule(rule)
    return forward.with_step("fuse_kernels")


def _replacements(sites: Sequence[SiteInfo]) -> dict[tuple[str, str], Callable[..., Any]]:
    """The function to call at each site that has a kernel."""
    table: dict[tuple[str, str], Callable[..., Any]] = {}
    for site in sites:
        key = (site.kind, site.path)
        if site.kind == "glu" and site.activation in GLUS:
            table[key] = partial(_glu, GLUS[site.activation])
        if site.kind in CALLS:
            table[key] = CALLS[site.kind]
        # layers that share a weight have one path: fused only if their norms agree
        alike = {s.norm for s in sites if (s.kind, s.path) == key} == {site.norm}
        if site.norm is not None and alike:
            table[key] = partial(_norm, site.norm)
    return table


def _glu(kernel: Callable[[Tensor, Tensor], Tensor], p: Tree, gate: Tensor, up: Tensor) -> Tensor:
    return kernel(gate, up)


def _attention(
    f: Callable[..., Tensor], p: Tree, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
) -> Tensor:
    """q ``[B, H, T, Dh]``, k and v ``[B, Hk, T, Dh]``; ``f`` is the module's own call."""
    masked = options.get("attn_mask") is not None or options.get("dropout_p", 0.0) > 0
    grouped = q.ndim == 4 and q.shape[1] != k.shape[1]
    alike = q.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if masked or not alike or k.shape != v.shape:
        return f(p, q, k, v, options)
    if not q.dtype == k.dtype == v.dtype or (grouped and not options.get("enable_gqa")):
        return f(p, q, k, v, options)  # torch raises the error
    rows, length = q.shape[0], q.shape[2]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device) * length
    packed_q, packed_k, packed_v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = kernels.attention(
        packed_q,
        packed_k,
        packed_v,
        starts,
        causal=options.get("is_causal", False),
        scale=options.get("scale"),
        length=length,
    )
    return out.unflatten(0, (rows, length)).transpose(1, 2)


def _rope(
    f: Callable[..., tuple[Tensor, Tensor]],
    p: Tree,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """q ``[B, H, T, Dh]``, k ``[B, Hk, T, Dh]``, cos and sin ``[B or 1, T, Dh]``."""
    dtype = torch.promote_types(cos.dtype, sin.dtype)
    same = all(torch.promote_types(x.dtype, dtype) == x.dtype for x in (q, k))
    if not takes_tables(q, k, cos, sin, rest) or not same or _moves(cos) or _moves(sin):
        return f(p, q, k, cos, sin, *rest)
    rows, length = q.shape[0], q.shape[2]
    positions = torch.arange(cos.shape[0] * length, device=q.device)
    if cos.shape[0] != rows:
        positions = positions.repeat(rows)
    packed_q, packed_k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
    turned = kernels.rope(packed_q, packed_k, cos.flatten(0, 1), sin.flatten(0, 1), positions)
    q, k = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in turned)
    return q, k


def _moves(x: Tensor) -> bool:
    """Whether x may be differentiated, for which the kernel has no derivative."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


CALLS: dict[str, Callable[..., Any]] = {"attention": _attention, "rope": _rope}


def _norm(form: NormForm, p: Tree, x: Tensor) -> Tensor:
    weight = p[form.weight]
    if form.offset:
        # in fp32: bf16 has no room for a small weight beside 1
        weight = form.offset + (weight if weight.itemsize >= 4 else weight.float())
    if form.kind == "rms":
        out = kernels.rms_norm(x, weight, form.eps)
        return out if form.bias is None else out + p[form.bias]
    return kernels.layer_norm(x, weight, None if form.bias is None else p[form.bias], form.eps)
