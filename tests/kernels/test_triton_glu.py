"""The activations' Triton kernels, in the interpreter and on a GPU: values, gradients, edge cases.

test_triton_elementwise.py tests them under autograd, torch.func and torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from kernels import geglu, relu2, swiglu
from kernels.mlp import glu_triton
from kernels.runtime import dispatch
from tests.kernels.accuracy import distance, outputs_and_gradients, within
from tests.kernels.drivers import random
from tests.rounding import ulps

EPS32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one number; less than a tile; several dimensions; no power of two; more than a tile
SHAPES = [(1,), (1, 7), (5, 123), (2, 3, 64), (5, 1000)]

OURS: dict[str, Callable[..., Tensor]] = {"swiglu": swiglu, "geglu": geglu, "relu2": relu2}
EXACT: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu2": lambda x: F.relu(x).square(),
}
COUNT = {"swiglu": 2, "geglu": 2, "relu2": 1}


def triton() -> Any:
    return dispatch.override(swiglu="triton", geglu="triton", relu2="triton")


def inputs(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """The activation's inputs, then a gradient of its output."""
    return tuple(random(*shape, seed=i, dtype=dtype).to(device) for i in range(COUNT[name] + 1))


def check(name: str, got: list[Tensor], g: Tensor, leaves: tuple[Tensor, ...], device: str) -> None:
    """The bound: e^z is 2^(z log2 e) with a rounded exponent, a relative error of |z| eps."""
    wide = [x.double() for x in leaves]
    exact = outputs_and_gradients(EXACT[name], g.double(), *wide)
    assert [t.dtype for t in got] == [g.dtype] * len(got)
    x = wide[0].abs()
    z = 1 + x if name != "geglu" else 1 + 1.6 * x + 0.072 * x**3
    within(got[0], exact[0], z * exact[0].abs(), device)
    # the slope is a difference of terms of size z
    within(got[1], exact[1], z * (g.double() * (wide[1] if len(wide) > 1 else x)).abs(), device)
    if len(wide) > 1:
        within(got[2], exact[2], z * exact[2].abs(), device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_rounded_once(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, kernel_device: str
) -> None:
    *leaves, g = inputs(name, shape, dtype, kernel_device)
    with triton():
        got = outputs_and_gradients(OURS[name], g, *leaves)
    check(name, got, g, tuple(leaves), kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [1, 40, 1000, 1030])
def test_halves_of_one_projection(width: int, kernel_device: str) -> None:
    """Strided rows with NaN between and after them give the same bits as contiguous ones."""
    wide = torch.full((3, 2, 2 * width + 8), float("nan"), device=kernel_device)
    gate, up = wide[..., :width], wide[..., width : 2 * width]
    gate.copy_(random(3, 2, width).float())
    up.copy_(random(3, 2, width, seed=1).float())
    g = random(3, 2, width, seed=2).float().to(kernel_device)
    for name, f in OURS.items():
        leaves = (gate, up)[: COUNT[name]]
        with triton():
            got = outputs_and_gradients(f, g, *leaves)
            wanted = outputs_and_gradients(f, g, *(x.contiguous() for x in leaves))
        for a, b in zip(got, wanted, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


def test_halves_are_not_copied(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(
        glu_triton, "launch", lambda kernel, grid, *args, **rest: given.extend(args)
    )
    wide = torch.zeros(5, 3, 80, device=kernel_device)
    gate, up = wide.chunk(2, -1)
    glu_triton.glu_backward(torch.zeros_like(gate.contiguous()), gate, up, "swiglu")
    own = [x.untyped_storage()._cdata == wide.untyped_storage()._cdata for x in given[1:3]]
    assert own == [True, True]


@pytest.mark.parametrize("name", OURS)
def test_any_strides(name: str, kernel_device: str) -> None:
    turned = random(50, 5, 4).float().to(kernel_device).permute(1, 2, 0)
    same = random(50, seed=3).float().to(kernel_device).expand(5, 4, 50)
    apart = random(10, 8, 50, seed=4).float().to(kernel_device)[::2, 1::2]
    for leaves in ((turned, same), (apart, turned), (same, apart)):
        leaves = leaves[: COUNT[name]]
        for g in (torch.ones((), device=kernel_device).expand(5, 4, 50), apart):
            with triton():
                got = outputs_and_gradients(OURS[name], g, *leaves)
                plain = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
                wanted = outputs_and_gradients(OURS[name], g.contiguous(), *plain)
            for a, b in zip(got, wanted, strict=True):
                assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # e^1e4, huge^2
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_at_the_ends(dtype: torch.dtype, kernel_device: str) -> None:
    huge = torch.finfo(dtype).max
    x = torch.tensor([-huge, -1e4, -50.0, -0.0, 0.0, 50.0, 1e4, huge], device=kernel_device)
    x = x.to(dtype)
    with triton():
        for f in (swiglu, geglu):
            y, d_gate, d_up = outputs_and_gradients(f, torch.ones_like(x), x, torch.ones_like(x))
            assert torch.equal(y, d_up)
            assert y.abs()[:3].max() <= 1e-20
            assert torch.equal(y[4:], x[4:])
            assert d_gate.abs()[:3].max() <= 1e-18  # 50 e^-50
            assert d_gate[3:].tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]
        y, dx = outputs_and_gradients(relu2, torch.ones_like(x), x)
        assert torch.equal(y, F.relu(x).square())
        assert dx.tolist() == (2 * F.relu(x)).tolist()


def test_swiglu_on_torch_is_finite_at_the_ends() -> None:
    for dtype in DTYPES:
        gate = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], dtype=dtype)
        for t in outputs_and_gradients(swiglu, torch.ones(5), gate, torch.ones_like(gate)):
            assert t.isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, of NaN
