"""Which implementation runs: the only place that chooses.

`choose` takes the best backend that can serve a call. `override` (or the environment variable
NANOVISION_KERNELS, e.g. `attention=plain,rms_norm=torch`) asks for one by name; asking for one that
cannot serve raises with the reason. `report` says in words what a run will use, and why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator

import torch

from kernels import launch

ENV = "NANOVISION_KERNELS"

# Best first; the conditions are in `why_not`.
BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash-attn-4", "flash-attn", "torch-varlen", "padded", "plain"),
    "cross_entropy": ("triton", "torch"),
    "linear_cross_entropy": ("triton", "torch"),
    "rms_norm": ("triton", "torch"),
    "layer_norm": ("triton", "torch"),
    "swiglu": ("triton", "torch"),
    "geglu": ("triton", "torch"),
    "relu2": ("triton", "torch"),
    "rope": ("triton", "torch"),
    "int8_linear": ("triton", "torch"),
}

_FLASH_NAMES = {
    "flash-attn-4": "flash-attn 4",
    "flash-attn": "flash-attn 2",
    "torch-varlen": "torch varlen",
}
_HALF = (torch.bfloat16, torch.float16)
_log = logging.getLogger(__name__)
_overrides: dict[str, str] = {}
_warned: set[str] = set()


@contextlib.contextmanager
def override(**backends: str) -> Iterator[None]:
    """Uses the named backends inside the block: `override(attention="plain")`.

    It goes before the environment variable. A compiled function keeps what it was traced with.

    Raises:
        ValueError: an unknown operation or backend. One that cannot serve raises when called.
    """
    for op, backend in backends.items():
        _check_names(op, backend, "override")
    before = dict(_overrides)
    _overrides.update(backends)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def _check_names(op: str, backend: str, where: str) -> None:
    if op not in BACKENDS:
        raise ValueError(f"{where}: unknown operation {op!r}; there are {', '.join(BACKENDS)}.")
    if backend not in BACKENDS[op]:
        raise ValueError(
            f"{where}: unknown backend {backend!r} for {op}; there are {', '.join(BACKENDS[op])}."
        )


def requested(op: str) -> str | None:
    """The backend that an override or the environment asks for, if any."""
    if op in _overrides:
        return _overrides[op]
    for entry in filter(None, os.environ.get(ENV, "").split(",")):
        name, _, backend = (part.strip() for part in entry.partition("="))
        _check_names(name, backend, ENV)
        if name == op:
            return backend
    return None


@torch.compiler.assume_constant_result  # decided while tracing, not traced itself
def choose(
    op: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    readable: bool = True,
    transformed: bool = False,
    compiling: bool = False,
) -> str:
    """The backend that serves a call.

    Args:
        op: a key of `BACKENDS`.
        device: "cpu", "cuda", "cuda:1", "meta", ...
        head_dim: head size (attention).
        readable: the document boundaries can be read by Python (attention).
        transformed: a `torch.func` transform is active.
        compiling: inside `torch.compile`.

    Raises:
        RuntimeError: the requested backend cannot serve the call; the message says why.
        ValueError: an unknown operation or backend name.
    """
    if op not in BACKENDS:
        raise ValueError(f"unknown operation {op!r}; there are {', '.join(BACKENDS)}.")

    def reason(backend: str) -> str | None:
        return why_not(op, backend, device, dtype, head_dim, readable, transformed, compiling)

    asked = requested(op)
    if asked is not None:
        problem = reason(asked)
        if problem is not None:
            raise RuntimeError(f"{op} backend {asked} requested but not available: {problem}")
        return asked
    chosen = next(backend for backend in BACKENDS[op] if reason(backend) is None)
    if op == "attention" and chosen == "plain" and torch.device(device).type == "cuda":
        _warn_once(
            "attention runs as plain masked arithmetic, O(N^2) in memory: "
            f"torch varlen {reason('torch-varlen')}"
        )
    return chosen


def why_not(
    op: str,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    readable: bool = True,
    transformed: bool = False,
    compiling: bool = False,
) -> str | None:
    """Why a backend cannot serve a call, as a clause ("needs a CUDA GPU"), or None if it can."""
    if backend == "triton":
        return launch.why_not(device, dtype)
    if op != "attention" or backend == "plain":
        return None
    kind = torch.device(device).type
    if backend == "padded":
        if kind != "cpu":
            return "runs on CPU only"
        if compiling or not readable:
            return "has to read cu_seqlens, which cannot be read here (compiled, vmapped or meta)"
        return None
    if kind != "cuda":
        return "needs a CUDA GPU"
    if dtype not in _HALF:
        return f"takes bfloat16 or float16, not {dtype}"
    if transformed:
        return "does not run under torch.func transforms"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    if backend == "torch-varlen":
        if head_dim % 8 or head_dim > 256:
            return f"takes head sizes up to 256 in multiples of 8, not {head_dim}"
        return import_problem("torch.nn.attention.varlen", "install torch 2.11 or newer")
    if compiling:
        return "is not proved under torch.compile"
    if backend == "flash-attn":
        if head_dim % 8 or head_dim > 256:
            return f"takes head sizes up to 256 in multiples of 8, not {head_dim}"
        return import_problem("flash_attn.flash_attn_interface", "install flash-attn")
    if capability < (9, 0):
        return f"needs compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if head_dim not in (64, 128):
        # 4.0.0b36 on an H200: head size 72 gives a wrong gradient of q without an error
        return f"is proved for head sizes 64 and 128 only, not {head_dim}"
    return import_problem("flash_attn.cute", "install flash-attn-4")


@functools.cache
def import_problem(module: str, remedy: str) -> str | None:
    """None if the module imports; else what to do, with the import's own words if it is broken."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return remedy
    except ImportError as error:
        return f"{remedy} ({module} does not import: {error})"
    return None


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        _log.warning(message)


