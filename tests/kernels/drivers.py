"""What a differentiable kernel is put through: each driver returns a list of tensors computed from
a loss and its arguments. For the tests of kernels that have a fast path and a plain formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

Loss = Callable[..., Tensor]
Driver = Callable[[Loss, tuple[Tensor, ...]], list[Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def scalar(f: Loss) -> Loss:
    """A loss with non-trivial cotangents and curvature, even for a linear f."""

    def loss(*floats: Tensor) -> Tensor:
        out = f(*floats)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device)
        return (torch.sin(out) * weights.reshape(out.shape)).sum()

    return loss


def joined(outs: Sequence[Tensor]) -> Tensor:
    """Several outputs as one, for a loss."""
    return torch.cat([out.flatten() for out in outs])


@dataclass(frozen=True)
class Case:
    """`fast` against `plain`, of tensors of these shapes; `op`: the attribute of the module."""

    fast: Loss
    plain: Loss
    shapes: tuple[tuple[int, ...], ...]
    module: Any
    op: str


def broken(case: Case, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the backward or the formula of the case's Op wrong by a factor of 3; a Function's
    formula is its jvp."""
    owner = getattr(case.module, case.op)
    if isinstance(owner, type) and hook == "formula":
        hook = "jvp"
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


def saved_by(f: Callable[[], Any]) -> list[Tensor]:
    """What a forward keeps for backward, each time that it does."""
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = f()
    assert out is not None
    return saved


def saved_bytes(f: Callable[[], Any], *inputs: Tensor) -> int:
    """Bytes saved for backward beyond the inputs themselves."""
    own = {x.untyped_storage()._cdata for x in inputs}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved_by(f)}
    return sum(size for storage, size in storages.items() if storage not in own)


def everyone(floats: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(floats)))


