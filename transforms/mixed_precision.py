"""Low-precision compute over high-precision params: a cast where each matrix is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.foreign.at_site import place_of
from core.forward import Forward, Rule, Site
from core.model.layers import Logits
from core.sites import WEIGHTED
from params.formats import DTYPE, added, is_mark, is_scale
from params.tree import Tree, flatten, map_with_path
from transforms.legal import check_legal


def mixed_precision(forward: Forward, dtype: torch.dtype = torch.bfloat16) -> Forward:
    """Matmuls and activations in ``dtype``, params, gradients and reductions as they are.

    Matrices are cast where they are used, so their gradients arrive in the params' own dtype.
    Vectors stay: norms compute in fp32 anyway, and a bias takes the dtype of its matmul. The loss
    is fp32 (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).

    In a module of someone else's, norms answer in the dtype that they were given, and what its own
    code computes between sites runs under ``torch.autocast``: products in ``dtype``, whatever they
    are given; a weight that is computed from others (``torch.nn.utils.parametrize``) is computed in
    their dtype. A dtype of more than 16 bits is wider, not lower: there all params, buffers and the
    batch's floating-point tensors are cast. Raises RuntimeError where tensors of two dtypes still
    meet in that code.
    """
    check_legal(forward, "mixed_precision")
    foreign = any(site.foreign for site in forward.sites)
    if foreign and dtype.itemsize > 2:
        return _wide(forward, dtype).with_step("mixed_precision")
    layers = {s.path for s in forward.sites if s.kind in WEIGHTED and s.kind != "weight"}
    weights = {s for s in forward.sites if s.kind == "weight"}
    read = {s.weight for s in weights} | {s.beside(name) for s in weights for name in added()}
    computed = _owners(forward)
    name = f"cast to {str(dtype).removeprefix('torch.')}"

    def at_site(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def run(p: Tree, *args: Any) -> Any:
            return f(_cast(p, dtype), *args)

        return run

    def in_group(p: Tree, path: str) -> tuple[Tree, None]:
        return {**p, "weight": p["weight"].to(dtype)}, None  # the kernel takes a wide bias

    def at_gather(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def others(leaf: str) -> bool:
            full = f"{path}.{leaf}"
            owner = full.rpartition(".")[0]
            if full in read or owner in computed:
                return False
            # a table's mark: its rows come in that dtype
            return leaf.endswith(DTYPE) or owner not in layers

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
        rule = Rule(kind, at_site, name=name, stage="cast", in_group=in_group)
        forward = forward.with_rule(rule)
    if any(s.foreign and s.kind in WEIGHTED and not s.computed for s in forward.sites):
        # outermost: what model code reads itself is of this dtype, whatever is done to it before
        rule = Rule("weight", at_read, lambda site: not site.computed, name, "outside")
        forward = forward.with_rule(rule)
    forward = forward.with_rule(Rule("gather", at_gather, name=name, stage="gather"))
    if foreign:
        for kind in sorted(kinds & {*WEIGHTED, "norm"} - {"weight"}):
            # outside of all: whatever computes at a site has its dtypes from its arguments
            forward = forward.with_rule(Rule(kind, _by_itself, None, "no autocast", "outside"))
        if "attention" in kinds:  # as autocast does it, which does not see it under vmap
            forward = forward.with_rule(
                Rule("attention", _attends_in(dtype), None, name, "outside")
            )
        forward = _around(forward, lambda f: partial(_autocast, f.build, dtype, _loose(f)))
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
Build = Callable[[Site], Run]


def _around(forward: Forward, build: Callable[[Forward], Build]) -> Forward:
    """The forward with another ``build``, made of its own, in whichever mode its layers are."""
    remade = forward.module.remade
    again = None if remade is None else lambda change: _around(remade(change), build)
    return replace(forward, build=build(forward), module=replace(forward.module, remade=again))


def _wide(forward: Forward, dtype: torch.dtype) -> Forward:
    def wide(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def widen(module: nn.Module) -> nn.Module:
        for m in module.modules():
            m._buffers.update({name: wide(leaf) for name, leaf in m._buffers.items()})
        return module

    def build(forward: Forward) -> Build:
        module = forward.module
        assert module.remade is not None  # every forward of from_module's has it
        return partial(_widened, module.remade(widen).build, wide, module.aux)

    wrapped = _around(forward, build)
    buffers = {name: wide(leaf) for name, leaf in forward.module.buffers.items()}
    return replace(wrapped, module=replace(wrapped.module, buffers=buffers))


def _widened(build: Build, wide: Callable[[Any], Any], aux: bool, site: Site) -> Run:
    run = build(site)

    def call(params: Tree, batch: Any) -> Any:
        flat = flatten(params)

        def cast(path: str, leaf: Tensor) -> Tensor:
            return leaf if is_scale(path, flat) and not is_mark(path, flat) else wide(leaf)

        out = run(map_with_path(cast, params), torch.utils._pytree.tree_map(wide, batch))
        if not aux:
            return out
        out, buffers = out  # these in the dtypes that params hold them in
        return out, map_with_path(lambda at, leaf: leaf.to(flat.get(at, leaf).dtype), buffers)

    return call


def _owners(forward: Forward) -> frozenset[str]:
    """Modules whose leaves their weight is computed from, in the leaves' own dtype."""
    return frozenset(s.weight.rpartition(".")[0] for s in forward.sites if s.computed)


def _loose(forward: Forward) -> Callable[[str], bool]:
    """Whether a leaf lies in no site: no gather meets it."""
    places = tuple({f"{site.path}." for site in forward.sites if site.outermost})
    computed = _owners(forward)
    return lambda path: not path.startswith(places) and path.rpartition(".")[0] not in computed


def _autocast(build: Build, dtype: torch.dtype, loose: Callable[[str], bool], site: Site) -> Run:
    run = build(site)

    def call(params: Tree, batch: Any) -> Any:
        device = next(iter(flatten(params).values())).device.type
        params = _cast(params, dtype, loose)
        try:
            with torch.autocast(device, dtype, cache_enabled=False):
                return run(params, batch)
        except (RuntimeError, ValueError, TypeError) as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                raise
            said = error.__cause__ or error  # torch's own words
            raise RuntimeError(
                f"mixed_precision: the module's own code, {place_of(error)}, brings tensors of two "
                f"dtypes together, where torch.autocast casts none ({said}). Cast there in the "
                f"module, or use the module itself in one dtype: from_module(module.to({dtype}))"
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
