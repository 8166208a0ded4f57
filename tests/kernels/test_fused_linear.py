"""glu_linear and norm_linears on torch: derivatives under every driver, saved tensors, the work of
backward, and the graphs that compilers and checkpointing policies see.

test_triton_fused_linear.py tests their Triton paths.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kernels import add_norm_linears, geglu, glu_linear, norm_linears, rms_norm, swiglu
from tests.kernels.drivers import (
    EVERY_FIRST,
    EVERY_HIGHER,
    Case,
    Driver,
    broken,
    error,
    joined,
    name_of,
    random,
    saved_bytes,
    spoilt,
)
from tests.rounding import ulps

gated = importlib.import_module("kernels.linear.glu_linear")
normed = importlib.import_module("kernels.linear.norm_linears")
TOLERANCE = ulps(torch.float64, 4000)  # fp64: sums of a few hundred terms of order 1
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, INNER = 5, 7
ACTIVATIONS = {"swiglu": swiglu, "geglu": geglu}


# References: the compositions that these functions replace


def exact_glu_linear(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None, name: str = "swiglu"
) -> Tensor:
    act = F.silu(gate) if name == "swiglu" else F.gelu(gate, approximate="tanh")
    return F.linear(act * up, weight, bias)


def exact_norm_linears(
    x: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    h = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm_weight
    return [F.linear(h, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def exact_add_norm_linears(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> list[Tensor]:
    total = x * 1.0 if residual is None else x + residual
    return [*exact_norm_linears(total, norm_weight, weights, biases), total]


def all_of(out: tuple[tuple[Tensor, ...], Tensor]) -> list[Tensor]:
    """The outputs of add_norm_linears, then the sum."""
    return [*out[0], out[1]]


def cast(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in the weight's dtype, as in the model."""
    return F.linear(h.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


# Under every driver


CASES = {
    "glu_linear": Case(
        glu_linear,
        exact_glu_linear,
        ((ROWS, INNER), (ROWS, INNER), (4, INNER), (4,)),
        gated,
        "GLU_LINEAR",
    ),
    "glu_linear, geglu without bias": Case(
        lambda *floats: glu_linear(*floats, activation="geglu"),
        partial(exact_glu_linear, name="geglu"),
        ((2, 3, INNER), (2, 3, INNER), (4, INNER)),
        gated,
        "GLU_LINEAR",
    ),
    "norm_linears, one": Case(
        lambda x, n, w, b: norm_linears(x, n, [w], [b], 1e-3)[0],
        lambda x, n, w, b: exact_norm_linears(x, n, [w], [b])[0],
        ((2, 3, INNER), (INNER,), (4, INNER), (4,)),
        normed,
        "NORM_LINEARS",
    ),
    "norm_linears, three": Case(
        lambda x, n, q, k, v, b: joined(norm_linears(x, n, [q, k, v], [None, b, None], 1e-3)),
        lambda x, n, q, k, v, b: joined(exact_norm_linears(x, n, [q, k, v], [None, b, None])),
        ((ROWS, INNER), (INNER,), (6, INNER), (2, INNER), (2, INNER), (2,)),
        normed,
        "NORM_LINEARS",
    ),
    "add_norm_linears": Case(
        lambda x, more, n, q, k, v, b: joined(
            all_of(add_norm_linears(x, more, n, [q, k, v], [None, b, None], 1e-3))
        ),
        lambda x, more, n, q, k, v, b: joined(
            exact_add_norm_linears(x, more, n, [q, k, v], [None, b, None])
        ),
        ((ROWS, INNER), (ROWS, INNER), (INNER,), (6, INNER), (2, INNER), (2, INNER), (2,)),
        normed,
        "ADD_NORM_LINEARS",
    ),
    "add_norm_linears, nothing added": Case(
        lambda x, n, w, b: joined(all_of(add_norm_linears(x, None, n, [w], [b], 1e-3))),
        lambda x, n, w, b: joined(exact_add_norm_linears(x, None, n, [w], [b])),
        ((2, 3, INNER), (INNER,), (4, INNER), (4,)),
        normed,
        "ADD_NORM_LINEARS",
    ),
}


BREAKABLE = ["glu_linear", "norm_linears, three", *(name for name in CASES if "add" in name)]


@pytest.mark.parametrize("driver", [*EVERY_FIRST, *EVERY_HIGHER], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_under_driver(name: str, driver: Driver) -> None:
    assert error(CASES[name], driver) < TOLERANCE


@pytest.mark.parametrize(("name", "driver"), spoilt(BREAKABLE, EVERY_FIRST))
def test_a_wrong_backward_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert error(CASES[name], driver) > 0.1


@pytest.mark.parametrize(("name", "driver"), spoilt(BREAKABLE, EVERY_HIGHER))
def test_a_wrong_formula_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(CASES[name], "formula", monkeypatch)
    assert error(CASES[name], driver) > 0.1


# Dtypes


def gradients(
    f: Callable[..., Any], grads: Sequence[Tensor], *tensors: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients given these gradients of theirs."""
    xs = [x.detach().clone().requires_grad_() for x in tensors]
    outs = f(*xs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    pairs = [g.to(out.dtype) for g, out in zip(grads, outs, strict=True)]
    return [out.detach() for out in outs], list(torch.autograd.grad(outs, xs, pairs))


# dtypes: of activations; of weights and bias; of the norm's weight
DTYPES = [(BF16, BF16, FP32), (FP16, FP16, FP32), (FP32, FP32, FP32), (BF16, FP32, BF16)]
SHAPES = [(1, 1), (5, 123), (2, 3, 64)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "wide", "_"), DTYPES)
def test_glu_linear_rounds_no_more_than_its_composition(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype, _: torch.dtype
) -> None:
    gate, up = (random(*shape, seed=i, dtype=dtype) for i in range(2))
    weight, bias = random(9, shape[-1], seed=2, dtype=wide), random(9, seed=3, dtype=wide)
    g = [random(*shape[:-1], 9, seed=4, dtype=wide)]
    got = gradients(partial(glu_linear, activation=name), g, gate, up, weight, bias)
    wanted = gradients(
        lambda a, b, w, c: cast(ACTIVATIONS[name](a, b), w, c), g, gate, up, weight, bias
    )
    assert torch.equal(got[0][0], wanted[0][0])
    assert torch.equal(got[1][2], wanted[1][2])  # the weight's: h is recomputed to the bit
    wider = (t.double() for t in (gate, up, weight, bias))
    exact = gradients(partial(exact_glu_linear, name=name), [g[0].double()], *wider)
    for mine, other, right in zip(got[1], wanted[1], exact[1], strict=True):
        no_worse(mine, other, right)


def no_worse(mine: Tensor, other: Tensor, right: Tensor, more: float = 0.0) -> None:
    """No worse against fp64 than the composition in the same dtypes, up to one rounding of the
    largest entry and `more`. NaN never passes."""
    assert mine.dtype == other.dtype
    assert mine.shape == right.shape
    allowed = (other.double() - right).abs().max() + torch.finfo(mine.dtype).eps * right.abs().max()
    assert float((mine.double() - right).abs().max()) <= float(allowed) + more


def roundings(
    x: Tensor,
    norm_weight: Tensor,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    unit: float,
    eps: float = 1e-3,
) -> tuple[float, float]:
    """How far rounding moves the gradients of x and of norm_weight before their terms cancel.

    The gradient of h is rounded after each of two products, by half a unit each, and consists of
    fp32 sums over all outputs in any order. In dx = r (v - u mean(v u)), with u = x r and v = dh w,
    the terms cancel, almost entirely if D = 1.
    """
    x, w = x.double(), norm_weight.double()
    pairs = [(g.double(), weight.double()) for g, weight in zip(grads, weights, strict=True)]
    of_dh = unit * torch.stack([(g @ weight).abs() for g, weight in pairs]).sum(0)
    terms = torch.stack([g.abs() @ weight.abs() for g, weight in pairs]).sum(0)
    of_dh += torch.finfo(FP32).eps / 2 * sum(len(weight) for weight in weights) * terms
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    u, v = (x * r).abs(), of_dh * w.abs()
    of_x = r * (v + u * (v * u).mean(-1, keepdim=True))
    of_weight = (of_dh * u).flatten(0, -2).sum(0)
    return float(of_x.max()), float(of_weight.max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "wide", "norm"), DTYPES)
def test_norm_linears_rounds_no_more_than_its_composition(
    shape: tuple[int, ...], dtype: torch.dtype, wide: torch.dtype, norm: torch.dtype
) -> None:
    x, n = random(*shape, dtype=dtype), random(shape[-1], seed=1, dtype=norm)
    sizes = (70, 5, 3)
    weights = [random(o, shape[-1], seed=2 + o, dtype=wide) for o in sizes]
    biases = [random(o, seed=20 + o, dtype=wide) for o in sizes]
    g = [random(*shape[:-1], o, seed=40 + o, dtype=wide) for o in sizes]

    def ours(x: Tensor, n: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        return norm_linears(x, n, leaves[:3], leaves[3:], 1e-3)

    def composed(x: Tensor, n: Tensor, *leaves: Tensor) -> list[Tensor]:
        h = rms_norm(x, n, 1e-3)
        return [cast(h, w, b) for w, b in zip(leaves[:3], leaves[3:], strict=True)]

    leaves = (x, n, *weights, *biases)
    got, wanted = gradients(ours, g, *leaves), gradients(composed, g, *leaves)
    joined = gradients(partial(composed_joined, wide=wide), g, *leaves)
    exact = gradients(
        lambda x, n, *leaves: exact_norm_linears(x, n, leaves[:3], leaves[3:]),
        [t.double() for t in g],
        *(t.double() for t in leaves),
    )
    for mine, other in zip((*got[0], *got[1][2:5]), (*wanted[0], *joined[1][2:5]), strict=True):
        assert torch.equal(mine, other)
    more = (*roundings(x, n, weights, g, torch.finfo(wide).eps), *(0.0,) * 3, *(0.0,) * 3)
    for i, (mine, leaf) in enumerate(zip(got[1], leaves, strict=True)):
        assert mine.dtype == leaf.dtype
        other = joined[1][i] if 2 <= i < 5 else wanted[1][i]
        no_worse(mine, other, exact[1][i], more[i])


def composed_joined(x: Tensor, n: Tensor, *leaves: Tensor, wide: torch.dtype) -> list[Tensor]:
    """Three linear layers as above, of which the last two share products if they are narrow."""
    h = rms_norm(x, n, 1e-3).to(wide)
    if 2 * leaves[1].shape[0] > x.shape[-1]:
        return [F.linear(h, w, b) for w, b in zip(leaves[:3], leaves[3:], strict=True)]
    pair = F.linear(h, torch.cat(leaves[1:3]), torch.cat(leaves[4:6]))
    first = leaves[1].shape[0]
    return [F.linear(h, leaves[0], leaves[3]), pair[..., :first], pair[..., first:]]


def test_bias_gradients_are_summed_in_fp32() -> None:
    """4,097 ones: a sum in bf16 would stop at 256."""
    rows = 4097
    gate, weight = torch.zeros(rows, 2, dtype=BF16), torch.zeros(1, 2, dtype=BF16)
    bias = torch.zeros(1, requires_grad=True)
    glu_linear(gate, gate, weight, bias).sum().backward()
    assert bias.grad is not None
    assert (bias.grad.item(), bias.grad.dtype) == (rows, FP32)
    other = torch.zeros(1, requires_grad=True)
    norm_linears(gate, torch.ones(2), [weight], [other])[0].sum().backward()
    assert other.grad is not None
    assert other.grad.item() == rows


# Saved tensors, and the work of backward


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> list[Tensor]:
    return [random(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def test_backward_keeps_what_it_is_given() -> None:
    gate, up, weight, bias = parameters((64, 32), (64, 32), (16, 32), (16,))
    own = (gate, up, weight, bias)
    assert saved_bytes(lambda: glu_linear(*own), *own) == 0
    assert (
        saved_bytes(lambda: cast(swiglu(gate, up), weight, bias), *own) == 64 * 32 * 2
    )  # the test can fail

    x, first, second = parameters((64, 32), (16, 32), (8, 32))
    norm = torch.ones(32, requires_grad=True)
    own, row = (x, norm, first, second), 64 * 4  # one fp32 number per row
    assert saved_bytes(lambda: norm_linears(x, norm, [first, second]), *own) == row

    def composed() -> list[Tensor]:
        h = rms_norm(x, norm)
        return [cast(h, weight, None) for weight in (first, second)]

    assert saved_bytes(composed, *own) == row + 64 * 32 * 2

    # with a residual only the sum, which is also an output; without one nothing more
    more = parameters((64, 32), (64, 32))[1]
    kept = saved_bytes(lambda: add_norm_linears(x, more, norm, [first, second]), *own, more)
    assert kept == row + x.nbytes
    kept = saved_bytes(lambda: add_norm_linears(x + more, None, norm, [first]), *own, more)
    assert kept == row + x.nbytes
    assert saved_bytes(lambda: add_norm_linears(x, None, norm, [first, second]), *own) == row


def test_nothing_extra_lives_after_a_forward(allocations_in: Any) -> None:
    gate, up, weight, norm = parameters((64, 32), (64, 32), (16, 32), (32,))
    with allocations_in(gate, up, weight, norm) as allocations:
        y = glu_linear(gate, up, weight)
        (z,) = norm_linears(gate, norm, [weight])
        assert allocations.living() == y.nbytes + z.nbytes + 64 * 4
    with allocations_in(gate, up, weight, norm) as allocations:
        (y,), total = add_norm_linears(gate, None, norm, [weight])
        assert allocations.living() == y.nbytes + 64 * 4
        assert total.data_ptr() == gate.data_ptr()
    with allocations_in(gate, up, weight, norm) as allocations:
        (y,), total = add_norm_linears(gate, up, norm, [weight])
        assert allocations.living() == y.nbytes + total.nbytes + 64 * 4


def seen_in_backward(
    f: Callable[..., Any],
    tensors: list[Tensor],
    learn: str,
    monkeypatch: pytest.MonkeyPatch,
    allocations_in: Any,
) -> list[str]:
    """The operations inside our operators in a backward to the tensors with a 1 in `learn`."""
    ops: list[str] = []
    for module, host in (
        (gated, gated.glu_linear_gradients),
        (normed, normed.norm_linears_gradients),
    ):

        def watched(*args: Any, host: Any = host) -> Any:
            with allocations_in() as allocations:
                out = host(*args)
            ops.extend(allocations.ops)
            return out

        monkeypatch.setattr(module, "_op", watched)
    leaves = [t.detach().requires_grad_(c == "1") for t, c in zip(tensors, learn, strict=True)]
    joined(f(*leaves)).square().sum().backward()
    for leaf, c in zip(leaves, learn, strict=True):
        assert (leaf.grad is not None) == (c == "1")
    return ops


# gate, up, weight, bias -> products, recomputed activations, their derivatives
GLU_WORK = {
    "1111": (2, 2, 1),  # silu(gate) is in the gradient of up as well
    "1100": (1, 1, 1),
    "1000": (1, 1, 1),
    "0010": (1, 1, 0),
    "0011": (1, 1, 0),
    "0001": (0, 0, 0),
}


@pytest.mark.parametrize("learn", GLU_WORK)
def test_glu_linear_leaves_out_what_is_frozen(
    learn: str, monkeypatch: pytest.MonkeyPatch, allocations_in: Any
) -> None:
    tensors = parameters((6, 8), (6, 8), (3, 8), (3,))
    ops = seen_in_backward(
        lambda *ts: [glu_linear(*ts)], tensors, learn, monkeypatch, allocations_in
    )
    counts = (ops.count("aten.mm.default"), *map(ops.count, ("aten.silu.default", SILU_BACKWARD)))
    assert counts == GLU_WORK[learn]


SILU_BACKWARD = "aten.silu_backward.default"
# x, norm, weights, bias -> products, products added to these, recomputed norms. The last two of the
# weights are narrow, and share a product if both need a gradient
NORM_WORK = {
    "11" + "111" + "1": (3, 1, 1),
    "11" + "010" + "0": (2, 1, 1),
    "11" + "011" + "0": (2, 1, 1),
    "10" + "000" + "0": (1, 1, 0),
    "01" + "000" + "0": (1, 1, 0),
    "00" + "101" + "1": (2, 0, 1),
    "00" + "111" + "1": (2, 0, 1),
    "00" + "000" + "1": (0, 0, 0),
}


@pytest.mark.parametrize("learn", NORM_WORK)
def test_norm_linears_leaves_out_what_is_frozen(
    learn: str, monkeypatch: pytest.MonkeyPatch, allocations_in: Any
) -> None:
    tensors = parameters((6, 8), (8,), (5, 8), (3, 8), (3, 8), (3,))
    ops = seen_in_backward(
        lambda x, n, q, k, v, b: norm_linears(x, n, [q, k, v], [None, b, None]),
        *(tensors, learn, monkeypatch, allocations_in),
    )
    names = ("aten.mm.default", "aten.addmm_.default", "aten.rsqrt.default")
    assert tuple(map(ops.count, names)) == NORM_WORK[learn]


def test_the_norm_is_gone_before_its_gradient_is_made(
    monkeypatch: pytest.MonkeyPatch, allocations_in: Any
) -> None:
    """Two [rows, D] live at a time: the gradients of the norm's output and of x."""
    x, norm, *weights = parameters((64, 32), (32,), (4, 32), (4, 32))
    grads = [random(64, 4, seed=i, dtype=BF16) for i in range(2)]
    _, r = normed._forward(x, norm, *weights, None, None, eps=1e-6, triton=False)
    living: list[int] = []
    right = normed.RMS_NORM.backward

    with torch.no_grad(), allocations_in(x, norm, *weights, *grads) as allocations:

        def watched(*args: Any, **static: Any) -> Any:
            living.append(allocations.living())
            return right(*args, **static)

        monkeypatch.setattr(
            normed, "RMS_NORM", dataclasses.replace(normed.RMS_NORM, backward=watched)
        )
        normed.norm_linears_gradients(
            grads, None, x, norm, weights, r[0], 1e-6, False, True, [True, True, True]
        )
    # it, the gradients of the weights, and the two joined gradients that it comes from
    assert living == [64 * 32 * 2 + 2 * 4 * 32 * 2 + 64 * 8 * 2]


def test_an_unused_output_counts_as_zero() -> None:
    x, norm, *weights = parameters((6, 8), (8,), (5, 8), (3, 8), dtype=torch.float64)
    leaves = (x, norm, *weights)
    got = torch.autograd.grad(norm_linears(x, norm, weights, eps=1e-3)[1].sum(), leaves)
    second = exact_norm_linears(x, norm, weights[1:], [None])[0]
    wanted = torch.autograd.grad(second.sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
    )


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
def test_unused_outputs_beside_a_sum_count_as_zero(used: list[int], summed: bool) -> None:
    x, more, norm, *weights = parameters((6, 8), (6, 8), (8,), (5, 8), (3, 8), dtype=torch.float64)
    leaves = (x, more, norm, *weights) if summed else (x, norm, *weights)
    given = more if summed else None
    outs = all_of(add_norm_linears(x, given, norm, weights, eps=1e-3))
    plain = exact_add_norm_linears(x, given, norm, weights, [None, None])
    got, wanted = (
        torch.autograd.grad(sum(ys[i].sin().sum() for i in used), leaves, materialize_grads=True)
        for ys in (outs, plain)
    )
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
    )


SOME = ["1000", "0010", "0001", "1001", "0011"]  # of x, residual, norm_weight, weight


@pytest.mark.parametrize(
    ("summed", "learn"),
    [*((False, learn) for learn in SOME), *((True, learn) for learn in (*SOME, "0100", "0110"))],
)
def test_gradients_of_some_beside_a_sum(summed: bool, learn: str) -> None:
    tensors = parameters((6, 8), (6, 8), (8,), (5, 8), dtype=torch.float64)
    x, more, norm, weight = (
        t.detach().requires_grad_(c == "1") for t, c in zip(tensors, learn, strict=True)
    )
    given = more if summed else None
    outs = all_of(add_norm_linears(x, given, norm, [weight], eps=1e-3))
    plain = exact_add_norm_linears(x, given, norm, [weight], [None])
    leaves = [t for t in (x, given, norm, weight) if t is not None and t.requires_grad]
    got, wanted = (torch.autograd.grad(joined(ys).sin().sum(), leaves) for ys in (outs, plain))
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
    )


@pytest.mark.parametrize("summed", [True, False])
def test_a_compiled_region_may_end_with_the_sum(summed: bool) -> None:
    """Without a residual the sum is a view of an input, which compilers treat specially."""
    x, more, norm, weight = parameters((6, 8), (6, 8), (8,), (5, 8), dtype=torch.float64)
    given = more if summed else None

    def region(x: Tensor, norm: Tensor, weight: Tensor) -> list[Tensor]:
        return all_of(add_norm_linears(x, given, norm, [weight], eps=1e-3))

    def loss(f: Callable[..., list[Tensor]]) -> Tensor:
        return joined(f(x, norm, weight)).sin().sum()

    torch._dynamo.reset()
    leaves = (x, norm, weight)
    got = torch.autograd.grad(
        loss(torch.compile(region, backend="aot_eager", fullgraph=True)), leaves
    )
    wanted = torch.autograd.grad(loss(region), leaves)
    torch.testing.assert_close(
        got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
    )


# The graphs of compilers and policies


def graphs_of(f: Callable[..., Tensor], *tensors: Tensor) -> tuple[Any, Any]:
    """The forward and backward graphs, partitioned as Inductor does."""
    graphs: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., Any]:
        def compiler(graph: Any, _: Any) -> Any:
            graphs[name] = graph.graph
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True)(*tensors).backward()
    return graphs["forward"], graphs["backward"]