def report(
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dims: tuple[int, ...] = (64,),
    fused_loss: bool = True,
    flash_attention: bool = True,
    fused_kernels: bool = True,
    compiling: bool = False,
) -> list[str]:
    """What a run with these settings uses, one line an optimisation, with the reason if not.

    Args:
        device: where the model runs.
        dtype: what attention's inputs are.
        head_dims: head sizes of the model's attentions; those that get the same backend share a
            line.
        fused_loss, flash_attention, fused_kernels: what the user asked for.

    >>> for line in report(flash_attention=False, fused_kernels=False): print(line)
    Using fused cross-entropy (torch, in chunks)
    Flash attention off; using padded attention (torch)
    Fused kernels off
    """
    lines = ["Using fused cross-entropy (torch, in chunks)" if fused_loss else "Fused loss off"]

    by_backend: dict[str, list[int]] = {}
    for dim in dict.fromkeys(head_dims):
        backend = choose("attention", device, dtype, dim, True, False, compiling)
        by_backend.setdefault(backend, []).append(dim)
    for backend, dims in by_backend.items():
        of = f" for head size {', '.join(map(str, dims))}" if len(by_backend) > 1 else ""
        other = f"using {backend} attention (torch){of}"
        if backend in _FLASH_NAMES:
            lines.append(f"Using flash attention ({_FLASH_NAMES[backend]}){of}")
        elif not flash_attention:
            lines.append(f"Flash attention off; {other}")
        else:
            forced = requested("attention")
            problem = (
                f"{forced} was asked for"
                if forced
                else why_not("attention", "torch-varlen", device, dtype, dims[0], True, False)
            )
            lines.append(f"Flash attention requested but not available: {problem}; {other}")

    if not fused_kernels:
        lines.append("Fused kernels off")
    else:
        problem = import_problem("triton", "install triton") or "no Triton kernel in this version"
        lines.append(
            f"Fused kernels requested but not available: {problem}; using torch, with backwards "
            "that recompute"
        )
    return lines
