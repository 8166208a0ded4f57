"""torch.compile as a transform: of the whole, or one compiled block for all layers."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

from core.forward import Forward
from transforms.legal import check_legal


def compile(
    forward: Forward, *, blocks: bool = False, fullgraph: bool = True, **options: Any
) -> Forward:
    """The forward through ``torch.compile``, with all that is applied before and after.

    blocks: compile blocks only, each with all its rules, and blocks that are alike once: a model of
        28 layers compiles as fast as one of one, and what lies outside of blocks (embedding, head,
        loss) runs as it is. Native blocks are alike if nothing but params tells them apart; those
        of ``from_module`` are compiled one by one. Raises ValueError if there are no blocks.

    ``options`` are torch.compile's (``dynamic``, ``mode``, ``backend``). Gradients are taken
    outside: ``value_and_grad(compile(loss_fn))``. Inside of ``torch.func.grad`` and its like it
    raises RuntimeError: torch would drop the backwards of custom kernels without a word there.
    """
    check_legal(forward, "compile")
    if blocks and not forward.select(("block",)):
        raise ValueError("compile(blocks=True): this forward has no blocks")

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(_with_own_cache(call), fullgraph=fullgraph, **options)

        def run(*args: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    "compile: torch.func transforms do not go through torch.compile; leave compile "
                    "out there, or use transforms.value_and_grad(compile(loss_fn))"
                )
            return compiled(*args)

        return run

    if blocks:
        return forward.with_step("compile", around_block=around)
    return forward.with_step("compile", around=around)


def _with_own_cache(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with code that nobody else has, for that is what Dynamo keeps its programs by.

    With code in common, two forwards that differ in a checkpoint policy alone would share a program
    (the policy of the first: nothing guards it), and each compiled one would count towards the
    limit of recompilations of the others.
    """

    def through(*args: Any) -> Any:
        return call(*args)

    own = through.__code__.replace()
    return FunctionType(own, through.__globals__, "through", None, through.__closure__)