def calls(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def shapes_out(graph: Any) -> list[tuple[int, ...]]:
    """The shapes of a graph's outputs that are not inputs."""
    (out,) = (node for node in graph.nodes if node.op == "output")
    nodes = [node for node in out.args[0] if node is not None and node.op != "placeholder"]
    return [tuple(node.meta["val"].shape) for node in nodes]


def test_a_compiler_sees_the_forwards_matmuls_and_keeps_no_h() -> None:
    """Even though Inductor merges equal operations, and keeping h would be cheaper."""
    gate, up, weight, bias = parameters((64, 32), (64, 32), (16, 32), (16,), dtype=FP32)
    forward, backward = graphs_of(
        lambda *ts: glu_linear(*ts).square().sum(), gate, up, weight, bias
    )
    assert [name for name in calls(forward) if "mm" in name] == ["aten.addmm.default"]
    assert "nanovision.glu_linear_backward.default" in calls(backward)
    assert (64, 32) not in shapes_out(forward)
    forward, _ = graphs_of(
        lambda *ts: cast(swiglu(*ts[:2]), *ts[2:]).square().sum(), gate, up, weight, bias
    )
    assert (64, 32) in shapes_out(forward)  # the test can fail

    norm = torch.ones(32, requires_grad=True)
    weights = parameters((16, 32), (8, 32), (4, 32), dtype=FP32)

    def ours(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
        return joined(norm_linears(x, norm, weights, [None, None, bias[:4]])).square().sum()

    def composed(x: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
        h = rms_norm(x, norm)
        return joined([cast(h, weight, None) for weight in weights]).square().sum()

    forward, backward = graphs_of(ours, gate, norm, *weights)
    products = [name for name in calls(forward) if "mm" in name]
    assert products == ["aten.mm.default", "aten.mm.default", "aten.addmm.default"]
    assert "nanovision.norm_linears_backward.default" in calls(backward)
    assert (64, 32) not in shapes_out(forward)
    assert (64, 32) in shapes_out(graphs_of(composed, gate, norm, *weights)[0])


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_forward_is_one_matmul_a_weight(lead: tuple[int, ...], allocations_in: Any) -> None:
    gate, up, norm = parameters((*lead, 4, 8), (*lead, 4, 8), (8,))
    q, k, bias = parameters((6, 8), (3, 8), (3,))
    with allocations_in() as allocations:
        glu_linear(gate, up, q)
        norm_linears(gate, norm, [q, k], [None, bias])
    products = [name for name in allocations.ops if "mm" in name]
    assert products == ["aten.mm.default", "aten.mm.default", "aten.addmm.default"]


@pytest.mark.parametrize("keeps", [True, False])
def test_a_checkpoint_may_keep_the_matmuls(keeps: bool, allocations_in: Any) -> None:
    tensors = parameters((64, 32), (64, 32), (16, 32), dtype=FP32)
    norm = torch.ones(32, requires_grad=True)

    def f(gate: Tensor, up: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        return joined([glu_linear(gate, up, weight), *norm_linears(up, norm, [weight])])

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        product = keeps and op == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE

    wanted = torch.autograd.grad(f(*tensors, norm).square().sum(), [*tensors, norm])
    context = partial(create_selective_checkpoint_contexts, policy)
    with allocations_in() as allocations:
        out = checkpoint(f, *tensors, norm, use_reentrant=False, context_fn=context)
        got = torch.autograd.grad(out.square().sum(), [*tensors, norm])
    for mine, other in zip(got, wanted, strict=True):
        assert torch.equal(mine, other)
    assert allocations.ops.count("aten.mm.default") == (2 if keeps else 4)


def test_compiled_gives_the_same_bits() -> None:
    x, norm, bias = parameters((16, 8), (8,), (24,))
    gate, up, down = parameters((24, 8), (24, 8), (8, 24))

    def block(x: Tensor, norm: Tensor, *leaves: Tensor) -> Tensor:
        gate, up, down, bias = leaves
        halves = norm_linears(x, norm, [gate, up], [None, bias])
        return x + glu_linear(*halves, down)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    leaves, g = (x, norm, gate, up, down, bias), [random(16, 8, seed=9)]
    got, wanted = gradients(compiled, g, *leaves), gradients(block, g, *leaves)
    for mine, other in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(mine, other)


# Shapes, errors


def test_dtype_and_shape_on_meta() -> None:
    x = torch.empty(2, 4, 6, dtype=BF16, device="meta", requires_grad=True)
    norm = torch.empty(6, device="meta", requires_grad=True)
    weight = torch.empty(5, 6, device="meta", dtype=FP16, requires_grad=True)
    for out in (glu_linear(x, x, weight), *norm_linears(x, norm, [weight, weight])):
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 5), FP16, "meta")
        grads = torch.autograd.grad(out.sum(), (x, weight), retain_graph=True)
        for leaf, g in zip((x, weight), grads, strict=True):
            assert (g.shape, g.dtype) == (leaf.shape, leaf.dtype)


def test_strides_are_as_a_compiler_is_told() -> None:
    """The results are contiguous, whatever the arguments' strides."""
    turned = random(8, 6, dtype=BF16).t()
    g, weight, norm = random(6, 5, dtype=FP32), random(5, 8, dtype=FP32), torch.ones(8)
    narrow = random(4, 8, dtype=FP32)
    r = torch.ones(6, 1)
    needs = [True, True, True]
    for op, args in (
        (gated._op, (g, turned, turned, weight, "swiglu", False, True, True)),
        (
            normed._op,
            ([g, g], None, turned, norm, [weight, weight], r, 1e-6, False, True, needs),
        ),
        (
            normed._op,
            (
                [g[:, :4], g[:, :4]],
                turned,
                turned,
                norm,
                [narrow, narrow],
                r,
                1e-6,
                False,
                True,
                needs,
            ),
        ),
    ):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            told = op(*tree_map_only(Tensor, mode.from_tensor, args))
        for mine, fake in zip(op(*args), told, strict=True):
            assert (mine.shape, mine.dtype) == (fake.shape, fake.dtype)
            assert mine.stride() == fake.stride()


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (6,)], ids=str)
def test_no_rows_and_one_row(shape: tuple[int, ...]) -> None:
    x, norm, weight, bias = parameters(shape, (6,), (5, 6), (5,), dtype=torch.float64)
    for ours, plain in (
        *(
            (add_norm_linears(x, more, norm, [weight], [bias], 1e-3)[0][0] * 1.0, y)
            for more in (x, None)
            for y in exact_add_norm_linears(x, more, norm, [weight], [bias])[:1]
        ),
        (glu_linear(x, x, weight, bias), exact_glu_linear(x, x, weight, bias)),
        (
            norm_linears(x, norm, [weight], [bias], 1e-3)[0] * 1.0,
            exact_norm_linears(x, norm, [weight], [bias])[0],
        ),
    ):
        assert ours.shape == (*shape[:-1], 5)
        torch.testing.assert_close(
            ours, plain, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
        )
        got, wanted = (
            torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True)
            for y in (ours, plain)
        )
        torch.testing.assert_close(
            got, wanted, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
        )


