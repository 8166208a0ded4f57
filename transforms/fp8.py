"""Float8 matrix products while training: "FP8 Formats for Deep Learning", arXiv 2209.05433."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import kernels
from core.forward import Forward, Rule
from core.model.layers import weight_of
from core.sites import SiteInfo
from kernels.quantised.fp8_linear import SCALINGS
from params.tree import Tree, flatten
from transforms.legal import check_legal


def fp8(forward: Forward, *, skip: Sequence[str] | None = None, scaling: str = "tensor") -> Forward:
    """The three matrix products of linears, forward and backward, in float8; the rest as it is.

    The numbers are those of :func:`kernels.fp8_linear`: x and weight in e4m3, the gradient of the
    output in e5m2, scales made at every call, so that the forward stays pure. Params, their
    gradients and their paths do not change. Embeddings, the head, and matrices that foreign code
    reads itself (kind ``weight`` in ``explain``) are never converted. Adapters of ``lora`` are
    outside, in their own dtype; under ``mixed_precision`` the rounded weight is the cast one,
    whichever was applied first.

    skip: path patterns of linears that stay; by default those of the first and the last block of
    every tower of three or more, whose rounding costs most. scaling: "tensor" or "row", as in the
    kernel.

    Raises ValueError if a pattern names nothing, if nothing is left to convert, or, in ``prepare``
    and at the call, for a weight ``[O, I]`` whose O or I 16 does not divide: skip it.
    """
    check_legal(forward, "fp8")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling is 'tensor' or 'row', not {scaling!r}")
    linears = frozenset(site.path for site in forward.select(("linear",)))
    if skip is None:
        ends = _ends(forward)
        paths = frozenset(path for path in linears if not path.startswith(ends))
    else:
        paths = linears - {site.path for site in forward.select(("linear",), skip)}
    if not paths:
        raise ValueError(f"skip={skip} leaves no linear to compute in float8, of {len(linears)}")

    weights = {site.path: site.weight for site in forward.sites}

    def prepare(params: Tree, seed: int) -> Tree:
        flat = flatten(params)
        for path in sorted(paths):
            _check_shape(path, flat[weights[path]])
        return params

    def chosen(site: SiteInfo) -> bool:
        return site.path in paths

    def wrap(f: Callable[..., Any], path: str) -> Callable[..., Any]:
        def linear(p: Tree, x: Tensor) -> Tensor:
            weight = weight_of(p)
            _check_shape(path, weight)
            return kernels.fp8_linear(x.to(weight.dtype), weight, p.get("bias"), scaling=scaling)

        return linear

    rule = Rule("linear", wrap, chosen, "fp8", stage="kernel")
    return forward.with_rule(rule).with_step("fp8", preparations=(*forward.preparations, prepare))


def _ends(forward: Forward) -> tuple[str, ...]:
    """What paths in the first and the last block of every list of blocks begin with."""
    towers: dict[str, list[str]] = {}
    for site in forward.select(("block",)):
        towers.setdefault(site.path.rpartition(".")[0], []).append(f"{site.path}.")
    return tuple(
        p for blocks in towers.values() if len(blocks) > 2 for p in (blocks[0], blocks[-1])
    )


def _check_shape(path: str, weight: Tensor) -> None:
    if any(size % 16 for size in weight.shape):
        raise ValueError(
            f"fp8: {path}.weight is {list(weight.shape)}, and float8 products need multiples of "
            f"16: skip=({path!r}, ...) leaves it as it is"
        )
