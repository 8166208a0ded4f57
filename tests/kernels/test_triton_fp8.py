"""The float8 kernels, in the interpreter and on a GPU: codes and scales bit for bit.

The interpreter's cast to float8 does not round half to even, so the kernels use integer arithmetic
there; on a GPU the same tests compare the cast of the hardware with torch.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from kernels.quantised import fp8_triton
from kernels.quantised.fp8_triton import LARGEST, Fp8Tile
from kernels.runtime import dispatch
from tests.kernels.drivers import random

linear = importlib.import_module("kernels.quantised.fp8_linear")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (5, 7), (16, 48), (130, 70), (33, 257)]


def raw(codes: Tensor) -> Tensor:
    return codes.view(torch.uint8)


def same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(raw(got), raw(wanted))


def turned(codes: Tensor) -> Tensor:
    padding = (0, -codes.shape[0] % 16)
    return torch.nn.functional.pad(raw(codes).t(), padding).contiguous().view(codes.dtype)


def spread(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal numbers times powers of two, so that many codes are small, zero, or halfway."""
    x = random(*shape) * 2.0 ** random(*shape, seed=1).mul(4).round().clamp(-13, 3)
    return x.to(dtype).to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_scales(dtype: torch.dtype, format: torch.dtype, kernel_device: str) -> None:
    for shape in SHAPES if dtype == torch.bfloat16 else SHAPES[2:4]:
        x = spread(*shape, dtype=dtype, device=kernel_device)
        scale = (x.abs().amax().float().cpu() / LARGEST[format]).to(kernel_device)
        wanted = (x.float() * (1 / scale)).to(format)
        codes, across, got = fp8_triton.quantize(x, format, True, True, config=Fp8Tile(32, 32, 4))
        assert torch.equal(got, scale)
        same(codes, wanted)
        same(across, turned(wanted))
        for straight in (True, False):
            one = fp8_triton.quantize(x, format, straight, not straight, config=Fp8Tile(64, 128, 4))
            same(one[0] if straight else one[1], wanted if straight else turned(wanted))
            assert one[1 if straight else 0] is None
        codes, _, none = fp8_triton.quantize(x, format, True, False, given=scale * 2)
        assert none is None
        same(codes, (x.float() * (0.5 / scale)).to(format))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_scales_of_rows_and_of_columns(format: torch.dtype, kernel_device: str) -> None:
    for shape in [(5, 7), (70, 70), (3, 8200)]:
        x = spread(*shape, dtype=torch.bfloat16, device=kernel_device)
        x[2], x[:, 3] = 0, 0
        for dim, quantize in ((1, fp8_triton.quantize_rows), (0, fp8_triton.quantize_columns)):
            if dim == 0 and x.shape[1] > 100:
                continue  # columns are many programs of a few
            codes, got = quantize(x, format)
            amax = x.abs().amax(dim, keepdim=True).float().cpu()
            scale = torch.where(amax == 0, 1.0, amax / LARGEST[format]).to(kernel_device)
            wanted = (x.float() * (1 / scale)).to(format)
            assert torch.equal(got, scale)
            same(codes, wanted if dim else turned(wanted))


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
def test_every_code_and_every_tie(format: torch.dtype, kernel_device: str) -> None:
    """All finite numbers of the format, their midpoints, and the fp32 neighbours of those."""
    codes = torch.arange(256, dtype=torch.uint8).view(format).float()
    values = codes[codes.isfinite()].sort().values
    halves = (values[1:] + values[:-1]) / 2
    x = torch.cat(
        [
            values,
            halves,
            torch.nextafter(halves, torch.tensor(1e9)),
            torch.nextafter(halves, torch.tensor(-1e9)),
        ]
    ).to(kernel_device)[None]
    assert x.max() == LARGEST[format]  # so the scale is 1
    got, _, scale = fp8_triton.quantize(x, format)
    assert scale == 1
    assert got is not None
    same(got, x.to(format))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of NaN
def test_what_is_not_a_number_shows(kernel_device: str) -> None:
    for value in (-float("nan"), float("inf"), -float("inf")):
        for format in (E4M3, E5M2):
            x = torch.ones(10, 20, device=kernel_device)
            x[3, 5] = value
            codes, across, scale = fp8_triton.quantize(x, format, True, True)
            assert codes is not None
            assert across is not None
            assert not scale.isfinite()
            assert codes.float()[3, 5].isnan()
            assert across.float()[5, 3].isnan()
            codes, scale = fp8_triton.quantize_rows(x, format)
            assert codes.float()[3, 5].isnan()
            assert codes.float()[:3].isfinite().all()
            assert scale.isfinite().sum() == 9


@pytest.mark.usefixtures("poisoned")
def test_zeros_and_the_smallest(kernel_device: str) -> None:
    x = torch.zeros(20, 20, dtype=torch.bfloat16, device=kernel_device)
    codes, across, scale = fp8_triton.quantize(x, E4M3, True, True)
    assert scale == 1
    assert not raw(codes).any()
    assert not raw(across).any()
    x = torch.full((1, 4), 1e-37, device=kernel_device)  # its scale would be subnormal
    codes, _, scale = fp8_triton.quantize(x, E4M3)
    assert scale == 2.0**-126
    same(codes, (x * 2.0**126).to(E4M3))


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_the_layer_is_the_same_on_either_backend(scaling: str, kernel_device: str) -> None:
    """Bit for bit in the interpreter; on a GPU up to the sums of the tensor cores."""
    for rows in (1, 21, 16):
        x = spread(rows, 32, dtype=torch.bfloat16, device=kernel_device)
        weight = spread(48, 32, dtype=torch.bfloat16, device=kernel_device)
        bias = random(48, dtype=torch.bfloat16).to(kernel_device)
        g = spread(rows, 48, dtype=torch.bfloat16, device=kernel_device)
        out = {}
        for backend in ("triton", "torch"):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            with dispatch.override(fp8_linear=backend):
                y = linear.fp8_linear(*leaves, scaling=scaling)
            out[backend] = (y, *torch.autograd.grad(y, leaves, g))
        for a, b in zip(out["triton"], out["torch"], strict=True):
            if kernel_device == "cpu":
                assert torch.equal(a, b)
            else:  # two roundings to bf16, and accumulators of 14 bits over at most 48 terms
                assert (a - b).abs().max() <= (2**-7 + 48 * 2**-14) * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize(("inner", "outs"), [(1536, 8960), (8960, 1536), (1536, 256)])
def test_real_sizes(inner: int, outs: int, scaling: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4096, inner, device="cuda"), torch.randn(outs, inner, device="cuda")
    g = torch.randn(4096, outs, device="cuda")
    out = {}
    for backend in ("triton", "torch"):
        leaves = [t.bfloat16().requires_grad_() for t in (x, weight)]
        with dispatch.override(fp8_linear=backend):
            y = linear.fp8_linear(*leaves, scaling=scaling)
        out[backend] = (y, *torch.autograd.grad(y, leaves, g.bfloat16()))
    for a, b in zip(out["triton"], out["torch"], strict=True):
        assert a.isfinite().all()
        assert (a.float() - b.float()).norm() <= 2**-7 * b.float().norm()
