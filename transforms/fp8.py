"""Float8 training: "FP8 Formats for Deep Learning", https://arxiv.org/abs/2209.05433."""

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
    """Computes the three matrix products of linears, forward and backward, in float8.

    x and weight are rounded to e4m3, the output's gradient to e5m2 (:func:`kernels.fp8_linear`).
    Scales are computed at every call, so the forward stays pure. Params, their paths and their
    gradients' dtypes do not change. Embeddings, the head, and matrices that a foreign module's own
    code reads (kind ``weight`` in ``explain``) are not converted. Adapters of ``lora`` stay in
    their own dtype. Under ``mixed_precision``, in either order, the cast weight is rounded.

    Args:
        forward: any Forward.
        skip: path patterns of linears to leave out. Default: the first and the last block of every
            tower of three or more, where rounding costs most.
        scaling: "tensor" or "row", as in :func:`kernels.fp8_linear`.

    Raises ValueError if a pattern matches nothing or nothing is left to convert; in ``prepare``
    and at the call, for a weight ``[O, I]`` with O or I not a multiple of 16.
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
    """Path prefixes of the first and the last block of every tower of three or more."""
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
            f"16: skip=({path!r}, ...) leaves it out"
        )
