"""glu_linear and norm_linears with their Triton kernels, in the interpreter and on a GPU: values,
gradients, reused memory, drivers.

test_fused_linear.py tests what does not depend on the backend.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    add_norm_linears,
    add_rms_norm,
    geglu,
    glu_linear,
    norm_linears,
    rms_norm,
    swiglu,
)
from kernels.mlp import glu_triton
from kernels.norm import rms_norm_triton, rows_triton
from kernels.runtime import dispatch
from tests.kernels.drivers import (
    FIRST_ORDER,
    HIGHER_ORDER,
    Case,
    Driver,
    broken,
    by_grad_grad,
    by_jvp_jacrev,
    disagreement,
    joined,
    placed,
    random,
    spoilt,
)
from tests.kernels.test_fused_linear import CASES as EVERYWHERE
from tests.kernels.test_fused_linear import (
    INNER,
    ROWS,
    all_of,
    composed_joined,
    exact_add_norm_linears,
    exact_glu_linear,
    exact_norm_linears,
    roundings,
)
from tests.rounding import ulps

gated = importlib.import_module("kernels.linear.glu_linear")
normed = importlib.import_module("kernels.linear.norm_linears")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = ulps(
    torch.float32, 800
)  # fp32: a few consecutive sums of a few hundred numbers of order 1


def triton() -> Any:
    return dispatch.override(swiglu="triton", geglu="triton", rms_norm="triton")


def torch_only() -> Any:
    return dispatch.override(swiglu="torch", geglu="torch", rms_norm="torch")


def gradients(
    f: Callable[..., Any], grads: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """The outputs, then the gradients given these gradients of theirs."""
    xs = [x.detach().clone().requires_grad_() for x in tensors]
    outs = f(*xs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, xs, grads)]


def no_worse(
    got: list[Tensor], other: list[Tensor], right: list[Tensor], more: Sequence[float]
) -> None:
    """No worse against fp64 than plain torch in the same dtypes, up to one rounding of the largest
    entry (the interpreter truncates instead of rounding) and `more`. NaN never passes."""
    for mine, theirs, exact, slack in zip(got, other, right, more, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == exact.shape
        unit = torch.finfo(mine.dtype).eps
        allowed = (theirs.double() - exact).abs().max() + unit * exact.abs().max()
        assert float((mine.double() - exact).abs().max()) <= float(allowed) + slack


# Values and gradients

# dtypes: of activations; of weights and bias; of the norm's weight
DTYPES = [(BF16, BF16, FP32), (FP16, FP16, FP32), (FP32, FP32, FP32), (BF16, FP32, BF16)]
SHAPES = [(1, 1), (2, 3, 64), (5, 123)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "wide", "_"), DTYPES)
def test_glu_linear(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    wide: torch.dtype,
    _: torch.dtype,
    kernel_device: str,
) -> None:
    inner = shape[-1]
    tensors = [random(*shape, seed=i, dtype=dtype) for i in range(2)]
    tensors += [random(9, inner, seed=2, dtype=wide), random(9, seed=3, dtype=wide)]
    tensors = [t.to(kernel_device) for t in tensors]
    g = random(*shape[:-1], 9, seed=4, dtype=wide).to(kernel_device)
    act = {"swiglu": swiglu, "geglu": geglu}[name]

    def composed(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(act(gate, up).to(wide), weight, bias)

    with triton():
        got = gradients(partial(glu_linear, activation=name), [g], tensors)
        same = gradients(composed, [g], tensors)
    with torch_only():
        other = gradients(composed, [g], tensors)
    exact = partial(exact_glu_linear, name=name)
    right = gradients(exact, [g.double()], [t.double() for t in tensors])
    check(got, same, other, right, [0, 3], dtype == wide)


def check(
    got: list[Tensor],
    same: list[Tensor],
    other: list[Tensor],
    right: list[Tensor],
    through: list[int],
    alike: bool,
    more: dict[int, float] | None = None,
) -> None:
    """Against the composition of the same kernels, torch's composition, and fp64.

    through: the results that depend on the rounded h, which are the outputs and the weights'
    gradients; they equal the composition's to the bit. Unless `alike`, h is rounded more coarsely
    than these results, and no other comparison holds. more: the error that rounding may cause in a
    result beyond one rounding of its largest entry.
    """
    for i in through:
        assert torch.equal(got[i], same[i])
    rest = [i for i in range(len(got)) if alike or i not in through]
    slack = [(more or {}).get(i, 0.0) for i in rest]
    no_worse(*([results[i] for i in rest] for results in (got, other, right)), slack)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["norm alone", "handed on", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "wide", "norm"), DTYPES)
def test_norm_linears(
    form: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    wide: torch.dtype,
    norm: torch.dtype,
    kernel_device: str,
) -> None:
    sizes, inner = (70, 5, 3), shape[-1]
    tensors = [random(*shape, dtype=dtype), random(inner, seed=1, dtype=norm)]
    tensors += [random(o, inner, seed=2 + o, dtype=wide) for o in sizes]
    tensors += [random(o, seed=20 + o, dtype=wide) for o in sizes]
    tensors = [t.to(kernel_device) for t in tensors]
    g = [random(*shape[:-1], o, seed=40 + o, dtype=wide).to(kernel_device) for o in sizes]
    total, more = [], None
    if form != "norm alone":
        total = [random(*shape, seed=60, dtype=dtype).to(kernel_device)]
    if form == "sum":
        more = random(*shape, seed=61, dtype=dtype).to(kernel_device)

    def ours(x: Tensor, n: Tensor, *leaves: Tensor) -> Sequence[Tensor]:
        if not total:
            return norm_linears(x, n, leaves[:3], leaves[3:], 1e-3)
        return all_of(add_norm_linears(x, more, n, leaves[:3], leaves[3:], 1e-3))

    def composed(x: Tensor, n: Tensor, *leaves: Tensor) -> list[Tensor]:
        h, x = (rms_norm(x, n, 1e-3), x * 1.0) if more is None else add_rms_norm(x, more, n, 1e-3)
        outs = [F.linear(h.to(wide), w, b) for w, b in zip(leaves[:3], leaves[3:], strict=True)]
        return [*outs, x] if total else outs

    with triton():
        got = gradients(ours, [*g, *total], tensors)
        same = gradients(composed, [*g, *total], tensors)
        normed = [got[3] if more is not None else tensors[0], *tensors[1:]]  # the rounded sum
        joined = gradients(partial(composed_joined, wide=wide), g, normed)
    same[-6:-3] = joined[-6:-3]
    with torch_only():
        other = gradients(composed, [*g, *total], tensors)

    def exact(x: Tensor, n: Tensor, *leaves: Tensor) -> list[Tensor]:
        outs = exact_norm_linears(x, n, leaves[:3], leaves[3:])
        return [*outs, x * 1.0] if total else outs

    right_inputs = [t.double() for t in normed]
    right = gradients(exact, [t.double() for t in (*g, *total)], right_inputs)
    outs = 3 + len(total)
    of_x, of_norm = roundings(*normed[:2], normed[2:5], g, torch.finfo(wide).eps)
    more_of = {outs: of_x, outs + 1: of_norm}
    h = exact_norm_linears(*right_inputs[:2], [torch.eye(inner).to(right_inputs[0])], [None])[0]
    for i, (weight, grad_y) in enumerate(zip(normed[2:5], g, strict=True)):
        # h may round differently from torch
        unit = torch.finfo(dtype).eps
        sums = (h.abs() @ weight.double().abs().t(), grad_y.double().abs().reshape(-1, len(weight)))
        more_of[i] = unit * float(sums[0].max())
        more_of[outs + 2 + i] = unit * float((sums[1].t() @ h.abs().reshape(-1, inner)).max())
    through = [*range(3), *range(outs + 2, outs + 5)]
    check(got, same, other, right, through, dtype == wide, more_of)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,)], ids=str)
def test_no_rows_and_one_row(shape: tuple[int, ...], kernel_device: str) -> None:
    x, norm, weight = (
        random(*s, seed=i, dtype=FP32).to(kernel_device)
        for i, s in enumerate((shape, (6,), (5, 6)))
    )
    ones = torch.ones(*shape[:-1], 5, device=kernel_device)
    with triton():
        got = gradients(glu_linear, [ones], [x, x, weight])
        got += gradients(
            lambda x, n, w: norm_linears(x, n, [w], eps=1e-3), [ones], [x, norm, weight]
        )
        got += gradients(
            lambda x, n, w: all_of(add_norm_linears(x, x, n, [w], eps=1e-3)),
            *([ones, torch.ones_like(x)], [x, norm, weight]),
        )
    right = gradients(exact_glu_linear, [ones], [x, x, weight])
    right += gradients(
        lambda x, n, w: exact_norm_linears(x, n, [w], [None]), [ones], [x, norm, weight]
    )
    right += gradients(
        lambda x, n, w: exact_add_norm_linears(x, x, n, [w], [None]),
        *([ones, torch.ones_like(x)], [x, norm, weight]),
    )
    for mine, exact in zip(got, right, strict=True):
        torch.testing.assert_close(
            mine, exact, rtol=ulps(torch.float32, 80), atol=ulps(torch.float32, 80)
        )


# Kernels that overwrite their arguments


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("shape", [(1,), (5, 123), (2, 3, 64), (3, 1030)], ids=str)
@pytest.mark.parametrize("halves", [False, True])
def test_overwriting_gives_the_same_bits(
    name: str, shape: tuple[int, ...], halves: bool, kernel_device: str
) -> None:
    """Like three kernels that do not, for contiguous rows and for rows with NaN between them."""
    width = shape[-1]
    wide = torch.full((*shape[:-1], 2 * width + 8), float("nan"), dtype=BF16, device=kernel_device)
    wide[..., : 2 * width] = random(*shape[:-1], 2 * width, dtype=BF16).to(kernel_device)
    gate, up = wide[..., :width], wide[..., width : 2 * width]
    if not halves:
        gate, up = gate.contiguous(), up.contiguous()
    g = random(*shape, seed=2, dtype=BF16).to(kernel_device)
    wanted = (*glu_triton.glu_backward(g, gate, up, name), glu_triton.glu_forward(gate, up, name))
    lent = g.clone()
    got = glu_triton.glu_backward_(lent, gate, up, name)
    for mine, other in zip(got, wanted, strict=True):
        assert mine is not None
        assert torch.equal(mine, other)
    assert got[1] is lent
    assert not torch.equal(lent, g)
    less = glu_triton.glu_backward_(g.clone(), gate, up, name, needs_value=False)
    assert less[2] is None
    assert torch.equal(less[0], wanted[0])
    assert torch.equal(less[1], wanted[1])


def test_what_cannot_be_overwritten_is_left_alone(kernel_device: str) -> None:
    gate, up = (random(6, 8, seed=i, dtype=BF16).to(kernel_device) for i in range(2))
    wider = random(6, 8, seed=2, dtype=FP32).to(kernel_device)
    turned = random(8, 6, seed=3, dtype=BF16).to(kernel_device).t()
    for g in (wider, turned):
        before = g.clone()
        got = glu_triton.glu_backward_(g, gate, up, "swiglu")
        assert torch.equal(g, before)
        assert got[1].data_ptr() != g.data_ptr()
        wanted = glu_triton.glu_backward(g, gate, up, "swiglu")
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_the_gradient_of_the_output_is_not_overwritten(kernel_device: str) -> None:
    """Nor are the arguments: the operators overwrite only tensors of their own."""
    tensors = [random(*s, seed=i, dtype=FP32) for i, s in enumerate(((8, 8), (8, 8), (8, 8)))]
    tensors = [t.to(kernel_device) for t in tensors]
    g, norm = (
        random(8, 8, seed=5, dtype=FP32).to(kernel_device),
        torch.ones(8, device=kernel_device),
    )
    before = [t.clone() for t in (*tensors, g, norm)]
    with triton():
        gated._op(g, *tensors, "swiglu", True, True, True)
        r = torch.ones(8, 1, device=kernel_device)
        normed._op([g, g], None, tensors[0], norm, tensors[1:], r, 1e-6, True, True, [True] * 3)
        normed._op([g], g, tensors[0], norm, tensors[1:2], r, 1e-6, True, True, [True] * 2)
    for mine, other in zip((*tensors, g, norm), before, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(("needs", "wide"), [((True, True), 3), ((True, False), 2)], ids=str)
def test_glu_linear_allocates_no_more_than_it_says(
    needs: tuple[bool, bool], wide: int, allocations_in: Any, kernel_device: str
) -> None:
    gate, up = (random(64, 32, seed=i, dtype=BF16).to(kernel_device) for i in range(2))
    weight, g = (random(*s, dtype=BF16).to(kernel_device) for s in ((4, 32), (64, 4)))
    with allocations_in(gate, up, weight, g) as allocations:
        out = gated.glu_linear_gradients(g, gate, up, weight, "swiglu", True, *needs)
        gc.collect()  # the interpreter's frames form cycles
        assert allocations.living() == sum(t.nbytes for t in out)
    storages = {ref.cdata for ref, size, _ in allocations.made if size == gate.nbytes}
    assert len(storages) == wide


def launched(
    monkeypatch: pytest.MonkeyPatch, f: Callable[..., Any], tensors: Sequence[Tensor], learn: str
) -> list[tuple[str, int]]:
    """The kernels of a step to the tensors with a 1 in `learn`, and their numbers of tensors."""
    seen: list[tuple[str, int]] = []
    for module in (glu_triton, rms_norm_triton, rows_triton):
        right = module.launch

        def counted(kernel: Any, grid: Any, *args: Any, right: Any = right, **rest: Any) -> None:
            count = sum(isinstance(a, Tensor) for a in args)
            seen.append((kernel.fn.__name__.removesuffix("_kernel"), count))
            right(kernel, grid, *args, **rest)

        monkeypatch.setattr(module, "launch", counted)
    leaves = [t.detach().requires_grad_(c == "1") for t, c in zip(tensors, learn, strict=True)]
    with triton():
        joined(f(*leaves)).square().sum().backward()
    for leaf, c in zip(leaves, learn, strict=True):
        assert (leaf.grad is not None) == (c == "1")
    return seen


@pytest.mark.parametrize(
    ("learn", "backward"),
    [
        ("111", [("glu_backward", 6)]),
        ("110", [("glu_backward", 5)]),
        ("001", [("glu_forward", 3)]),
    ],
)
def test_glu_linear_launches(
    learn: str,
    backward: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    kernel_device: str,
) -> None:
    """One kernel per direction, and how many tensors it reads and writes."""
    shapes = ((6, 8), (6, 8), (3, 8))
    tensors = [random(*s, seed=i, dtype=BF16).to(kernel_device) for i, s in enumerate(shapes)]
    seen = launched(monkeypatch, lambda *ts: [glu_linear(*ts)], tensors, learn)
    assert seen == [("glu_forward", 3), *backward]


@pytest.mark.parametrize(
    ("learn", "backward"),
    [
        ("1111", ["rms_norm_backward", "sum_partials"]),
        ("1000", ["rms_norm_backward"]),
        ("1010", ["rms_norm_backward"]),
        ("0011", ["rms_norm_forward"]),
    ],
)
def test_norm_linears_launches(
    learn: str, backward: list[str], monkeypatch: pytest.MonkeyPatch, kernel_device: str
) -> None:
    shapes = ((6, 8), (8,), (3, 8), (2, 8))
    tensors = [random(*s, seed=i, dtype=BF16).to(kernel_device) for i, s in enumerate(shapes)]
    seen = launched(monkeypatch, lambda x, n, a, b: norm_linears(x, n, [a, b]), tensors, learn)
    assert [name for name, _ in seen] == ["rms_norm_forward", *backward]

    def sums(x: Tensor, n: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return all_of(add_norm_linears(x, tensors[0], n, [a, b]))

    monkeypatch.undo()
    assert [name for name, _ in launched(monkeypatch, sums, tensors, learn)] == [
        "rms_norm_forward",
        *backward,
    ]


@pytest.mark.parametrize(("learns", "wide"), [(True, 2), (False, 1)])
def test_norm_linears_allocates_no_more_than_it_says(
    learns: bool, wide: int, allocations_in: Any, kernel_device: str
) -> None:
    """Of the size of x: the gradient of h, whose memory becomes that of x's, and h."""
    x, g_total = (random(64, 32, seed=i, dtype=BF16).to(kernel_device) for i in range(2))
    norm, weight = (random(*s, dtype=BF16).to(kernel_device) for s in ((32,), (4, 32)))
    g, r = random(64, 4, dtype=BF16).to(kernel_device), torch.ones(64, 1, device=kernel_device)
    with allocations_in(x, g_total, norm, weight, g, r) as allocations:
        out = normed.norm_linears_gradients(
            [g], g_total, x, norm, [weight], r, 1e-6, True, True, [learns, learns]
        )
        gc.collect()  # the interpreter's frames form cycles
        assert allocations.living() == sum(t.nbytes for t in out)
    storages = {ref.cdata for ref, size, _ in allocations.made if size == x.nbytes}
    assert len(storages) == wide


