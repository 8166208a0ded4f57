"""The providers of a case: our public functions, torch, and other libraries where installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from runners.benchmarks.clock import DeviceLostError, first_line
from runners.shell.errors import UserError

Inputs = dict[str, Any]  # the tensors of one call, by name
Forward = Callable[[Inputs], Any]  # to a tensor or a tuple of them

# What is imported, and what pip calls it.
PEERS = {
    "Liger": ("liger_kernel", "liger-kernel"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "quack": ("quack", "quack-kernels"),
    "torchao": ("torchao", "torchao"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "flash-attn-4": ("flash_attn.cute", "flash-attn-4"),
}


class MissingError(Exception):
    """The reason for a provider's absence."""


@contextmanager
def failing(row: Any) -> Iterator[None]:
    """Turns an error into the row's status and reason. DeviceLostError is raised."""
    try:
        yield
    except DeviceLostError:
        raise
    except torch.OutOfMemoryError as error:
        row.status, row.reason = "out of memory", first_line(error)
    except (MissingError, ImportError, UserError) as error:
        row.status, row.reason = "missing", first_line(error)
    except Exception as error:  # whatever a rung or a library raises
        row.status, row.reason = "error", f"{type(error).__name__}: {first_line(error)}"
    if row.status != "ok":
        row.samples.clear()


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    name: in tables; the same for all cases, "ours" or "ours, ..." for ours.
    build: given the inputs (several sets of them), returns what is timed: a forward from one set.
        Imports its library here. Raises MissingError if there is nothing to time.
    peer: a key of PEERS, for other people's libraries.
    compiled: the forward goes through torch.compile.
    direct: the forward returns its results with their gradients; else those are asked for.
    graph: may be captured as a CUDA graph.
    charted: has a bar in the picture.
    """

    name: str
    build: Callable[[Sequence[Inputs]], Forward]
    peer: str | None = None
    compiled: bool = False
    direct: bool = False
    graph: bool = True
    charted: bool = True


def simple(name: str, forward: Forward, **options: Any) -> Provider:
    """A provider without preparation."""
    return Provider(name, lambda sets: forward, **options)


def torch_and_compiled(forward: Forward) -> tuple[Provider, Provider]:
    """Plain PyTorch, and the same through torch.compile."""
    return (
        simple("torch eager", forward),
        simple("torch.compile", forward, compiled=True),
    )


def ours(name: str, *keywords: str) -> Callable[..., Any]:
    """A public function of `kernels` that takes these keywords. Raises MissingError."""
    function = getattr(kernels, name, None)
    if function is None:
        raise MissingError(f"kernels.{name} does not exist")
    known = inspect.signature(function).parameters
    for keyword in keywords:
        if keyword not in known:
            raise MissingError(f"kernels.{name} takes no {keyword}=")
    return function


def need(peer: str) -> None:
    """Imports a peer. Raises MissingError with what to do, or with what its import said."""
    module, package = PEERS[peer]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = error.name or module
        if module == absent or module.startswith(f"{absent}."):
            raise MissingError(f"not installed (pip install {package})") from None
        raise MissingError(f"{package} needs {absent}, which is not installed") from error
    except Exception as error:  # other people's import-time code raises anything
        raise MissingError(f"{module} does not import: {first_line(error)}") from error


def version(package: str) -> str | None:
    """An installed distribution's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tensors(out: Any) -> tuple[Tensor, ...]:
    """A forward's output as a tuple."""
    return (out,) if isinstance(out, Tensor) else tuple(out)


def timed(
    provider: Provider, forward: Forward, wrt: Sequence[str], seeds: Sequence[str]
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """One call as a user makes it: the forward, and with `wrt` the gradients to those inputs.

    seeds: the inputs that are the gradients of the outputs; none for a scalar loss.
    Returns the outputs, then the gradients.
    """

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        if provider.direct:
            return tensors(forward(inputs))
        with torch.set_grad_enabled(bool(wrt)):
            outs = tensors(forward(inputs))
        if not wrt:
            return outs
        grads = torch.autograd.grad(
            outs, [inputs[name] for name in wrt], [inputs[name] for name in seeds] or None
        )
        return (*(out.detach() for out in outs), *grads)

    return call
