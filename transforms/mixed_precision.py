"""Low-precision compute over high-precision params: a cast where each matrix is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core.forward import ADDED, WEIGHTED, Forward, Rule
from params.int8 import is_scale
from params.tree import Tree, flatten, map_with_path
from transforms.legal import check_legal


def mixed_precision(forward: Forward, dtype: torch.dtype = torch.bfloat16) -> Forward:
    """Matmuls and activations in ``dtype``, params, gradients and reductions as they are.

    Matrices are cast where they are used, so their gradients arrive in the params' own dtype.
    Vectors stay: norms compute in fp32 anyway, and a bias takes the dtype of its matmul. The loss
    is fp32 (Micikevicius et al. 2017, https://arxiv.org/abs/1710.03740).
    """
    check_legal(forward, "mixed_precision")
    layers = {s.path for s in forward.sites if s.kind in WEIGHTED and s.kind != "weight"}
    weights = {s for s in forward.sites if s.kind == "weight"}
    read = {s.weight for s in weights} | {s.beside(name) for s in weights for name in ADDED}
    name = f"cast to {str(dtype).removeprefix('torch.')}"

    def cast(p: Tree, chosen: Callable[[str], bool] = lambda leaf: True) -> Tree:
        flat = flatten(p)
        matrices = {path.rpartition(".")[0] for path, leaf in flat.items() if leaf.ndim >= 2}

        def one(path: str, leaf: Tensor) -> Tensor:
            # beside a matrix: the bias of a layer that is no site, which takes one dtype only
            matrix = leaf.ndim >= 2 or path.rpartition(".")[0] in matrices
            if not leaf.is_floating_point() or not matrix or is_scale(path, flat):
                return leaf
            return leaf.to(dtype) if chosen(path) else leaf

        return map_with_path(one, p)

    def at_site(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def run(p: Tree, *args: Any) -> Any:
            return f(cast(p), *args)

        return run

    def at_gather(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def others(leaf: str) -> bool:
            full = f"{path}.{leaf}"
            return full.rpartition(".")[0] not in layers and full not in read

        def run(p: Tree, *args: Any) -> Any:
            if path in read or not args:
                return f(p)
            # float weights bring x to their dtype; int8 ones take it as it comes
            x, *rest = args
            x = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            return f(cast(p, others), x, *rest)

        return run

    def at_read(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        return lambda p: f(p).to(dtype)

    for kind in sorted({site.kind for site in forward.sites} & set(WEIGHTED) - {"weight"}):
        # Innermost: what else is done to a weight (rounding by fake_quant) is done in its own
        # dtype, or training would see other int8 codes than quantize_int8 will give.
        forward = forward.with_rule(Rule(kind, at_site, name=name), innermost=True)
    if any(site.foreign and site.kind in WEIGHTED for site in forward.sites):
        # outermost: what model code reads itself is of this dtype, whatever is done to it before
        forward = forward.with_rule(Rule("weight", at_read, name=name, level=2))
    return forward.with_rule(Rule("gather", at_gather, name=name)).with_step("mixed_precision")


def cast_matrices(params: Tree, dtype: torch.dtype) -> Tree:
    """What :func:`mixed_precision` casts at every call, cast once, for the bare forward: the same
    numbers. A training loop differentiates with respect to these, and updates what they are cast
    from. A leaf that is of this dtype already is taken as it is.
    """

    flat = flatten(params)

    def cast(path: str, leaf: Tensor) -> Tensor:
        matrix = leaf.is_floating_point() and leaf.ndim > 1 and not is_scale(path, flat)
        return leaf.to(dtype) if matrix else leaf

    return map_with_path(cast, params)
