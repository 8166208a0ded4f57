"""Checkpointing: the same gradients under every driver, less memory, one recomputation a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from core import Rule, from_module, vlm
from params.tree import flatten, map_leaves, unflatten
from tests.rounding import FP64
from transforms import checkpoint, fuse_loss, rematerialize, value_and_grad

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

aten = torch.ops.aten
Fn = Callable[..., Any]


# -- a function of its own, under every driver --------------------------------------------------


def inside(p: dict[str, Tensor], x: Tensor, ids: Tensor, scale: float, *, power: int) -> Tensor:
    """Matmuls, a lookup, things linear in a param, one param unused."""
    h = torch.tanh(x @ p["w"]) ** power + p["table"][ids] + p["b"] * p["half"]
    return kernels.rms_norm(h, p["g"]) * scale


def outside(f: Fn, p: dict[str, Tensor], x: Tensor) -> Tensor:
    ids = torch.tensor([0, 2, 1])
    # places that stand for several numbers, differentiated and constant
    p = {**p, "b": p["b"].expand(3, 4), "half": torch.tensor([[0.5]]).to(x).expand(3, 4)}
    y = f(p, x, ids, 0.5, power=2)
    return f(p, y, ids, 2.0, power=3).sin().sum()


def leaves() -> tuple[dict[str, Tensor], Tensor]:
    make = partial(torch.randn, dtype=torch.float64)
    p = {"w": make(4, 4), "table": make(3, 4), "b": make(4), "g": make(4), "unused": make(2)}
    return p, make(3, 4)


def tangent(p: Any) -> Any:
    return map_leaves(lambda t: torch.cos(torch.arange(t.numel())).view_as(t).to(t), p)


def along(g: Any, v: Any) -> Tensor:
    pairs = zip(flatten(g).values(), flatten(v).values(), strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs]).sum()


def autograd(f: Fn, p: Any, *args: Any, order: int = 1) -> Any:
    inputs = {k: t.clone().requires_grad_() for k, t in flatten(p).items()}
    out = f(unflatten(inputs), *args)
    for _ in range(order - 1):
        g = torch.autograd.grad(
            out, list(inputs.values()), create_graph=True, materialize_grads=True
        )
        out = along(dict(zip(inputs, g, strict=True)), tangent(p))
    g = torch.autograd.grad(out, list(inputs.values()), materialize_grads=True)
    return unflatten(dict(zip(inputs, g, strict=True)))


def examples(x: Tensor) -> Tensor:
    return torch.stack([x, x * 2, x.flip(0)])


DRIVERS: dict[str, Fn] = {
    "value": lambda f, p, x: f(p, x),
    "autograd": lambda f, p, x: autograd(f, p, x),
    "autograd, twice": lambda f, p, x: autograd(f, p, x, order=2),
    "grad": lambda f, p, x: grad(f)(p, x),
    "grad of x": lambda f, p, x: grad(f, argnums=1)(p, x),
    "grad of both": lambda f, p, x: grad(f, argnums=(0, 1))(p, x),
    "vjp": lambda f, p, x: vjp(f, p, x)[1](torch.tensor(2.0, dtype=x.dtype)),
    "jvp": lambda f, p, x: jvp(lambda q: f(q, x), (p,), (tangent(p),)),
    "vmap": lambda f, p, x: vmap(f, (None, 0))(p, examples(x)),
    "vmap of grad": lambda f, p, x: vmap(grad(f), (None, 0))(p, examples(x)),
    "grad of vmap": lambda f, p, x: grad(lambda q: vmap(f, (None, 0))(q, examples(x)).sum())(p),
    "vmap over params": lambda f, p, x: vmap(grad(f), (0, None))(
        map_leaves(lambda t: torch.stack([t, t * 2]), p), x
    ),
    "vmap of vmap": lambda f, p, x: vmap(vmap(grad(f), (None, 0)), (None, 0))(
        p, torch.stack([examples(x), examples(x) + 1])
    ),
    "autograd of vmap": lambda f, p, x: autograd(
        lambda q: vmap(f, (None, 0))(q, examples(x)).sum(), p
    ),
    "grad of grad": lambda f, p, x: grad(lambda q: along(grad(f)(q, x), tangent(p)))(p),
    "jvp of grad": lambda f, p, x: jvp(lambda q: grad(f)(q, x), (p,), (tangent(p),))[1],
    "grad of jvp": lambda f, p, x: grad(lambda q: jvp(lambda r: f(r, x), (q,), (tangent(p),))[1])(
        p
    ),
    "jvp of jvp": lambda f, p, x: jvp(
        lambda q: jvp(lambda r: f(r, x), (q,), (tangent(p),))[1], (p,), (tangent(p),)
    )[1],
    "grad of jvp of jvp": lambda f, p, x: grad(DRIVERS["jvp of jvp"], argnums=1)(f, p, x),
    "vmap of hvp": lambda f, p, x: vmap(
        lambda y: grad(lambda q: along(grad(f)(q, y), tangent(p)))(p)
    )(examples(x)),
    "third order": lambda f, p, x: grad(
        lambda q: along(grad(lambda r: along(grad(f)(r, x), tangent(p)))(q), tangent(p))
    )(p),
    "jacrev": lambda f, p, x: jacrev(lambda q: grad(f, argnums=1)(q, x).flatten()[:3])(p),
    "jacfwd": lambda f, p, x: jacfwd(lambda g: f({**p, "g": g}, x))(p["g"]),
    "hessian": lambda f, p, x: hessian(lambda w: f({**p, "w": w}, x))(p["w"]),
}


def once(f: Fn) -> Fn:
    return rematerialize(f)


def nested(f: Fn) -> Fn:
    """A checkpoint inside a checkpoint."""
    return rematerialize(lambda *args, **kwargs: rematerialize(f)(*args, **kwargs))


@pytest.mark.parametrize("wrap", [once, nested])
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_driver(driver: str, wrap: Fn) -> None:
    if (driver, wrap) == ("jacrev", nested):
        pytest.xfail("torch 2.13: a Function in the backward of a Function under jacrev asserts")
    p, x = leaves()
    run = DRIVERS[driver]
    want = tree_leaves(run(partial(outside, inside), p, x))
    got = tree_leaves(run(partial(outside, wrap(inside)), p, x))
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


def test_arguments_and_results_of_any_form() -> None:
    """Nested containers, ints, None and strings in and out; integer tensors; an input returned."""

    def odd(p: Any, pair: Any, *, how: str, flag: bool, nothing: None = None) -> Any:
        assert how == "so"
        assert flag is True
        assert nothing is None
        (x, ids), factor = pair
        y = (p["a"]["b"] * x).tanh() * factor
        return {"y": y, "more": [None, 7, (x, ids + 1)], "how": how}

    def loss(f: Fn, p: Any, x: Tensor) -> Tensor:
        out = f(p, ([x, torch.arange(3)], 3), how="so", flag=True)
        assert out["more"][:2] == [None, 7]
        assert out["how"] == "so"
        same, ids = out["more"][2]
        assert ids.dtype == torch.int64
        return (out["y"] * same + ids).square().sum()

    p, x = {"a": {"b": torch.randn(3).double()}}, torch.randn(3).double()
    for driver in ("autograd", "grad", "grad of both", "vmap of grad", "jvp", "grad of grad"):
        run = DRIVERS[driver]
        want, got = (tree_leaves(run(partial(loss, f), p, x)) for f in (odd, rematerialize(odd)))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)


# -- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "mlp", "resampler"])
def test_gradients_are_bit_equal(micro, rough, example, assert_same, name: str) -> None:
    config = micro[name]
    batch = example(config)
    for dtype in (torch.float32, torch.bfloat16):
        params = rough(config, dtype=dtype)
        bare, saving = fuse_loss(vlm(config)), checkpoint(fuse_loss(vlm(config)))
        value, grads = value_and_grad(bare)(params, batch)
        got_value, got = value_and_grad(saving)(params, batch)
        assert torch.equal(got_value, value)
        assert_same(got, grads, 0)
        with kernels.override(attention="plain"):  # "padded" only runs where Python may read
            assert_same(grad(saving)(params, batch), grad(bare)(params, batch), 0)


def block_calls(forward: Any, run: Fn) -> Counter[str]:
    calls: Counter[str] = Counter()

    def wrap(f: Fn, path: str) -> Fn:
        def count(*args: Any) -> Any:
            calls[path] += 1
            return f(*args)

        return count

    run(fuse_loss(checkpoint(forward.with_rule(Rule("block", wrap)))))
    return calls


def test_each_block_is_computed_twice(micro, rough, example) -> None:
    config = micro["resampler"]
    params, batch, forward = rough(config), example(config), vlm(config)
    blocks = {s.path for s in forward.sites if s.kind == "block"}
    assert len(blocks) == 6
    drivers: dict[str, tuple[int, Fn]] = {
        "value": (1, lambda loss: loss(params, batch)),
        "value_and_grad": (2, lambda loss: value_and_grad(loss)(params, batch)),
        "grad": (2, lambda loss: grad(loss)(params, batch)),
        "vjp, not pulled": (1, lambda loss: vjp(lambda p: loss(p, batch), params)),
    }
    for name, (times, run) in drivers.items():
        calls = block_calls(forward, run)
        assert calls == Counter(dict.fromkeys(blocks, times)), name


def test_every_second_block(micro, rough, example, assert_same) -> None:
    config = micro["mlp"]
    params, batch = rough(config), example(config)
    calls: Counter[str] = Counter()

    def wrap(f: Fn, path: str) -> Fn:
        return lambda *args: calls.update([path]) or f(*args)

    forward = vlm(config).with_rule(Rule("block", wrap))
    _, grads = value_and_grad(fuse_loss(checkpoint(forward, every=2)))(params, batch)
    assert calls == {
        "vision.blocks.0": 2,
        "vision.blocks.1": 1,
        "text.blocks.0": 2,
        "text.blocks.1": 1,
    }
    assert_same(grads, value_and_grad(fuse_loss(vlm(config)))(params, batch)[1], 0)


@pytest.mark.parametrize("every", [0, -1])
def test_every_must_be_positive(micro, every: int) -> None:
    with pytest.raises(ValueError, match=f"every must be 1 or more, not {every}"):
        checkpoint(vlm(micro["text"]), every=every)


def test_a_forward_without_blocks_is_refused() -> None:
    forward, _ = from_module(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"has no block.*blocks="):
        checkpoint(forward)


def test_compile_of_grad_says_what_to_do(micro, rough, example) -> None:
    config = micro["text"]
    loss = fuse_loss(checkpoint(vlm(config)))
    compiled = torch.compile(grad(loss), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="not supported by PyTorch"):
        compiled(rough(config), example(config))


# -- memory -------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of tensors made inside that are alive at once, and how often each op ran."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.ops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops[func.overloadpacket] += 1
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def layer(w: Tensor, x: Tensor) -> Tensor:
    for _ in range(6):
        x = torch.tanh(x @ w)
    return x


def stack(f: Fn, weights: list[Tensor], x: Tensor) -> Tensor:
    for w in weights:
        x = f(w, x)
    return x.sum()


MECHANISMS: dict[str, Fn] = {
    "autograd": lambda f, w, x: torch.autograd.grad(f([t.requires_grad_() for t in w], x), w),
    "grad": lambda f, w, x: grad(f)(w, x),
    "vmap of grad": lambda f, w, x: vmap(grad(f), (None, 0))(w, x.unflatten(0, (2, -1))),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_memory_falls_and_matmuls_rise_by_the_recomputation(mechanism: str) -> None:
    """8 blocks of 6 layers on x of 32 KB: 48 activations against 8, and one block's inside."""
    blocks, inner = 8, 6

    def measure(f: Fn) -> Live:
        weights = [torch.randn(16, 16) / 4 for _ in range(blocks)]
        x = torch.randn(512, 16)
        with Live() as live:
            MECHANISMS[mechanism](partial(stack, f), weights, x)
        return live

    bare, saving = measure(layer), measure(rematerialize(layer))
    activation = 512 * 16 * 4
    assert bare.peak >= blocks * inner * activation
    # inputs of blocks, one block's activations and gradients (func.grad keeps these as well)
    assert saving.peak <= (blocks + 4 * inner) * activation
    assert saving.peak < bare.peak / 2
    products = {aten.mm, aten.bmm, aten.matmul}
    extra = sum(n for op, n in saving.ops.items() if op in products) - sum(
        n for op, n in bare.ops.items() if op in products
    )
    # all of a block again, save its last layer where only the input of tanh's backward is needed
    assert blocks * (inner - 1) <= extra <= blocks * inner


