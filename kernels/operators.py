"""What compilers are told about our custom operators (`nanovision::...`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._guards import TracingContext

NAMES: list[str] = []
_told: set[str] = set()


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function that gives the outputs of `nanovision::name` without computing them."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if len(_told) < len(NAMES) and TracingContext.try_get() is not None:
                _tell_inductor()
            return function(*args, **kwargs)

        torch.library.register_fake(f"nanovision::{name}", run)
        NAMES.append(name)
        return function

    return register


def _tell_inductor() -> None:
    """Says that the operators are to be called as they are, with strides as they were traced.

    Inductor would find that out by itself. But before 2.13 it first writes its arguments out for a
    log that nobody reads, each with all that it was computed from: the time doubles with every
    layer (pytorch issue 185937; a step with 16 blocks was not compiled after 2 minutes). Called in
    the midst of tracing, since importing Inductor takes a second that only compiling should cost.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in set(NAMES) - _told:
        op = getattr(torch.ops.nanovision, name).default
        if op not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            make_fallback(op, layout_constraint=constraint, warn=False)
        _told.add(name)
