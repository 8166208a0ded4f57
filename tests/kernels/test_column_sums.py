"""The gradient of a bias: sums over rows, against fp64."""

from __future__ import annotations

import pytest
import torch

from kernels.linear.column_sums import COLS, ROWS, column_sums, launch_column_sums
from kernels.runtime.launch import recording
from kernels.runtime.resources import resources
from tests.kernels.drivers import random

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (0, 5), (3, 0), (ROWS + 1, COLS + 1), (700, 20), (1030, 300)]
)
def test_against_fp64(shape: tuple[int, int], dtype: torch.dtype, kernel_device: str) -> None:
    """The bound: a tree of far fewer than ``rows`` fp32 additions of numbers up to 5, and one
    rounding to the bias's dtype."""
    x = random(*shape, dtype=dtype).to(kernel_device)
    exact, size = x.double().sum(0), x.double().abs().sum(0)
    for out in (FP32, BF16):
        got = column_sums(x, out)
        assert got.dtype == out
        allowed = 2.0**-22 * size + torch.finfo(out).eps * exact.abs()
        assert ((got.double() - exact).abs() <= allowed).all()


def test_rows_of_a_wider_matrix_and_columns(kernel_device: str) -> None:
    wide = random(130, 64, dtype=BF16).to(kernel_device)
    for x in (wide[:, 8:40], wide[::2], wide.t()):
        assert torch.equal(column_sums(x, FP32), column_sums(x.contiguous(), FP32))
        torch.testing.assert_close(column_sums(x, FP32), x.float().sum(0))


def test_a_nan_stays_in_its_column(kernel_device: str) -> None:
    x = random(100, 200, dtype=BF16).to(kernel_device)
    x[50, 7] = float("nan")
    assert column_sums(x, BF16).isnan().nonzero().tolist() == [[7]]


@pytest.mark.compiles
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_without_spills(arch: int) -> None:
    with recording(divmod(arch, 10), 132) as launches:
        for width in (256, 1536, 8960):
            launch_column_sums(torch.empty(16384, width, dtype=BF16, device="meta"), BF16)
    assert len(launches) == 6
    for launch in launches:
        assert resources(launch, arch).local == 0