def directions(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(random(*x.shape, seed=9 + i).to(x) for i, x in enumerate(floats))


def examples(floats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    pairs = zip(floats, directions(floats), strict=True)
    return tuple(torch.stack([x, x + 0.3 * d]) for x, d in pairs)


def backend_of(floats: tuple[Tensor, ...]) -> str:
    return "inductor" if floats[0].is_cuda else "aot_eager"


def by_value(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [loss(*floats)]


def by_vmap(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return [vmap(loss)(*examples(floats))]


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


def by_grad_of_vmap(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    dims = (0, *(None for _ in floats[1:]))
    total = grad(lambda *xs: vmap(loss, dims)(*xs).sum(), everyone(floats))
    return list(total(examples(floats)[0], *floats[1:]))


def by_vmap_twice(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    nested = tuple(torch.stack([x, 0.5 * x]) for x in examples(floats))
    return list(vmap(vmap(grad(loss, everyone(floats))), in_dims=1)(*nested))


def by_autograd_of_vmap(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    dims = (0, *(None for _ in floats[1:]))
    xs = [x.clone().requires_grad_() for x in (examples(floats)[0], *floats[1:])]
    return list(torch.autograd.grad(vmap(loss, dims)(*xs).sum(), xs))


def by_vjp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    value, pull = vjp(loss, *floats)
    return [value, *pull(torch.full_like(value, 0.7))]


def by_compile(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    return by_autograd(torch.compile(loss, backend=backend_of(floats), fullgraph=True), floats)


def by_compiled_grad(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    torch._dynamo.reset()
    gradient = grad(loss, everyone(floats))
    return list(torch.compile(gradient, backend=backend_of(floats), fullgraph=True)(*floats))


def by_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(loss, floats, directions(floats)))


def by_jvp_of_one(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    moves = directions(floats)
    out = []
    for i in everyone(floats):

        def partial(x: Tensor, i: int = i) -> Tensor:
            return loss(*floats[:i], x, *floats[i + 1 :])

        out.append(jvp(partial, (floats[i],), (moves[i],))[1])
    return out


def by_vmap_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    tangents = examples(directions(floats))
    return [vmap(lambda *t: jvp(loss, floats, t)[1])(*tangents)]


def by_double_backward(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    xs = [x.clone().requires_grad_() for x in floats]
    first = torch.autograd.grad(loss(*xs), xs, create_graph=True)
    return list(torch.autograd.grad(along(first, floats), xs))


def along(gradients: Iterable[Tensor], floats: tuple[Tensor, ...]) -> Tensor:
    pairs = zip(gradients, directions(floats), strict=True)
    return torch.stack([(g * d).sum() for g, d in pairs]).sum()


def by_grad_grad(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    every = everyone(floats)
    return list(grad(lambda *xs: along(grad(loss, every)(*xs), floats), every)(*floats))


def by_jacrev_jacrev(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    """As in torch.func.hessian: the inner gradient is taken under a vmap."""
    every = everyone(floats)
    return list(jacrev(lambda *xs: along(jacrev(loss, every)(*xs), floats), every)(*floats))


def by_hvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(grad(loss, everyone(floats)), floats, directions(floats))[1])


def by_jvp_jacrev(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return list(jvp(jacrev(loss, everyone(floats)), floats, directions(floats))[1])


def by_grad_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    slope = grad(lambda *xs: jvp(loss, xs, directions(floats))[1], everyone(floats))
    return list(slope(*floats))


def by_vmap_hvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    """The curvature of examples: a derivative of a backward that serves them all."""
    moves, gradient = directions(floats), grad(loss, everyone(floats))
    return list(vmap(lambda *xs: jvp(gradient, xs, moves)[1])(*examples(floats)))


def by_hvp_of_many(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    """The curvature along several directions at once."""
    gradient = grad(loss, everyone(floats))
    tangents = examples(directions(floats))
    return list(vmap(lambda *t: jvp(gradient, floats, t)[1])(*tangents))


def moving_slope(loss: Loss) -> Loss:
    """The derivative along a direction that depends on the point."""
    return lambda *xs: jvp(loss, xs, tuple(torch.cos(x) for x in xs))[1]


def by_jvp_jvp(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return [jvp(moving_slope(loss), floats, directions(floats))[1]]


def by_third_order(loss: Loss, floats: tuple[Tensor, ...]) -> list[Tensor]:
    return by_hvp(moving_slope(loss), floats)


FIRST_ORDER: list[Driver] = [
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
HIGHER_ORDER: list[Driver] = [by_jvp, by_double_backward, by_hvp, by_vmap_hvp, by_jvp_jvp]
EVERY_FIRST: list[Driver] = [*FIRST_ORDER, by_grad_of_vmap, by_vjp]
EVERY_HIGHER: list[Driver] = [
    *HIGHER_ORDER,
    by_jvp_of_one,
    by_vmap_jvp,
    by_grad_grad,
    by_jacrev_jacrev,
    by_jvp_jacrev,
    by_grad_jvp,
    by_hvp_of_many,
    by_third_order,
]


def placed(names: Iterable[str], drivers: Sequence[Callable[..., Any]]) -> list[Any]:
    """(name, driver, kernel_device) for a test: all of them in the interpreter; on a GPU, where a
    driver hands the same tensors to the kernels and Inductor takes seconds each, a few."""
    names = list(names)
    out = []
    for driver in drivers:
        for name in names:
            kind = f"{name}-{name_of(driver)}"
            marks = pytest.mark.interpreter
            out.append(pytest.param(name, driver, "cpu", marks=marks, id=f"{kind}-cpu"))
            compiled = driver.__name__ == "by_compile" and name == names[0]
            if compiled or driver.__name__ in ("by_autograd", "by_vmap_grad"):
                marks = pytest.mark.gpu
                out.append(pytest.param(name, driver, "cuda", marks=marks, id=f"{kind}-cuda"))
    return out


def spoilt(names: Iterable[str], drivers: Sequence[Callable[..., Any]]) -> list[Any]:
    """(name, driver) for a test that something wrong shows: the first name under every driver, the
    others, whose drivers are the same, under the first."""
    names = list(names)
    pairs = [(names[0], driver) for driver in drivers]
    pairs += [(name, drivers[0]) for name in names[1:]]
    return [pytest.param(*pair, id=f"{pair[0]}-{name_of(pair[1])}") for pair in pairs]


def name_of(driver: Callable[..., Any]) -> str:
    return driver.__name__.removeprefix("by_")


def disagreement(driver: Driver, fast: Loss, plain: Loss, floats: tuple[Tensor, ...]) -> float:
    """Largest error of `fast` against `plain` in fp64, relative to the largest entry; NaN is an
    infinite error."""
    reference = {by_compile: by_autograd, by_compiled_grad: by_func_grad}.get(driver, driver)
    got = driver(scalar(fast), floats)
    wanted = reference(scalar(plain), tuple(x.double() for x in floats))
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == floats[0].dtype
        assert b.abs().max() > 1e-6  # the reference itself says something
        error = float((a.double() - b).abs().max() / b.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def error(
    case: Case, driver: Driver, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> float:
    """The disagreement of a case's two functions on random tensors of its shapes."""
    floats = tuple(random(*shape, seed=i) for i, shape in enumerate(case.shapes))
    return disagreement(driver, case.fast, case.plain, tuple(x.to(device, dtype) for x in floats))
