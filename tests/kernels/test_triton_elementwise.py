"""The activations' and the rotary embedding's Triton kernels under every driver, and a deliberately
wrong backward under each: autograd, torch.func, torch.compile.

Values, gradients and traps are in test_triton_glu.py and test_triton_rope.py; the torch paths under
drivers in test_drivers.py.
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
from torch.func import grad, jvp, vmap

from kernels import dispatch, geglu, relu2, rope, swiglu

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

glu = importlib.import_module("kernels.glu")
ropes = importlib.import_module("kernels.rope")
TOLERANCE = 1e-4  # fp32: sums of a few hundred numbers of order 1, a few times over
ROWS, WIDTH = 5, 24

Loss = Callable[..., Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TABLE = random(9, 4, seed=8)
POSITIONS = torch.tensor([0, 8, 3, 3, 1])


def angles(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = TABLE.cos().float(), TABLE.sin().float()
    return cos.to(like.device), sin.to(like.device), POSITIONS.to(like.device)


def joined(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in pair])


@dataclass(frozen=True)
class Case:
    """`fast` against `plain`, of tensors of these shapes; `op`: the attribute of the module."""

    fast: Loss
    plain: Loss
    shapes: tuple[tuple[int, ...], ...]
    module: Any
    op: str


HEADS = ((ROWS, 3, 8), (ROWS, 2, 8))
CASES = {
    "swiglu": Case(
        swiglu, glu.swiglu_reference, ((ROWS, WIDTH), (ROWS, WIDTH)), glu, "SWIGLU_TRITON"
    ),
    "geglu": Case(geglu, glu.geglu_reference, ((ROWS, WIDTH), (ROWS, WIDTH)), glu, "GEGLU_TRITON"),
    "relu2": Case(relu2, glu.relu2_reference, ((ROWS, WIDTH),), glu, "RELU2_TRITON"),
    "rope": Case(
        lambda q, k: joined(rope(q, k, *angles(q))),
        lambda q, k: joined(ropes.rope_reference(q, k, *angles(q))),
        HEADS,
        ropes,
        "_Rotate",
    ),
    "rope with norms": Case(
        lambda q, k, a, b: joined(rope(q, k, *angles(q), q_weight=a, k_weight=b, eps=1e-3)),
        lambda q, k, a, b: joined(ropes.rope_qk_norm_reference(q, k, a, b, *angles(q), eps=1e-3)),
        (*HEADS, (8,), (8,)),
        ropes,
        "QK_NORM_TRITON",
    ),
}


# Drivers: each returns a list of tensors computed from a loss and its arguments


def scalar(f: Loss) -> Loss:
    """A loss with non-trivial cotangents and curvature, even for a linear f."""

    def loss(*floats: Tensor) -> Tensor:
        out = f(*floats)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device)
        return (torch.sin(out) * weights.reshape(out.shape)).sum()

    return loss


def everyone(floats: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(floats)))


def directions(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(random(*x.shape, seed=9 + i).to(x) for i, x in enumerate(floats))


def examples(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pairs = zip(floats, directions(floats), strict=True)
    return tuple(torch.stack([x, x + 0.3 * d]) for x, d in pairs)


def by_autograd(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in floats]
    value = loss(*xs)
    return [value.detach(), *torch.autograd.grad(value, xs)]


def by_one_leaf(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    out = []
    for i in everyone(floats):
        xs = [x.clone().requires_grad_(j == i) for j, x in enumerate(floats)]
        out += torch.autograd.grad(loss(*xs), xs[i])
    return out


def by_func_grad(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(grad(loss, everyone(floats))(*floats))


def by_vmap_grad(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(vmap(grad(loss, everyone(floats)))(*examples(floats)))


def by_vmap_grad_shared(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    dims = (0, *(None for _ in floats[1:]))
    return list(vmap(grad(loss, everyone(floats)), dims)(examples(floats)[0], *floats[1:]))


def by_vmap_twice(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    nested = tuple(torch.stack([x, 0.5 * x]) for x in examples(floats))
    return list(vmap(vmap(grad(loss, everyone(floats))), in_dims=1)(*nested))


def by_autograd_of_vmap(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    dims = (0, *(None for _ in floats[1:]))
    xs = [x.clone().requires_grad_() for x in (examples(floats)[0], *floats[1:])]
    return list(torch.autograd.grad(vmap(loss, dims)(*xs).sum(), xs))


def by_compile(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    backend = "inductor" if floats[0].is_cuda else "aot_eager"
    return by_autograd(torch.compile(loss, backend=backend, fullgraph=True), floats)


def by_compiled_grad(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    backend = "inductor" if floats[0].is_cuda else "aot_eager"
    gradient = grad(loss, everyone(floats))
    return list(torch.compile(gradient, backend=backend, fullgraph=True)(*floats))


def by_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(loss, floats, directions(floats)))


def by_double_backward(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in floats]
    first = torch.autograd.grad(loss(*xs), xs, create_graph=True)
    pairs = zip(first, directions(floats), strict=True)
    return list(torch.autograd.grad(torch.stack([(g * d).sum() for g, d in pairs]).sum(), xs))


def by_hvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(grad(loss, everyone(floats)), floats, directions(floats))[1])


def by_vmap_hvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    """The curvature of examples: a derivative of a backward that serves them all."""

    moves = directions(floats)

    def hvp(*xs: Tensor) -> tuple[Tensor, ...]:
        return jvp(grad(loss, everyone(floats)), xs, moves)[1]

    return list(vmap(hvp)(*examples(floats)))


def by_jvp_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    def slope(*xs: Tensor) -> Tensor:
        return jvp(loss, xs, tuple(torch.cos(x) for x in xs))[1]

    return [jvp(slope, floats, directions(floats))[1]]


Driver = Callable[[Loss, tuple[Tensor, ...]], list[Tensor]]
FIRST: list[Driver] = [
    by_autograd,
    by_one_leaf,
    by_func_grad,
    by_vmap_grad,
    by_vmap_grad_shared,
    by_vmap_twice,
    by_autograd_of_vmap,
    by_compile,
    by_compiled_grad,
]
HIGHER: list[Driver] = [by_jvp, by_double_backward, by_hvp, by_vmap_hvp, by_jvp_jvp]


def name_of(driver: Driver) -> str:
    return driver.__name__.removeprefix("by_")


def disagreement(case: Case, driver: Driver, device: str) -> float:
    """Largest error, relative to the largest entry; NaN is an infinite error."""
    floats = tuple(random(*s, seed=i).to(device, torch.float32) for i, s in enumerate(case.shapes))
    reference = {by_compile: by_autograd, by_compiled_grad: by_func_grad}.get(driver, driver)
    with dispatch.override(swiglu="triton", geglu="triton", relu2="triton", rope="triton"):
        got = driver(scalar(case.fast), floats)
    wanted = reference(scalar(case.plain), tuple(x.double() for x in floats))
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float32
        assert b.abs().max() > 1e-6  # the reference itself says something
        error = float((a.double() - b).abs().max() / b.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


@pytest.mark.parametrize("driver", [*FIRST, *HIGHER], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_under_driver(name: str, driver: Driver, kernel_device: str) -> None:
    assert disagreement(CASES[name], driver, kernel_device) < TOLERANCE


def broken(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a function of the case's Op, or of its Function, wrong by a factor of 3."""
    owner = getattr(case.module, case.op)
    right = getattr(owner, hook)

    def wrong(*args: Any, **static: Any) -> Any:
        out = right(*args, **static)
        if isinstance(out, Tensor):
            return 3.0 * out
        return tuple(3.0 * t if isinstance(t, Tensor) else t for t in out)

    if isinstance(owner, type):
        monkeypatch.setattr(owner, hook, staticmethod(wrong))
    else:
        monkeypatch.setattr(case.module, case.op, dataclasses.replace(owner, **{hook: wrong}))


@pytest.mark.parametrize("driver", FIRST, ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_backward_shows(
    name: str, driver: Driver, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(CASES[name], "backward", monkeypatch)
    assert disagreement(CASES[name], driver, kernel_device) > 0.1


@pytest.mark.parametrize("driver", [by_hvp, by_double_backward], ids=name_of)
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_derivative_of_backward_shows(
    name: str, driver: Driver, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Op takes it from its formula, the self-adjoint Function from its own jvp and backward."""
    own = "jvp" if driver is by_hvp else "backward"
    broken(CASES[name], own if name == "rope" else "formula", monkeypatch)
    assert disagreement(CASES[name], driver, kernel_device) > 0.1
