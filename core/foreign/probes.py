"""Probes: calls of a copy of a module on random inputs, to find out what it computes."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's ``forward`` alone: no hooks, no patches."""
    state = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in state and not any(state[name] for name in hooks)


def takes_one(module: nn.Module, *, more: bool = False) -> bool:
    """Whether ``forward`` takes a single argument, as a site's function does.

    more: further optional arguments are allowed.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code has no signature
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    return len(needed) == 1 and (more or len(parameters) == 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp32, from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_failures: ContextVar[list[str] | None] = ContextVar("failures", default=None)


@contextmanager
def failures() -> Iterator[list[str]]:
    """Collects the reasons that :func:`failed` is given meanwhile."""
    reasons: list[str] = []
    token = _failures.set(reasons)
    try:
        yield reasons
    finally:
        _failures.reset(token)


def failed(what: str, error: Exception | None = None) -> None:
    """Records, for :func:`failures`, why a module is not the kind of site it looks like."""
    reasons = _failures.get()
    if reasons is not None:
        first = str(error).partition("\n")[0][:160] if error is not None else ""
        reasons.append(what if error is None else f"{what}: {type(error).__name__}: {first}")


def probe(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor | None:
    """The module's output for x with these params; None for an error or other than one tensor."""
    body = skeleton(module)  # a copy: the forward may count its calls
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            out = functional_call(body, dict(params), (x,))
        except Exception as error:  # foreign code may refuse these inputs: the reason is recorded
            failed("its probe ended in", error)
            return None
    if not isinstance(out, Tensor):
        failed(f"it returns {type(out).__name__}, not one tensor")
        return None
    return out


def same_slopes(f: Callable[..., Tensor], g: Callable[..., Tensor], *at: Tensor) -> bool:
    """Whether two functions with equal outputs have equal gradients too: one may detach a factor,
    or scale its gradient."""
    found = []
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        for function in (f, g):
            given = [x.detach().clone().requires_grad_() for x in at]
            out = function(*given)
            if not out.requires_grad:
                return False
            weighted = (out * noise(*out.shape, seed=9)).sum()
            found.append(torch.autograd.grad(weighted, given, materialize_grads=True))
    return all(close(a, b, 1e-3 * float(b.abs().max())) for a, b in zip(*found, strict=True))


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of the module with parameters on the meta device, which take no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in module.parameters()
    }
    for m in module.modules():
        for value in vars(m).values():  # a hook computed it from a parameter
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copied(module, memo)


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, in which functions (a patched ``forward``, hooks) and weak references refer to
    the copy where the original's refer to the original."""
    memo = {} if memo is None else memo
    out = copy.deepcopy(module, memo)

    for m in out.modules():
        redirect(m, lambda value: memo.get(id(value), value))
    return out


TREES = ("_parameters", "_buffers", "_modules")


def redirect(module: nn.Module, new: Callable[[Any], Any]) -> None:
    """Replaces the modules and parameters that a module's attributes refer to by ``new(value)``:
    directly, in lists, tuples and dicts, in closures, as owners of methods, by weak references.
    References to the module itself stay."""
    seen: set[int] = set()

    def swap(value: Any) -> Any:
        if value is module:
            return value
        if isinstance(value, nn.Module | nn.Parameter):
            return new(value)
        if isinstance(value, weakref.ref):
            old = value()
            other = swap(old) if isinstance(old, nn.Module) else old
            return value if other is old else weakref.ref(other)
        if isinstance(value, MethodType):
            return _method(value, swap) if isinstance(value.__self__, nn.Module) else value
        if isinstance(value, functools.partial):
            func, args, kwargs = swap(value.func), swap(value.args), swap(value.keywords)
            same = func is value.func and args is value.args
            return value if same else functools.partial(func, *args, **kwargs)
        if isinstance(value, FunctionType):
            return _enclosing(value, swap)
        if type(value) is tuple:
            parts = tuple(map(swap, value))
            return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
        if isinstance(value, list | dict) and id(value) not in seen:
            seen.add(id(value))
            for key, each in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
                if (other := swap(each)) is not each:
                    value[key] = other
        return value

    held = vars(module)
    for key, value in [*held.items()]:
        if key not in TREES and (other := swap(value)) is not value:
            held[key] = other


def _method(method: MethodType, swap: Callable[[Any], Any]) -> MethodType:
    """The same method of its owner's replacement; of another class, that class's ``forward``."""
    owner = method.__self__
    if (other := swap(owner)) is owner:
        return method
    if type(other) is type(owner):
        return MethodType(method.__func__, other)
    return other.forward if method.__name__ == "forward" else method


def _enclosing(function: FunctionType, swap: Callable[[Any], Any]) -> FunctionType:
    """The function with its closure and defaults swapped; itself if nothing changes."""
    try:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # an empty cell
        return function
    held += function.__defaults__ or ()
    kinds = nn.Module | nn.Parameter | MethodType | weakref.ref  # the caller's lists stay untouched
    new = [swap(v) if isinstance(v, kinds) else v for v in held]
    if all(a is b for a, b in zip(new, held, strict=True)):
        return function
    count = len(function.__closure__ or ())
    cells, defaults = tuple(map(CellType, new[:count])), tuple(new[count:]) or None
    made = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Sets a submodule by its dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def close(a: Tensor, b: Tensor, atol: float) -> bool:
    """Whether shapes and dtypes are equal, and numbers within atol."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=atol)