ONES = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: glu_linear(ONES, ONES[:2], w), "they must be alike"),
        (lambda w: glu_linear(ONES, ONES.bfloat16(), w), "they must be alike"),
        (lambda w: glu_linear(ONES, ONES, w, activation="relu"), "must be .swiglu. or .geglu."),
        (lambda w: glu_linear(ONES[:, :5], ONES[:, :5], w), r"weight must be \[O, I\] for gate"),
        (lambda w: glu_linear(ONES, ONES, w, torch.ones(2)), r"bias must have shape \[5\]"),
        (lambda w: glu_linear(ONES, ONES, w.to("meta")), "weight is on meta"),
        (lambda w: norm_linears(ONES, torch.ones(6), []), "needs at least one weight"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w], [None, None]), "1 weights and 2 biases"),
        (lambda w: norm_linears(ONES, torch.ones(5), [w]), r"norm_weight must have shape \[6\]"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w, w.t()]), r"weights\[1\] must be \[O, I\]"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w, w.half()]), "must have one dtype"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w], [torch.ones(6)]), r"biases\[0\] must"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w.long()]), r"weights\[0\] must be floating"),
        (lambda w: norm_linears(ONES, torch.ones(6), [w], eps=-1.0), "eps must be >= 0"),
        (
            lambda w: add_norm_linears(ONES, ONES[:2], torch.ones(6), [w]),
            r"add_norm_linears: x is .* must be alike",
        ),
        (lambda w: add_norm_linears(ONES, ONES.half(), torch.ones(6), [w]), "must be alike"),
        (lambda w: add_norm_linears(ONES, ONES.to("meta"), torch.ones(6), [w]), "is on meta"),
        (lambda w: add_norm_linears(ONES, None, torch.ones(6), []), "add_norm_linears: needs a"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 6))
