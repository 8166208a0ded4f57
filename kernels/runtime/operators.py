"""Custom operators (`nanovision::...`): each is declared once, by `operator`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.utils.flop_counter import register_flop_formula

from kernels.runtime import dynamo

NAMES: list[str] = []  # operators that have a fake
LIBRARY = torch.library.Library("nanovision", "FRAGMENT")
_kinds: dict[str, str] = {}
_registered: set[str] = set()


def operator(
    name: str,
    *,
    fake: Callable[..., Any] | None,
    mutates: Sequence[str] = (),
    overwrites: Sequence[str] = (),
    flops: Callable[..., int] | None = None,
    kind: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the operator `nanovision::name`, called with positional arguments.

    The function's annotations are the schema. The operator has no gradient of its own: it is called
    where autograd records nothing. `torch.library.custom_op` does the same, but its calls import
    Dynamo and cost 36 us on the host; these cost 16 (inside an autograd Function, on a slow core).

    Args:
        fake: returns outputs of the right shapes without computing them. It receives the arguments
            by name, so that it lists only the ones it reads, then `**_`. None: the operator cannot
            be compiled.
        mutates: the arguments (tensors, lists of them) that the function changes in place.
        overwrites: the arguments whose memory the function may reuse when its last argument,
            `overwrite`, is true. A second operator, `nanovision::name_`, then passes True and
            declares these arguments as mutated; the first passes False. Neither schema has
            `overwrite`.
        flops: the operator's FLOPs for `FlopCounterMode`, from the arguments by name; each tensor
            is given as its shape.
        kind: what `kind_of` returns, such as "matmul" or "attention".

    For example::

        def _double(x: Tensor) -> Tensor: ...
        double = operator("double", fake=lambda x, **_: x.new_empty(x.shape))(_double)
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not overwrites:
            return _define(name, function, function, mutates, fake, flops, kind)
        kept, reused = (partial(function, overwrite=overwrite) for overwrite in (False, True))
        _define(f"{name}_", function, reused, overwrites, fake, flops, kind)
        return _define(name, function, kept, mutates, fake, flops, kind)

    return register


def kind_of(operation: str) -> str | None:
    """The kind that an operator, `nanovision.name`, was registered with."""
    return _kinds.get(operation)


def empty(x: Tensor, wanted: bool = False) -> Tensor:
    """The fake of a gradient of x, or what an operator returns in place of one nobody wants."""
    return x.new_empty(x.shape if wanted else 0)


def _define(
    name: str,
    declared: Callable[..., Any],
    kernel: Callable[..., Any],
    mutates: Sequence[str],
    fake: Callable[..., Any] | None,
    flops: Callable[..., int] | None,
    kind: str | None,
) -> Callable[..., Any]:
    schema = torch.library.infer_schema(_without_overwrite(declared), mutates_args=mutates)
    LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    packet = getattr(torch.ops.nanovision, name)
    names = [argument.name for argument in packet.default._schema.arguments]
    changed = [names.index(argument) for argument in mutates]
    call = kernel

    def run(*args: Any) -> Any:
        for index in changed:
            _count_change(args[index])
        return call(*args)

    def shield(module: Any) -> None:
        # Dynamo must not trace what the dispatcher calls after a graph break: `run`, and everything
        # below the kernel, because the kernel calls much else.
        nonlocal call
        call = module.disable(kernel)
        module.disable(run, recursive=False)

    dynamo.when_imported(shield)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if kind is not None:
        _kinds[f"nanovision.{name}"] = kind
    if fake is not None:
        torch.library.register_fake(f"nanovision::{name}", _by_name(names, fake))
        NAMES.append(name)
    if flops is not None:

        def count(*args: Any, out_shape: Any, **kwargs: Any) -> int:
            return flops(**dict(zip(names, args, strict=False)), **kwargs)

        register_flop_formula(packet)(count)
    op: Callable[..., Any] = packet.default
    return op


def _without_overwrite(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same signature but for `overwrite`, to infer a schema from."""
    signature = inspect.signature(function)
    parameters = [p for name, p in signature.parameters.items() if name != "overwrite"]
    out: Any = FunctionType(function.__code__, function.__globals__)
    out.__signature__ = signature.replace(parameters=parameters)
    return out


def _count_change(changed: Tensor | Sequence[Tensor] | None) -> None:
    """Lets autograd notice if it needs the values before the change."""
    tensors = [changed] if isinstance(changed, Tensor) else changed or ()
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _by_name(names: Sequence[str], fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake` with positional arguments, which also registers the operators with Inductor."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if len(_registered) < len(NAMES) and TracingContext.try_get() is not None:
            _register_with_inductor()
        return fake(**dict(zip(names, args, strict=False)), **kwargs)

    return run


def _register_with_inductor() -> None:
    """Tells Inductor to call the operators as they are, with strides as they were traced.

    Inductor would find that out by itself. But before 2.13 it first writes its arguments to a log,
    each with everything it was computed from: the time doubles with every layer (pytorch issue
    185937; a step with 16 blocks was not compiled after 2 minutes). Called during tracing, because
    importing Inductor takes a second that only compiling should cost.
    """
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    for name in set(NAMES) - _registered:
        op = getattr(torch.ops.nanovision, name).default
        if op not in lowerings:
            constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True))
            make_fallback(op, layout_constraint=constraint, warn=False)
        _registered.add(name)
