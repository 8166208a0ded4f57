"""int8_linear's Triton kernels, in the interpreter and on a GPU: values, gradients, drivers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import choose, int8_linear
from kernels.quantised import int8_few, int8_matmul
from tests.kernels.drivers import (
    Case,
    Driver,
    broken,
    by_autograd,
    by_compile,
    by_compiled_grad,
    by_func_grad,
    by_hvp,
    by_jvp,
    by_vmap_grad,
    by_vmap_grad_shared,
    error,
    name_of,
)
from tests.rounding import ulps

linear = importlib.import_module("kernels.quantised.int8_linear")
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# leading shape, inner, outs: all of size one; odd sizes; each range of rows with its own kernel,
# with whole tiles and partial ones; a weight of two chunks
SHAPES = [
    ((1,), 1, 1),
    ((2, 3), 37, 5),
    ((1,), 256, 32),
    ((8,), 48, 40),
    ((3, 4), 112, 70),
    ((17,), 256, 64),
    ((41,), 80, 33),
    ((65,), 64, 24),
    ((5,), 2064, 16),
]


def layer(out: int, inner: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, inner), generator=generator, dtype=torch.int8)
    return weight.to(device), (torch.rand(out, generator=generator) * 0.01 + 0.001).to(device)


def rand(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def eps(dtype: torch.dtype, device: str) -> float:
    """Relative error of one rounding, doubled in the interpreter, which truncates to bf16."""
    return torch.finfo(dtype).eps / (1 if device == "cpu" and dtype == torch.bfloat16 else 2)


def test_the_kernels_are_used(kernel_device: str) -> None:
    assert choose("int8_linear", kernel_device, torch.bfloat16) == "triton"
    assert choose("int8_linear", kernel_device, torch.float64) == "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_only_against_fp64(
    shape: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype,
    kernel_device: str,
    poisoned: None,
) -> None:
    lead, inner, outs = shape
    weight, scale = layer(outs, inner, kernel_device)
    x = rand(*lead, inner, device=kernel_device, dtype=dtype).requires_grad_()
    bias = rand(outs, device=kernel_device, dtype=dtype, seed=3).requires_grad_()
    full = weight.double() * scale.double()[:, None]
    unit = eps(dtype, kernel_device)

    y = int8_linear(x, weight, scale, bias)
    wanted = x.double() @ full.mT + bias.double()
    # many rows: the weight and the sum are rounded; few: only the sum. Sums of `inner` terms in
    # fp32.
    size = x.double().abs() @ full.abs().mT + bias.double().abs()
    assert (y.shape, y.dtype) == ((*lead, outs), dtype)
    assert ((y.double() - wanted).abs() <= (2 * unit + (inner + 4) * EPS32) * size).all()
    if len(x.reshape(-1, inner)) <= 64 and inner % 16 == 0 and dtype != torch.float32:
        slack = 1.001 * unit * wanted.abs() + (inner + 4) * EPS32 * size
        assert ((y.double() - wanted).abs() <= slack + torch.finfo(dtype).tiny).all()

    g = rand(*y.shape, device=kernel_device, dtype=dtype, seed=2)
    dx, db = torch.autograd.grad(y, (x, bias), g)
    wanted, size = g.double() @ full, g.double().abs() @ full.abs()
    assert dx.dtype == dtype
    assert ((dx.double() - wanted).abs() <= (2 * unit + (outs + 4) * EPS32) * size).all()
    rows = g.double().reshape(-1, outs)
    slack = 1.001 * unit * rows.sum(0).abs() + len(rows) * EPS32 * rows.abs().sum(0)
    assert ((db.double() - rows.sum(0)).abs() <= slack).all()


CONFIGS = [
    int8_few.Few(1, 1),
    int8_few.Few(2, 2),
    int8_few.Few(1, 2, 4),
    int8_few.Rows(16, 16, 64, 4, 3),
    int8_few.Rows(16, 64, 32, 4, 2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_launch_settings_do_not_change_the_result(
    config: Any, kernel_device: str, poisoned: None
) -> None:
    """Sums of exact products in any order agree to a few fp32 roundings."""
    weight, scale = layer(40, 208, kernel_device)
    few = isinstance(config, int8_few.Few)
    x = rand(7 if few else 11, 208, device=kernel_device, dtype=torch.float16)
    function: Callable[..., Tensor] = int8_few.few_rows if few else int8_few.many_few_rows
    full = weight.double() * scale.double()[:, None]
    wanted, size = x.double() @ full.mT, x.double().abs() @ full.abs().mT
    y = function(x, weight, scale, None, config)
    slack = 1.001 * eps(torch.float16, kernel_device) * wanted.abs() + 208 * EPS32 * size
    assert ((y.double() - wanted).abs() <= slack).all()


# int8 x int8


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: steps [rows] in fp32, and x / step in fp64, not yet rounded."""
    step = x.float().abs().amax(-1).cpu() / 127  # IEEE division
    step[step == 0] = 1.0
    return step.to(x.device), x.double() / step.to(x.device).double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [1, 37, 256, 1000])
