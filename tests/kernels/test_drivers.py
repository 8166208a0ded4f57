"""Every kernel under every driver, values and derivatives, in fp64 against its plain formula.

fp64 makes the check sharp: right answers agree to about 1e-13, wrong ones do not come near. The
last tests break each backward (and each formula) on purpose: every driver must then disagree.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

import kernels
from kernels import attention, cross_entropy, int8_linear, linear_cross_entropy, rms_norm, rope
from tests.kernels.rounding import ulps

N, VOCAB, DIM = 12, 11, 6
TOLERANCE = ulps(torch.float64, 4000)  # fp64; sums here have at most a few hundred terms of order 1


def module(name: str) -> Any:
    """The module, which the public function of the same name hides as an attribute."""
    return importlib.import_module(f"kernels.{name}")


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """`fast(*floats)` against `plain(*floats)`; both return one tensor."""

    fast: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    floats: tuple[Tensor, ...]
    op: tuple[str, str] | None = None  # (module, attribute) of its Op
    function: tuple[str, str] | None = None  # or of its self-adjoint Function
    compiled: bool = True  # has a custom backward under torch.compile


def make_cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCAB, (N,), generator=generator)
    labels[torch.tensor([0, 5, 11])] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
    everything = {"ignore_index": -100, **options}
    positions = torch.randint(0, 9, (N,), generator=generator)
    angles = rand(9, 2, seed=5)
    cos, sin = angles.cos(), angles.sin()
    weight = torch.randint(-127, 128, (5, DIM), generator=generator, dtype=torch.int8)
    scale = rand(5, 1, seed=6).abs()
    ragged = torch.tensor([0, 3, 3, 8, 10, 12, 12, 12], dtype=torch.int32)
    uniform = torch.tensor([0, 4, 8, 12, 12], dtype=torch.int32)
    ln, rn = (
        module("norm.rms_norm").layer_norm_reference,
        module("norm.rms_norm").rms_norm_reference,
    )
    ce = module("loss.cross_entropy")
    plain_attention = module("attention.attention").attention_reference

    def attention_case(cu: Tensor, causal: bool, window: int | None) -> Case:
        def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, cu, causal=causal, window=window)

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plain_attention(q, k, v, cu, causal=causal, window=window, scale=0.5)

        floats = (rand(N, 4, 4), rand(N, 2, 4, seed=1), rand(N, 2, 4, seed=2))
        return Case(fast, plain, floats, ("attention.attention_padded", "PADDED"), compiled=False)

    def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([part.flatten() for part in pair])

    return {
        "cross_entropy": Case(
            lambda z: cross_entropy(z, labels, **options),
            lambda z: ce.cross_entropy_reference(z, labels, **everything),
            (rand(N, VOCAB),),
            ("loss.cross_entropy", "OP"),
        ),
        "linear_cross_entropy": Case(
            lambda h, w, b: linear_cross_entropy(
                h, w, labels, bias=b, scale=0.7, chunk=4, **options
            ),
            lambda h, w, b: ce.cross_entropy_reference((h @ w.mT + b) * 0.7, labels, **everything),
            (rand(N, DIM), rand(VOCAB, DIM, seed=1), rand(VOCAB, seed=2)),
            ("loss.linear_cross_entropy", "OP"),
        ),
        "rms_norm": Case(
            lambda x, w: rms_norm(x, w, 1e-3),
            lambda x, w: rn(x, w, eps=1e-3),
            (rand(N, DIM), rand(DIM, seed=1)),
            ("norm.rms_norm", "RMS_NORM"),
        ),
        "rms_norm without weight": Case(
            lambda x: rms_norm(x, None, 1e-3),
            lambda x: rn(x, None, eps=1e-3),
            (rand(3, 4, DIM),),
            ("norm.rms_norm", "RMS_NORM"),
        ),
        "layer_norm": Case(
            lambda x, w, b: kernels.layer_norm(x, w, b, 1e-3),
            lambda x, w, b: ln(x, w, b, eps=1e-3),
            (rand(3, 4, DIM), rand(DIM, seed=1), rand(DIM, seed=2)),
            ("norm.rms_norm", "LAYER_NORM"),
        ),
        "layer_norm without leaves": Case(
            lambda x: kernels.layer_norm(x, None, None, 1e-3),
            lambda x: ln(x, None, None, eps=1e-3),
            (rand(N, DIM),),
            ("norm.rms_norm", "LAYER_NORM"),
        ),
        "swiglu": Case(
            kernels.swiglu,
            module("mlp.glu").swiglu_reference,
            (rand(N, DIM), rand(N, DIM, seed=1)),
            ("mlp.glu", "SWIGLU"),
        ),
        "geglu": Case(
            kernels.geglu,
            module("mlp.glu").geglu_reference,
            (rand(N, DIM), rand(N, DIM, seed=1)),
            ("mlp.glu", "GEGLU"),
        ),
        "relu2": Case(
            kernels.relu2, module("mlp.glu").relu2_reference, (rand(N, DIM),), ("mlp.glu", "RELU2")
        ),
        "rope": Case(
            lambda q, k: joined(rope(q, k, cos, sin, positions)),
            lambda q, k: joined(module("rope.rope").rope_reference(q, k, cos, sin, positions)),
            (rand(N, 4, 4), rand(N, 2, 4, seed=1)),
            function=("rope.rope", "_Rotate"),
        ),
        "rope with norms": Case(
            lambda q, k, a, b: joined(
                rope(q, k, cos, sin, positions, q_weight=a, k_weight=b, eps=1e-3)
            ),
            lambda q, k, a, b: joined(
                module("rope.rope").rope_qk_norm_reference(
                    q, k, a, b, cos, sin, positions, eps=1e-3
                )
            ),
            (rand(N, 4, 4), rand(N, 2, 4, seed=1), rand(4, seed=2), rand(4, seed=3)),
            ("rope.rope", "QK_NORM"),
        ),
        "int8_linear": Case(
            lambda x, b: int8_linear(x, weight, scale, b),
            lambda x, b: (
                module("quantised.int8_linear").int8_linear_reference(x, weight, scale) + b
            ),
            (rand(2, 3, DIM), rand(5, seed=1)),
            function=("quantised.int8_linear", "_Linear"),
        ),
        "attention ragged causal": attention_case(ragged, True, None),
        "attention ragged full": attention_case(ragged, False, None),
        "attention ragged window": attention_case(ragged, True, 2),
        "attention ragged full window": attention_case(ragged, False, 2),
        "attention uniform": attention_case(uniform, False, None),
    }


CASES = make_cases()
# one case an Op or Function for the deliberately wrong backwards
BROKEN = [
    "cross_entropy",
    "linear_cross_entropy",
    "rms_norm",
    "layer_norm",
    "swiglu",
    "geglu",
    "relu2",
    "rope",
    "rope with norms",
    "int8_linear",
    "attention ragged causal",
]


# Drivers: each returns a list of tensors computed from f and its arguments


def scalar(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss with non-trivial cotangents and curvature, even for a linear f."""

    def loss(*floats: Tensor) -> Tensor:
        out = f(*floats)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
        return (torch.sin(out) * weights).sum()

    return loss