def test_memory_of_the_model_falls(micro, rough, example) -> None:
    config = micro["text"]
    params = rough(config, dtype=torch.float32)
    batch = example(config, rows=8, length=16)
    for run in (value_and_grad, grad):
        peaks = []
        for loss in (fuse_loss(vlm(config)), fuse_loss(checkpoint(vlm(config)))):
            with Live() as live:
                run(loss)(params, batch)
            peaks.append(live.peak)
        assert peaks[1] < 0.75 * peaks[0]  # two blocks: at best half, and params' gradients stay


# -- random numbers -----------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.gelu(self.fc(x)))


class NoisyStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Noisy() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("mechanism", ["value_and_grad", "grad", "vjp"])
def test_dropout_is_drawn_again_and_the_generator_ends_where_it_would(mechanism: str) -> None:
    forward, params = from_module(NoisyStack().double().train())
    batch = {"x": torch.randn(5, 6).double()}
    pulls = {
        "value_and_grad": lambda f: value_and_grad(f)(params, batch)[1],
        "grad": lambda f: grad(f)(params, batch),
        "vjp": lambda f: vjp(lambda p: f(p, batch), params)[1](torch.ones(()).double())[0],
    }
    results, states = [], []
    for f in (forward, checkpoint(forward), forward):
        torch.manual_seed(7 if len(results) < 2 else 8)
        results.append(pulls[mechanism](lambda p, b, f=f: f(p, b).square().sum()))
        states.append(torch.get_rng_state())
    for a, b in zip(flatten(results[0]).values(), flatten(results[1]).values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(states[0], states[1])
    other = flatten(results[2])["blocks.0.fc.weight"]
    assert not torch.allclose(flatten(results[0])["blocks.0.fc.weight"], other)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness: str) -> None:
    forward, params = from_module(NoisyStack().double().train())
    x = torch.randn(1, 2, 6).double().expand(4, 2, 6)
    grads = []
    for f in (forward, checkpoint(forward)):
        torch.manual_seed(7)
        g = grad(lambda p, b, f=f: f(p, b).square().sum())
        grads.append(vmap(g, (None, 0), randomness=randomness)(params, {"x": x}))
    pairs = zip(flatten(grads[0]).values(), flatten(grads[1]).values(), strict=True)
    assert all(torch.allclose(a, b, rtol=FP64, atol=FP64) for a, b in pairs)
    first = flatten(grads[1])["blocks.0.fc.weight"]
    assert torch.equal(first[0], first[1]) == (randomness == "same")


