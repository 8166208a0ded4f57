"""What a leaf will be, before it is: its shape and its initial distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

INITS = ("normal", "zeros", "ones")


@dataclass(frozen=True)
class Leaf:
    """Shape and initial values of one parameter; ``std`` only counts for "normal"."""

    shape: tuple[int, ...]
    init: str = "normal"
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}, not {self.init!r}")


Spec = dict[str, Any]  # of Leaf, or of further specs


def count_leaves(spec: Spec | Leaf) -> int:
    """Number of parameters of a spec."""
    if isinstance(spec, Leaf):
        return math.prod(spec.shape)
    return sum(count_leaves(part) for part in spec.values())
