"""Which implementation runs: the only place that chooses.

`choose` takes the best backend that can serve a call. `override` (or the environment variable
NANOVISION_KERNELS, e.g. `attention=plain,rms_norm=torch`) asks for one by name; asking for one that
cannot serve raises with the reason. A backend from outside is proved by a small call before it is
chosen (`kernels.runtime.proof`). `report` says in words what a run will use, and why.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch

from kernels.runtime import dynamo, launch
from kernels.runtime.proof import import_problem, proof_problem, warn_once

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
}

_FLASH_NAMES = {
    "flash-attn-4": "flash-attn 4",
    "flash-attn": "flash-attn 2",
    "torch-varlen": "torch varlen",
    "cudnn": "cuDNN",
    "triton": "triton",
}
# Head sizes whose output and gradients were tested against fp64 on an H200, causal or not, with
# windows, shared key heads, ragged and empty documents (tests/kernels/test_attention_gpu.py). What
# is not here is refused: 72 in flash-attn 4.0.0b36 gives a wrong gradient of q without an error.
# flash-attn was not at hand there: it serves what its proof finds right in this process.
TESTED: dict[str, tuple[int, ...]] = {
    "flash-attn-4": (64, 128),
    "cudnn": (64, 128),
    "torch-varlen": tuple(range(8, 257, 8)),
    "flash-attn": tuple(range(8, 257, 8)),
    "triton": (16, 32, 64, 72, 80, 96, 128, 256),
}
_FUSED = ("rms_norm", "layer_norm", "swiglu", "rope")  # what a step of our own models may use
_HALF = (torch.bfloat16, torch.float16)
_overrides: dict[str, str] = {}


class Proof(NamedTuple):
    """How a backend from outside is proved: see `kernels.runtime.proof.proof_problem`."""

    libraries: tuple[str, ...]
    case: Callable[[Facts], None]
    kind: Callable[[Facts], Hashable]  # of call: one proof each


class Facts(NamedTuple):
    """What is known of a call when its backend is chosen: the arguments of `choose`."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    readable: bool = True
    compiling: bool = False
    group: int = 1
    window: int | None = None
    max_seqlen: int | None = None
    length: int | None = None
    large: bool = False
    causal: bool = True
    many: bool = False


_proofs: dict[tuple[str, str], Proof] = {}


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


def refuse(op: str, backend: str, problem: str) -> NoReturn:
    """Raises RuntimeError: a backend was asked for that cannot serve a call."""
    raise RuntimeError(f"{op} backend {backend} requested but not available: {problem}")


def proved_by(op: str, backend: str, proof: Proof) -> None:
    """Says how a backend from outside is proved. `choose` takes it only where its proof holds."""
    _proofs[op, backend] = proof


@dynamo.constant_result  # decided while tracing, not traced itself
def choose(op: str, *facts: Any, **named: Any) -> str:
    """The backend that serves a call.

    Args:
        op: a key of `BACKENDS`.
        facts, named: fields of `Facts`, all of which have defaults:

            device: "cpu", "cuda", "cuda:1", "meta", ...
            dtype: of the tensors.
            head_dim: head size (attention); entries of a row (layer_norm).
            readable: the document boundaries can be read by Python (attention).
            compiling: inside `torch.compile`.
            group: query heads that share a key head (attention).
            window, max_seqlen, length, causal: as attention was called.
            large: q with its documents padded by 128 rows each has 2^31 entries or more
                (attention).
            many: there are more than 256 documents (attention).

    Raises:
        RuntimeError: the requested backend cannot serve the call; the message says why.
        ValueError: an unknown operation or backend name.
    """
    return _choose(op, Facts(*facts, **named))


def _choose(op: str, facts: Facts, prove: bool = True) -> str:
    """prove: backends from outside are tried; else they count as good until they were."""
    if op not in BACKENDS:
        raise ValueError(f"unknown operation {op!r}; there are {', '.join(BACKENDS)}.")
    asked = requested(op)
    if asked is not None:
        problem = _problem(op, asked, facts, prove)
        if problem is not None:
            refuse(op, asked, problem)
        return asked
    on_gpu = torch.device(facts.device).type == "cuda"
    if op == "fp8_linear" and on_gpu:
        problem = _problem(op, "triton", facts, prove)
        if problem is not None:  # torch only imitates it, slower than bf16: not unless asked for
            raise RuntimeError(f"fp8_linear cannot run on {facts.device}: {problem}")
    order = _attention_order(facts) if op == "attention" else BACKENDS[op]
    chosen = next(backend for backend in order if _problem(op, backend, facts, prove) is None)
    if op == "attention" and chosen == "plain" and on_gpu:
        warn_once(
            "attention runs as plain masked arithmetic, O(N^2) in memory: "
            f"torch varlen {_problem(op, 'torch-varlen', facts, prove)}"
        )
    return chosen


def _problem(op: str, backend: str, facts: Facts, prove: bool) -> str | None:
    """Why a backend cannot serve a call, by what is known of it and by its proof."""
    problem = _why_not(op, backend, facts)
    proof = _proofs.get((op, backend))
    if problem is not None or proof is None or not prove:
        return problem
    key = (op, backend, facts.device, proof.kind(facts))
    return proof_problem(proof.libraries, lambda: proof.case(facts), key, facts.device)


def why_not(op: str, backend: str, *facts: Any, **named: Any) -> str | None:
    """Why a backend cannot serve a call, as a clause ("needs a CUDA GPU"), or None if it can.

    Nothing is run: a backend from outside may still fail its proof. Arguments as for `choose`.
    """
    return _why_not(op, backend, Facts(*facts, **named))