# -- what blocks hand on beside their results ---------------------------------------------------


class Notes(dict):
    """A mapping that pytrees take for a leaf."""


class Talking(nn.Module):
    """A block that leaves a tensor for others: in an argument, or on itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.line, self.how, self.aux = nn.Linear(4, 4), how, None

    def forward(self, x: Tensor, notes: Any) -> Tensor:
        h = self.line(x).tanh()
        if self.how == "detached":
            self.aux = h.detach().mean()
        elif self.how == "no_grad":
            with torch.no_grad():
                self.aux = h.mean() + self.line.weight.sum()
        elif self.how == "attribute":
            self.aux = h.mean()
        elif self.how == "own result":
            self.aux = h = x + h
        elif isinstance(notes, list):
            notes.append(x + h if self.how == "result" else h.mean())
        else:
            notes["h"] = h.mean() + notes.get("h", 0.0)
            notes["calls"] = notes.get("calls", 0) + 1
        return notes[-1] if self.how == "result" else h if self.how == "own result" else x + h


class Gossip(nn.Module):
    def __init__(self, how: str, form: Callable[[], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Talking(how) for _ in range(2))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        notes = self.form()
        for layer in self.layers:
            x = layer(x, notes=notes)
        said = notes if isinstance(notes, list) else [notes["h"]] if notes else []
        said = [*said, *(layer.aux for layer in self.layers if layer.aux is not None)]
        assert not isinstance(notes, dict) or notes.get("calls", 2) == 2
        return x.square().mean() + torch.stack([t.mean() for t in said]).square().sum()


BESIDE = {
    "a mapping": ("argument", Notes),
    "a dict": ("argument", dict),
    "a list": ("argument", list),
    "a list that gets the result": ("result", list),
    "an attribute": ("attribute", dict),
    "an attribute that is the result": ("own result", dict),
    "a detached attribute": ("detached", dict),
    "an attribute under no_grad": ("no_grad", dict),
}


@pytest.mark.parametrize("way", BESIDE)
def test_what_blocks_hand_on_beside_their_results(way: str) -> None:
    """Autograd follows it; torch.func, which cannot, says so: no gradient is dropped in silence."""
    module = Gossip(*BESIDE[way]).double()
    forward, params = from_module(module)
    checked, x = checkpoint(forward), torch.randn(3, 2, 4, dtype=torch.float64)

    def near(got: Any, want: Any) -> None:
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=FP64, atol=FP64)

    batch = {"x": x[0]}
    near(value_and_grad(checked)(params, batch), value_and_grad(forward)(params, batch))
    near(checked(params, batch), forward(params, batch))
    drivers: dict[str, Fn] = {
        "grad": lambda f: grad(f)(params, batch),
        "vmap": lambda f: vmap(lambda x: grad(f)(params, {"x": x}))(x),
        "hvp": lambda f: jvp(lambda p: grad(f)(p, batch), (params,), (tangent(params),))[1],
        "jvp": lambda f: jvp(lambda p: f(p, batch), (params,), (tangent(params),))[1],
    }
    for name, driver in drivers.items():
        # tangents pass through no_grad
        constant = ("detached",) if name in ("hvp", "jvp") else ("detached", "no_grad")
        if module.layers[0].how in (*constant, "result"):
            near(driver(checked), driver(forward))
        else:
            with pytest.raises(RuntimeError, match=r"the block layers\.0 hands a tensor on"):
                driver(checked)
    # nobody differentiates: blocks are left as they are
    near(*(vmap(lambda x, f=f: f(params, {"x": x}))(x) for f in (checked, forward)))


class Taking(nn.Module):
    """A block that takes from a list, and changes a dict, that it is given; or its input."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.line, self.in_place = nn.Linear(4, 4), in_place

    def forward(self, state: dict[str, Any], skips: list[Tensor]) -> None:
        h = self.line(state["x"].clone() if self.in_place else state["x"]).tanh()
        if self.in_place:
            h = state["x"].mul_(0.5) + h
        state["x"], state["old"] = h + skips.pop(), {"x": state["x"]}


