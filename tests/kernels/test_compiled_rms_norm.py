"""The norms' Triton kernels, compiled for real sizes without a GPU: registers do not spill."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.norm import layer_norm_triton, rms_norm_triton
from kernels.runtime.launch import Launch, recording
from kernels.runtime.resources import resources
from tests.kernels.archs import SHARED, compiled_for

pytestmark = pytest.mark.compiles

# rows per tile: 32 (masked), 8, 2 (masked), 1; warps: 4, 8, 16; then rows too long for registers,
# in backward and in both directions; fp32 where tiles are largest
CASES = [
    (40, torch.bfloat16),
    (128, torch.bfloat16),
    (1000, torch.float16),
    (2048, torch.bfloat16),
    (4096, torch.bfloat16),
    (8192, torch.bfloat16),
    (8192, torch.float32),
    (16384, torch.bfloat16),
    (20000, torch.float32),
]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches_of(dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[Launch]:
    """Both directions of the norm of a sum, the backward with and without forward's output, and
    both directions of layer_norm where it takes such rows."""
    x, r = meta(16384, dim, dtype=dtype), meta(16384, 1, dtype=torch.float32)
    w = meta(dim, dtype=torch.float32)
    with recording(capability, 132) as launches:
        rms_norm_triton.rms_norm_forward(x, x, w, 1e-6)
        rms_norm_triton.rms_norm_backward(x, x, x, w, r, True)
        rms_norm_triton.rms_norm_backward_(x, x, x, w, r, True)
        if dim <= layer_norm_triton.MAX_DIM:
            layer_norm_triton.layer_norm_forward(x, w, w, 1e-6)
            layer_norm_triton.layer_norm_backward(x, x, w, w, r, r, True, True)
    return launches


def check(launch: Launch, arch: int) -> None:
    used = resources(launch, arch)
    assert used.local == 0, (launch.kernel.fn.__name__, arch, used)
    assert used.shared <= SHARED[arch], (launch.kernel.fn.__name__, arch, used)


@pytest.mark.parametrize(("case", "arch"), compiled_for(CASES, CASES[3:4]))
def test_nothing_spills(case: tuple[int, torch.dtype], arch: int) -> None:
    dim, dtype = case
    launches = launches_of(dim, dtype, divmod(arch, 10))
    assert len(launches) == (8 if dim <= 8192 else 5)
    for launch in launches[: None if dtype == torch.bfloat16 or arch == 90 else -3]:
        check(launch, arch)


def test_nothing_spills_without_weight_or_residual() -> None:
    x, r = meta(16384, 2048, dtype=torch.bfloat16), meta(16384, 1, dtype=torch.float32)
    with recording() as launches:
        rms_norm_triton.rms_norm_forward(x, None, None, 1e-6)
        rms_norm_triton.rms_norm_backward(x, None, x, None, r, False)
        rms_norm_triton.rms_norm_backward_(x, None, x, None, r, False)
        layer_norm_triton.layer_norm_forward(x, None, None, 1e-6)
        layer_norm_triton.layer_norm_backward(x, x, None, None, r, r, False, False)
    assert len(launches) == 5  # no weight, so no sums for its gradient
    for launch in launches:
        check(launch, 90)
