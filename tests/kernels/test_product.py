"""Products by another kernel of cuBLAS than its first choice: which, and the same numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest
import torch

import kernels
from kernels.linear import cublas_lt
from kernels.linear.cublas_lt import T128X256, T176X128, T192X192, T320X128, better, is_wide
from kernels.linear.product import product, wide_linear
from kernels.runtime import dispatch
from transforms.kept import operation

# as cuBLAS 13.1 lists them on an H200: tile, and parts of the inner dimension
GATE = [(T192X192, 1), (24, 1), (T128X256, 1), (T320X128, 1), (31, 1), (32, 1), (T176X128, 1)]
HEAD = [(T320X128, 1), (T128X256, 1), (24, 1), (T192X192, 1), (31, 1), (T176X128, 1), (197, 1)]
DOWN = [(T192X192, 1), (24, 1), (T128X256, 1), (T320X128, 1), (31, 1), (32, 1), (29, 1)]
QKV = [(24, 1), (T128X256, 1), (32, 1), (31, 1), (29, 1), (T176X128, 1)]


@pytest.mark.parametrize(
    ("transposed", "tiles", "index"),
    [
        (True, GATE, 6),
        (True, HEAD, 5),
        (False, DOWN, 2),
        (True, QKV, None),  # the first is good
        (False, HEAD, None),  # not measured to be worse
        (True, DOWN, None),  # the better one is not there
        (True, [(T192X192, 1), (T176X128, 4), (T176X128, 1)], 2),  # in one part
        (True, [], None),
    ],
)
def test_which_is_taken(
    transposed: bool, tiles: Sequence[tuple[int, int]], index: int | None
) -> None:
    assert better(transposed, tiles) == index


def test_only_wide_products() -> None:
    assert is_wide(16384, 1536, 8960)
    assert not is_wide(16384, 8960, 1536)
    assert not is_wide(16384, 2560, 8960)  # an inner dimension that was not measured
    assert not is_wide(1, 1536, 151_936)
    assert not is_wide(16384, 0, 8960)


def test_the_structure_is_the_library_s() -> None:
    assert ctypes.sizeof(cublas_lt._Algorithm) == 96
    assert cublas_lt._Algorithm.workspace.offset == 64


def test_elsewhere_it_is_torch_s() -> None:
    assert dispatch.why_not("product", "cublas-lt") == "needs a CUDA GPU"
    assert dispatch.choose("product") == "torch"
    with kernels.override(product="cublas-lt"), pytest.raises(RuntimeError, match="needs a CUDA"):
        dispatch.choose("product")
    x, w = torch.randn(2048, 4), torch.randn(8192, 4)
    assert torch.equal(product(x, w.t()), torch.mm(x, w.t()))
    out = torch.empty(2048, 8192)
    assert product(x, w.t(), out) is out
    assert torch.equal(out, torch.mm(x, w.t()))
    assert torch.equal(wide_linear(x.view(2, 1024, 4), w), (x @ w.t()).view(2, 1024, 8192))


def test_policies_see_a_product() -> None:
    assert operation(torch.ops.nanovision.wide_linear.default) == "aten.mm"


def test_the_library_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cublas_lt.library.cache_clear()
    try:
        problem = dispatch.why_not("product", "cublas-lt", "cuda", torch.bfloat16)
    finally:
        cublas_lt.library.cache_clear()
    assert problem == "cannot load cuBLASLt: PyTorch was built without CUDA"


HOPPER = (
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
)


def hopper(test: object) -> object:
    for mark in HOPPER:
        test = mark(test)
    return test


def matrices(rows: int, inner: int, wide: int, transposed: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(rows, inner, device="cuda").bfloat16()
    shape = (wide, inner) if transposed else (inner, wide)
    weight = (torch.randn(shape, device="cuda") / inner**0.5).bfloat16()
    return x, weight.t() if transposed else weight


SHAPES = [
    (16384, 1536, 8960, True),
    (16384, 1536, 8960, False),
    (3328, 1536, 151_936, True),
    (3072, 1536, 151_936, True),
]


@hopper
@pytest.mark.parametrize(("rows", "inner", "wide", "transposed"), SHAPES)
def test_the_same_numbers(rows: int, inner: int, wide: int, transposed: bool) -> None:
    x, weight = matrices(rows, inner, wide, transposed)
    out = torch.full((rows, wide), torch.nan, device="cuda", dtype=torch.bfloat16)
    assert cublas_lt.plan_of(x, weight, out) is not None  # else there is nothing to test
    expected = torch.mm(x, weight)
    assert product(x, weight, out) is out
    assert torch.equal(out, expected)
    assert torch.equal(product(x, weight), expected)
    exact = x[:64].double() @ weight[:, :512].double()
    # of one rounding to bf16, of a sum in fp32
    torch.testing.assert_close(out[:64, :512].double(), exact, rtol=2**-8, atol=1e-4)


@hopper
def test_what_has_no_plan() -> None:
    x, weight = matrices(16384, 1536, 8960, True)
    out = torch.empty(16384, 8960, device="cuda", dtype=torch.bfloat16)
    assert cublas_lt.plan_of(x, weight, out) is not None
    assert cublas_lt.plan_of(x.float(), weight.float(), out.float()) is None
    assert cublas_lt.plan_of(x[:, :1024], weight[:1024], out) is None  # gaps
    assert cublas_lt.plan_of(x, weight, out[:, :-8]) is None
    odd = torch.randn(16384 * 1536 + 8, device="cuda").bfloat16()[8:].view(16384, 1536)
    assert cublas_lt.plan_of(odd, weight, out) is None  # not on 256 bytes
    assert torch.equal(product(odd, weight), torch.mm(odd, weight))


@hopper
def test_streams_and_graphs() -> None:
    x, weight = matrices(16384, 1536, 8960, True)  # of which there is a plan: see above
    expected = torch.mm(x, weight)
    results = []
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            results += [product(x, weight) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x, weight)
    for scale in (1.0, 2.0):
        x.mul_(scale)
        graph.replay()
        assert torch.equal(out, expected * scale)


@hopper
def test_an_mlp_and_a_loss_are_the_same() -> None:
    torch.manual_seed(0)
    dim, width, rows = 1536, 8960, 16384
    leaves = [
        (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).bfloat16().requires_grad_()
        for shape in ((width, dim), (width, dim), (dim, width), (width, dim))
    ]
    x = torch.randn(rows, dim, device="cuda").bfloat16().requires_grad_()
    norm = torch.ones(dim, device="cuda", requires_grad=True)
    labels = torch.randint(width, (rows,), device="cuda")

    def values(backend: str) -> list[torch.Tensor]:
        with kernels.override(product=backend):
            y, total = kernels.add_norm_gated_mlp(x, None, norm, *leaves[:3])
            loss = kernels.linear_cross_entropy(y + total, leaves[3], labels)
            return [loss, y, *torch.autograd.grad(loss, [x, norm, *leaves])]

    out = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    plans = [
        cublas_lt.plan_of(x.detach(), leaves[0].detach().t(), out),
        cublas_lt.plan_of(x.detach(), leaves[2].detach(), out),
    ]
    assert all(plans)  # else both are torch's
    for a, b in zip(values("cublas-lt"), values("torch"), strict=True):
        assert torch.equal(a, b)


@hopper
def test_it_compiles() -> None:
    x, weight = matrices(16384, 1536, 8960, True)
    w = weight.t().contiguous()
    compiled = torch.compile(lambda x: wide_linear(x * 2, w) + 1, fullgraph=True)
    assert torch.equal(compiled(x), torch.mm(x * 2, w.t()) + 1)
