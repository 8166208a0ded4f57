"""Starting Triton kernels: on a GPU, in the interpreter on a CPU, or only written down.

Kernel files take `jit`, `tl` and `triton` from here, so that they import where Triton is not
installed. Set TRITON_INTERPRET=1 before the first import and the same kernels run on CPU tensors.

With `recording()`, a launch is noted instead of made. Host functions run on meta tensors then, at
any size and with no GPU, and `kernels.runtime.resources` compiles what they would have launched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError:  # not a Linux machine: `why_not` below says so to whoever asks
    triton = tl = None

    def jit(kernel: Callable[..., Any]) -> Any:
        return kernel


INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret


def constant(value: Any) -> Any:
    """A number of a module that its kernels may read; as it is where there is no Triton."""
    return value if triton is None else tl.constexpr(value)


IN_INTERPRETER = constant(INTERPRETED)
LOG2E = constant(1.4426950408889634)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what it is given, and the options it is compiled with."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]  # by parameter name, in order; constexprs apart
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class LaunchRecorder:
    """The launches made so far, on a GPU that need not exist."""

    capability: tuple[int, int]
    processors: int
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[LaunchRecorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(
    capability: tuple[int, int] = (9, 0), processors: int = 132
) -> Iterator[list[Launch]]:
    """Notes launches instead of making them, as for a GPU with these properties (H100, H200)."""
    recorder = LaunchRecorder(capability, processors)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    pdl: bool = False,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Starts `kernel` on the device of its first tensor argument.

    Args:
        grid: programs along up to three axes; nothing is launched if one of them is 0.
        args: the kernel's parameters in order, without its constexprs.
        num_warps, num_stages: warps a program (32 threads each), depth of software pipelining.
        pdl: programmatic dependent launch: the kernel may start before the one ahead of it on the
            stream has ended, and waits itself (`gdc_wait`); compute capability 9.0 and newer.
        maxnreg: registers a thread at most; None leaves it to the compiler.
        constants: the kernel's constexprs, by name.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {
        "num_warps": num_warps,
        "num_stages": num_stages,
        "enable_fp_fusion": True,  # a * b + c rounds once; said aloud, because defaults differ
    }
    if pdl:
        options["launch_pdl"] = True
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    recorder = _recorder.get()
    if recorder is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        given = dict(zip(names, args, strict=True))
        recorder.launches.append(Launch(kernel, grid, given, constants, options))
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; 4 for the interpreter, so that loops are run."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.processors
    return 4 if device.type == "cpu" else _properties(device).multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (9, 0) for H100 and H200; (0, 0) for the interpreter."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.capability
    if device.type == "cpu":
        return (0, 0)
    properties = _properties(device)
    return properties.major, properties.minor


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why Triton cannot serve tensors like these, as a clause, or None if it can."""
    if triton is None:
        return "install triton"
    kind = torch.device(device).type
    if kind == "cpu" and not INTERPRETED:
        return "needs a CUDA GPU (or TRITON_INTERPRET=1, which is for tests)"
    if kind not in ("cpu", "cuda"):
        return "needs a CUDA GPU"
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32, not {dtype}"
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 0):
            return f"needs compute capability 8.0, this GPU has {major}.{minor}"
    return None


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """For kernels: a @ b, added to acc unless that is None; fp32."""
    if IN_INTERPRETER:  # it multiplies the bits of bf16 as if they were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
