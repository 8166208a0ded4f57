"""Weights that model code reads itself: every rule acts on every use, under every driver."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from core import Forward, Rule, from_module
from core.sites import WEIGHTED
from params.int8 import dequantize_weight, quantize_weight
from params.tree import Tree, flatten, map_leaves, unflatten
from transforms import (
    checkpoint,
    fake_quant,
    lora,
    merge_lora,
    mixed_precision,
    quantize_int8,
    value_and_grad,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",  # torch's attention on a CPU under vmap
    "ignore:.*torch.jit.script.*:DeprecationWarning",
)


class TiedRead(nn.Module):
    """x @ table.weight.T, and a weight's device and dtype asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x.to(self.table.weight.device))
        h = h + self.mid(torch.tanh(h).to(self.mid.weight.dtype))
        assert self.table.weight.shape == (20, 8)
        return h @ self.table.weight.T


class ByHand(nn.Module):
    """A linear that is called, and whose weight is read too; and one that is read only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a.weight, self.a.bias) + self.a(x)
        return F.linear(h, self.b.weight, self.b.bias)


class Experts(nn.Module):
    """Experts as one parameter each way, a router with a weight of its own, in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, 8))
        self.up = nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(3, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        share = F.linear(x, self.router).softmax(-1)
        each = torch.einsum("bi,eio->beo", x, self.up).relu()
        return x + torch.einsum("beo,eod,be->bd", each, self.down, share)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Shares(nn.Module):
    """A parameter of its own that is a layer's weight too; two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8) / 2)
        self.one, self.two, self.three = (nn.Linear(8, 8) for _ in range(3))
        self.one.weight, self.three.weight = self.own, self.two.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(self.one(x).tanh()).tanh()) + x @ self.own.T


class Hooked(nn.Module):
    """A layer with a hook is no site; its weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a.register_forward_hook(lambda m, args, out: out * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])


class Attends(nn.Module):
    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x[None], x[None], x[None], need_weights=False)[0]


class Fast(nn.Module):
    """Layers that hand their children's weights to one fused function in eval."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x[None])[0]


class Gated(nn.Linear):
    """A linear that may be given more than its input."""

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) * scale


class More(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Gated(8, 8), Gated(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x, 1.0).tanh(), scale=0.5)) + self.b(x, x.mean())


class Penalised(nn.Module):
    """Asks for all its parameters: one that is tied counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.c(self.b(self.a(x).tanh()).to(next(self.parameters()).dtype))
        large = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return h + 0.1 * large


class Child(nn.Module):
    """Calls a layer of its parent's, which it refers to beside the tree of modules."""

    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.parent, self.own = weakref.ref(parent), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parent: Any = self.parent()
        return self.own(parent.layers[0](x))


class Beside(nn.Module):
    """Layers in a list that is no ModuleList, in a function, by a method, by a weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = []
        for i in range(2):
            layer = nn.Linear(8, 8)
            self.add_module(f"layer{i}", layer)
            self.layers.append(layer)
        self.call, self.then = self.layers[0].forward, functools.partial(self.layers[1])
        self.pair = (lambda x, first=self.layers[0]: first(x), {"b": self.layers[1]})
        self.child = Child(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.child(self.call(self.then(x)).tanh()) + self.pair[1]["b"](self.pair[0](x))


class Outside(Moe):
    """Reads a weight of a block's outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layers[0]
        return super().forward(x) + 0.1 * F.linear(x, first.router).sum()


CASES: dict[str, Callable[[], nn.Module]] = {
    "a tied read": TiedRead,
    "read by hand": ByHand,
    "experts": Moe,
    "shared": Shares,
    "a hook": Hooked,
    "lstm": Recurrent,
    "attention": Attends,
    "attention, batch second": lambda: Attends(False),
    "fast path": Fast,
    "no fast path": lambda: Fast(False),
    "more arguments": More,
    "all parameters": Penalised,
    "beside the tree": Beside,
    "outside of a block": Outside,
}


def make(name: str) -> tuple[nn.Module, Forward, Tree, dict[str, Tensor]]:
    torch.manual_seed(1)
    module = CASES[name]().eval()
    x = torch.randint(20, (4,)) if name == "a tied read" else torch.randn(4, 8)
    forward, params = from_module(module)
    return module, forward, map_leaves(lambda t: t * 1.2 + 0.01, params), {"x": x}


def plain(module: nn.Module) -> Callable[[Tree, Any], Tensor]:
    """The module itself; leaf names are those that params hold tied weights under."""
    return lambda p, b: functional_call(module, flatten(p), (b["x"],))


