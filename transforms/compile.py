"""torch.compile as a transform: of the whole forward, or of its blocks."""

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
    """Compiles the forward with all its transforms, applied before or after this one.

    Take gradients outside: ``value_and_grad(compile(loss_fn))``.

    Args:
        forward: any Forward.
        blocks: compile only the blocks, with all their rules. Native blocks that differ in params
            only share one program, so 28 layers compile as fast as one; those of ``from_module``
            are compiled one by one. Code outside of blocks (embedding, head, loss) runs eagerly.
        fullgraph: as in torch.compile.
        options: of torch.compile (``dynamic``, ``mode``, ``backend``).

    Raises ValueError if ``blocks`` is set and there are none; at the call, RuntimeError inside of
    ``torch.func`` transforms, where torch would silently ignore the backwards of custom kernels.
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
    """``call`` with its own code object, which is Dynamo's key for compiled programs.

    With a common code object, two forwards that differ only in a checkpoint policy would share the
    first one's program (no guard covers the policy), and their recompilations would count together.
    """

    def through(*args: Any) -> Any:
        return call(*args)

    own = through.__code__.replace()
    return FunctionType(own, through.__globals__, "through", None, through.__closure__)
