"""Which implementation of an operation runs.

Each operation declares its backends, best first. `choose` takes the first that can serve a call.
`override` (or the environment variable NANOVISION_KERNELS, e.g. `attention=plain,rms_norm=torch`)
asks for one by name; if it cannot serve, `choose` raises with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from kernels.runtime import dynamo, launch
from kernels.runtime.proof import proof_problem

ENV = "NANOVISION_KERNELS"


class CallInfo(NamedTuple):
    """What most operations know of a call before a backend is chosen."""

    device: str = "cpu"  # or "cuda", "cuda:1", "meta", ...
    dtype: torch.dtype = torch.float32


class Proof(NamedTuple):
    """How a library is tested before its first use: see `kernels.runtime.proof.proof_problem`."""

    libraries: Sequence[str]  # distributions, the backend's own first
    case: Callable[[Any], None]  # (call): raises whatever is wrong
    kind: Callable[[Any], Hashable]  # (call): one proof for each


class Backend(NamedTuple):
    """One implementation of an operation."""

    name: str
    why_not: Callable[[Any], str | None]
    """(call) -> why it cannot serve the call, as a clause ("needs a CUDA GPU"), or None."""
    run: Callable[..., Any] | None = None
    """The implementation. None: the operation's `Op` branches on the name."""
    proof: Proof | None = None
    """None: the project's own code, held by its tests."""


class Operation(NamedTuple):
    backends: dict[str, Backend]  # best first; the last is plain torch
    call: type[Any]  # a NamedTuple with defaults that begins with the fields of `CallInfo`
    order: Callable[[Any], Sequence[str]] | None  # (call) -> names, where the best depends on it


OPERATIONS: dict[str, Operation] = {}
_overrides: dict[str, str] = {}


def declare(
    name: str,
    *backends: Backend,
    call: type[Any] = CallInfo,
    order: Callable[[Any], Sequence[str]] | None = None,
) -> None:
    """Adds an operation. See `Operation`."""
    assert name not in OPERATIONS, f"{name} is declared twice"
    OPERATIONS[name] = Operation({each.name: each for each in backends}, call, order)


TRITON = Backend("triton", lambda call: launch.why_not(call.device, call.dtype))
TORCH = Backend("torch", lambda call: None)


@contextlib.contextmanager
def override(**backends: str) -> Iterator[None]:
    """Uses the named backends inside the block: `override(attention="plain")`.

    It goes before the environment variable. A compiled function keeps the backends it was traced
    with.

    Raises:
        ValueError: an unknown operation or backend. A backend that cannot serve raises when called.
    """
    for op, backend in backends.items():
        _find(op, backend, "override: ")
    before = dict(_overrides)
    _overrides.update(backends)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def requested(op: str) -> str | None:
    """The backend that an override or the environment asks for, if any."""
    if op in _overrides:
        return _overrides[op]
    for entry in filter(None, os.environ.get(ENV, "").split(",")):
        name, _, backend = (part.strip() for part in entry.partition("="))
        _find(name, backend, f"{ENV}: ")
        if name == op:
            return backend
    return None


@dynamo.constant_result  # decided while tracing, not traced itself
def choose(op: str, *facts: Any, **named: Any) -> str:
    """The backend that serves a call.

    Args:
        op: the operation's name, e.g. "rms_norm".
        facts, named: fields of the operation's call, which all have defaults: device ("cuda"),
            dtype, and for attention and layer_norm their shapes.

    Raises:
        RuntimeError: the requested backend, or every backend, cannot serve the call.
        ValueError: an unknown operation or backend name.
    """
    return select(op, _find(op).call(*facts, **named))


def select(op: str, call: Any, prove: bool = True) -> str:
    """`choose`, of a call. prove=False: libraries that were not proved yet count as good."""
    operation, asked = _find(op), requested(op)
    order = [asked] if asked else operation.order(call) if operation.order else operation.backends
    first: str | None = None
    for name in order:
        problem = _problem(op, operation.backends[name], call, prove)
        if problem is None:
            return name
        first = first or problem
    if asked:
        raise RuntimeError(f"{op} backend {asked} requested but not available: {first}")
    raise RuntimeError(f"{op} cannot run on {call.device}: {first}")


def why_not(op: str, backend: str, *facts: Any, **named: Any) -> str | None:
    """Why a backend cannot serve a call, as a clause ("needs a CUDA GPU"), or None if it can.

    Nothing runs: a library may still fail its proof. Arguments as for `choose`.
    """
    return _find(op, backend).backends[backend].why_not(_find(op).call(*facts, **named))


def plain() -> dict[str, str]:
    """Each operation's backend in plain torch, as `override` takes them."""
    return {name: list(each.backends)[-1] for name, each in OPERATIONS.items()}


def _find(op: str, backend: str | None = None, where: str = "") -> Operation:
    if op not in OPERATIONS:
        known = ", ".join(sorted(OPERATIONS))
        raise ValueError(f"{where}unknown operation {op!r}; there are {known}.")
    operation = OPERATIONS[op]
    if backend is not None and backend not in operation.backends:
        known = ", ".join(operation.backends)
        raise ValueError(f"{where}unknown backend {backend!r} for {op}; there are {known}.")
    return operation


def _problem(op: str, backend: Backend, call: Any, prove: bool) -> str | None:
    problem, proof = backend.why_not(call), backend.proof
    if problem is not None or proof is None or not prove:
        return problem
    key = (op, backend.name, call.device, proof.kind(call))
    return proof_problem(proof.libraries, lambda: proof.case(call), key, call.device)
