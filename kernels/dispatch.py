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
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from kernels import cublas_lt, dynamo, launch, program_cache

ENV = "NANOVISION_KERNELS"

# Best first (attention's order depends on the shape: `_attention_order`); the conditions are in
# `why_not`.
BACKENDS: dict[str, tuple[str, ...]] = {
    "attention": (
        "flash-attn-4",
        "cudnn",
        "flash-attn",
        "torch-varlen",
        "triton",
        "padded",
        "plain",
    ),
    "cross_entropy": ("triton", "torch"),
    "linear_cross_entropy": ("triton", "torch"),
    "rms_norm": ("triton", "torch"),
    "layer_norm": ("triton", "torch"),
    "linear": ("triton", "torch"),
    "swiglu": ("triton", "torch"),
    "geglu": ("triton", "torch"),
    "relu2": ("triton", "torch"),
    "rope": ("triton", "torch"),
    "int8_linear": ("triton", "torch"),
    "adamw": ("triton", "torch"),
    "muon": ("triton", "torch"),
    "fp8_linear": ("triton", "torch"),
    "gelu_mlp": ("quack", "torch"),
    "product": ("cublas-lt", "torch"),
}

_FLASH_NAMES = {
    "flash-attn-4": "flash-attn 4",
    "flash-attn": "flash-attn 2",
    "torch-varlen": "torch varlen",
    "cudnn": "cuDNN",
    "triton": "triton",
}
# Head sizes whose output and gradients were proved against fp64 on an H200, causal or not, with
# windows, shared key heads, ragged and empty documents (tests/kernels/test_attention_gpu.py). What
# is not here is refused: 72 in flash-attn 4.0.0b36 gives a wrong gradient of q without an error.
PROVED: dict[str, tuple[int, ...]] = {
    "flash-attn-4": (64, 128),
    "cudnn": (64, 128),
    "torch-varlen": tuple(range(8, 257, 8)),
    "flash-attn": tuple(range(8, 257, 8)),  # not run: torch-varlen is the same kernels
    "triton": (16, 32, 64, 72, 80, 96, 128, 256),
}
_FUSED = ("rms_norm", "layer_norm", "swiglu", "rope")  # what a step of our own models uses
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


@dynamo.constant_result  # decided while tracing, not traced itself
def choose(
    op: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    readable: bool = True,
    compiling: bool = False,
    group: int = 1,
    window: int | None = None,
    max_seqlen: int | None = None,
    length: int | None = None,
    large: bool = False,
) -> str:
    """The backend that serves a call.

    Args:
        op: a key of `BACKENDS`.
        device: "cpu", "cuda", "cuda:1", "meta", ...
        head_dim: head size (attention); entries of a row (layer_norm).
        readable: the document boundaries can be read by Python (attention).
        compiling: inside `torch.compile`.
        group: query heads that share a key head (attention).
        window, max_seqlen, length: as attention was called.
        large: q with its documents padded by 128 rows each has 2^31 entries or more (attention).

    Raises:
        RuntimeError: the requested backend cannot serve the call; the message says why.
        ValueError: an unknown operation or backend name.
    """
    if op not in BACKENDS:
        raise ValueError(f"unknown operation {op!r}; there are {', '.join(BACKENDS)}.")

    def reason(backend: str) -> str | None:
        return why_not(
            op, backend, device, dtype, head_dim, readable, compiling, window, length, large
        )

    asked = requested(op)
    if asked is not None:
        problem = reason(asked)
        if problem is not None:
            raise RuntimeError(f"{op} backend {asked} requested but not available: {problem}")
        return asked
    order = BACKENDS[op]
    if op == "attention":
        order = _attention_order(device, group, max_seqlen, length, window)
    if op == "fp8_linear" and torch.device(device).type == "cuda":
        problem = reason("triton")  # torch only imitates it, slower than bf16: not unless asked for
        if problem is not None:
            raise RuntimeError(f"fp8_linear cannot run on {device}: {problem}")
    chosen = next(backend for backend in order if reason(backend) is None)
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
    compiling: bool = False,
    window: int | None = None,
    length: int | None = None,
    large: bool = False,
    installed: bool = False,
) -> str | None:
    """Why a backend cannot serve a call, as a clause ("needs a CUDA GPU"), or None if it can.

    installed: an attention's library is taken to be, without the import that tells.
    """
    if op == "layer_norm" and backend == "triton" and head_dim > 8192:
        return f"keeps rows in registers, of up to 8192 entries, not {head_dim}"
    if op == "fp8_linear" and backend == "triton" and torch.device(device).type == "cuda":
        has = torch.cuda.get_device_capability(device)
        if has < (9, 0):
            return f"needs compute capability 9.0, this GPU has {has[0]}.{has[1]}"
    if backend == "quack":
        return _quack_problem(device, dtype)
    if backend == "cublas-lt":
        return _hopper_problem(device, dtype, "measured") or cublas_lt.problem()
    if op != "attention":
        return launch.why_not(device, dtype) if backend == "triton" else None
    if backend == "plain":
        return None
    kind = torch.device(device).type
    if backend == "padded":
        if kind != "cpu":
            return "runs on CPU only"
        if compiling or not readable:
            return "has to read cu_seqlens, which cannot be read here (compiled, vmapped or meta)"
        return None
    if backend == "triton":
        problem = launch.why_not(device, dtype)
    elif kind != "cuda":
        problem = "needs a CUDA GPU"
    else:
        needed = (9, 0) if backend == "flash-attn-4" else (8, 0)
        has = torch.cuda.get_device_capability(device)
        problem = None
        if has < needed:
            problem = (
                f"needs compute capability {needed[0]}.{needed[1]}, this GPU has {has[0]}.{has[1]}"
            )
    if problem is not None:
        return problem
    if dtype not in _HALF and backend != "triton":
        return f"takes bfloat16 or float16, not {dtype}"
    if backend == "cudnn" and length is None:
        return "takes documents of equal length only, said by attention(..., length=)"
    if backend == "cudnn" and window is not None:
        return "has no sliding window"
    if large and backend in ("torch-varlen", "flash-attn"):
        return "counts the entries of q's gradient in 32 bits"
    if head_dim not in PROVED[backend]:
        return f"is not proved for head size {head_dim}"
    return None if installed else _library_problem(backend)


