"""A linear layer with the kernel for its bias's gradient, in the interpreter and on a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from kernels.linear.linear import bias_gradient, linear
from kernels.runtime import dispatch
from tests.kernels.drivers import (
    FIRST_ORDER,
    HIGHER_ORDER,
    Case,
    Driver,
    broken,
    by_autograd,
    disagreement,
    placed,
    random,
)
from tests.rounding import ulps

BF16, FP32 = torch.bfloat16, torch.float32
CASE = Case(
    linear,
    F.linear,
    ((5, 7), (3, 7), (3,)),
    importlib.import_module("kernels.linear.linear"),
    "LINEAR",
)


def error(driver: Driver, device: str) -> float:
    floats = tuple(random(*s, seed=i).to(device, FP32) for i, s in enumerate(CASE.shapes))
    with dispatch.override(linear="triton"):
        return disagreement(driver, CASE.fast, CASE.plain, floats)


@pytest.mark.parametrize(
    ("name", "driver", "kernel_device"), placed(["linear"], [*FIRST_ORDER, *HIGHER_ORDER])
)
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    """The bound: a few consecutive fp32 sums of a few dozen numbers of order 1."""
    assert error(driver, kernel_device) < ulps(torch.float32, 800)


def test_a_wrong_backward_shows(interpreter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drivers suffice: test_triton_elementwise.py covers all of them."""
    broken(CASE, "backward", monkeypatch)
    assert error(by_autograd, interpreter) > 0.1


# 13: rows whose bytes are not a multiple of 16 are padded
@pytest.mark.parametrize("shape", [(4, 6, 16), (0, 16), (1, 16), (300, 16), (40, 13)])
@pytest.mark.parametrize("needs", ["111", "100", "011", "001"])
def test_no_worse_than_torch(shape: tuple[int, ...], needs: str, kernel_device: str) -> None:
    """Against fp64, with an fp32 bias and bf16 weights: the bias's gradient is fp32, where torch
    rounds it to bf16."""
    x, weight = random(*shape, dtype=BF16), random(24, shape[-1], seed=1, dtype=BF16)
    bias, g = random(24, seed=2, dtype=FP32), random(*shape[:-1], 24, seed=3, dtype=BF16)
    results = {}
    for name, dtype in (("fast", None), ("torch", None), ("exact", torch.float64)):
        leaves = [
            t.to(kernel_device, dtype or t.dtype).requires_grad_(need == "1")
            for t, need in zip((x, weight, bias), needs, strict=True)
        ]
        with dispatch.override(linear="triton" if name == "fast" else "torch"):
            y = linear(*leaves)
        learning = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(y, learning, g.to(y.device, y.dtype))
        results[name] = (y, *grads)
    for mine, theirs, exact in zip(*results.values(), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == exact.shape
        if exact.numel():
            off, other = ((got.double() - exact).abs().max() for got in (mine, theirs))
            assert off <= other + torch.finfo(mine.dtype).eps * exact.abs().max()


def test_fp64_is_summed_in_fp64(kernel_device: str) -> None:
    g = random(100, 3).to(kernel_device) + 1e8
    got = bias_gradient(g, g[0], True)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, g.sum(0), rtol=ulps(torch.float64, 64), atol=0)