# Drivers


CASES = {
    **{name: EVERYWHERE[name] for name in ("glu_linear", "add_norm_linears")},
    "norm_linears": Case(
        lambda x, n, q, k, b: joined(norm_linears(x, n, [q, k], [None, b], 1e-3)),
        lambda x, n, q, k, b: joined(exact_norm_linears(x, n, [q, k], [None, b])),
        ((ROWS, INNER), (INNER,), (6, INNER), (2, INNER), (2,)),
        normed,
        "NORM_LINEARS",
    ),
    "add_norm_linears, nothing added": replace(
        EVERYWHERE["add_norm_linears, nothing added"],
        shapes=((ROWS, INNER), (INNER,), (4, INNER), (4,)),
    ),
}


def error(case: Case, driver: Driver, device: str) -> float:
    floats = tuple(random(*s, seed=i).to(device, FP32) for i, s in enumerate(case.shapes))
    with triton():
        return disagreement(driver, case.fast, case.plain, floats)


@pytest.mark.parametrize(
    ("name", "driver", "kernel_device"),
    placed(CASES, [*FIRST_ORDER, *HIGHER_ORDER, by_grad_grad, by_jvp_jacrev]),
)
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    assert error(CASES[name], driver, kernel_device) < TOLERANCE


@pytest.mark.parametrize(("name", "driver"), spoilt(CASES, FIRST_ORDER))
def test_a_wrong_backward_shows(
    name: str, driver: Driver, interpreter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver, interpreter) > 0.1
