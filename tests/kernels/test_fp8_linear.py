"""fp8_linear: errors against fp64, scales, saved and computed tensors, drivers, compilers."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jacrev, jvp, vjp, vmap

from kernels import fp8_linear
from kernels.quantised import fp8_products
from kernels.runtime import dispatch
from tests.kernels import drivers
from tests.kernels.drivers import directions, examples, random, saved_by, scalar
from tests.rounding import ulps

module = importlib.import_module("kernels.quantised.fp8_linear")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SCALINGS = ["tensor", "row"]
SHAPES = [((1, 16), 16), ((21, 48), 32), ((2, 3, 160), 64)]


def rounded(x: Tensor, format: torch.dtype, dim: int | None) -> Tensor:
    """x to float8 and back, divided in fp32: ratios of 16-bit numbers are often ties."""
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = amax.float() / torch.finfo(format).max
    return (x.float() * (1 / scale)).to(format).double() * scale.double()


def floors(x: Tensor, format: torch.dtype, dim: int | None) -> Tensor:
    """Half a step between the smallest numbers of the format, at the scale of x: the error bound
    of entries too small for a relative one."""
    amax = x.abs().max() if dim is None else x.abs().amax(dim, keepdim=True)
    step = torch.finfo(format).smallest_normal * torch.finfo(format).eps
    return (amax.double() / torch.finfo(format).max * step / 2).expand(x.shape)


def error_of_product(a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
    """The largest error of a b^T if those of a and b are within da and db."""
    return da @ b.abs().mT + a.abs() @ db.mT + da @ db.mT


def layer(
    shape: tuple[int, ...], out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of y; sizes over eleven powers of two."""

    def wide(*shape: int, seed: int) -> Tensor:
        return random(*shape, seed=seed) * 2.0 ** random(*shape, seed=seed + 1).mul(2).round()

    x, weight = wide(*shape, seed=0) * 1e3, wide(out, shape[-1], seed=2) * 1e-5
    bias, g = random(out, seed=4), wide(*shape[:-1], out, seed=5) * 1e-7
    return tuple(t.to(dtype) for t in (x, weight, bias, g))  # type: ignore[return-value]


def outputs(scaling: str, g: Tensor, *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    y = fp8_linear(*leaves, scaling=scaling)
    return [y.detach(), *torch.autograd.grad(y, leaves, g)]


# Numbers


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=str)
def test_within_the_errors_of_the_formats(
    shape: tuple[int, ...], out: int, dtype: torch.dtype, scaling: str
) -> None:
    """Each operand is within a relative 2^-4 (e4m3) or 2^-3 (e5m2), or half a smallest step, which
    bounds the errors of products. Against the definition, up to the rounding of sums.
    """
    x, weight, bias, g = layer(shape, out, dtype)
    y, dx, dw, db = outputs(scaling, g, x, weight, bias)
    assert {t.dtype for t in (y, dx, dw, db)} == {dtype}
    rows, grads = x.flatten(0, -2), g.flatten(0, -2)
    y, dx = y.flatten(0, -2), dx.flatten(0, -2)
    wide, w, wide_g = rows.double(), weight.double(), grads.double()
    row = scaling == "row"

    def bound(t: Tensor, format: torch.dtype, dim: int | None) -> Tensor:
        relative = torch.finfo(format).eps / 2
        return torch.maximum(relative * t.abs(), floors(t, format, dim)).double()

    last, first = (1, 0) if row else (None, None)
    x8, w8, g8 = (rounded(t, f, last) for t, f in ((rows, E4M3), (weight, E4M3), (grads, E5M2)))
    w8_turned = rounded(weight, E4M3, first)
    limits = [
        error_of_product(wide, w, bound(rows, E4M3, last), bound(weight, E4M3, last)),
        error_of_product(wide_g, w.mT, bound(grads, E5M2, last), bound(weight, E4M3, first).mT),
        error_of_product(
            wide_g.mT, wide.mT, bound(grads, E5M2, None).mT, bound(rows, E4M3, None).mT
        ),
    ]
    exact = [wide @ w.mT, wide_g @ w, wide_g.mT @ wide]
    defined = [x8 @ w8.mT, g8 @ w8_turned, (wide_g.mT @ wide) if row else g8.mT @ x8]
    sizes = [
        x8.abs() @ w8.abs().mT + bias.double().abs(),
        g8.abs() @ w8_turned.abs(),
        wide_g.abs().mT @ wide.abs() if row else g8.abs().mT @ x8.abs(),
    ]
    eps, eps32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    lengths = [shape[-1], out, rows.shape[0]]
    got = [y.double(), dx.double(), dw.double()]
    exact[0], defined[0] = exact[0] + bias.double(), defined[0] + bias.double()
    for i, (a, b, c) in enumerate(zip(got, exact, defined, strict=True)):
        # fp32 sums, three scalings, one rounding
        slack = eps * c.abs() + (lengths[i] + 4) * eps32 * sizes[i]
        assert ((a - c).abs() <= slack).all(), float(((a - c).abs() / slack).max())
        assert ((a - b).abs() <= limits[i] + slack).all()
        if len(rows) > 1 and not (row and i == 2):  # of one row, the bias is most of y
            assert (a - b).norm() > 2 * slack.norm()  # it is float8
    torch.testing.assert_close(
        db.double(), wide_g.sum(0), rtol=2 * eps, atol=2 * eps * float(wide_g.abs().sum(0).max())
    )


