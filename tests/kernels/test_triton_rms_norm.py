"""The norms' Triton kernels, in the interpreter and on a GPU: values, gradients, drivers, limits.

The torch path of `add_rms_norm` is tested here too, because both paths share what is saved and how
it is differentiated.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import add_rms_norm, choose, layer_norm, rms_norm
from kernels.norm import rms_norm_triton
from kernels.runtime import dispatch
from tests.kernels.accuracy import distance, outputs_and_gradients, within
from tests.kernels.drivers import (
    FIRST_ORDER,
    HIGHER_ORDER,
    Case,
    Driver,
    broken,
    by_autograd,
    by_jvp,
    by_jvp_of_one,
    disagreement,
    name_of,
    placed,
    random,
    saved_bytes,
    spoilt,
)
from tests.rounding import ulps

norms = importlib.import_module("kernels.norm.rms_norm")
layer_norms = importlib.import_module("kernels.norm.layer_norm")
EPS = 1e-5
EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# every dtype of activations, and of weights
PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
# one row; one entry; fewer rows than a tile has; odd lengths; several turns a program; heads
SHAPES = [(1, 7), (5, 1), (2, 64), (5, 123), (2, 520), (35, 72), (3, 5, 7, 40)]


def triton() -> Any:
    return dispatch.override(rms_norm="triton", layer_norm="triton")


def exact_rms_norm(x: Tensor, w: Tensor, eps: float = EPS) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def exact_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def check_gradients(
    got: list[Tensor], exact: list[Tensor], r: float, length: int, device: str
) -> None:
    """The bounds: dx is a difference of terms of size |g w r|; dw sums over `length` numbers."""
    for one, right in zip(got, exact, strict=True):
        size = max(float(right.abs().max()), 8 * r)
        within(one, right, size * length**0.5, device)


# Parity


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounded_once(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    kernel_backend: tuple[str, str],
) -> None:
    kind, device = kernel_backend
    chosen = partial(dispatch.override, rms_norm=kind, layer_norm=kind)
    rounding = "exact" if kind == "torch" else device  # see `within`
    x, more, g, g_total = (random(*shape, dtype=dtype, seed=i).to(device) for i in (0, 1, 2, 3))
    w, b = (random(shape[-1], dtype=weight_dtype, seed=i).to(device) for i in (4, 5))
    xd, wd, bd = x.double(), w.double(), b.double()
    r = float((xd.square().mean(-1) + EPS).rsqrt().max())

    with chosen():
        got = outputs_and_gradients(lambda x, w: rms_norm(x, w, EPS), (g,), x, w)
    exact = outputs_and_gradients(exact_rms_norm, (g.double(),), xd, wd)
    assert [t.dtype for t in got] == [dtype, dtype, weight_dtype]
    within(got[0], exact[0], 0.0 if dtype != torch.float32 else exact[0].abs(), rounding)
    check_gradients(got[1:], exact[1:], r, x.numel(), rounding)

    with chosen():
        normed, total, dx, dmore, dw = outputs_and_gradients(
            lambda x, more, w: add_rms_norm(x, more, w, EPS), (g, g_total), x, more, w
        )
    within(total, xd + more.double(), 0.0, rounding)
    assert torch.equal(dx, dmore)
    exact = outputs_and_gradients(
        lambda t, w: (exact_rms_norm(t, w), t * 1.0),
        (g.double(), g_total.double()),
        total.double(),
        wd,
    )
    within(normed, exact[0], exact[0].abs(), rounding)
    r = float((total.double().square().mean(-1) + EPS).rsqrt().max())
    check_gradients([dx, dw], exact[2:], r, x.numel(), rounding)

    with chosen():
        got = outputs_and_gradients(lambda x, w, b: layer_norm(x, w, b, EPS), (g,), x, w, b)
    exact = outputs_and_gradients(exact_layer_norm, (g.double(),), xd, wd, bd)
    # subtracting the mean leaves an error of eps * |x|, scaled up by 1 / sqrt(var + eps)
    spread = float((xd.var(-1, correction=0) + EPS).rsqrt().max()) * 4
    within(got[0], exact[0], spread, rounding)
    check_gradients(got[1:], exact[1:], spread**2, x.numel(), rounding)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weight_or_bias(dtype: torch.dtype, kernel_device: str) -> None:
    x, g = (random(6, 3, 50, dtype=dtype, seed=i).to(kernel_device) for i in (0, 1))
    one = torch.ones(50, dtype=torch.float64, device=kernel_device)
    cases = [
        (lambda x: rms_norm(x, None, EPS), lambda x: exact_rms_norm(x, one)),
        (lambda x: add_rms_norm(x, 0 * x, None, EPS)[0], lambda x: exact_rms_norm(x, one)),
        (lambda x: layer_norm(x, None, None, EPS), lambda x: exact_layer_norm(x, one, 0 * one)),
        (lambda x: layer_norm(x, one, None, EPS), lambda x: exact_layer_norm(x, one, 0 * one)),
        (lambda x: layer_norm(x, None, one, EPS), lambda x: exact_layer_norm(x, one, one)),
    ]
    for fast, plain in cases:
        with triton():
            got = outputs_and_gradients(fast, (g,), x)
        exact = outputs_and_gradients(plain, (g.double(),), x.double())
        within(got[0], exact[0], 4.0, kernel_device)
        check_gradients(got[1:], exact[1:], 1.0, 50, kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("rows", "dim"), [(5, 16390)])
def test_rows_longer_than_registers(rows: int, dim: int, kernel_device: str) -> None:
    """In pieces, and with more rows than programs, so that programs add to their own sums."""
    x, more, g, g_total = (
        random(rows, dim, dtype=torch.float32, seed=i).to(kernel_device) for i in (0, 1, 2, 3)
    )
    w = random(dim, dtype=torch.float32, seed=4).to(kernel_device)
    with triton():
        got = outputs_and_gradients(
            lambda x, more, w: add_rms_norm(x, more, w, EPS), (g, g_total), x, more, w
        )
        alone = outputs_and_gradients(lambda x, w: rms_norm(x, w, EPS), (g,), x + more, w)
    total = (x + more).double()
    exact = outputs_and_gradients(
        lambda t, w: (exact_rms_norm(t, w), t * 1.0), (g.double(), g_total.double()), total, w
    )
    within(got[0], exact[0], exact[0].abs(), kernel_device)
    assert torch.equal(got[1], x + more)
    check_gradients([got[2], got[4]], exact[2:], 1.0, rows, kernel_device)
    assert torch.equal(alone[0], got[0])
    check_gradients(alone[1:], [exact[2] - g_total, exact[3]], 1.0, rows, kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "dtype", "weighted"),
    [
        *((shape, torch.bfloat16, True) for shape in (*SHAPES, (0, 7), (2, 8193))),
        *(((5, 123), dtype, weighted) for dtype in DTYPES for weighted in (True, False)),
    ],
    ids=str,
)
def test_backward_gives_the_norm_again(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, kernel_device: str
) -> None:
    """Forward's bits again, and the same gradients, in the memory of the given gradient."""
    x, g, g_total = (random(*shape, dtype=dtype, seed=i).to(kernel_device) for i in (0, 1, 2))
    w = random(shape[-1], dtype=torch.float32, seed=3).to(kernel_device) if weighted else None
    y, _, r = rms_norm_triton.rms_norm_forward(x, None, w, EPS)
    for asked in (True, False):
        lent = g.clone()
        dx, dw, again = rms_norm_triton.rms_norm_backward_(lent, g_total, x, w, r, weighted, asked)
        assert dx is lent
        assert (again is not None) == asked
        assert again is None or torch.equal(again, y)
        wanted = rms_norm_triton.rms_norm_backward(g, g_total, x, w, r, weighted)
        if shape[-1] > rms_norm_triton.MAX_DIM:  # whose sums run over other pieces
            one = torch.ones(shape[-1]) if w is None else w.cpu()
            exact = outputs_and_gradients(
                lambda t, w: (exact_rms_norm(t, w), t * 1.0),
                (g.double().cpu(), g_total.double().cpu()),
                *(x.double().cpu(), one.double()),
            )
            got = [dx.cpu()] if dw is None else [dx.cpu(), dw.cpu()]
            check_gradients(got, exact[2 : 2 + len(got)], 1.0, shape[0], kernel_device)
            continue
        assert torch.equal(dx, wanted[0])
        assert (dw is None) == (wanted[1].numel() == 0)
        assert dw is None or torch.equal(dw, wanted[1])


