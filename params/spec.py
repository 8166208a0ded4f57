"""Declarations of parameters: shape and initial distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from params.tree import flatten

INITS = ("normal", "zeros", "ones")
Spec = dict[str, Any]  # str -> Spec | Leaf


@dataclass(frozen=True)
class Leaf:
    """A declared tensor, drawn from N(0, std^2) or constant.

    Raises ValueError for an unknown ``init``, a negative ``std`` or a negative dimension.
    """

    shape: tuple[int, ...]
    init: str = "normal"
    std: float = 0.02  # of "normal"; ignored otherwise

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}, not {self.init!r}")
        if not self.std >= 0 or any(size < 0 for size in self.shape):
            raise ValueError(f"no tensor has shape {self.shape} and std {self.std}")


def count_leaves(spec: Mapping[str, Any]) -> int:
    """Parameters in a nested dict of Leaf.

    >>> count_leaves({"down": {"weight": Leaf((3, 4)), "bias": Leaf((3,), "zeros")}})
    15
    """
    return sum(math.prod(leaf.shape) for leaf in flatten(spec).values())
