"""Would the other tests notice? Each hand-written derivative is broken on purpose.

Every driver that is served by it must then disagree. (torch.compile(torch.func.grad(f)) silently
skips a Function that is not called through allow_in_graph.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from params.tree import flatten, map_leaves
from tests.rounding import FP64
from transforms import rematerialize, value_and_grad
from transforms.quantize_int8 import _StraightThrough, straight_through
from transforms.recompute import _Checkpoint, _Recompute

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

Fn = Callable[..., Any]
compiled = partial(torch.compile, backend="aot_eager", fullgraph=True)
ones = partial(map_leaves, torch.ones_like)


def total(tree: Any) -> Tensor:
    return torch.stack([t.sum() for t in flatten(tree).values()]).sum()


DRIVERS: dict[str, Fn] = {
    "value_and_grad": lambda f, p, x: value_and_grad(f)(p, x)[1],
    "grad": lambda f, p, x: grad(f)(p, x),
    "vmap of grad": lambda f, p, x: vmap(grad(f), (None, 0))(p, torch.stack([x, x + 1])),
    "vmap over params": lambda f, p, x: vmap(grad(f), (0, None))(
        map_leaves(lambda t: torch.stack([t, t + 1]), p), x
    ),
    "compile of loss": lambda f, p, x: value_and_grad(compiled(f))(p, x)[1],
    "compile of grad": lambda f, p, x: compiled(grad(f))(p, x),
    "jvp": lambda f, p, x: {"value": jvp(lambda q: f(q, x), (p,), (ones(p),))[1]},
    "jvp of grad": lambda f, p, x: jvp(lambda q: grad(f)(q, x), (p,), (ones(p),))[1],
    "grad of grad": lambda f, p, x: grad(lambda q: total(grad(f)(q, x)))(p),
}


def params() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    make = partial(torch.randn, dtype=torch.float64)
    return {"w": make(4, 5), "v": make(3, 4)}, make(2, 5)


def agree(f: Fn, g: Fn, driver: str) -> bool:
    torch._dynamo.reset()
    p, x = params()
    got, want = (flatten(DRIVERS[driver](h, p, x)) for h in (f, g))
    return all(torch.allclose(got[k], want[k], rtol=FP64, atol=FP64) for k in want)


def times_ten(cls: Any, name: str, which: slice) -> Any:
    right = getattr(cls, name)

    def wrong(*args: Any) -> Any:
        out = right(*args)
        if isinstance(out, Tensor):
            return out * 10
        pick = range(len(out))[which]
        return tuple(t * 10 if i in pick and t is not None else t for i, t in enumerate(out))

    return staticmethod(wrong)


# -- straight through ---------------------------------------------------------------------------


def quantised(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return ((x @ straight_through(p["w"]).mT).tanh() @ straight_through(p["v"]).mT).sin().sum()


def surrogate(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """The same in plain operations: r + (w - stop(w)), r the rounded weight held constant."""

    def through(w: Tensor) -> Tensor:
        still = w.detach()
        scale = still.float().abs().amax(1, keepdim=True) / 127
        return ((still.float() / scale).round() * scale).to(w) + (w - still)

    return ((x @ through(p["w"]).mT).tanh() @ through(p["v"]).mT).sin().sum()


@pytest.mark.parametrize("driver", DRIVERS)
def test_straight_through_is_right_and_watched(driver: str, monkeypatch) -> None:
    assert agree(quantised, surrogate, driver)
    name = "jvp" if driver == "jvp" else "backward"
    monkeypatch.setattr(_StraightThrough, name, times_ten(_StraightThrough, name, slice(None)))
    assert not agree(quantised, surrogate, driver)


def test_straight_through_twice_forward() -> None:
    """A jvp of a jvp, where PyTorch drops the outer tangent of any Function."""
    p, x = params()
    want, got = (
        jvp(lambda q, f=f: jvp(lambda r: f(r, x), (q,), (ones(p),))[1], (p,), (ones(p),))
        for f in (surrogate, quantised)
    )
    torch.testing.assert_close(got, want)


# -- checkpoint ---------------------------------------------------------------------------------


def layer(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w.mT)


def net(f: Fn, p: dict[str, Tensor], x: Tensor) -> Tensor:
    return f(p["v"], f(p["w"], x)).sin().sum()


FUNCTORCH = ["grad", "vmap of grad", "vmap over params", "jvp of grad", "grad of grad"]


@pytest.mark.parametrize("driver", FUNCTORCH)
@pytest.mark.parametrize("function", [_Checkpoint, _Recompute])
def test_functional_checkpoint_is_watched(driver: str, function: Any, monkeypatch) -> None:
    """_Checkpoint.backward serves them all, _Recompute.backward those that differentiate twice."""
    bare, saving = partial(net, layer), partial(net, rematerialize(layer))
    assert agree(saving, bare, driver)
    first = 2 if function is _Checkpoint else 4  # inputs before the tensors have no gradient
    wrong = times_ten(function, "backward", slice(first, None))
    monkeypatch.setattr(function, "backward", wrong)
    served = function is _Checkpoint or driver == "grad of grad"
    assert agree(saving, bare, driver) != served


@pytest.mark.parametrize("driver", ["jvp", "jvp of grad"])
@pytest.mark.parametrize("function", [_Checkpoint, _Recompute])
def test_forward_mode_of_the_checkpoint_is_watched(driver, function: Any, monkeypatch) -> None:
    bare, saving = partial(net, layer), partial(net, rematerialize(layer))
    assert agree(saving, bare, driver)
    monkeypatch.setattr(function, "jvp", times_ten(function, "jvp", slice(None)))
    served = function is _Checkpoint or driver == "jvp of grad"
    assert agree(saving, bare, driver) != served


@pytest.mark.parametrize("driver", ["value_and_grad", "compile of loss"])
def test_plain_autograd_and_compile_do_not_use_the_functional_one(driver, monkeypatch) -> None:
    for function, first in ((_Checkpoint, 2), (_Recompute, 4)):
        wrong = times_ten(function, "backward", slice(first, None))
        monkeypatch.setattr(function, "backward", wrong)
    assert agree(partial(net, rematerialize(layer)), partial(net, layer), driver)
