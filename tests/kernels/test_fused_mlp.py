"""add_norm_gated_mlp and gelu_mlp: derivatives under every driver, whose memory is whose, and on a
GPU the products that compute GELUs against fp64.

On a CPU those products are plain operations ("torch"), and all around them is what a GPU runs.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import add_norm_gated_mlp, dispatch, gelu_mlp
from tests.kernels.drivers import Case, Driver, broken, disagreement, joined, name_of, random
from tests.kernels.test_fused_linear import FIRST, HIGHER, parameters

# torch.func.jvp scripts its decompositions when first used; the libraries warn of their own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

fused = importlib.import_module("kernels.fused_mlp")
BF16, FP32 = torch.bfloat16, torch.float32
ROWS, DIM, INNER, OUT, EPS = 5, 7, 6, 3, 1e-3


def gated(
    x: Tensor, residual: Tensor | None, *leaves: Tensor, keep: bool = True
) -> tuple[Tensor, Tensor]:
    return add_norm_gated_mlp(x, residual, *leaves, eps=EPS, keep=keep)


def exact_gated(x: Tensor, residual: Tensor | None, *leaves: Tensor) -> tuple[Tensor, Tensor]:
    norm, gate, up, down = leaves
    total = x * 1.0 if residual is None else x + residual
    h = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * norm
    return F.linear(F.silu(h @ gate.t()) * (h @ up.t()), down), total


def exact_gelu(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)


GATED_SHAPES = ((ROWS, DIM), (ROWS, DIM), (DIM,), (INNER, DIM), (INNER, DIM), (OUT, INNER))
GELU_SHAPES = ((2, ROWS, DIM), (INNER, DIM), (INNER,), (OUT, INNER), (OUT,))
CASES = {
    "gated": Case(
        lambda *ts: joined(gated(*ts)),
        lambda *ts: joined(exact_gated(*ts)),
        GATED_SHAPES, fused, "GATED_MLP",
    ),
    "gated, made again": Case(
        lambda *ts: joined(gated(*ts, keep=False)),
        lambda *ts: joined(exact_gated(*ts)),
        GATED_SHAPES, fused, "GATED_MLP",
    ),
    "gated, nothing added": Case(
        lambda x, *ts: joined(gated(x, None, *ts)),
        lambda x, *ts: joined(exact_gated(x, None, *ts)),
        ((2, ROWS, DIM), *GATED_SHAPES[2:]), fused, "GATED_MLP",
    ),
    "gelu": Case(
        lambda *ts: fused._apply_gelu(*ts, "torch"), exact_gelu, GELU_SHAPES, fused, "GELU_MLP"
    ),
    "gelu without biases": Case(
        lambda x, up, down: fused._apply_gelu(x, up, None, down, None, "torch"),
        lambda x, up, down: exact_gelu(x, up, None, down, None),
        ((ROWS, DIM), (INNER, DIM), (OUT, INNER)), fused, "GELU_MLP",
    ),
}  # fmt: skip


def floats_of(case: Case) -> tuple[Tensor, ...]:
    return tuple(random(*shape, seed=i) for i, shape in enumerate(case.shapes))


def error(case: Case, driver: Driver) -> float:
    return disagreement(driver, case.fast, case.plain, floats_of(case))


@pytest.mark.parametrize("driver", [*FIRST, *HIGHER], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_under_driver(name: str, driver: Driver) -> None:
    assert error(CASES[name], driver) < 1e-10  # fp64: sums of some tens of terms of order 1


@pytest.mark.parametrize("driver", FIRST, ids=name_of)
@pytest.mark.parametrize("name", ["gated, made again", "gelu"])
def test_a_wrong_backward_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver) > 0.1


@pytest.mark.parametrize("driver", HIGHER, ids=name_of)
@pytest.mark.parametrize("name", ["gated", "gelu"])
def test_a_wrong_formula_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "formula", monkeypatch)
    assert error(CASES[name], driver) > 0.1


# Whose memory is whose


def bf16_inputs(rows: int = 64) -> list[Tensor]:
    return parameters((rows, 32), (rows, 32), (32,), (48, 32), (48, 32), (32, 48))


@pytest.mark.parametrize(("keep", "wide"), [(True, 2 * 48 * 2), (False, 0)])
def test_what_is_kept(keep: bool, wide: int) -> None:
    """Beside the arguments: the sum, one fp32 number a row, and what gate and up gave."""
    tensors = bf16_inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = gated(*tensors, keep=keep)
    own = {t.data_ptr() for t in (*tensors, total)}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == 64 * (4 + wide)


def last_backwards(f: Callable[[], Tensor], leaves: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients by a backward that keeps the graph, and by the one after it, which does not."""
    loss = f()
    return [list(torch.autograd.grad(loss, leaves, retain_graph=keep)) for keep in (True, False)]