def wants_flash_attn_4(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    max_seqlen: int | None,
    length: int | None,
    window: int | None,
) -> bool:
    """Whether `choose` takes flash-attn 4 for an attention if it is installed, without a look at
    whether it is, which would import it."""
    asked = requested("attention")
    order = (asked,) if asked else _attention_order(device, group, max_seqlen, length, window)
    if order[0] != "flash-attn-4":
        return False
    problem = why_not(
        "attention", "flash-attn-4", device, dtype, head_dim,
        window=window, length=length, installed=True,
    )  # fmt: skip
    return problem is None


def _gelu_line(device: str, dtype: torch.dtype) -> str:
    if choose("gelu_mlp", device, dtype) == "quack":
        return "Using matrix products that compute GELUs (quack)"
    asked = requested("gelu_mlp")
    why = f"{asked} was asked for" if asked else why_not("gelu_mlp", "quack", device, dtype)
    return f"GELUs are passes of their own: {why}"


def _quack_problem(device: str, dtype: torch.dtype) -> str | None:
    """None if GELUs can be computed inside matrix products."""
    problem = _hopper_problem(device, dtype, "proved")
    return problem or import_problem("quack.epilogue", "install quack-kernels 0.6.5 or newer")


def _hopper_problem(device: str, dtype: torch.dtype, seen: str) -> str | None:
    """None where bf16 products are computed that were seen on compute capability 9.0 alone."""
    if torch.device(device).type != "cuda":
        return "needs a CUDA GPU"
    has = torch.cuda.get_device_capability(device)
    if has != (9, 0):
        return f"is {seen} for compute capability 9.0, this GPU has {has[0]}.{has[1]}"
    return None if dtype == torch.bfloat16 else f"takes bfloat16, not {dtype}"


def _library_problem(backend: str) -> str | None:
    """None if what runs an attention backend is installed, else the remedy."""
    if backend == "flash-attn-4":
        return import_problem("flash_attn.cute", "install flash-attn-4")
    if backend == "flash-attn":
        return import_problem("flash_attn.flash_attn_interface", "install flash-attn")
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "needs a torch with cuDNN"
    return None  # torch-varlen: in every torch that we run on; triton: asked for before


