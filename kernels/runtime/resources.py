"""What the compiler makes of a launch: registers, local memory, shared memory. Needs no GPU.

with recording() as launches:
    rms_norm_forward(torch.empty(16384, 2048, device="meta", dtype=torch.bfloat16), ...)
assert all(resources(launch, 90).local == 0 for launch in launches)
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.launch import Launch, triton


@dataclass(frozen=True)
class Resources:
    """Of one kernel: registers a thread, local memory (spills, stack) in bytes a thread, shared
    memory in bytes a program."""

    registers: int
    local: int
    shared: int


_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}


def resources(launch: Launch, arch: int) -> Resources:
    """Compiles a launch for compute capability `arch` (80, 90, 100) and reads what it uses.

    Arguments are specialised as a real launch does: pointers and integers that 16 divides, and
    integers that are 1. Raises whatever the compiler raises.
    """
    signature: list[tuple[str, str]] = []
    constants = dict(launch.constants)
    divisible = []
    for name, value in launch.args.items():
        kind = _kind(value)
        if kind is None or (isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        signature.append((name, kind))
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            divisible.append(name)
    options = {k: v for k, v in launch.options.items() if k != "launch_pdl" or arch >= 90}
    return _compile(
        launch.kernel,
        tuple(signature),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
        arch,
    )


def _kind(value: Any) -> str | None:
    """The type of an argument as Triton writes it; None for None, which is a constant."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    raise TypeError(f"a kernel argument of type {type(value).__name__} is not known here")


@functools.cache
def _compile(
    kernel: Any,
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    divisible: tuple[str, ...],
    options: tuple[tuple[str, Any], ...],
    arch: int,
) -> Resources:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given, known = dict(signature), dict(constants)
    source = ASTSource(
        fn=kernel,
        signature={name: given.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=known,
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        report = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared)
