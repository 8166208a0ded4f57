"""int8_linear's Triton kernels at real sizes, compiled without a GPU: no spills, all fits."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from kernels.runtime.launch import Launch, recording
from kernels.runtime.resources import resources
from tests.kernels.archs import SHARED, compiled_for

pytestmark = pytest.mark.compiles

linear = importlib.import_module("kernels.quantised.int8_linear")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (rows, inner, outs, dtype, activations, bias): every launch configuration, then masks
CASES = [
    (1, 2048, 8192, BF16, None, False),
    (1, 1536, 8960, FP16, None, True),
    (8, 2048, 8192, BF16, None, False),
    (8, 8192, 2048, BF16, None, False),
    (8, 1536, 8960, FP16, None, True),
    (4, 14336, 4096, BF16, None, False),
    (16, 2048, 8192, BF16, None, False),
    (16, 8960, 1536, BF16, None, True),
    (32, 2048, 8192, BF16, None, False),
    (32, 8960, 1536, FP16, None, True),
    (64, 2048, 8192, BF16, None, False),
    (64, 8960, 1536, FP16, None, True),
    (65, 2048, 8192, BF16, None, False),
    (4096, 1000, 40, FP32, None, False),
    (16, 2048, 8192, BF16, "dynamic", False),
    (64, 8960, 1536, BF16, "dynamic", True),
    (64, 1000, 1000, BF16, "dynamic", True),
    (1024, 8192, 2048, BF16, "dynamic", True),
    (4096, 2048, 8192, BF16, "dynamic", False),
    (4096, 2048, 8192, FP32, "dynamic", False),
    (4096, 20000, 1001, FP16, "dynamic", True),
]


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches_of(
    rows: int,
    inner: int,
    outs: int,
    dtype: torch.dtype,
    activations: str | None,
    bias: bool,
    arch: int,
) -> list[Launch]:
    weight, scale = meta(outs, inner, dtype=torch.int8), meta(outs, dtype=FP32)
    with recording(divmod(arch, 10), 132) as launches:
        y = linear._forward_kernel(
            meta(rows, inner, dtype=dtype),
            weight,
            scale,
            meta(outs, dtype=dtype) if bias else None,
            activations == "dynamic",
        )
    assert (y.shape, y.dtype) == ((rows, outs), dtype)
    return launches


@pytest.mark.parametrize(("case", "arch"), compiled_for(CASES, (CASES[2], CASES[18])))
def test_nothing_spills(
    case: tuple[int, int, int, torch.dtype, str | None, bool], arch: int
) -> None:
    launches = launches_of(*case, arch)
    assert len(launches) == (2 if case[4] else 1)
    for launch in launches:
        used = resources(launch, arch)
        assert used.local == 0, (launch.kernel.fn.__name__, used)
        assert used.shared <= SHARED[arch], (launch.kernel.fn.__name__, used)


def test_backward_reads_the_int8_weight() -> None:
    with recording() as launches:
        dx = linear._transposed_kernel(
            meta(3, 5, 8192, dtype=BF16),
            meta(8192, 2048, dtype=torch.int8),
            meta(8192, dtype=FP32),
        )
    assert dx.shape == (3, 5, 2048)
    (launch,) = launches
    assert resources(launch, 90).local == 0


def test_few_rows_go_from_memory_to_tensor_cores_unshuffled() -> None:
    """Shared memory holds only the sums of the warps: no operand passes through it."""
    (launch,) = launches_of(8, 2048, 8192, BF16, None, False, 90)
    warps, outs = launch.constants["WARPS"], 8 * launch.constants["HALVES"]
    assert resources(launch, 90).shared <= warps * outs * 8 * 4
