"""torch.compile as a transform: of the whole, wherever in the chain it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from core.forward import Forward
from transforms.legal import check_legal


def compile(forward: Forward, *, fullgraph: bool = True, **options: Any) -> Forward:
    """The forward through ``torch.compile``, with all that is applied before and after.

    ``options`` are torch.compile's (``dynamic``, ``mode``, ``backend``). Gradients are taken
    outside: ``value_and_grad(compile(loss_fn))``. Inside of ``torch.func.grad`` and its like it
    raises RuntimeError: torch would drop the backwards of custom kernels without a word there.
    """
    check_legal(forward, "compile")

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(call, fullgraph=fullgraph, **options)

        def run(params: Any, batch: Any) -> Any:
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    "compile: torch.func transforms do not go through torch.compile; leave compile "
                    "out there, or use transforms.value_and_grad(compile(loss_fn))"
                )
            return compiled(params, batch)

        return run

    return forward.with_step("compile", around=around)