def test_rows_are_rounded_to_the_nearest_int8(
    inner: int, dtype: torch.dtype, kernel_device: str, poisoned: None
) -> None:
    """Except at ties: x / step is rounded to fp32 first, so near a half either is right."""
    x = rand(9, inner, device=kernel_device, dtype=dtype)
    x[3] = 0.0
    x[4] = 1e-30 if dtype != torch.float16 else 6e-8
    x[5, 0] = 127.0
    x[5, 1:] = torch.arange(inner - 1) % 100 + 0.5  # halves: to the even neighbour, exactly
    x[6] *= 3e4 / x[6].abs().max()
    q, step = int8_matmul.quantize_rows(x)
    wanted_step, ratio = quantized(x)
    assert torch.equal(step, wanted_step)
    assert q.shape == (9, -(-inner // 16) * 16)
    assert not q[:, inner:].any()
    q = q[:, :inner].double()
    assert q.abs().max() <= 127
    assert ((q - ratio).abs() <= 0.5 + 127 * EPS32).all()
    assert torch.equal(q[5], x[5].double().round())


def test_a_row_longer_than_a_block(kernel_device: str, poisoned: None) -> None:
    inner = 16384 + 40
    x = rand(2, inner, device=kernel_device)
    x[0, -1], x[1, 0] = 9.0, -9.0
    q, step = int8_matmul.quantize_rows(x)
    wanted_step, ratio = quantized(x)
    assert torch.equal(step, wanted_step)
    assert ((q[:, :inner].double() - ratio).abs() <= 0.5 + 127 * EPS32).all()


TILES = [
    None,
    int8_matmul.Tile(16, 32, 32, 4, 2),
    int8_matmul.Tile(64, 16, 64, 4, 3, group=2),
    int8_matmul.Tile(16, 32, 64, 4, 2, tma=True),
    int8_matmul.Tile(32, 64, 32, 4, 2, tma=True, parts=2),
]


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [*((tile, torch.bfloat16) for tile in TILES), (None, torch.float16), (None, torch.float32)],
    ids=str,
)
def test_int8_products_are_exact(
    tile: int8_matmul.Tile | None, dtype: torch.dtype, kernel_device: str, poisoned: None
) -> None:
    """int32 sums, then two products and a sum in fp32, and one rounding."""
    if tile and tile.tma and kernel_device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")
    for rows, inner, outs in ((1, 16, 8), (20, 64, 40), (70, 144, 72)):
        weight, scale = layer(outs, inner, kernel_device)
        bias = rand(outs, device=kernel_device, seed=4)
        q, step = int8_matmul.quantize_rows(rand(rows, inner, device=kernel_device, dtype=dtype))
        y = int8_matmul.matmul_rows(q, step, weight, scale, bias, dtype, tile)
        exact = (q.double() @ weight.double().mT) * step.double()[:, None] * scale.double()
        wanted, size = exact + bias.double(), exact.abs() + bias.double().abs()
        slack = 1.001 * eps(dtype, kernel_device) * wanted.abs() + 3 * EPS32 * size
        assert ((y.double() - wanted).abs() <= slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [((1,), 1, 1), ((2, 3), 37, 5), ((20,), 208, 24)], ids=str)
def test_dynamic_activations(
    shape: tuple[tuple[int, ...], int, int], dtype: torch.dtype, kernel_device: str, poisoned: None
) -> None:
    lead, inner, outs = shape
    weight, scale = layer(outs, inner, kernel_device)
    x = rand(*lead, inner, device=kernel_device, dtype=dtype).requires_grad_()
    y = int8_linear(x, weight, scale, activations="dynamic")
    step, ratio = quantized(x.detach().reshape(-1, inner))
    codes = ratio.float().round().double()  # of the fp32 quotient, as everywhere
    exact = (codes @ weight.double().mT) * step.double()[:, None] * scale.double()
    tolerance = 1.001 * eps(dtype, kernel_device) + 3 * EPS32
    assert ((y.double().reshape(-1, outs) - exact).abs() <= tolerance * exact.abs()).all()
    g = rand(*y.shape, device=kernel_device, dtype=dtype, seed=2)
    (through,) = torch.autograd.grad(y, x, g)
    (straight,) = torch.autograd.grad(int8_linear(x, weight, scale), x, g)
    assert torch.equal(through, straight)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("rows", [3, 70])
def test_nan_and_infinity_stay_in_their_row(
    rows: int, activations: str | None, kernel_device: str
) -> None:
    weight, scale = layer(24, 64, kernel_device)
    x = rand(rows, 64, device=kernel_device, dtype=torch.bfloat16)
    clean = int8_linear(x, weight, scale, activations=activations)
    x[0, 5], x[2, 7] = float("nan"), float("inf")
    y = int8_linear(x, weight, scale, activations=activations)
    assert y[0].isnan().all()
    assert not y[2].isfinite().any()
    others = [i for i in range(rows) if i not in (0, 2)]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_strides_and_neighbours(activations: str | None, kernel_device: str) -> None:
    """Views of larger tensors, whose other entries are NaN, and a transposed weight."""
    weight, scale = layer(24, 64, kernel_device)
    x = rand(3, 64, device=kernel_device, dtype=torch.bfloat16)
    wide = torch.full((5, 200), float("nan"), device=kernel_device, dtype=torch.bfloat16)
    wide[1:4, 7:71] = x
    scales = torch.full((24, 3), float("nan"), device=kernel_device)
    scales[:, 1] = scale
    got = int8_linear(
        wide[1:4, 7:71], weight.t().contiguous().t(), scales[:, 1], activations=activations
    )
    assert torch.equal(got, int8_linear(x, weight, scale, activations=activations))


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_nothing_to_do(activations: str | None, kernel_device: str) -> None:
    weight, scale = layer(5, 16, kernel_device)
    bias = rand(5, device=kernel_device)
    x = torch.zeros(0, 16, device=kernel_device, requires_grad=True)
    y = int8_linear(x, weight, scale, bias, activations=activations)
    assert y.shape == (0, 5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 16)
    x, weight = torch.zeros(3, 0, device=kernel_device), weight[:, :0]
    y = int8_linear(x, weight, scale, bias, activations=activations)
    assert torch.equal(y, bias.expand(3, 5))


# Drivers


def scalar(
    weight: Tensor, scale: Tensor, activations: str | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return torch.sin(int8_linear(x, weight, scale, bias, activations=activations)).sum()

    return loss


def case(activations: str | None = None) -> Case:
    weight, scale = layer(24, 48, "cpu")

    def fast(x: Tensor, bias: Tensor) -> Tensor:
        at = x.device
        return int8_linear(x, weight.to(at), scale.to(at), bias, activations=activations)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        if activations is not None:  # straight through
            step = linear.row_scale(x)
            x = x + ((x / step).round() * step - x).detach()
        return linear.int8_linear_reference(x, weight.to(x.device), scale.to(x.device)) + bias

    return Case(fast, plain, ((5, 48), (24,)), linear, "_Int8Linear")


FIRST = [by_autograd, by_func_grad, by_vmap_grad, by_vmap_grad_shared, by_compile, by_compiled_grad]


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("driver", [*FIRST, by_jvp, by_hvp], ids=name_of)
def test_drivers_agree_with_torch(
    driver: Driver, activations: str | None, interpreter: str
) -> None:
    # fp32 sums of 48 and 24 terms, through the slope of a sine
    assert error(case(activations), driver, interpreter, torch.float32) < ulps(torch.float32, 800)


@pytest.mark.parametrize("driver", FIRST, ids=name_of)
def test_a_wrong_backward_shows(
    driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(case(), "backward", monkeypatch)
    assert error(case(), driver, interpreter, torch.float32) > 0.1


# At real sizes


def real_layer(outs: int, inner: int) -> tuple[Tensor, Tensor]:
    weight = torch.randint(-127, 128, (outs, inner), device="cuda", dtype=torch.int8)
    return weight, torch.rand(outs, device="cuda") * 0.01 + 0.001


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2048, 8192), (8192, 2048), (1536, 8960), (8960, 1536)], ids=str)
def test_no_worse_than_torch_for_every_number_of_rows(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    inner, outs = size
    weight, scale = real_layer(outs, inner)
    full = weight.double() * scale.double()[:, None]
    rounded = full.to(dtype)
    for rows in (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 1000):
        x = torch.randn(rows, inner, device="cuda", dtype=dtype)
        exact = x.double() @ full.mT
        ours = (int8_linear(x, weight, scale).double() - exact).norm()
        theirs = ((x @ rounded.mT).double() - exact).norm()
        assert ours <= 1.02 * theirs, rows  # random roundings: within 2% of one another


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(2048, 8192), (8192, 2048), (1000, 1001)], ids=str)
def test_dynamic_at_real_sizes(size: tuple[int, int]) -> None:
    inner, outs = size
    weight, scale = real_layer(outs, inner)
    for rows in (1, 16, 65, 1024, 4096):
        x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        q, step = int8_matmul.quantize_rows(x)
        wanted = (x.float().cpu() / step.cpu()[:, None]).round()  # the CPU divides as IEEE says
        assert torch.equal(q[:, :inner].float().cpu(), wanted)
        exact = (q[:, :inner].double() @ weight.double().mT) * step.double()[:, None]
        exact *= scale.double()
        y = int8_linear(x, weight, scale, activations="dynamic")
        tolerance = torch.finfo(torch.bfloat16).eps / 2 + 4 * EPS32
        assert ((y.double() - exact).abs() <= tolerance * exact.abs()).all(), rows