def _attention_order(
    device: str, group: int, max_seqlen: int | None, length: int | None, window: int | None
) -> tuple[str, ...]:
    """Attention's backends, best first, by what is known of a call before it runs.

    Measured on an H200, bf16, 16,384 tokens, forward + backward in ms, 2026-11-23: flash-attn 4 |
    cuDNN | torch varlen | triton. Equal lengths, 16 heads of 64, not causal:

        64: 0.422 | 0.306 | 0.506 | 0.189      512: 0.369 | 0.402 | 0.558 | 0.493
       128: 0.240 | 0.230 | 0.285 | 0.236    2,048: 0.951 | 1.123 | 1.785 | 1.569
       256: 0.291 | 0.289 | 0.365 | 0.322   16,384: 7.304 | 8.546 | 13.12 | 12.81

    (256, forward alone: 0.098 | 0.055 | 0.081 | 0.064.)
    Ragged, causal, heads of 128, by mean length, flash-attn 4 | triton (the longest is about twice
    the mean): 12 query heads on 2 key heads: 200: 0.445 | 0.328, 380: 0.461 | 0.387,
    700: 0.521 | 0.566; 16 on 16: 200: 0.512 | 0.500, 380: 0.531 | 0.612. One document with a window
    of 256, 12 on 2: 0.463 | 0.412; in a causal document of twice the window as many keys are seen.
    """
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return BACKENDS["attention"]  # not measured: the libraries first
    short = 512 if group < 4 else 1024
    few = length <= 64 if length is not None else max_seqlen is not None and max_seqlen <= short
    if few or (window is not None and 2 * window <= short):
        return ("triton", *(b for b in BACKENDS["attention"] if b != "triton"))
    first, second = "flash-attn-4", "cudnn"
    if length is not None and length <= 256:
        first, second = second, first
    return (first, second, "triton", "flash-attn", "torch-varlen", "plain")


@functools.cache
def import_problem(module: str, remedy: str) -> str | None:
    """None if the module imports; else what to do, with the import's own words if it is broken."""
    if module in ("flash_attn.cute", "quack.epilogue"):
        program_cache.keep()
    try:
        # quack, which flash-attn 4 is made with, imports Dynamo: 1.2 of the 1.9 s that this takes
        with dynamo.not_yet():
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
    attentions: Mapping[str, Mapping[str, Any]] = MappingProxyType({"text": {}}),
    fused_loss: bool = True,
    flash_attention: bool = True,
    fused_kernels: bool = True,
    compiling: bool = False,
    gelus: bool = False,
) -> list[str]:
    """What a run with these settings uses, one line an optimisation, with the reason if not.

    Args:
        device: where the model runs.
        dtype: what attention's inputs are.
        attentions: what is known of each of the model's attentions, by its name, as `choose` takes
            it (head_dim, group, max_seqlen, length); those that get the same backend share a line.
        fused_loss, flash_attention, fused_kernels: what the user asked for.
        gelus: the model has MLPs with a GELU.

    >>> for line in report(flash_attention=False, fused_kernels=False): print(line)
    Using fused cross-entropy (torch, in chunks)
    Flash attention off; using padded attention (torch)
    Fused kernels off
    """
    loss = {"triton": "triton", "torch": "torch, in chunks"}[
        choose("linear_cross_entropy", device, dtype)
    ]
    lines = [f"Using fused cross-entropy ({loss})" if fused_loss else "Fused loss off"]

    by_backend: dict[str, list[str]] = {}
    for name, facts in attentions.items():
        backend = choose("attention", device, dtype, compiling=compiling, **facts)
        by_backend.setdefault(backend, []).append(name)
    for backend, names in by_backend.items():
        of = f" for {', '.join(names)}" if len(by_backend) > 1 else ""
        other = f"using {backend} attention (torch){of}"
        if backend in _FLASH_NAMES:
            lines.append(f"Using flash attention ({_FLASH_NAMES[backend]}){of}")
        elif not flash_attention:
            lines.append(f"Flash attention off; {other}")
        else:
            asked = requested("attention")
            head_dim = attentions[names[0]].get("head_dim", 64)
            problem = (
                f"{asked} was asked for"
                if asked
                else why_not("attention", "torch-varlen", device, dtype, head_dim)
            )
            lines.append(f"Flash attention requested but not available: {problem}; {other}")

    if not fused_kernels:
        lines.append("Fused kernels off")
        return lines
    if gelus and torch.device(device).type == "cuda":
        lines.append(_gelu_line(device, dtype))
    if choose("product", device, dtype) == "cublas-lt":
        lines.append("Using the most economical of cuBLAS's kernels for wide products")
    served: dict[str, list[str]] = {}
    for op in _FUSED:
        served.setdefault(choose(op, device, dtype), []).append(op)
    if "triton" in served:
        lines.append(f"Using fused kernels (triton): {', '.join(served['triton'])}")
    if "torch" in served:
        forced = [op for op in served["torch"] if requested(op)]
        problem = (
            f"torch was asked for ({', '.join(forced)})"
            if forced
            else launch.why_not(device, dtype)
        )
        lines.append(
            f"Fused kernels requested but not available: {problem}; using torch, with backwards "
            f"that recompute: {', '.join(served['torch'])}"
        )
    return lines