def test_errors_grow_like_the_root_of_the_length() -> None:
    """Independent errors: the relative error of a sum does not grow with its length."""
    errors = []
    for inner in (64, 1024):
        x, weight = random(64, inner, dtype=torch.float32), random(64, inner, seed=1)
        exact = x.double() @ weight.mT
        error = fp8_linear(x, weight.float()).double() - exact
        errors.append(float(error.norm() / exact.norm()))
    # two operands with uniform errors within 2^-4 each: 2^-4 sqrt(2 / 3) at most
    assert min(errors) > 0.01
    assert max(errors) < 2**-4 * (2 / 3) ** 0.5
    assert 0.8 < errors[0] / errors[1] < 1.25


def test_a_scale_a_row_spares_small_rows() -> None:
    x, weight = random(32, 64, dtype=torch.float32), random(32, 64, seed=1).float()
    x[1] *= 1e6  # 448 / 1e6 is below half of the smallest step: the others round to zero
    exact = x.double() @ weight.double().mT
    tensor = (fp8_linear(x, weight).double() - exact).norm(dim=1) / exact.norm(dim=1)
    rows = (fp8_linear(x, weight, scaling="row").double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert tensor[1] < 0.06
    assert tensor[0] > 0.1
    assert (rows < 0.06).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**60])
