"""Low-rank adapters beside frozen linears: "LoRA", https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from core.forward import Forward, Rule, SiteInfo
from params.init import leaf_seed
from params.tree import Tree, flatten, unflatten
from transforms.legal import check_legal

ADAPTERS = ("lora_a", "lora_b")


def is_adapter(path: str) -> bool:
    """Whether a leaf is half of an adapter."""
    return path.rpartition(".")[2] in ADAPTERS


def lora(
    forward: Forward,
    *,
    rank: int,
    alpha: float | None = None,
    select: Sequence[str] | None = None,
) -> Forward:
    """Linears with an adapter: ``y + (alpha / rank) * (x @ A.T) @ B.T``; ``prepare`` makes A and B.

    Beside ``weight [O, I]`` come ``lora_a [rank, I]``, normal with variance 1 / I, and
    ``lora_b [O, rank]``, zeros, so that at first nothing changes; fp32 at least.
    ``value_and_grad`` and ``trainable`` then train the adapters alone. They lie outside whatever
    rounds the weight or x (``quantize_int8``: QLoRA-style, https://arxiv.org/abs/2305.14314;
    ``fake_quant``), in any order, and are never quantised.

    alpha: default rank, a factor of 1. select: path patterns of linears (``attn.[qv]``,
    ``text.blocks``); default: all. Raises ValueError if rank is not positive or a pattern names no
    linear.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, not {rank}")
    check_legal(forward, "lora")
    sites = {site.path: site for site in forward.select(("linear",), select)}
    if not sites:
        have = sorted({site.path for site in forward.sites if site.kind == "linear"})
        raise ValueError(f"lora: {select} names no linear; there are {have[:12]}")
    factor = 1.0 if alpha is None else alpha / rank

    def prepare(params: Tree, seed: int) -> Tree:
        flat = flatten(params)
        for path in sorted(sites):
            flat |= _fresh(flat, sites[path], rank, seed)
        return unflatten(flat)

    def chosen(site: SiteInfo) -> bool:
        return site.path in sites

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def adapted(p: Tree, x: Tensor) -> Tensor:
            if "lora_a" not in p:
                raise KeyError(
                    f"{path} has no adapter: params = forward.prepare(params) comes first"
                )
            y = f({name: leaf for name, leaf in p.items() if name not in ADAPTERS}, x)
            a, b = (p[name].to(y.dtype) for name in ADAPTERS)
            return y + factor * F.linear(F.linear(x.to(y.dtype), a), b)

        return adapted

    rule = Rule("linear", wrap, chosen, "lora", level=1)
    out = forward.with_rule(rule)
    return out.with_step("lora", preparations=(*out.preparations, prepare))


def _fresh(flat: dict[str, Tensor], site: SiteInfo, rank: int, seed: int) -> dict[str, Tensor]:
    path = site.path
    weight = flat.get(f"{path}.weight")
    if weight is not None:
        outs, inner = weight.shape[::-1] if site.transposed else weight.shape
        dtype = weight.dtype
    else:
        weight = flat.get(f"{path}.weight_int8")
        if weight is None:
            raise ValueError(f"params have no leaf {path}.weight to adapt")
        (outs, inner), dtype = weight.shape, flat[f"{path}.weight_scale"].dtype
    generator = torch.Generator(weight.device).manual_seed(leaf_seed(seed, f"{path}.lora_a"))
    a = torch.empty(rank, inner, dtype=torch.float32, device=weight.device)
    if not a.is_meta:
        a.normal_(0.0, inner**-0.5, generator=generator)
    dtype = torch.promote_types(dtype, torch.float32)  # small steps are lost in bf16
    b = torch.zeros(outs, rank, dtype=dtype, device=weight.device)
    return {f"{path}.lora_a": a.to(dtype), f"{path}.lora_b": b}


def merge_lora(
    forward: Forward, params: Tree, *, alpha: float | None = None, dtype: torch.dtype | None = None
) -> Tree:
    """Params for the forward without ``lora``: adapters added into their weights, in fp32.

    alpha: what ``lora`` was given. dtype: of the weights that change; default: their own. Raises
    ValueError for adapters beside an int8 weight, which cannot take them.
    """
    flat = flatten(params)
    for site in {s.path: s for s in forward.sites if s.kind == "linear"}.values():
        a, b = (flat.pop(f"{site.path}.{name}", None) for name in ADAPTERS)
        if a is None or b is None:
            continue
        weight = flat.get(f"{site.path}.weight")
        if weight is None:
            raise ValueError(
                f"{site.path} is quantised: merge the adapters into the float params, then "
                "quantise those"
            )
        factor = 1.0 if alpha is None else alpha / a.shape[0]
        change = factor * b.float() @ a.float()
        merged = weight.float() + (change.T if site.transposed else change)
        flat[f"{site.path}.weight"] = merged.to(dtype or weight.dtype)
    if left := [path for path in flat if is_adapter(path)]:
        raise ValueError(f"adapters at no linear of this forward: {left[:4]}")
    return unflatten(flat)