def test_nan_stays_alone_and_stays(kernel_device: str) -> None:
    for name, f in OURS.items():
        *leaves, g = inputs(name, (3, 50), torch.float32, kernel_device)
        for i in range(len(leaves)):
            spoilt = [x.clone() for x in leaves]
            spoilt[i][1, 7] = float("nan")
            with triton():
                got = outputs_and_gradients(f, g, *spoilt)
            wrong = torch.zeros(3, 50, dtype=torch.bool, device=kernel_device)
            wrong[1, 7] = True
            assert torch.equal(got[0].isnan(), wrong)
            for t in got[1:]:
                assert not t[~wrong].isnan().any()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(0,), (0, 6), (3, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...], kernel_device: str) -> None:
    x = torch.zeros(shape, device=kernel_device)
    with triton():
        for name, f in OURS.items():
            for t in outputs_and_gradients(f, x, *(x,) * COUNT[name]):
                assert t.shape == shape


def test_a_scalar(kernel_device: str) -> None:
    x = torch.tensor(2.0, device=kernel_device)
    with triton():
        y, dx = outputs_and_gradients(relu2, torch.ones_like(x), x)
    assert (float(y), float(dx)) == (4.0, 4.0)


@pytest.mark.parametrize("name", OURS)
def test_one_launch_serves_all_examples(
    name: str, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *leaves, _ = inputs(name, (4, 3, 20), torch.float32, kernel_device)
    count = 0
    real = glu_triton.launch

    def counted(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        real(*args, **options)

    monkeypatch.setattr(glu_triton, "launch", counted)
    everyone = tuple(range(len(leaves)))
    with triton():
        got = vmap(grad(lambda *xs: OURS[name](*xs).square().sum(), everyone))(*leaves)
    assert count == 2  # forward and backward
    exact = [x.double().requires_grad_() for x in leaves]
    wanted = torch.autograd.grad(EXACT[name](*exact).square().sum(), exact)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 80)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_torch_rounds_seldom_too(name: str, dtype: torch.dtype) -> None:
    """It rounds twice: after the activation, and after the product."""
    *leaves, g = inputs(name, (5, 123), dtype, "cpu")
    with dispatch.override(swiglu="torch", geglu="torch", relu2="torch"):
        got = outputs_and_gradients(OURS[name], g, *leaves)
    exact = outputs_and_gradients(EXACT[name], g.double(), *(x.double() for x in leaves))
    unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal
    for a, b in zip(got, exact, strict=True):
        error = (a.double() - b).abs()
        # relative to terms of size 4: gelu' is a difference, and passes through 0
        assert (error <= 3 * unit * b.abs() + 64 * EPS32 * 4 + 2 * tiny).all(), float(error.max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: geglu(x, x[:2]), "geglu: gate is .* they must be alike"),
        (lambda x: geglu(x, x.bfloat16()), "they must be alike"),
        (lambda x: swiglu(x, x.to("meta")), "gate is on cpu but up is on meta"),
        (lambda x: relu2(x.long()), "relu2: x must be floating point, got torch.int64"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 6))


# Real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_no_worse_than_torch_at_real_size(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(4096, 8960, device="cuda").to(dtype) for _ in range(COUNT[name])]
    g = torch.randn(4096, 8960, device="cuda").to(dtype)
    with triton():
        got = outputs_and_gradients(OURS[name], g, *leaves)
    plain = outputs_and_gradients(EXACT[name], g, *leaves)
    exact = outputs_and_gradients(EXACT[name], g.double(), *(x.double() for x in leaves))
    for a, b, c in zip(got, plain, exact, strict=True):
        assert distance(a, c) <= 1.01 * distance(b, c) + 2 * EPS32


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
@pytest.mark.usefixtures("whole_gpu")
def test_more_than_2_31_numbers(name: str) -> None:
    """In one row and in strided rows: the last entries equal those of a short tensor."""
    tail, size = 5003, 2**31 + 4096 + 8
    flat = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    flat[-tail:] = torch.randn(tail, device="cuda")
    rows = flat[: 2**31 + 2**12].view(-1, 4096)
    rows[-1] = torch.randn(4096, device="cuda")
    for x, last in ((flat, slice(size - tail, None)), (rows[:, :2000], slice(-1, None))):
        leaves = (x,) * COUNT[name]
        with triton():
            got = outputs_and_gradients(OURS[name], torch.ones_like(x), *leaves)
            short = [t[last].clone() for t in leaves]
            wanted = outputs_and_gradients(OURS[name], torch.ones_like(short[0]), *short)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a[last], b)
            assert not a[:1000].any()
        del got
