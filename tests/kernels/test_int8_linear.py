"""int8_linear: values, straight-through activations, what is saved, vmap, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from kernels import int8_linear
from tests.kernels.drivers import saved_by
from tests.rounding import ulps


def layer(out: int, inner: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (out, inner), generator=generator, dtype=torch.int8)
    return weight, torch.rand(out, 1, generator=generator) * 0.01 + 0.001


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = [((1, 1), 1), ((7, 13), 5), ((2, 3, 64), 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_weight_only_against_fp64(shape: tuple[int, ...], out: int, dtype: torch.dtype) -> None:
    weight, scale = layer(out, shape[-1])
    x, bias = rand(*shape, dtype=dtype), rand(out)
    full = weight.double() * scale.double()
    x.requires_grad_()
    y = int8_linear(x, weight, scale, bias)
    assert y.dtype == dtype
    wanted = x.double() @ full.mT + bias.double()
    # sums of I terms in fp32, and three roundings to dtype (sum, scaled sum, with bias)
    size = x.double().abs() @ full.abs().mT + bias.abs()
    slack = 3 * torch.finfo(dtype).eps + shape[-1] * torch.finfo(torch.float32).eps
    assert ((y.double() - wanted).abs() <= slack * size).all()

    g = rand(*y.shape, dtype=dtype, seed=2)
    (dx,) = torch.autograd.grad(y, x, g)
    wanted = g.double() @ full
    size = g.double().abs() @ full.abs()
    assert dx.dtype == dtype
    slack = 3 * torch.finfo(dtype).eps + out * torch.finfo(torch.float32).eps
    assert ((dx.double() - wanted).abs() <= slack * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out"), [*SHAPES, ((20, 1200), 24)], ids=str)
def test_dynamic_activations_are_exact_integers(
    shape: tuple[int, ...], out: int, dtype: torch.dtype
) -> None:
    weight, scale = layer(out, shape[-1])
    x = rand(*shape, dtype=dtype)
    if x.numel() > 1:
        x.view(-1, shape[-1])[0] = 0.0  # a row of zeros stays zero
    y = int8_linear(x, weight, scale, activations="dynamic")
    step = x.abs().amax(-1, keepdim=True).float() / 127
    step[step == 0] = 1.0
    q = (x.float() / step).round()
    assert q.abs().max() <= 127
    exact = (q.double() @ weight.double().mT) * step.double() * scale.squeeze(1).double()
    tolerance = 0.51 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= tolerance * exact.abs()).all()


def test_dynamic_gradient_is_straight_through() -> None:
    weight, scale = layer(5, 13)
    x, g = rand(7, 13, dtype=torch.float64).requires_grad_(), rand(7, 5, dtype=torch.float64)
    (through,) = torch.autograd.grad(int8_linear(x, weight, scale, activations="dynamic"), x, g)
    (exact,) = torch.autograd.grad(int8_linear(x, weight, scale), x, g)
    torch.testing.assert_close(through, exact, rtol=ulps(torch.float64, 1000), atol=0)


def test_scale_may_be_flat() -> None:
    weight, scale = layer(5, 13)
    x = rand(7, 13)
    assert torch.equal(int8_linear(x, weight, scale), int8_linear(x, weight, scale.squeeze(1)))


# Memory


OUT, INNER = 64, 96


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("driver", ["autograd", "func.grad", "func.grad twice"])
def test_no_float_weight_is_kept(driver: str, activations: str | None, allocations_in: Any) -> None:
    """Between forward and backward the output lives, and no copy of the weight."""
    weight, scale = layer(OUT, INNER)
    x = rand(8, INNER)
    seen: list[int] = []

    def loss(x: Tensor) -> Tensor:
        y = int8_linear(x * 1, weight, scale, activations=activations)
        seen.append(allocations.living())
        return torch.sin(y).sum()

    with allocations_in(weight, scale, x) as allocations:
        if driver == "autograd":
            loss(x.requires_grad_()).backward()
        elif driver == "func.grad":
            torch.func.grad(loss)(x)
        else:
            torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
    float_weight = OUT * INNER * 2  # even in 16 bits
    # the output and x * 1 live, possibly at two functorch levels
    assert 0 < seen[0] <= 4 * 8 * (OUT + 2 * INNER) < float_weight


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_no_float_weight_is_kept_compiled(activations: str | None) -> None:
    """The tensors that the compiled forward saves for the compiled backward."""
    weight, scale = layer(OUT, INNER)
    handed_on: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        values = [node.meta["val"] for node in outputs if node is not None]
        handed_on.extend((value.dtype, tuple(value.shape)) for value in values)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: int8_linear(x, weight, scale, activations=activations),
        backend=aot_autograd(fw_compiler=keep, bw_compiler=lambda g, _: make_boxed_func(g)),
        fullgraph=True,
    )
    compiled(rand(8, INNER).requires_grad_()).sum().backward()
    assert (torch.float32, (8, OUT)) in handed_on
    assert (torch.int8, (OUT, INNER)) in handed_on
    weights = [d for d, shape in handed_on if shape in ((OUT, INNER), (INNER, OUT))]
    assert set(weights) == {torch.int8}


def test_the_count_would_see_a_float_weight(allocations_in: Any) -> None:
    weight, scale = layer(OUT, INNER)
    x = rand(8, INNER).requires_grad_()
    with allocations_in(weight, scale, x) as allocations:
        y = (x @ weight.to(x.dtype).mT) * scale.squeeze(1)
        assert allocations.living() >= OUT * INNER * 4
    assert y.requires_grad


def test_saved_tensors_are_the_int8_weight_and_its_scale() -> None:
    weight, scale = layer(OUT, INNER)
    x = rand(8, INNER, dtype=torch.bfloat16).requires_grad_()
    saved = saved_by(lambda: int8_linear(x, weight, scale, activations="dynamic"))
    storages = {t.untyped_storage()._cdata for t in saved}
    assert storages == {weight.untyped_storage()._cdata, scale.untyped_storage()._cdata}


# Transforms beyond those of test_drivers


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_weights_may_be_batched(activations: str | None) -> None:
    layers = [layer(5, 13, seed) for seed in range(3)]
    weights, scales = (torch.stack(column) for column in zip(*layers, strict=True))
    x = rand(3, 7, 13, dtype=torch.float64)

    def loss(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return int8_linear(x, weight, scale, activations=activations).square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(x, weights, scales)
    shared = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(x[0], weights, scales)
    for i in range(3):
        torch.testing.assert_close(got[i], torch.func.grad(loss)(x[i], weights[i], scales[i]))
        torch.testing.assert_close(shared[i], torch.func.grad(loss)(x[0], weights[i], scales[i]))


def test_dynamic_under_jvp_and_its_nesting() -> None:
    """The tangent is the straight-through one, as in backward, to any depth."""
    weight, scale = layer(5, 13)
    x, d = rand(7, 13, dtype=torch.float64), rand(7, 13, dtype=torch.float64, seed=3)

    def f(x: Tensor) -> Tensor:
        return int8_linear(x, weight, scale, activations="dynamic")

    value, tangent = torch.func.jvp(f, (x,), (d,))
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(tangent, int8_linear(d, weight, scale))

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(f, (x,), (torch.sin(x),))[1]

    inner, outer = torch.func.jvp(slope, (x,), (d,))
    torch.testing.assert_close(inner, int8_linear(torch.sin(x), weight, scale))
    torch.testing.assert_close(outer, int8_linear(torch.cos(x) * d, weight, scale))


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_compiled_and_meta(activations: str | None) -> None:
    weight, scale = layer(40, 64)
    x = rand(2, 3, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(int8_linear, backend="aot_eager", fullgraph=True)
    got = compiled(x, weight, scale, activations=activations)
    torch.testing.assert_close(got, int8_linear(x, weight, scale, activations=activations))
    meta = int8_linear(x.to("meta"), weight.to("meta"), scale.to("meta"), activations=activations)
    assert (meta.shape, meta.dtype) == (got.shape, got.dtype)


def test_no_rows() -> None:
    weight, scale = layer(5, 13)
    for activations in (None, "dynamic"):
        x = torch.zeros(0, 13, requires_grad=True)
        y = int8_linear(x, weight, scale, activations=activations)
        assert y.shape == (0, 5)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 13)}, "weight must be int8"),
        ({"weight": torch.zeros(5, dtype=torch.int8)}, "weight must be int8"),
        ({"x": torch.zeros(7, 12)}, r"x must be floating point \[..., 13\]"),
        ({"x": torch.zeros(7, 13, dtype=torch.int8)}, "x must be floating point"),
        ({"scale": torch.zeros(4)}, r"scale must be floating point \[5\] or \[5, 1\]"),
        ({"scale": torch.ones(5, requires_grad=True)}, "scale requires a gradient"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[5\]"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta"),
        ({"activations": "static"}, "activations must be None or \"dynamic\", got 'static'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    weight, scale = layer(5, 13)
    arguments: dict[str, Any] = {"x": torch.zeros(7, 13), "weight": weight, "scale": scale}
    call: Callable[..., Tensor] = int8_linear
    with pytest.raises(ValueError, match=message):
        call(**{**arguments, **change})


@pytest.mark.parametrize("activations", [None, "dynamic"])
def test_fp16_is_scaled_before_it_is_rounded(activations: str | None) -> None:
    """Sums of codes far beyond fp16's range, and gradients that underflow in fp16 once scaled."""
    codes = torch.full((4, 2048), 127, dtype=torch.int8)
    scale = torch.full((4, 1), 1e-5)
    x = torch.ones(3, 2048, dtype=torch.float16, requires_grad=True)
    y = int8_linear(x, codes, scale, activations=activations)
    torch.testing.assert_close(y.detach(), torch.full_like(y, 2048 * 127e-5))
    grad = torch.full_like(y, 1e-3)
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dx, torch.full_like(dx, 4 * float(grad[0, 0]) * 127e-5))


def test_the_output_may_be_changed_in_place() -> None:
    codes, scale = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    x = torch.randn(2, 3, 8, requires_grad=True)
    for activations in (None, "dynamic"):
        y = int8_linear(x, codes, scale, activations=activations)
        y += 1
        y.sum().backward()