def rounded(forward: Forward, params: Tree) -> Tree:
    """Every weight of a site as int8 holds it."""
    flat = flatten(params)
    for site in {s.weight: s for s in forward.sites if s.kind in WEIGHTED}.values():
        flat[site.weight] = dequantize_weight(*quantize_weight(flat[site.weight]))
    return unflatten(flat)


def loss_of(run: Any) -> Any:
    return lambda p, b: run(p, b).float().tanh().sum()


def drive(driver: str, run: Any, params: Tree, batch: Any) -> Any:
    if driver == "call":
        return run(params, batch)
    if driver == "no_grad":
        with torch.no_grad():
            return run(params, batch)
    if driver == "value_and_grad":
        return value_and_grad(loss_of(run))(params, batch)[1]
    if driver == "grad":
        learns = {p: t for p, t in flatten(params).items() if t.is_floating_point()}
        rest = {p: t for p, t in flatten(params).items() if p not in learns}
        return unflatten(grad(lambda p: loss_of(run)(unflatten({**p, **rest}), batch))(learns))
    if driver == "vmap":
        stacked = {"x": torch.stack([batch["x"], batch["x"].flip(0)])}
        return vmap(lambda b: run(params, b))(stacked)
    assert driver == "compile"
    torch._dynamo.reset()
    fullgraph = torch.compile(loss_of(run), backend="aot_eager", fullgraph=True)
    return value_and_grad(fullgraph)(params, batch)[1]


DRIVERS = ("call", "no_grad", "value_and_grad", "grad", "vmap")
COMPILED = ("a tied read", "read by hand", "experts", "shared", "more arguments", "fast path")
COMPILED += ("all parameters", "beside the tree", "outside of a block")


def runs(name: str) -> list[str]:
    # torch has no rule for a recurrent layer under vmap, and its fast paths none for either
    without = {"lstm": ("grad", "vmap")}.get(name, ())
    return [d for d in DRIVERS if d not in without]


@pytest.mark.parametrize("name", CASES)
def test_int8_and_fake_quant_round_every_use(name: str, assert_same) -> None:
    module, forward, params, batch = make(name)
    assert_same(forward(params, batch), plain(module)(params, batch))
    int8, fake = quantize_int8(forward, skip=()), fake_quant(forward, skip=())
    want = rounded(forward, params)
    prepared = int8.prepare(params)
    left = [p for p, t in flatten(prepared).items() if t.ndim > 1 and t.is_floating_point()]
    assert all(path.endswith("_scale") for path in left)
    for driver in runs(name):
        bare = drive(driver, plain(module), want, batch)
        assert_same(drive(driver, fake, params, batch), bare)
        if driver in ("call", "no_grad", "vmap"):
            assert_same(drive(driver, int8, prepared, batch), bare)
    biases = flatten(drive("value_and_grad", int8, prepared, batch))
    of_plain = flatten(drive("value_and_grad", plain(module), want, batch))
    assert_same(unflatten(biases), unflatten({p: of_plain[p] for p in biases}))


@pytest.mark.parametrize("name", CASES)
def test_adapters_act_at_every_use_and_merge(name: str, assert_same) -> None:
    module, forward, params, batch = make(name)
    select = sorted({s.path for s in forward.sites if s.kind in ("linear", "weight")})
    adapted = lora(forward, rank=2, select=select)
    flat = flatten(adapted.prepare(params))
    tree = unflatten({k: torch.randn_like(v) if "lora_b" in k else v for k, v in flat.items()})
    merged = merge_lora(adapted, tree)
    for run in (adapted, checkpoint(adapted) if name == "experts" else adapted):
        for driver in ("call", "no_grad", *(d for d in ("vmap",) if d in runs(name))):
            assert_same(
                drive(driver, run, tree, batch), drive(driver, plain(module), merged, batch)
            )
    grads = flatten(value_and_grad(loss_of(adapted))(tree, batch)[1])
    assert grads.keys() == {path for path in flat if "lora_" in path}
    of_merged = flatten(value_and_grad(loss_of(plain(module)))(merged, batch)[1])
    want, got = {}, {}
    for site in {s.weight: s for s in forward.sites if s.kind in ("linear", "weight")}.values():
        b = site.beside("lora_b")
        want[b] = of_merged[site.weight] @ flatten(tree)[site.beside("lora_a")].mT  # dL/dW A^T
        got[b] = grads[b]
    assert_same(unflatten(got), unflatten(want))
    if "grad" in runs(name):
        all_grads = flatten(drive("grad", adapted, tree, batch))
        assert_same(unflatten({p: all_grads[p] for p in grads}), unflatten(grads))