class Takers(nn.Module):
    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Taking(in_place) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": self.first(x)}
        skips = [x, state["x"] * 2, x * 3]
        for layer in self.layers:
            layer(state, skips)
        assert len(skips) == 1
        return (state["x"] + state["old"]["x"]).square().mean()


def test_a_block_that_runs_again_finds_what_it_was_given(assert_same: Any) -> None:
    forward, params = from_module(Takers().double())
    batch = {"x": torch.randn(3, 4, dtype=torch.float64)}
    checked = checkpoint(forward)
    got, want = (value_and_grad(f)(params, batch) for f in (checked, forward))
    assert_same(got[1], want[1], rtol=1e-12)
    for driver in (grad, lambda f: lambda p, b: jvp(lambda p: f(p, b), (p,), (tangent(p),))):
        with pytest.raises(RuntimeError, match=r"the block layers\.0 hands a tensor on"):
            driver(checked)(params, batch)


@pytest.mark.parametrize("driver", [value_and_grad, grad])
def test_a_block_that_changes_its_input_says_so(driver: Fn) -> None:
    forward, params = from_module(Takers(in_place=True))
    batch = {"x": torch.randn(3, 4)}
    driver(forward)(params, batch)
    with pytest.raises(RuntimeError, match=r"the block layers\.0 changes a tensor \[3, 4\]"):
        driver(checkpoint(forward))(params, batch)
    with torch.no_grad():
        assert torch.equal(checkpoint(forward)(params, batch), forward(params, batch))
