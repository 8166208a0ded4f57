"""fp8_linear's Triton kernels at real sizes, compiled without a GPU: no spills, all fits.

Compute capability 8.0 has no float8, and no test here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.quantised import fp8_triton
from kernels.runtime.launch import Launch, recording
from kernels.runtime.resources import resources

pytestmark = pytest.mark.compiles

SHARED = 227 * 1024  # bytes a program may have
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check(launches: list[Launch], arch: int) -> None:
    for launch in launches:
        used = resources(launch, arch)
        assert used.local == 0, (launch.kernel.fn.__name__, launch.constants, used)
        assert used.shared <= SHARED, (launch.kernel.fn.__name__, used)


@pytest.mark.parametrize(("dtype", "arch"), [(BF16, 90), (BF16, 100), (FP32, 90)], ids=str)
def test_one_scale(dtype: torch.dtype, arch: int) -> None:
    """x and the gradient, in both layouts and in one; the weight in forward and in backward."""
    x, scale = meta(16384, 8960, dtype=dtype), meta(dtype=FP32)
    with recording(divmod(arch, 10), 132) as launches:
        codes, turned, _ = fp8_triton.quantize(x, E4M3, True, True)
        fp8_triton.quantize(x, E5M2, True, True)
        fp8_triton.quantize(x, E5M2, True, False)
        fp8_triton.quantize(x, E4M3, False, True, given=scale)
    assert codes is not None
    assert turned is not None
    assert (codes.shape, turned.shape) == ((16384, 8960), (8960, 16384))
    assert len(launches) == 7  # a scale that is given costs no launch
    check(launches, arch)


@pytest.mark.parametrize(("dtype", "arch"), [(BF16, 90), (BF16, 100)], ids=str)
def test_a_scale_a_row(dtype: torch.dtype, arch: int) -> None:
    with recording(divmod(arch, 10), 132) as launches:
        for cols in (256, 1536, 8960):
            fp8_triton.quantize_rows(meta(16384, cols, dtype=dtype), E5M2)
        turned, scale = fp8_triton.quantize_columns(meta(8960, 1536, dtype=dtype), E4M3)
    assert (turned.shape, scale.shape) == ((1536, 8960), (1, 1536))
    assert len(launches) == 5
    check(launches, arch)


def test_odd_sizes() -> None:
    with recording() as launches:
        fp8_triton.quantize(meta(999, 77, dtype=FP16), E4M3, True, True)
        fp8_triton.quantize_rows(meta(999, 77, dtype=FP16), E4M3)
        fp8_triton.quantize_columns(meta(999, 77, dtype=FP16), E4M3)
    check(launches, 90)


def test_a_cast_is_one_instruction() -> None:
    """The hardware's, two numbers at a time, to the nearest: no table, no arithmetic."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = fp8_triton.fp8_quantize_rows_kernel
    for e5m2, name in ((False, "e4m3x2"), (True, "e5m2x2")):
        constants = {"LARGEST": 1.0, "E5M2": e5m2, "BLOCK": 1024, "ONCE": True}
        types = {"x_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp32", "cols": "i32"}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        text = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True}
        ).asm["ptx"]
        assert f"cvt.rn.satfinite.{name}.f32" in text
