"""Calling a module on made-up numbers, in a copy: what finding sites rests on."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's ``forward``: no hooks, nothing patched in."""
    state = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in state and not any(state[name] for name in hooks)


def takes_one(module: nn.Module) -> bool:
    """Whether ``forward`` takes a single argument, as a site's function does."""
    try:
        return len(inspect.signature(module.forward).parameters) == 1
    except (TypeError, ValueError):  # compiled code has no signature
        return False


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, fp32, of a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probe(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """What a module makes of x, holding these tensors; None if that is no tensor, or an error."""
    body = skeleton(module)  # a forward may count its calls
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            out = functional_call(body, dict(params), (x,))
        except Exception:  # foreign code, given what it may not take: any error means no
            return None
    return out if isinstance(out, Tensor) else None


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of the module tree with parameters on the meta device: it costs no memory."""
    memo = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    return copy.deepcopy(module, memo)


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def close(a: Tensor, b: Tensor, atol: float) -> bool:
    """Alike in shape and dtype, and nowhere further apart than this."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=atol)