@pytest.mark.parametrize("name", COMPILED)
def test_weights_are_read_inside_compile(name: str, assert_same) -> None:
    _, forward, params, batch = make(name)
    int8 = quantize_int8(lora(forward, rank=2), skip=())
    prepared = int8.prepare(params)
    want = value_and_grad(loss_of(int8))(prepared, batch)[1]
    assert_same(drive("compile", int8, prepared, batch), want)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("name", CASES)
def test_a_read_weight_is_cast(name: str, driver: str, assert_same) -> None:
    """Numbers of bf16 and not of fp32, near the exact ones; gradients in the params' dtype."""
    if driver not in runs(name):
        return
    _, forward, params, batch = make(name)
    low = mixed_precision(forward)
    got, want = (drive(driver, f, params, batch) for f in (low, forward))
    if isinstance(got, Tensor):
        # under vmap torch takes F.linear apart, and adds a bias in the bias's dtype
        assert got.dtype == torch.bfloat16 or driver == "vmap"
        got, want = {"out": got.float()}, {"out": want}
    got, want = flatten(got), flatten(want)
    assert all(leaf.dtype == torch.float32 for leaf in got.values())
    assert_same(unflatten(got), unflatten(want), 8, torch.bfloat16)  # a few roundings in a row
    assert any(not torch.equal(got[path], want[path]) for path in want)


def test_a_rule_meets_every_read_once(assert_same) -> None:
    """A rule of kind weight; and one at linears, where two share a weight."""
    _, forward, params, batch = make("shared")
    double = forward.with_rule(Rule("weight", lambda f, path: lambda p: 2 * f(p)))
    flat = flatten(params)
    x = batch["x"]
    one, two, three = (
        F.linear(x, flat["own"], flat["one.bias"]).tanh(),
        lambda h: F.linear(h, flat["two.weight"], flat["two.bias"]).tanh(),
        lambda h: F.linear(h, flat["two.weight"], flat["three.bias"]),
    )
    assert_same(double(params, batch), three(two(one)) + x @ (2 * flat["own"]).T)
    linears = forward.with_rule(Rule("linear", lambda f, path: lambda p, v: 2 * f(p, v)))
    one = (2 * F.linear(x, flat["own"], flat["one.bias"])).tanh()
    two_ = (2 * F.linear(one, flat["two.weight"], flat["two.bias"])).tanh()
    assert_same(linears(params, batch), 2 * three(two_) + x @ flat["own"].T)


def test_rules_at_linears_act_in_layers_with_a_fast_path() -> None:
    _, forward, params, batch = make("fast path")
    seen: list[str] = []

    def wrap(f: Any, path: str) -> Any:
        return lambda p, *args: seen.append(path) or f(p, *args)

    ruled = forward
    for kind in ("linear", "norm", "weight"):
        ruled = ruled.with_rule(Rule(kind, wrap))
    with torch.no_grad():
        ruled(params, batch)
    assert set(seen) == {s.path for s in forward.sites if s.kind != "block"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_stands_in_for_a_weight_has_its_dtype_and_shape(dtype: torch.dtype) -> None:
    seen: list[Any] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.norm = nn.Linear(8, 6), nn.LayerNorm(6)

        def forward(self, x: Tensor) -> Tensor:
            w = self.line.weight
            seen.append((w.dtype, w.device.type, w.shape, *{p.dtype for p in self.parameters()}))
            return self.norm(self.line(x))

    module, x = Asks().to(dtype), {"x": torch.randn(2, 8, dtype=dtype)}
    forward, params = from_module(module)
    int8 = lora(quantize_int8(forward, skip=()), rank=2)
    int8(int8.prepare(params), x)
    module(**x)
    assert seen[0] == seen[1] == (dtype, "cpu", (6, 8), dtype)


def test_a_shared_weight_is_merged_for_every_use_or_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.line = nn.Embedding(8, 8), nn.Linear(8, 8)
            self.line.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.line(self.table(ids))

    forward, params = from_module(Tied())
    adapted = lora(forward, rank=2)
    prepared = adapted.prepare(params)
    with pytest.raises(ValueError, match=r"table.weight is also the weight of the embed table"):
        merge_lora(adapted, prepared)


def test_a_rule_that_knows_no_more_arguments_says_so() -> None:
    _, forward, params, batch = make("more arguments")
    ruled = forward.with_rule(Rule("linear", lambda f, path: lambda p, x: f(p, x)))
    with pytest.raises(ValueError, match="calls a with more than its input"):
        ruled(params, batch)