def test_only_a_gradient_like_x_is_overwritten(kernel_device: str) -> None:
    x = random(6, 8, dtype=torch.bfloat16).to(kernel_device)
    _, _, r = rms_norm_triton.rms_norm_forward(x, None, None, EPS)
    wider = random(6, 8, seed=1, dtype=torch.float32).to(kernel_device)
    turned = random(8, 6, seed=2, dtype=torch.bfloat16).to(kernel_device).t()
    for g in (wider, turned):
        before = g.clone()
        dx, _, _ = rms_norm_triton.rms_norm_backward_(g, None, x, None, r, False)
        assert torch.equal(g, before)
        assert torch.equal(dx, rms_norm_triton.rms_norm_backward(g, None, x, None, r, False)[0])


def test_layer_norm_says_how_long_its_rows_may_be(kernel_device: str) -> None:
    assert choose("layer_norm", kernel_device, torch.float32, 8192) == "triton"
    assert choose("layer_norm", kernel_device, torch.float32, 8193) == "torch"
    x = torch.ones(2, 8193, device=kernel_device)
    with triton(), pytest.raises(RuntimeError, match="rows in registers, of up to 8192 entries"):
        layer_norm(x)


def test_any_strides(kernel_device: str) -> None:
    """Strided rows with NaN between them, strided columns, broadcast rows and gradients."""
    dim = 20
    wide = torch.full((2, 3, dim + 8), float("nan"), device=kernel_device)
    apart = wide[:, :, :dim]
    apart.copy_(random(2, 3, dim).float())
    turned = random(dim, 2, 3).float().to(kernel_device).permute(1, 2, 0)
    same = random(dim, seed=3).float().to(kernel_device).expand(2, 3, dim)
    w = random(2 * dim, seed=1).float().to(kernel_device)[::2]
    g = random(2, 3, dim, seed=2).float().to(kernel_device)
    for x in (apart[:, 1], apart, turned, same):
        for cotangent in (g[:, 1] if x.ndim == 2 else g, torch.ones((), device=x.device)):
            cotangent = cotangent.expand(x.shape)
            with triton():
                for f in (
                    lambda x, w: rms_norm(x, w, EPS),
                    lambda x, w: add_rms_norm(x, x, w, EPS)[0],
                    lambda x, w: layer_norm(x, w, w, EPS),
                ):
                    got = outputs_and_gradients(f, (cotangent,), x, w)
                    plain = [t.clone(memory_format=torch.contiguous_format) for t in (x, w)]
                    wanted = outputs_and_gradients(f, (cotangent.contiguous(),), *plain)
                    for a, b in zip(got, wanted, strict=True):
                        assert torch.equal(a, b)


