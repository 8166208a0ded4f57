"""Low-rank adapters of frozen linears: "LoRA", https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.forward import Branch, Forward, Rule
from core.sites import SiteInfo
from params.formats import ADAPTERS, dtype_of, held_at, is_adapter, shape_of
from params.init import leaf_seed
from params.tree import Tree, flatten, unflatten
from transforms.legal import check_legal

KINDS = ("linear", "weight")  # of site


def lora(
    forward: Forward,
    *,
    rank: int = 8,
    alpha: float | None = None,
    select: Sequence[str] | None = None,
) -> Forward:
    """Adds an adapter to linears: ``y + (alpha / rank) * (x @ A.T) @ B.T``.

    ``prepare`` puts ``lora_a [rank, I]``, normal with variance 1 / I, and ``lora_b [O, rank]``,
    zeros, beside ``weight [O, I]``. Both are fp32 or wider. ``value_and_grad`` and ``trainable``
    then train the adapters only. Adapters are never quantised: combined with ``quantize_int8``
    (QLoRA-style, https://arxiv.org/abs/2305.14314) or ``fake_quant``, in either order, they add to
    the output of the rounded linear.

    A matrix ``w`` that a foreign module's own code reads becomes ``w + (alpha / rank) * B @ A``.
    Experts ``[E, O, I]`` have one each: ``w_lora_a [E, rank, I]`` and ``w_lora_b [E, O, rank]``.

    Args:
        forward: any Forward.
        rank: inner dim of the adapters.
        alpha: default rank, a factor of 1.
        select: path patterns of linears (``attn.[qv]``, ``text.blocks``) and matrices. Default:
            all linears, and the two-dimensional matrices that no embed or head shares.

    Raises ValueError if rank is not positive, or a pattern matches nothing.

    Example::

        forward = lora(vlm(config), rank=16, select=["attn.[qv]"])
        params = forward.prepare(params)
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}")
    check_legal(forward, "lora")
    default = _by_default(forward)
    chosen_sites = [site for site in forward.select(KINDS, select) if select or default(site)]
    sites = {site.weight: site for site in chosen_sites}
    if both := [s.weight for s in chosen_sites if s.transposed != sites[s.weight].transposed]:
        raise ValueError(f"lora: {both[0]} is used both as it is and transposed: leave it out")
    if not sites:
        have = sorted({site.path for site in forward.sites if site.kind in KINDS})
        asked = "select is None, and no site is a linear" if select is None else f"select={select}"
        raise ValueError(f"lora: {asked}: nothing to adapt; of linears there are {have[:12]}")
    factor = 1.0 if alpha is None else alpha / rank

    def prepare(params: Tree, seed: int) -> Tree:
        flat = flatten(params)
        for path in sorted(sites):
            flat |= _fresh(flat, sites[path], rank, seed)
        return unflatten(flat)

    def chosen(site: SiteInfo) -> bool:
        return site.weight in sites

    def split(p: Tree, path: str) -> tuple[Tree, list[Tensor]]:
        if ADAPTERS[0] not in p:
            raise KeyError(f"{path} has no adapter: params = forward.prepare(params) comes first")
        return {k: leaf for k, leaf in p.items() if k not in ADAPTERS}, [p[k] for k in ADAPTERS]

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def adapted(p: Tree, x: Tensor) -> Tensor:
            rest, adapter = split(p, path)
            y = f(rest, x)
            a, b = (half.to(y.dtype) for half in adapter)
            return y + factor * F.linear(F.linear(x.to(y.dtype), a), b)

        return adapted

    def beside(p: Tree, path: str) -> tuple[Tree, Branch]:
        rest, (a, b) = split(p, path)
        return rest, Branch(a, lambda y, t: y + factor * F.linear(t.to(y.dtype), b.to(y.dtype)))

    def wrap_read(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def adapted(p: Tree) -> Tensor:
            rest, (a, b) = split(p, path)
            w = f(rest)
            return w + (factor * (b @ a)).to(w.dtype)

        return adapted

    out = forward
    for kind, how in (("linear", wrap), ("weight", wrap_read)):
        rule = Rule(kind, how, chosen, "lora", "adapt", beside)
        if any(True for site in forward.sites for _ in rule.keys(site)):
            out = out.with_rule(rule)
    return out.with_step("lora", preparations=(*out.preparations, prepare))


def _fresh(flat: dict[str, Tensor], site: SiteInfo, rank: int, seed: int) -> dict[str, Tensor]:
    p = held_at(flat, site.weight)
    try:
        *lead, outs, inner = shape_of(p)
    except KeyError:
        raise ValueError(f"params have no leaf {site.weight} to adapt") from None
    if site.transposed and "weight" in p:  # a quantised weight is [O, I] already
        outs, inner = inner, outs
    device = next(iter(p.values())).device
    at_a, at_b = (site.beside(name) for name in ADAPTERS)
    generator = torch.Generator(device).manual_seed(leaf_seed(seed, at_a))
    a = torch.empty(*lead, rank, inner, dtype=torch.float32, device=device)
    if not a.is_meta:
        a.normal_(0.0, inner**-0.5, generator=generator)
    dtype = torch.promote_types(dtype_of(p), torch.float32)  # small steps are lost in bf16
    b = torch.zeros(*lead, outs, rank, dtype=dtype, device=device)
    return {at_a: a.to(dtype), at_b: b}


def _by_default(forward: Forward) -> Callable[[SiteInfo], bool]:
    """Linears, and two-dimensional matrices that no embed or head shares: it would not adapt."""
    others = {site.weight for site in forward.sites if site.kind in ("embed", "head")}

    def chosen(site: SiteInfo) -> bool:
        flat = site.shape is not None and len(site.shape) == 2
        return site.kind == "linear" or (flat and site.weight not in others)

    return chosen


def merge_lora(
    forward: Forward, params: Tree, *, alpha: float | None = None, dtype: torch.dtype | None = None
) -> Tree:
    """Params for the forward without ``lora``: adapters are added to their weights, in fp32.

    alpha: as passed to ``lora``. dtype: of the merged weights; default: their own. Raises
    ValueError for an adapter of a quantised weight, and of a weight that an embed or the head
    shares, whose output the adapter does not change.
    """
    flat = flatten(params)
    others = {s.weight: s for s in forward.sites if s.kind in ("embed", "head")}
    for site in {s.weight: s for s in forward.sites if s.kind in KINDS}.values():
        a, b = (flat.pop(site.beside(name), None) for name in ADAPTERS)
        if a is None or b is None:
            continue
        weight = flat.get(site.weight)
        if weight is None:
            raise ValueError(
                f"{site.weight} is quantised: merge the adapters into the float params, then "
                "quantise those"
            )
        if other := others.get(site.weight):
            raise ValueError(
                f"{site.weight} is also the weight of the {other.kind} {other.path}, which its "
                "adapter does not change: untie the two before from_module"
            )
        factor = 1.0 if alpha is None else alpha / a.shape[-2]
        change = factor * b.float() @ a.float()
        merged = weight.float() + (change.T if site.transposed else change)
        flat[site.weight] = merged.to(dtype or weight.dtype)
    if left := [path for path in flat if is_adapter(path)]:
        raise ValueError(f"adapters at no linear of this forward: {left[:4]}")
    return unflatten(flat)