@pytest.mark.gpu
@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_a_chain_in_a_graph_waits_for_what_it_reads(activations: str | None) -> None:
    """Each layer reads the output of the one ahead and a weight written just before, in memory that
    is reused: kernels that start early must wait."""
    size, depth = 2048, 24
    layers = [real_layer(size, size) for _ in range(depth)]
    weight, scale = torch.empty_like(layers[0][0]), torch.empty_like(layers[0][1])
    x = torch.randn(4, size, device="cuda", dtype=torch.bfloat16)

    def chain(apart: bool) -> Tensor:
        h = x
        for i, (w, s) in enumerate(layers):
            if i % 3 == 0:
                weight.copy_(w)
                scale.copy_(s)
                w, s = weight, scale
            if apart:
                torch.cuda.synchronize()
            h = int8_linear(h, w, s, activations=activations) * 0.002
        return h

    wanted = chain(apart=True)
    assert wanted.abs().max() > 0
    for _ in range(20):
        assert torch.equal(chain(apart=False), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(apart=False)
    for _ in range(50):
        graph.replay()
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_inductor(activations: str | None) -> None:
    f = scalar(*real_layer(512, 256), activations)
    x = torch.randn(100, 256, device="cuda")
    bias = torch.randn(512, device="cuda")
    torch._dynamo.reset()
    got = by_autograd(torch.compile(f, fullgraph=True), (x, bias))[1:]
    for a, b in zip(got, by_autograd(f, (x, bias))[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_to_the_31_elements() -> None:
    """The weight, then activations and outputs, have more entries than an int32 can count."""
    inner = 2048
    outs = 2**31 // inner + 48
    weight, scale = real_layer(outs, inner)
    for rows in (1, 16, 64, 70):
        x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        y = int8_linear(x, weight, scale)
        tail = int8_linear(x, weight[-64:].clone(), scale[-64:].clone())
        torch.testing.assert_close(y[:, -64:], tail, rtol=2e-2, atol=1e-2 * float(tail.abs().max()))
        dynamic = int8_linear(x, weight, scale, activations="dynamic")[:, -64:]
        wanted = int8_linear(x, weight[-64:].clone(), scale[-64:].clone(), activations="dynamic")
        assert torch.equal(dynamic, wanted)
    del weight, scale, y
    torch.cuda.empty_cache()
    weight, scale = real_layer(inner, inner)
    x = torch.randn(outs, inner, device="cuda", dtype=torch.bfloat16)
    y = int8_linear(x, weight, scale, activations="dynamic")
    for part in (slice(0, 64), slice(-64, None)):
        wanted = int8_linear(x[part].clone(), weight, scale, activations="dynamic")
        assert torch.equal(y[part], wanted)
