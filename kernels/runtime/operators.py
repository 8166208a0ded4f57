"""What compilers are told about our custom operators (`nanovision::...`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from kernels.runtime import dynamo

NAMES: list[str] = []
LIBRARY = torch.library.Library("nanovision", "FRAGMENT")
_told: set[str] = set()


def operator(
    name: str, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the operator `nanovision::name`, called with positional arguments; its
    annotations are the schema. mutates: the arguments (tensors, lists of them) that it changes.

    As `torch.library.custom_op` does, but that one's calls import Dynamo (`runtime.dynamo`) and
    cost 36 us on the host, one of these 16 (inside an autograd Function, on one slow core). It has
    no gradient of its own: ours are called where nothing is recorded.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        op: Callable[..., Any] = getattr(torch.ops.nanovision, name).default
        arguments = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
        changed = [arguments.index(argument) for argument in mutates]
        kernel = function

        def run(*args: Any) -> Any:
            for index in changed:
                _count_change(args[index])
            return kernel(*args)

        def shield(module: Any) -> None:
            # Dynamo must not trace what the dispatcher calls after a graph break: `run` and, as it
            # calls much else, all that is under the kernel.
            nonlocal kernel
            kernel = module.disable(function)
            module.disable(run, recursive=False)

        dynamo.when_imported(shield)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        return op

    return register


def _count_change(changed: Tensor | Sequence[Tensor] | None) -> None:
    """Autograd then notices if it needs what was there before."""
    tensors = [changed] if isinstance(changed, Tensor) else changed or ()
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


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
