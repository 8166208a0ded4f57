"""Low-precision compute over high-precision params: a cast where each matrix is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.forward import ADDED, WEIGHTED, Forward, Rule, Site
from core.model.layers import Logits
from params.int8 import is_mark, is_scale
from params.tree import Tree, flatten, map_with_path
from transforms.legal import check_legal


def mixed_precision(forward: Forward, dtype: torch.dtype = torch.bfloat16) -> Forward:
    """Matmuls and activations in ``dtype``, params, gradients and reductions as they are.

    Matrices are cast where they are used, so their gradients arrive in the params' own dtype.
    Vectors stay: norms compute in fp32 anyway, and a bias takes the dtype of its matmul. The loss
    is fp32 (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).

    In a module of someone else's, norms answer in the dtype that they were given, and what its own
    code computes between sites runs under ``torch.autocast``: products in ``dtype``, whatever they
    are given. A dtype of more than 16 bits is wider, not lower: there all params and all of the
    batch's floating-point tensors are cast. Raises RuntimeError where tensors of two dtypes still
    meet in that code.
    """
    check_legal(forward, "mixed_precision")
    foreign = any(site.foreign for site in forward.sites)
    if foreign and dtype.itemsize > 2:
        build = partial(_widened, forward.build, dtype)
        return forward.with_step("mixed_precision", build=build)
    layers = {s.path for s in forward.sites if s.kind in WEIGHTED and s.kind != "weight"}
    weights = {s for s in forward.sites if s.kind == "weight"}
    read = {s.weight for s in weights} | {s.beside(name) for s in weights for name in ADDED}
    name = f"cast to {str(dtype).removeprefix('torch.')}"

    def at_site(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def run(p: Tree, *args: Any) -> Any:
            return f(_cast(p, dtype), *args)

        return run

    def at_gather(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def others(leaf: str) -> bool:
            full = f"{path}.{leaf}"
            if full in read:
                return False
            # a table's mark: its rows come in that dtype
            return leaf.endswith("weight_dtype") or full.rpartition(".")[0] not in layers

        def run(p: Tree, *args: Any) -> Any:
            if path in read or not args:
                return f(p)
            # float weights bring x to their dtype; int8 ones take it as it comes
            x, *rest = args
            x = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            return f(_cast(p, dtype, others), x, *rest)

        return run

    def at_read(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return lambda p: f(p).to(dtype)

    kinds = {site.kind for site in forward.sites}
    for kind in sorted(kinds & set(WEIGHTED) - {"weight"}):
        # Innermost: what else is done to a weight (rounding by fake_quant) is done in its own
        # dtype, or training would see other int8 codes than quantize_int8 will give.
        forward = forward.with_rule(Rule(kind, at_site, name=name), innermost=True)
    if any(site.foreign and site.kind in WEIGHTED for site in forward.sites):
        # outermost: what model code reads itself is of this dtype, whatever is done to it before
        forward = forward.with_rule(Rule("weight", at_read, name=name, level=2))
    forward = forward.with_rule(Rule("gather", at_gather, name=name))
    if foreign:
        loose = _loose(forward)
        for kind in sorted(kinds & {*WEIGHTED, "norm"} - {"weight"}):
            # outside of all: whatever computes at a site has its dtypes from its arguments
            forward = forward.with_rule(Rule(kind, _by_itself, name="no autocast", level=3))
        if "attention" in kinds:  # as autocast does it, which does not see it under vmap
            forward = forward.with_rule(Rule("attention", _attends_in(dtype), name=name, level=3))
        forward = replace(forward, build=partial(_autocast, forward.build, dtype, loose))
    return forward.with_step("mixed_precision")


def cast_matrices(params: Tree, dtype: torch.dtype) -> Tree:
    """What :func:`mixed_precision` casts at every call, cast once, for the bare forward: the same
    numbers. A training loop differentiates with respect to these, and updates what they are cast
    from. A leaf that is of this dtype already is taken as it is.

    That is for the forwards of ``core.vlm``. In a module of someone else's, two dtypes meet in code
    that takes one only: keep ``mixed_precision`` there, which casts no leaf that is cast already.
    """
    flat = flatten(params)

    def cast(path: str, leaf: Tensor) -> Tensor:
        if is_mark(path, flat):
            return leaf.to(dtype)
        matrix = leaf.is_floating_point() and leaf.ndim > 1 and not is_scale(path, flat)
        return leaf.to(dtype) if matrix else leaf

    return map_with_path(cast, params)


def _cast(p: Tree, dtype: torch.dtype, chosen: Callable[[str], bool] = lambda leaf: True) -> Tree:
    """Matrices, and what lies beside one: the bias of a layer that is no site, which takes one
    dtype only."""
    flat = flatten(p)
    matrices = {path.rpartition(".")[0] for path, leaf in flat.items() if leaf.ndim >= 2}

    def one(path: str, leaf: Tensor) -> Tensor:
        matrix = leaf.ndim >= 2 or path.rpartition(".")[0] in matrices
        scale = is_scale(path, flat) and not is_mark(path, flat)
        if not leaf.is_floating_point() or not matrix or scale:
            return leaf
        return leaf.to(dtype) if chosen(path) else leaf

    return map_with_path(one, p)


# -- modules of someone else's -------------------------------------------------------------------


Run = Callable[[Tree, Any], Any]


def _widened(build: Callable[[Site], Run], dtype: torch.dtype, site: Site) -> Run:
    run = build(site)

    def wide(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def call(params: Tree, batch: Any) -> Any:
        flat = flatten(params)

        def cast(path: str, leaf: Tensor) -> Tensor:
            return leaf if is_scale(path, flat) and not is_mark(path, flat) else wide(leaf)

        return run(map_with_path(cast, params), torch.utils._pytree.tree_map(wide, batch))

    return call


def _loose(forward: Forward) -> Callable[[str], bool]:
    """Whether a leaf lies in no site: no gather meets it."""
    places = tuple({f"{site.path}." for site in forward.sites if site.outermost})
    return lambda path: not path.startswith(places)


def _autocast(
    build: Callable[[Site], Run], dtype: torch.dtype, loose: Callable[[str], bool], site: Site
) -> Run:
    run = build(site)

    def call(params: Tree, batch: Any) -> Any:
        device = next(iter(flatten(params).values())).device.type
        params = _cast(params, dtype, loose)
        try:
            with torch.autocast(device, dtype, cache_enabled=False):
                return run(params, batch)
        except (RuntimeError, ValueError) as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                raise
            raise RuntimeError(
                f"mixed_precision: the module's own code brings tensors of two dtypes together, "
                f"where torch.autocast casts none ({error}). Cast there in the module, or use the "
                f"module itself in one dtype: from_module(module.to({dtype}))"
            ) from error

    return call


def _attends_in(dtype: torch.dtype) -> Callable[..., Callable[..., Tensor]]:
    def to(x: Tensor | None) -> Tensor | None:
        return x.to(dtype) if x is not None and x.is_floating_point() else x

    def wrap(f: Callable[..., Tensor], path: str) -> Callable[..., Tensor]:
        def run(p: Tree, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor:
            options = {**options, "attn_mask": to(options.get("attn_mask"))}
            return f(p, to(q), to(k), to(v), options)

        return run

    return wrap


def _by_itself(f: Callable[..., Any], path: str) -> Callable[..., Any]:
    """A site outside of autocast: its rules and kernels say themselves what is wide."""

    def run(p: Tree, x: Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            out = f(p, x)
        if isinstance(out, Logits):
            return replace(out, project=partial(_projected, out.project))
        return out

    return run


def _projected(project: Callable[[Tree, Tensor], Tensor], p: Tree, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return project(p, x)