def test_a_row_of_nan_stays_alone(kernel_device: str) -> None:
    for dim in (40, 9000):
        x = random(37, dim).float().to(kernel_device)
        x[3] = float("nan")
        others = [i for i in range(37) if i != 3][: 36 if dim == 40 else 3]
        with triton():
            for f in (
                lambda x: rms_norm(x),
                lambda x: add_rms_norm(x, x)[0],
                *([lambda x: layer_norm(x)] if dim == 40 else []),
            ):
                rows = x if dim == 40 else x[:5]
                out, dx = outputs_and_gradients(f, (torch.ones_like(rows),), rows)
                assert out[others].isfinite().all()
                assert dx[others].isfinite().all()
                assert out[3].isnan().all()


def test_same_bits_each_time(kernel_device: str) -> None:
    x, g = (random(150, 96, seed=i).float().to(kernel_device) for i in (0, 1))
    w = random(96, seed=2).float().to(kernel_device)
    with triton():
        runs = [
            outputs_and_gradients(lambda x, w: layer_norm(rms_norm(x, w), w, w), (g,), x, w)
            for _ in range(2)
        ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned")
def test_no_rows_or_no_columns(kernel_device: str) -> None:
    for shape in ((0, 6), (4, 0)):
        x = torch.zeros(shape, device=kernel_device)
        w = torch.ones(shape[1], device=kernel_device)
        with triton():
            for f, outs in (
                (lambda x, w: rms_norm(x, w), 1),
                (lambda x, w: add_rms_norm(x, x, w), 2),
                (lambda x, w: layer_norm(x, w, w), 1),
            ):
                *_, dx, dw = outputs_and_gradients(f, (x,) * outs, x, w)
                assert dx.shape == shape
                assert torch.equal(dw, torch.zeros_like(w))


# Drivers


def both(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.sin(pair[0]) * pair[1].square() + pair[1]


CASES = {
    "rms_norm": Case(
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: norms.rms_norm_reference(x, w, eps=EPS),
        ((5, 24), (24,)),
        norms,
        "RMS_NORM_TRITON",
    ),
    "add_rms_norm": Case(
        lambda x, more, w: both(add_rms_norm(x, more, w, EPS)),
        lambda x, more, w: both(norms.add_rms_norm_reference(x, more, w, eps=EPS)),
        ((5, 24), (5, 24), (24,)),
        norms,
        "ADD_RMS_NORM_TRITON",
    ),
    "layer_norm": Case(
        lambda x, w, b: layer_norm(x, w, b, EPS),
        lambda x, w, b: layer_norms.layer_norm_reference(x, w, b, eps=EPS),
        ((5, 24), (24,), (24,)),
        layer_norms,
        "LAYER_NORM_TRITON",
    ),
}
OF_TORCH = replace(CASES["add_rms_norm"], op="ADD_RMS_NORM")
DRIVERS = [*FIRST_ORDER, *HIGHER_ORDER, by_jvp_of_one]


def error(case: Case, driver: Driver, device: str, backend: str = "triton") -> float:
    dtype = torch.float64 if backend == "torch" else torch.float32  # Triton takes no fp64
    floats = tuple(random(*s, seed=i).to(device, dtype) for i, s in enumerate(case.shapes))
    with dispatch.override(rms_norm=backend, layer_norm=backend):
        return disagreement(driver, case.fast, case.plain, floats)


@pytest.mark.parametrize(("name", "driver", "kernel_device"), placed(CASES, DRIVERS))
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    # fp32: a few consecutive sums of 120 numbers of order 1
    assert error(CASES[name], driver, kernel_device) < ulps(torch.float32, 800)


@pytest.mark.parametrize("driver", DRIVERS, ids=name_of)
def test_torch_s_sum_under_driver(driver: Driver) -> None:
    assert error(OF_TORCH, driver, "cpu", "torch") < ulps(torch.float64, 4000)  # the same in fp64


@pytest.mark.parametrize(("name", "driver"), spoilt(CASES, FIRST_ORDER))
def test_a_wrong_backward_shows(
    name: str, driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver, interpreter) > 0.1


@pytest.mark.parametrize(("part", "driver"), [("backward", by_autograd), ("formula", by_jvp)])
def test_what_is_wrong_in_torch_s_sum_shows(
    part: str, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers suffice: test_drivers.py covers all of them."""
    broken(OF_TORCH, part, monkeypatch)
    assert error(OF_TORCH, driver, "cpu", "torch") > 0.1


# The residual add


def test_one_output_may_go_unused(kernel_backend: tuple[str, str]) -> None:
    x, more, w = (random(*s, seed=i).float() for i, s in enumerate([(5, 24), (5, 24), (24,)]))
    floats = tuple(t.to(kernel_backend[1]) for t in (x, more, w))
    for which in (0, 1):
        with dispatch.override(rms_norm=kernel_backend[0]):
            xs = [t.clone().requires_grad_() for t in floats]
            out = add_rms_norm(*xs, EPS)[which]
            got = torch.autograd.grad(out.sin().sum(), xs, allow_unused=True)
        ys = [t.double().requires_grad_() for t in floats]
        out = norms.add_rms_norm_reference(*ys, eps=EPS)[which]
        wanted = torch.autograd.grad(out.sin().sum(), ys, allow_unused=True)
        for a, b in zip(got, wanted, strict=True):
            b = torch.zeros_like(w, device=kernel_backend[1]) if b is None else b
            torch.testing.assert_close(
                a.double(), b.double(), rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 80)
            )


def test_backward_keeps_the_sum_alone(kernel_backend: tuple[str, str]) -> None:
    kind, device = kernel_backend
    x = random(64, 32).to(device, torch.bfloat16).requires_grad_()
    more = random(64, 32, seed=1).to(device, torch.bfloat16).requires_grad_()
    w = random(32, seed=2).to(device, torch.float32).requires_grad_()
    with dispatch.override(rms_norm=kind):
        for own in ((w,), (x, more, w)):  # one tensor of x's size: the sum
            kept = saved_bytes(lambda: add_rms_norm(x, more, w), *own)
            assert kept == x.nbytes + 64 * 4  # and one fp32 number per row


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: add_rms_norm(x, x, torch.ones(5)), r"add_rms_norm: weight must have shape"),
        (lambda x: add_rms_norm(x, x[:2]), "they must be alike"),
        (lambda x: add_rms_norm(x, x.bfloat16()), "they must be alike"),
        (lambda x: add_rms_norm(x, x.to("meta")), "residual is on meta"),
        (lambda x: add_rms_norm(x.long(), x.long()), "x must be floating point"),
        (lambda x: add_rms_norm(x, x, None, -1.0), "eps must be >= 0"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 6))


# Real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(4099, 2048), (2048, 8192), (4096, 16, 128), (4096, 8, 64), (300, 16384)], ids=str
)
def test_no_worse_than_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against fp64; the allowance is fp32's rounding in sums of a few thousand numbers."""
    x, g = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    w, b = (torch.randn(shape[-1], device="cuda").to(dtype) for _ in range(2))
    wide = [t.double() for t in (x, w, b)]
    kinds = ["torch"] if shape[-1] > 8192 else ["torch", "layer"]
    for kind in kinds:
        if kind == "layer":
            args, ours, theirs = (x, w, b), layer_norm, F.layer_norm
        else:
            args, ours, theirs = (x, w), rms_norm, None

        def torchs(*a: Tensor, theirs: Any = theirs) -> Tensor:
            if theirs is None:
                return F.rms_norm(a[0], (shape[-1],), a[1], EPS)
            return theirs(a[0], (shape[-1],), a[1], a[2], EPS)

        exact = outputs_and_gradients(torchs, (g.double(),), *wide[: len(args)])
        plain = outputs_and_gradients(torchs, (g,), *args)
        with triton():
            got = outputs_and_gradients(lambda *a, f=ours: f(*a, EPS), (g,), *args)
        for ours_one, torchs_one, right in zip(got, plain, exact, strict=True):
            assert distance(ours_one, right) <= 1.01 * distance(torchs_one, right) + 32 * EPS32


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_past_two_to_the_31_elements() -> None:
    """At the last rows a 32-bit offset would overflow."""
    dim = 2048
    rows = 2**31 // dim + 1000
    x = torch.zeros(rows, dim, device="cuda", dtype=torch.bfloat16)
    g = torch.zeros_like(x)
    x[-64:] = torch.randn(64, dim, device="cuda").bfloat16()
    g[-64:] = torch.randn(64, dim, device="cuda").bfloat16()
    w = torch.randn(dim, device="cuda")
    with triton():
        y, dx, dw = outputs_and_gradients(lambda x, w: rms_norm(x, w, EPS), (g,), x, w)
    last = (x[-64:].double(), w.double())
    exact = outputs_and_gradients(exact_rms_norm, (g[-64:].double(),), *last)
    within(y[-64:], exact[0], 1.0, "cuda")
    check_gradients([dx[-64:], dw], exact[1:], 1.0, 64, "cuda")
    assert not y[:-64].any()
    assert not dx[:-64].any()
    del y, dx
    with triton():
        normed, total, dx, _ = outputs_and_gradients(
            lambda x, more: add_rms_norm(x, more, w, EPS), (g, g), x, x
        )
    assert torch.equal(total[-64:], 2 * x[-64:])
    twice = 2 * last[0]
    exact = outputs_and_gradients(lambda t: exact_rms_norm(t, last[1]), (g[-64:].double(),), twice)
    within(normed[-64:], exact[0], 1.0, "cuda")
    check_gradients([dx[-64:]], [exact[1] + g[-64:].double()], 1.0, 64, "cuda")


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, g, g_total = (torch.randn(512, 2048, device="cuda").bfloat16() for _ in range(3))
    w = torch.randn(2048, device="cuda")

    def step() -> tuple[Tensor, ...]:
        _, total, r = rms_norm_triton.rms_norm_forward(x, x, w, EPS)
        dx, dw = rms_norm_triton.rms_norm_backward(g, g_total, total, w, r, True)
        return total, r, dx, dw

    wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