def watch(name: str, of: int, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether what a function of the module gives first lies where its argument `of` did."""
    seen: list[bool] = []
    right = getattr(fused, name)

    def watched(*args: Any) -> Any:
        given = args[of].data_ptr()
        outs = right(*args)
        seen.append(outs[0].data_ptr() == given)
        return outs

    monkeypatch.setattr(fused, name, watched)
    return seen


def test_the_last_backward_overwrites_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = parameters((64, 32), (48, 32), (48,), (32, 48), (32,))
    seen = watch("linear_gelu_backward", 2, monkeypatch)
    first, second = last_backwards(
        lambda: fused._apply_gelu(*leaves, "torch").float().square().sum(), leaves
    )
    assert seen == [False, True]
    assert all(map(torch.equal, first, second))


def test_the_last_backward_overwrites_gate_and_up(
    kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = [t.detach().to(kernel_device).requires_grad_() for t in bf16_inputs()]
    seen = watch("glu_gradients", 1, monkeypatch)
    with dispatch.override(rms_norm="triton", swiglu="triton"):
        first, second = last_backwards(lambda: gated(*leaves)[0].float().square().sum(), leaves)
        again = torch.autograd.grad(gated(*leaves, keep=False)[0].float().square().sum(), leaves)
    assert seen == [False, True, True]
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_rows_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces give what one piece gives: sums of pieces are kept in fp32 and rounded once."""
    leaves = bf16_inputs(rows)

    def gradients() -> list[Tensor]:
        y, total = gated(*leaves, keep=False)
        loss = joined([y, total]).float().square().sum()
        return [y, *torch.autograd.grad(loss, leaves)]

    whole = gradients()
    pieces: list[int] = []
    forward, backward = fused.wide_linear, fused.product

    def in_forward(x: Tensor, weight: Tensor) -> Tensor:
        if weight is leaves[3]:
            pieces.append(len(x))
        return forward(x, weight)

    def in_backward(x: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() == leaves[3].data_ptr():
            pieces.append(len(x))
        return backward(x, weight)

    monkeypatch.setattr(fused, "wide_linear", in_forward)
    monkeypatch.setattr(fused, "product", in_backward)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 1)
    cut = gradients()
    assert pieces == [n for _ in range(2) for n in (128,) * (rows // 128) + (rows % 128,) if n]
    for a, b in zip(whole, cut, strict=True):
        # two roundings to bf16 of sums that differ in fp32's last bits
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(BF16).eps, atol=0)


@pytest.mark.parametrize("keep", [True, False])
def test_no_rows(keep: bool) -> None:
    leaves = bf16_inputs(0)
    y, total = gated(*leaves, keep=keep)
    grads = torch.autograd.grad(y.sum() + total.sum(), leaves)
    assert y.shape == total.shape == (0, 32)
    assert all(g.shape == leaf.shape and not g.any() for g, leaf in zip(grads, leaves, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_what_lives_at_the_worst_moment(
    keep: bool, allocations_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what gate and up gave the gradient of the activation alone: not h, which made them,
    nor its gradient, nor a weight's. Then, in their place, what the norm's backward is made of."""
    rows, inner = 4096, 48
    x, _, norm, *weights = (t.detach() for t in bf16_inputs(rows))
    h, total, r = fused.add_norm(x, None, norm, EPS, False)
    made = tuple(F.linear(h, weight) for weight in weights[:2]) if keep else (None, None)
    inputs = (torch.ones_like(x), torch.ones_like(x), total, norm, *weights, r)
    living: list[int] = []

    def watched(name: str, outs: Callable[..., Any]) -> None:
        def look(*args: Any) -> Any:
            living.append(allocations.living())
            return outs(*args)

        monkeypatch.setattr(fused, name, look)

    # as the kernels do, in place; whatever the numbers are
    watched("glu_gradients", lambda grad, gate, up, *_: (gate, grad, up))
    watched("norm_gradients", lambda grad, *_: (grad, norm, grad))
    right = fused.norm_again
    monkeypatch.setattr(fused, "norm_again", lambda *args: right(*args[:-1], False))
    given = (t for t in (*inputs, *made) if t is not None)
    with torch.no_grad(), allocations_in(*given) as allocations:
        fused._gated_gradients(*inputs, *made, EPS, True, True, True, [True] * 4, True)
    wide, of_h, of_down = (2 * rows * inner, 2 * rows * 32, weights[2].nbytes)
    assert living == [(1 if keep else 3) * wide, (1 if keep else 2) * wide + of_h + of_down]


LEARN = ["100000", "001000", "000100", "000010", "000001", "111111", "110000", "000101"]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("learn", LEARN)
def test_gradients_of_some(learn: str, keep: bool) -> None:
    tensors = [
        random(*s, seed=i).requires_grad_(c == "1")
        for i, (s, c) in enumerate(zip(GATED_SHAPES, learn, strict=True))
    ]
    some = [t for t in tensors if t.requires_grad]
    got, wanted = (
        torch.autograd.grad(joined(f(*tensors)).sin().sum(), some)
        for f in (partial(gated, keep=keep), exact_gated)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("learn", ["10000", "01000", "00100", "00010", "00001", "01111"])
def test_gelu_gradients_of_some(learn: str) -> None:
    tensors = [
        random(*s, seed=i).requires_grad_(c == "1")
        for i, (s, c) in enumerate(zip(GELU_SHAPES, learn, strict=True))
    ]
    some = [t for t in tensors if t.requires_grad]
    fast = fused._apply_gelu(*tensors, "torch")
    got, wanted = (torch.autograd.grad(y.sin().sum(), some) for y in (fast, exact_gelu(*tensors)))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


# What serves where


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("triton", ["torch", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_gated_is_its_parts_to_the_bit(triton: str, keep: bool) -> None:
    leaves = bf16_inputs()

    def parts(x: Tensor, residual: Tensor, norm: Tensor, *more: Tensor) -> list[Tensor]:
        (a, b), total = kernels.add_norm_linears(x, residual, norm, more[:2], eps=EPS)
        return [kernels.glu_linear(a, b, more[2]), total]

    with dispatch.override(rms_norm=triton, swiglu=triton):
        got, wanted = (
            [*outs, *torch.autograd.grad(joined(outs).float().sin().sum(), leaves)]
            for outs in (gated(*leaves, keep=keep), parts(*leaves))
        )
    assert all(map(torch.equal, got, wanted))


def test_elsewhere_gelu_is_its_parts() -> None:
    x, up, up_bias, down, down_bias = (
        t.detach() for t in parameters((64, 32), (48, 32), (48,), (32, 48), (32,))
    )
    h = F.gelu(F.linear(x, up, up_bias), approximate="tanh")
    assert torch.equal(gelu_mlp(x, up, up_bias, down, down_bias), F.linear(h, down, down_bias))


@pytest.mark.parametrize(
    ("rows", "dim", "dtype", "inside"),
    [
        (1024, 64, BF16, True),
        (1023, 64, BF16, False),
        (1024, 68, BF16, False),
        (1024, 64, FP32, False),
    ],
)
def test_which_shapes_go_inside_products(
    rows: int, dim: int, dtype: torch.dtype, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(fused, "choose", lambda *_: "quack")
    monkeypatch.setattr(fused, "_apply_gelu", lambda *args: seen.append(args[-1]))
    monkeypatch.setattr(fused, "linear", lambda x, weight, bias: F.linear(x.to(BF16), weight))
    x = torch.zeros(rows, dim, dtype=dtype)
    up, down = torch.zeros(32, dim, dtype=BF16), torch.zeros(dim, 32, dtype=BF16)
    gelu_mlp(x, up, None, down, None)
    assert seen == (["quack"] if inside else [])


def test_wrong_arguments() -> None:
    x, residual, norm, gate, up, down = (t.detach() for t in bf16_inputs())
    with pytest.raises(ValueError, match="gate and up must be alike"):
        add_norm_gated_mlp(x, residual, norm, gate, up[:40], down)
    with pytest.raises(ValueError, match="they must be alike"):
        add_norm_gated_mlp(x, residual.float(), norm, gate, up, down)
    with pytest.raises(ValueError, match=r"down \[O, F\]"):
        add_norm_gated_mlp(x, residual, norm, gate, up, down.t())
    with pytest.raises(ValueError, match=r"up \[F, D\] and down"):
        gelu_mlp(x, up, None, down.t(), None)


# On a GPU: the library's products


def has_quack() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the library warns of when it is imported
        return (
            torch.cuda.is_available()
            and dispatch.why_not("gelu_mlp", "quack", "cuda", BF16) is None
        )


needs_quack = pytest.mark.skipif(not has_quack(), reason="needs quack-kernels and a Hopper GPU")
REAL = [(2048, 1536, 8960), (1100, 264, 712), (1024, 8, 8)]


def on_gpu(*shapes: tuple[int, ...]) -> list[Tensor]:
    """bf16; of matrices so that outputs are of order 1."""
    return [
        (random(*s, seed=i) * (1 if i < 2 or len(s) < 2 else s[-1] ** -0.5)).cuda().to(BF16)
        for i, s in enumerate(shapes)
    ]


def gradients(
    f: Callable[..., Any], tensors: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor]:
    xs = [t.detach().clone().requires_grad_() for t in tensors]
    outs = f(*xs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    pairs = [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, xs, pairs)]


def no_worse(got: list[Tensor], other: list[Tensor], right: list[Tensor]) -> None:
    """Than parts by themselves against fp64, in the mean square, by more than one rounding in
    ten: backward rounds one tensor more (the activation from rounded numbers). NaN never passes."""
    for mine, theirs, exact in zip(got, other, right, strict=True):
        assert mine.shape == exact.shape
        scale = exact.square().mean().sqrt()
        unit = torch.finfo(mine.dtype).eps / 12**0.5  # the mean square of one rounding, at most
        ours, parts = (float((t.double() - exact).square().mean().sqrt()) for t in (mine, theirs))
        assert ours <= 1.1 * parts + 0.1 * unit * float(scale)


@pytest.mark.gpu
@needs_quack
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("rows", "dim", "inner"), [*REAL, (2048, 1152, 4304)])
def test_gelu_products_on_a_gpu(rows: int, dim: int, inner: int, biased: bool) -> None:
    shapes = ((rows, dim), (inner, dim), (dim, inner), (inner,), (dim,))
    tensors, grads = on_gpu(*shapes), on_gpu((rows, dim))
    tensors = tensors if biased else tensors[:3]

    def call(f: Callable[..., Tensor], x: Tensor, up: Tensor, down: Tensor, *b: Tensor) -> Tensor:
        return f(x, up, b[0] if b else None, down, b[1] if b else None)

    def quack(*args: Any) -> Tensor:
        return fused._apply_gelu(*args, "quack")

    got = gradients(partial(call, quack), tensors, grads)
    other = gradients(partial(call, exact_gelu), tensors, grads)
    right = gradients(partial(call, exact_gelu), [t.double() for t in tensors], grads)
    no_worse(got, other, right)


@pytest.mark.gpu
@needs_quack
def test_gelu_products_in_a_cuda_graph_and_compiled() -> None:
    shapes = ((1024, 256), (512, 256), (512,), (256, 512), (256,))
    tensors = [t.requires_grad_() for t in on_gpu(*shapes)]

    def gradients_of(y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(y.float().square().sum(), tensors))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            wanted = gradients_of(gelu_mlp(*tensors))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = gradients_of(gelu_mlp(*tensors))
    for t in recorded:
        t.zero_()
    graph.replay()
    assert all(map(torch.equal, recorded, wanted))
    compiled = torch.compile(gelu_mlp, fullgraph=True)
    for a, b in zip(gradients_of(compiled(*tensors)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.gpu
@needs_quack
def test_a_row_with_nan_stays_alone() -> None:
    tensors = on_gpu((1024, 256), (512, 256), (512,), (256, 512), (256,))
    clean = gelu_mlp(*tensors)
    tensors[0][7] = float("nan")
    y = gelu_mlp(*tensors)
    assert y[7].isnan().all()
    rest = torch.arange(1024, device="cuda") != 7
    assert torch.equal(y[rest], clean[rest])