def _why_not(op: str, backend: str, facts: Facts) -> str | None:
    device, dtype, head_dim = facts.device, facts.dtype, facts.head_dim
    if op == "layer_norm" and backend == "triton" and head_dim > 8192:
        return f"keeps rows in registers, of up to 8192 entries, not {head_dim}"
    if op == "fp8_linear" and backend == "triton" and torch.device(device).type == "cuda":
        has = torch.cuda.get_device_capability(device)
        if has < (9, 0):
            return f"needs compute capability 9.0, this GPU has {has[0]}.{has[1]}"
    if op != "attention":
        return launch.why_not(device, dtype) if backend == "triton" else None
    if backend == "plain":
        return None
    kind = torch.device(device).type
    if backend == "padded":
        if kind != "cpu":
            return "runs on CPU only"
        if facts.compiling or not facts.readable:
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
    if backend == "cudnn" and facts.length is None:
        return "takes documents of equal length only, said by attention(..., length=)"
    if backend == "cudnn" and facts.window is not None:
        return "has no sliding window"
    if facts.large and backend in ("torch-varlen", "flash-attn"):
        return "counts the entries of q's gradient in 32 bits"
    if head_dim not in TESTED[backend]:
        return f"is not tested for head size {head_dim}"
    return _library_problem(backend)


def _library_problem(backend: str) -> str | None:
    """None if what runs an attention backend is installed, else the remedy."""
    if backend == "flash-attn-4":
        return import_problem("flash_attn.cute", "install flash-attn-4")
    if backend == "flash-attn":
        return import_problem("flash_attn.flash_attn_interface", "install flash-attn")
    if backend == "cudnn":
        return None if torch.backends.cudnn.is_available() else "needs a torch with cuDNN"
    return None  # torch-varlen: in every torch that we run on; triton: asked for before


def _attention_order(facts: Facts) -> tuple[str, ...]:
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
    device, length, window = facts.device, facts.length, facts.window
    if torch.device(device).type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return BACKENDS["attention"]  # not measured: the libraries first
    short = 512 if facts.group < 4 else 1024
    longest = facts.max_seqlen
    few = length <= 64 if length is not None else longest is not None and longest <= short
    if few or (window is not None and 2 * window <= short):
        return ("triton", *(b for b in BACKENDS["attention"] if b != "triton"))
    first, second = "flash-attn-4", "cudnn"
    if length is not None and length <= 256:
        first, second = second, first
    return (first, second, "triton", "flash-attn", "torch-varlen", "plain")


def report(
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attentions: Mapping[str, Mapping[str, Any]] = MappingProxyType({"text": {}}),
    operations: Sequence[str] = _FUSED,
    fused_loss: bool = True,
    flash_attention: bool = True,
    fused_kernels: bool = True,
    compiling: bool = False,
) -> list[str]:
    """What a run with these settings uses, one line an optimisation, with the reason if not.

    Nothing is tried: a backend from outside that then fails its proof is warned of when it is.

    Args:
        device: where the model runs.
        dtype: what attention's inputs are.
        attentions: what is known of each of the model's attentions, by its name, as `choose` takes
            it (head_dim, group, max_seqlen, length); those that get the same backend share a line.
        operations: which of rms_norm, layer_norm, swiglu and rope the model has.
        fused_loss, flash_attention, fused_kernels: what the user wants.

    >>> for line in report(flash_attention=False, fused_kernels=False): print(line)
    Using fused cross-entropy (torch, in chunks)
    Flash attention off; using padded attention (torch)
    Fused kernels off
    """
    lines = ["Fused loss off"]
    if fused_loss:
        loss = choose("linear_cross_entropy", device, dtype)
        loss = {"triton": "triton", "torch": "torch, in chunks"}[loss]
        lines = [f"Using fused cross-entropy ({loss})"]

    by_backend: dict[str, list[Facts]] = {}
    names: dict[str, list[str]] = {}
    for name, known in attentions.items():
        facts = Facts(device, dtype, compiling=compiling, **known)
        backend = _choose("attention", facts, prove=False)
        by_backend.setdefault(backend, []).append(facts)
        names.setdefault(backend, []).append(name)
    for backend, served in by_backend.items():
        of = f" for {', '.join(names[backend])}" if len(by_backend) > 1 else ""
        if backend in _FLASH_NAMES:
            lines.append(f"Using flash attention ({_FLASH_NAMES[backend]}){of}")
            continue
        why = ""
        if flash_attention:
            asked = requested("attention")
            why = f": {asked} was asked for"
            if not asked:
                why = f": {_why_not('attention', 'torch-varlen', served[0])}"
        lines.append(f"Flash attention off{why}; using {backend} attention (torch){of}")

    if not fused_kernels:
        lines.append("Fused kernels off")
        return lines
    served_by: dict[str, list[str]] = {}
    for op in operations:
        backend = choose(op, device, dtype)
        served_by.setdefault("asked" if requested(op) == "torch" else backend, []).append(op)
    if "triton" in served_by:
        lines.append(f"Using fused kernels (triton): {', '.join(served_by['triton'])}")
    if "asked" in served_by:
        lines.append(f"Fused kernels off, torch was asked for: {', '.join(served_by['asked'])}")
    if "torch" in served_by:
        lines.append(
            f"No fused kernels: {launch.why_not(device, dtype)}; using torch, with backwards that "
            f"recompute: {', '.join(served_by['torch'])}"
        )
    return lines