def test_scales_take_what_formats_cannot(factor: float, scaling: str) -> None:
    """A power of two in an operand does not change its codes."""
    x, weight, bias, g = (t.clone() for t in layer((21, 48), 32))
    bias.zero_()
    base = outputs(scaling, g, x, weight, bias)
    moved = outputs(scaling, g, x * factor, weight, bias)
    assert torch.equal(moved[0], base[0] * factor)
    assert torch.equal(moved[1], base[1])
    assert torch.equal(moved[2], base[2] * factor)
    assert base[2].any()
    moved = outputs(scaling, g * factor, x, weight, bias)
    assert torch.equal(moved[1], base[1] * factor)
    assert torch.equal(moved[2], base[2] * factor)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_zeros(scaling: str) -> None:
    for zero in range(3):
        x, weight, bias, g = layer((21, 48), 32)
        leaves = [x, weight, g]
        leaves[zero] = torch.zeros_like(leaves[zero])
        y, dx, dw, db = outputs(scaling, leaves[2], leaves[0], leaves[1], bias)
        assert all(t.isfinite().all() for t in (y, dx, dw, db))
        assert bool(dx.any()) == (zero == 0)
        assert bool(dw.any()) == (zero == 1)
        if zero < 2:
            assert torch.equal(y, bias.expand_as(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_a_number_shows(scaling: str, value: float) -> None:
    for spoilt in range(3):
        x, weight, bias, g = (t.clone() for t in layer((21, 48), 32))
        (x, weight, g)[spoilt][3, 5] = value
        y, dx, dw, _ = outputs(scaling, g, x, weight, bias)
        if spoilt == 0:
            assert y[3].isnan().all()
            assert not dw[:, 5].isfinite().any()
        elif spoilt == 1:
            assert y[:, 3].isnan().all()
            assert dx[:, 5].isnan().all()
        else:
            assert dx[3].isnan().all()
            assert not dw[5].isfinite().any()


def test_no_rows() -> None:
    for scaling in SCALINGS:
        x, weight = torch.zeros(0, 16), torch.ones(32, 16)
        y, dx, dw = outputs(scaling, torch.zeros(0, 32), x, weight)
        assert (y.shape, dx.shape) == ((0, 32), (0, 16))
        assert torch.equal(dw, torch.zeros(32, 16))


# Derivatives


def reference(scaling: str) -> Callable[..., Tensor]:
    def f(*leaves: Tensor) -> Tensor:
        return module.fp8_linear_reference(*leaves, scaling=scaling)

    return f


def first_order(scaling: str) -> Callable[..., Tensor]:
    """The reference, with a backward that rounds the gradient too."""

    class RoundedGradient(torch.autograd.Function):
        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return rounded(g.float().flatten(0, -2), E5M2, None).view(g.shape)

    def f(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = module.fp8_linear_reference(x, weight, None, scaling=scaling)
        return RoundedGradient.apply(y) + bias

    return f


FIRST = [
    drivers.by_autograd,
    drivers.by_one_leaf,
    drivers.by_func_grad,
    drivers.by_compile,
    drivers.by_compiled_grad,
]
# derivatives of the formula: forward mode, and derivatives of a backward
PLAIN = [
    drivers.by_jvp,
    drivers.by_jvp_of_one,
    drivers.by_hvp,
    drivers.by_jvp_jvp,
    drivers.by_double_backward,
]
FLOATS = (random(21, 16), random(32, 16, seed=1) / 4, random(32, seed=2))


@pytest.mark.parametrize("driver", FIRST, ids=drivers.name_of)
def test_first_derivatives(driver: drivers.Driver) -> None:
    """fp64 throughout except the scales and the division by them. A code of the gradient may round
    the other way, which changes one term by 2^-3 of it (e5m2)."""
    fast = lambda *xs: fp8_linear(*xs)  # noqa: E731
    floats = tuple(x.float().double() for x in FLOATS)
    assert drivers.disagreement(driver, fast, first_order("tensor"), floats) < ulps(
        torch.float32, 16
    )
    assert drivers.disagreement(driver, fast, reference("tensor"), floats) > 1e-4


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("driver", PLAIN, ids=drivers.name_of)
def test_derivatives_of_the_formula(driver: drivers.Driver, scaling: str) -> None:
    fast = scalar(lambda *xs: fp8_linear(*xs, scaling=scaling))
    got, wanted = driver(fast, FLOATS), driver(scalar(reference(scaling)), FLOATS)
    # the second backward multiplies by gradients again, rounded to e5m2
    rounding = 2.0**-3 if driver is drivers.by_double_backward else 0.0
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 1e-3
        assert (a - b).norm() <= (1e-10 + rounding) * b.norm()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_examples_are_rows(scaling: str) -> None:
    """With shared weights, examples are one product with one scale; each gets its own gradients."""
    xs = examples(FLOATS)[0]
    weight, bias = FLOATS[1:]
    y = vmap(lambda x: fp8_linear(x, weight, bias, scaling=scaling))(xs)
    assert torch.equal(y, fp8_linear(xs, weight, bias, scaling=scaling))
    loss = scalar(lambda *leaves: fp8_linear(*leaves, scaling=scaling))
    everyone = (0, 1, 2)
    got = vmap(grad(loss, everyone), (0, None, None))(xs, weight, bias)
    for i, x in enumerate(xs):
        wanted = torch.func.grad(scalar(reference(scaling)), everyone)(x, weight, bias)
        for a, b in zip(got, wanted, strict=True):
            assert (a[i] - b).norm() <= 2**-3 * b.norm()  # another scale, and gradients of e5m2
    if scaling == "row":
        for i, x in enumerate(xs):
            for a, b in zip(got, grad(loss, everyone)(x, weight, bias), strict=True):
                torch.testing.assert_close(
                    a[i], b, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
                )
    # with a frozen weight, the gradients of all examples are one product too
    (dx,) = vmap(lambda x: vjp(lambda x: fp8_linear(x, weight, scaling=scaling), x)[1](y[0]))(xs)
    assert dx.shape == xs.shape


@pytest.mark.parametrize("scaling", SCALINGS)
def test_weights_may_be_batched_and_levels_nested(scaling: str) -> None:
    loss = scalar(lambda *leaves: fp8_linear(*leaves, scaling=scaling))
    batched = examples(FLOATS)
    got = vmap(grad(loss, (0, 1, 2)))(*batched)
    for i in range(2):
        wanted = grad(loss, (0, 1, 2))(*(t[i] for t in batched))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(
                a[i], b, rtol=ulps(torch.float64, 1000), atol=ulps(torch.float64, 1000)
            )
    moves = directions(FLOATS)
    plain = scalar(reference(scaling))
    hvp = [
        vmap(lambda *xs, f=f: jvp(grad(f, (0, 1, 2)), xs, moves)[1])(*batched)
        for f in (loss, plain)
    ]
    for a, b in zip(*hvp, strict=True):
        assert (a - b).norm() <= ulps(torch.float64, 4000) * b.norm()
    curvature = [jacrev(grad(f))(FLOATS[0][:2], *FLOATS[1:]) for f in (loss, plain)]
    assert (curvature[0] - curvature[1]).norm() <= 2**-3 * curvature[1].norm()  # e5m2, as above


# Saved and computed tensors


def test_a_byte_an_entry_is_kept_of_x() -> None:
    x, weight = random(40, 64, dtype=torch.bfloat16), random(32, 64, dtype=torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    for scaling, bytes_of_x in (("tensor", 48 * 64), ("row", 2 * 40 * 64)):
        saved = saved_by(lambda scaling=scaling: fp8_linear(x * 1, weight, scaling=scaling))
        own = [t for t in saved if t.untyped_storage()._cdata != weight.untyped_storage()._cdata]
        sizes = sorted(t.untyped_storage().nbytes() for t in own)
        # x, or its codes with rows up to a multiple of 16; one number of the shadow; scales
        assert sizes[-1] == bytes_of_x
        assert sum(sizes[:-1]) <= 2 + (4 + 4 if scaling == "tensor" else 4 * (40 + 32))
    frozen = saved_by(lambda: fp8_linear(x * 1, weight.detach()))
    own = [t for t in frozen if t.untyped_storage()._cdata != weight.untyped_storage()._cdata]
    assert sum(t.untyped_storage().nbytes() for t in own) <= 2 + 4 + 4


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("learns", ["x", "weight"])
def test_only_what_is_asked_for_is_made(
    learns: str, scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[torch.dtype, str, bool, bool]] = []
    real = fp8_products._quantize

    def quantize(
        x: Any,
        dtype: Any,
        scaling: str,
        triton: bool,
        straight: bool = True,
        turned: bool = False,
        given: Any = None,
    ) -> Any:
        made.append((dtype, scaling, straight, turned))
        return real(x, dtype, scaling, triton, straight=straight, turned=turned, given=given)

    monkeypatch.setattr(fp8_products, "_quantize", quantize)
    x, weight = random(40, 64, dtype=torch.float32), random(32, 64, dtype=torch.float32)
    leaf = (x if learns == "x" else weight).requires_grad_()
    both = torch.autograd.grad(fp8_linear(x, weight, scaling=scaling).sum(), leaf)[0]
    tensor = scaling == "tensor"
    forward = [(E4M3, scaling, True, tensor and learns == "weight"), (E4M3, scaling, True, False)]
    if learns == "x":
        other = "tensor" if tensor else "column"
        backward = [(E5M2, scaling, True, False), (E4M3, other, False, True)]
    else:
        backward = [(E5M2, scaling, False, tensor)]
    assert made == forward + backward
    wanted = outputs(scaling, torch.ones(40, 32), x.detach(), weight.detach())
    assert torch.equal(both, wanted[1 if learns == "x" else 2])


# Compilers


def compiled_graphs(f: Callable[..., Any], *args: Tensor) -> list[torch.fx.Graph]:
    """The forward and backward graphs that a compiler gets."""
    graphs: list[torch.fx.Graph] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    torch.autograd.grad(compiled(*args), args)
    return graphs


def calls(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def test_layers_that_share_an_input_round_it_once() -> None:
    """q, k and v: forward rounds x and each weight once, backward rounds each gradient with its
    weight. Forward saves the codes of x: not x, and no copy of a weight."""
    x = random(40, 64, dtype=torch.bfloat16).requires_grad_()
    weights = [random(n, 64, seed=n, dtype=torch.bfloat16).requires_grad_() for n in (48, 32, 16)]

    def attention(x: Tensor, *weights: Tensor) -> Tensor:
        q, k, v = (fp8_linear(x * 2, w) for w in weights)
        return q.sin().sum() + k.cos().sum() + v.tanh().sum()

    forward, backward = compiled_graphs(attention, x, *weights)
    assert calls(forward)["nanovision.fp8_quantize.default"] == 1 + 3
    assert calls(forward)["nanovision.fp8_quantize_backward.default"] == 0
    assert calls(backward)["nanovision.fp8_quantize.default"] == 0
    assert calls(backward)["nanovision.fp8_quantize_backward.default"] == 3
    output = next(node for node in forward.nodes if node.op == "output")
    kept = [node.meta["val"] for node in output.args[0][1:] if node is not None]
    codes = [tuple(t.shape) for t in kept if isinstance(t, Tensor) and t.dtype == E4M3]
    assert codes == [(64, 48)]
    assert (torch.bfloat16, (40, 64)) not in {
        (t.dtype, tuple(t.shape)) for t in kept if isinstance(t, Tensor)
    } - {(x.dtype, tuple(x.shape))}


def test_the_count_would_see_three() -> None:
    x, weight = random(32, 64).float().requires_grad_(), random(32, 64, seed=1).float()

    def attention(x: Tensor, weight: Tensor) -> Tensor:
        return sum(fp8_linear(x * factor, weight).sin().sum() for factor in (1, 2, 3))  # type: ignore[return-value]

    forward, _ = compiled_graphs(attention, x, weight.requires_grad_())
    assert calls(forward)["nanovision.fp8_quantize.default"] == 3 + 1


@pytest.mark.parametrize("scaling", SCALINGS)
def test_torch_takes_the_layouts_of_the_products(
    scaling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own checks of torch._scaled_mm on a fake GPU: at real size, and with a number of rows
    that is no multiple of 16."""
    products: list[tuple[tuple[int, ...], torch.dtype, bool]] = []
    real = torch._scaled_mm

    def multiply(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        out = real(a, b, **options)
        assert out.device.type == "cuda"
        products.append(((*a.shape, b.shape[1]), a.dtype, options["use_fast_accum"]))
        return out

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    call = module.Fp8Call(scaling, triton=True, keep=True)
    for rows, inner, outs in ((16384, 1536, 8960), (1001, 1536, 256)):
        products.clear()
        with FakeTensorMode():  # autograd itself would look for the GPU
            options: Any = {"device": "cuda", "dtype": torch.bfloat16}
            x, weight = torch.empty(rows, inner, **options), torch.empty(outs, inner, **options)
            bias = torch.empty(outs, **options)
            y, codes, *scales = module._Fp8Linear.forward(call, x, x, weight, bias)
            kept = x if scaling == "row" else codes
            got = module._Fp8Backward.forward(call, (True, True), y, x, weight, kept, *scales)
        assert [t.shape for t in (y, *got)] == [(rows, outs), x.shape, weight.shape]
        wanted = [
            ((rows, inner, outs), E4M3, True),
            ((rows, outs, inner), E5M2, False),
            ((outs, -(-rows // 16) * 16, inner), E5M2, False),
        ]
        assert products == wanted[: 3 if scaling == "tensor" else 2]


def test_a_gpu_without_float8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    text = r"fp8_linear cannot run on cuda: needs compute capability 9\.0, this GPU has 8\.0"
    with pytest.raises(RuntimeError, match=text):
        dispatch.choose("fp8_linear", "cuda", torch.bfloat16)
    with (
        dispatch.override(fp8_linear="triton"),
        pytest.raises(RuntimeError, match=r"needs compute capability 9\.0"),
    ):
        dispatch.choose("fp8_linear", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert dispatch.choose("fp8_linear", "cuda", torch.bfloat16) == "triton"
    with pytest.raises(RuntimeError, match="float16 or float32, not torch"):
        dispatch.choose("fp8_linear", "cuda", torch.float64)
    with dispatch.override(fp8_linear="torch"):  # asked for by name: to compare with
        assert dispatch.choose("fp8_linear", "cuda", torch.bfloat16) == "torch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(40, 16)}, r"weight must be \[O, I\] with multiples of 16.*40, 16"),
        ({"weight": torch.zeros(16)}, r"weight must be \[O, I\]"),
        ({"weight": torch.zeros(16, 16, dtype=torch.int8)}, "weight must be floating point"),
        (
            {"x": torch.zeros(7, 32)},
            r"x must be \[..., 16\] to match weight \(16, 16\), got \(7, 32",
        ),
        ({"x": torch.zeros(7, 16).long()}, "x must be floating point"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \[16\]"),
        ({"bias": torch.zeros(16, device="meta")}, "bias is on meta"),
        ({"scaling": "block"}, 'scaling must be "tensor" or "row", got \'block\''),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(7, 16), "weight": torch.zeros(16, 16)}
    with pytest.raises(ValueError, match=message):
        fp8_linear(**{**arguments, **change})
