"""Mixed precision: matrices are cast where they are used; params keep their dtype."""

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
    """Computes matmuls and activations in ``dtype``; params, gradients and reductions keep theirs.

    Matrices are cast where they are used, so their gradients have the params' dtype. Vectors are
    not cast: norms compute in fp32, and a bias takes the dtype of its matmul. The loss is fp32
    (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).

    In a foreign module, norms return the dtype of their input, and the code between sites runs
    under ``torch.autocast``. A weight computed from other leaves (``torch.nn.utils.parametrize``)
    is computed in their dtype. For a ``dtype`` of more than 16 bits, all params, buffers and
    floating-point tensors of the batch are cast instead. Raises RuntimeError where tensors of two
    dtypes still meet in that code.
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
            # rows of a quantised embedding have the dtype of its mark
            return leaf.endswith(DTYPE) or owner not in layers

        def run(p: Tree, *args: Any) -> Any:
            if path in read or not args:
                return f(p)
            # a float weight casts x to its dtype, an int8 one does not
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
        # outermost: model code reads this dtype, after all other rules
        rule = Rule("weight", at_read, lambda site: not site.computed, name, "outside")
        forward = forward.with_rule(rule)
    forward = forward.with_rule(Rule("gather", at_gather, name=name, stage="gather"))
    if foreign:
        for kind in sorted(kinds & {*WEIGHTED, "norm"} - {"weight"}):
            # outermost: at a site, dtypes follow from the arguments
            forward = forward.with_rule(
                Rule(kind, _without_autocast, None, "no autocast", "outside")
            )
        if "attention" in kinds:  # as autocast would, which misses it under vmap
            forward = forward.with_rule(
                Rule("attention", _attends_in(dtype), None, name, "outside")
            )
        forward = _around(forward, lambda f: partial(_autocast, f.build, dtype, _loose(f)))
    return forward.with_step("mixed_precision")


def cast_matrices(params: Tree, dtype: torch.dtype) -> Tree:
    """Params with every matrix cast to ``dtype``, once instead of at every call.

    A native forward without :func:`mixed_precision` computes the same numbers from them. A training
    loop differentiates with respect to these, and updates the originals. Leaves of ``dtype`` are
    returned as they are. A foreign module needs ``mixed_precision`` nevertheless, for the dtypes of
    its own code.
    """
    flat = flatten(params)

    def cast(path: str, leaf: Tensor) -> Tensor:
        if is_mark(path, flat):
            return leaf.to(dtype)
        matrix = leaf.is_floating_point() and leaf.ndim > 1 and not is_scale(path, flat)
        return leaf.to(dtype) if matrix else leaf

    return map_with_path(cast, params)


def _cast(p: Tree, dtype: torch.dtype, chosen: Callable[[str], bool] = lambda leaf: True) -> Tree:
    """Casts matrices and their siblings: the bias of a layer outside of all sites must match."""
    flat = flatten(p)
    matrices = {path.rpartition(".")[0] for path, leaf in flat.items() if leaf.ndim >= 2}

    def one(path: str, leaf: Tensor) -> Tensor:
        matrix = leaf.ndim >= 2 or path.rpartition(".")[0] in matrices
        scale = is_scale(path, flat) and not is_mark(path, flat)
        if not leaf.is_floating_point() or not matrix or scale:
            return leaf
        return leaf.to(dtype) if chosen(path) else leaf

    return map_with_path(one, p)


# -- foreign modules ------------------------------------------------------------------------------


Run = Callable[[Tree, Any], Any]
Build = Callable[[Site], Run]


def _around(forward: Forward, build: Callable[[Forward], Build]) -> Forward:
    """The forward with ``build(forward)`` as its ``build``, also once its module is remade."""
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
        assert module.remade is not None  # set by from_module
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
        out, buffers = out  # cast back to the dtypes in params
        return out, map_with_path(lambda at, leaf: leaf.to(flat.get(at, leaf).dtype), buffers)

    return call


def _owners(forward: Forward) -> frozenset[str]:
    """Modules whose weight is computed from their leaves, in the leaves' dtype."""
    return frozenset(s.weight.rpartition(".")[0] for s in forward.sites if s.computed)


def _loose(forward: Forward) -> Callable[[str], bool]:
    """Whether a leaf lies outside of all sites, so that no ``gather`` rule sees it."""
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
                f"dtypes together, and torch.autocast does not cast there ({said}). Cast in the "
                f"module, or use the module in one dtype: from_module(module.to({dtype}))"
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


def _without_autocast(f: Callable[..., Any], path: str) -> Callable[..., Any]:
    """A site without autocast: its rules and kernels choose their dtypes."""

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