def leaves(floats: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in floats]


def everyone(floats: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(floats)))


def directions(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(rand(*x.shape, seed=10 + i) for i, x in enumerate(floats))


def examples(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([x, x + 0.3 * rand(*x.shape, seed=20)]) for x in floats)


def by_value(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [f(*floats)]


def by_autograd(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = leaves(floats)
    value = scalar(f)(*xs)
    return [value.detach(), *torch.autograd.grad(value, xs)]


def by_one_leaf(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    """Each argument alone requires a gradient."""
    out = []
    for i in everyone(floats):
        xs = [x.clone().requires_grad_(j == i) for j, x in enumerate(floats)]
        out += torch.autograd.grad(scalar(f)(*xs), xs[i])
    return out


def by_func_grad(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(grad(scalar(f), everyone(floats))(*floats))


def by_vmap(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return [vmap(f)(*examples(floats))]


def by_vmap_grad(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(vmap(grad(scalar(f), everyone(floats)))(*examples(floats)))


def by_vmap_grad_shared(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    """Per-sample gradients: the first argument is batched, the others are shared."""
    batched = examples(floats)[0]
    dims = (0, *(None for _ in floats[1:]))
    return list(vmap(grad(scalar(f), everyone(floats)), dims)(batched, *floats[1:]))


def by_autograd_of_vmap(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = leaves(examples(floats))
    return list(torch.autograd.grad(vmap(scalar(f))(*xs).sum(), xs))


def by_grad_of_vmap(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    def loss(*xs: Tensor) -> Tensor:
        return vmap(scalar(f), in_dims=(0, *(None for _ in xs[1:])))(*xs).sum()

    return list(grad(loss, everyone(floats))(examples(floats)[0], *floats[1:]))


def by_jvp(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(f, floats, directions(floats)))


def by_vmap_jvp(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    tangents = examples(directions(floats))
    return [vmap(lambda *t: jvp(f, floats, t)[1])(*tangents)]


def by_double_backward(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = leaves(floats)
    first = torch.autograd.grad(scalar(f)(*xs), xs, create_graph=True)
    dot = sum((g * d).sum() for g, d in zip(first, directions(floats), strict=True))
    return list(torch.autograd.grad(dot, xs))


def by_grad_grad(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    def dot(*xs: Tensor) -> Tensor:
        first = grad(scalar(f), everyone(xs))(*xs)
        pairs = zip(first, directions(floats), strict=True)
        return torch.stack([(g * d).sum() for g, d in pairs]).sum()

    return list(grad(dot, everyone(floats))(*floats))


def by_jvp_grad(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(grad(scalar(f), everyone(floats)), floats, directions(floats))[1])


def by_jvp_jacrev(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    """As in torch.func.hessian: the inner gradient is taken under a vmap."""
    return list(jvp(jacrev(scalar(f), everyone(floats)), floats, directions(floats))[1])


def by_jacrev_jacrev(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    def dot(*xs: Tensor) -> Tensor:
        first = jacrev(scalar(f), everyone(xs))(*xs)
        pairs = zip(first, directions(floats), strict=True)
        return torch.stack([(g * d).sum() for g, d in pairs]).sum()

    return list(jacrev(dot, everyone(floats))(*floats))


def by_grad_jvp(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    def slope(*xs: Tensor) -> Tensor:
        return jvp(scalar(f), xs, directions(floats))[1]

    return list(grad(slope, everyone(floats))(*floats))


def by_vmap_hvp(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    def hvp(*direction: Tensor) -> tuple[Tensor, ...]:
        return jvp(grad(scalar(f), everyone(floats)), floats, direction)[1]

    return list(vmap(hvp)(*examples(directions(floats))))


def by_third_order(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(grad(moving_slope(f), everyone(floats)), floats, directions(floats))[1])


def by_jvp_jvp(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    return [jvp(moving_slope(f), floats, directions(floats))[1]]


def moving_slope(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The derivative of the loss along a direction that depends on the point."""

    def slope(*xs: Tensor) -> Tensor:
        return jvp(scalar(f), xs, tuple(torch.cos(x) for x in xs))[1]

    return slope


def by_compile(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(scalar(f), backend="aot_eager", fullgraph=True)
    xs = leaves(floats)
    value = compiled(*xs)
    return [value.detach(), *torch.autograd.grad(value, xs)]


def by_compiled_grad(f: Callable[..., Tensor], floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    gradient = grad(scalar(f), everyone(floats))
    return list(torch.compile(gradient, backend="aot_eager", fullgraph=True)(*floats))


Driver = Callable[[Callable[..., Tensor], tuple[Tensor, ...]], list[Tensor]]
BACKWARD: list[Driver] = [
    by_autograd,
    by_one_leaf,
    by_func_grad,
    by_vmap_grad,
    by_vmap_grad_shared,
    by_autograd_of_vmap,
    by_grad_of_vmap,
    by_compile,
    by_compiled_grad,
]
HIGHER: list[Driver] = [
    by_jvp,
    by_vmap_jvp,
    by_double_backward,
    by_grad_grad,
    by_jvp_grad,
    by_grad_jvp,
    by_vmap_hvp,
    by_jvp_jacrev,
    by_jacrev_jacrev,
    by_third_order,
    by_jvp_jvp,
]
COMPILED: list[Driver] = [by_compile, by_compiled_grad]


def name_of(driver: Driver) -> str:
    return driver.__name__.removeprefix("by_")


def disagreement(case: Case, driver: Driver) -> float:
    """Largest error, relative to the largest entry; NaN and wrong shapes are infinite errors."""
    reference = {by_compile: by_autograd, by_compiled_grad: by_func_grad}.get(driver, driver)
    got, wanted = driver(case.fast, case.floats), reference(case.plain, case.floats)
    assert len(got) == len(wanted)
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert b.abs().max() > 1e-6  # the reference itself says something
        error = float((a - b).abs().max() / b.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def pairs() -> list[Any]:
    """(case, driver): all of them, but other kinds of attention skip what is slow and the same."""
    slow = [*COMPILED, by_vmap_hvp, by_grad_jvp, by_third_order, by_jvp_jvp]
    out = []
    for name in CASES:
        for driver in [by_value, by_vmap, *BACKWARD, *HIGHER]:
            if name in BROKEN or not name.startswith("attention") or driver not in slow:
                out.append(pytest.param(name, driver, id=f"{name}-{name_of(driver)}"))
    return out


@pytest.mark.parametrize(("name", "driver"), pairs())
def test_kernel_under_driver(name: str, driver: Driver) -> None:
    assert disagreement(CASES[name], driver) < TOLERANCE


def broken(case: Case, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Makes the case's backward (or formula) wrong by a factor of 3."""
    if case.function is not None:
        cls = getattr(module(case.function[0]), case.function[1])
        hook = "jvp" if which == "formula" else "backward"
        right = getattr(cls, hook)

        def wrong(*args: Any) -> Any:
            out = right(*args)
            if isinstance(out, Tensor):
                return 3.0 * out
            return tuple(3.0 * g if isinstance(g, Tensor) else g for g in out)

        monkeypatch.setattr(cls, hook, staticmethod(wrong))
        return
    assert case.op is not None
    owner = module(case.op[0])
    op = getattr(owner, case.op[1])

    def wrong_backward(*args: Any, **static: Any) -> Any:
        return tuple(None if g is None else 3.0 * g for g in op.backward(*args, **static))

    def wrong_formula(*args: Any, **static: Any) -> Any:
        out = op.formula(*args, **static)
        return 3.0 * out if isinstance(out, Tensor) else tuple(3.0 * part for part in out)

    replacement = (
        dataclasses.replace(op, formula=wrong_formula)
        if which == "formula"
        else dataclasses.replace(op, backward=wrong_backward)
    )
    monkeypatch.setattr(owner, case.op[1], replacement)


def breakable(drivers: list[Driver], skipped: Callable[[Case, Driver], bool]) -> list[Any]:
    return [
        pytest.param(name, driver, id=f"{name}-{name_of(driver)}")
        for name in BROKEN
        for driver in drivers
        if not skipped(CASES[name], driver)
    ]


def no_custom_backward(case: Case, driver: Driver) -> bool:
    """Compiled attention is `plain`: it has no custom backward that could be ignored."""
    return driver in COMPILED and not case.compiled


def no_custom_jvp(case: Case, driver: Driver) -> bool:
    """A self-adjoint Function's jvp is not used by reverse twice, nor (by choice) by jvp of jvp."""
    unused = [by_double_backward, by_grad_grad, by_jacrev_jacrev, by_third_order, by_jvp_jvp]
    return case.function is not None and driver in unused


@pytest.mark.parametrize(("name", "driver"), breakable(BACKWARD, no_custom_backward))
def test_a_wrong_backward_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    broken(case, monkeypatch, "backward")
    assert disagreement(case, driver) > 0.1


@pytest.mark.parametrize(("name", "driver"), breakable(HIGHER, no_custom_jvp))
def test_a_wrong_formula_shows(name: str, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    broken(case, monkeypatch, "formula")
    assert disagreement(case, driver) > 0.1
