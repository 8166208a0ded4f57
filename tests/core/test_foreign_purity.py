"""Modules that change what they are given, or remember it: pure functions, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from core import from_module
from params.tree import map_leaves
from transforms import checkpoint, value_and_grad


class Rescales(nn.Module):
    """Changes its weights once, and knows that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.ready = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.rescale()
        self.ready = True
        return self.line(x)

    def rescale(self) -> None:
        self.line.weight.div_(2)


class Loops(Rescales):
    """The same, where its code does not tell which."""

    def rescale(self) -> None:
        for p in self.line.parameters():
            p.div_(2)


@pytest.mark.parametrize("make", [Rescales, Loops])
def test_a_module_that_changes_its_params_is_refused(make: type[Rescales]) -> None:
    module = make()
    before = module.line.weight.detach().clone()
    forward, params = from_module(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"its parameters .*line.weight.* in place") as error:
            forward(params, {"x": torch.randn(2, 4)})
    spared = torch.equal(module.line.weight, before)
    assert spared == (make is Rescales) == ("module and params anew" not in str(error.value))


class Scales(nn.Module):
    """Changes what it is given."""

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        return x.mul_(2) if by is None else by.add_(x)


def test_a_batch_stays_as_it_was() -> None:
    forward, _ = from_module(nn.Sequential(Scales()), call=lambda run, b: run(b["x"]))
    both, _ = from_module(Scales())
    x, by = torch.ones(3), torch.ones(3)
    for _ in range(3):
        assert torch.equal(forward({}, {"x": x}), 2 * torch.ones(3))
        assert torch.equal(both({}, {"x": x, "by": by}), 2 * torch.ones(3))
        assert torch.equal(both({}, {"x": x}), 2 * torch.ones(3))
        assert torch.equal(vmap(lambda b: both({}, b))({"x": x[:, None]}), 2 * torch.ones(3, 1))
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(by, torch.ones(3))


def test_a_tied_weight_is_held_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.line = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)
            self.line.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.line(self.table(ids))

    module, batch = Tied(), {"ids": torch.arange(3)}
    forward, params = from_module(module)
    other = {"line": {"weight": params["table"]["weight"]}}
    for tree in (other, {**other, "table": {"weight": torch.ones(8, 8)}}):
        with pytest.raises(ValueError, match=r"line.weight, which the module ties to table.weight"):
            forward(tree, batch)
    assert torch.equal(forward({**other, **params}, batch), module(**batch))


class Grows(nn.Module):
    """A block with a cache of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.seen = nn.Linear(4, 4), torch.zeros(0, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x])
        return x + self.line(self.seen).tanh().sum(0)


def test_a_block_that_remembers_is_named_by_checkpoint() -> None:
    block = Grows()
    forward, params = from_module(nn.Sequential(block, block))  # it grows within one call
    loss = lambda p, b: checkpoint(forward)(p, b).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="keeps a state from call to call, such as a cache"):
        value_and_grad(loss)(params, {"input": torch.randn(3, 4)})


class Cache:
    """Keys of every layer, by the protocol of Hugging Face's caches."""

    def __init__(self) -> None:
        self.layers: dict[int, Tensor] = {}

    def get_seq_length(self) -> int:
        return len(self.layers)

    def update(self, at: int, x: Tensor) -> Tensor:
        self.layers[at] = torch.cat([self.layers[at], x], -2) if at in self.layers else x
        return self.layers[at]


class Remembers(nn.Module):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.line, self.at = nn.Linear(4, 4), at

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        keys = cache.update(self.at, self.line(x))
        return x + (x @ keys.mT).softmax(-1) @ keys.cumsum(-2)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Remembers(i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        cache = Cache()
        for layer in self.layers:
            x = layer(x, cache)
        return x


@pytest.mark.parametrize("driver", [value_and_grad, grad])
def test_a_cache_is_as_it_was_when_a_block_runs_again(driver: Any, assert_same) -> None:
    torch.manual_seed(0)
    forward, params = from_module(Remembering())
    batch = {"x": torch.randn(3, 4)}
    again, plain = (
        driver(lambda p, b, f=f: f(p, b).square().sum())(params, batch)
        for f in (checkpoint(forward), forward)
    )
    got, want = (again[1], plain[1]) if driver is value_and_grad else (again, plain)
    assert_same(got, want)


class Tables(nn.Module):
    """Keeps a table that it computes of its parameters, in a dict and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept, self.last = nn.Parameter(torch.ones(4)), {}, None
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.kept:
            self.kept["table"] = self.bias * 2
        if self.last is None:
            self.last = self.bias * 3
        return self.line(x + self.kept["table"] + self.last)


def test_what_a_module_remembers_is_not_of_older_parameters(assert_same) -> None:
    forward, params = from_module(nn.Sequential(Tables(), Tables()))
    pure = lambda p, b: from_module(nn.Sequential(Tables(), Tables()))[0](p, b)  # noqa: E731
    batch = {"input": torch.randn(3, 4)}
    forward(params, batch)  # what the bare one remembers says nothing of the next
    checked = checkpoint(forward)
    for _ in range(3):
        got, want = (
            value_and_grad(lambda p, b, f=f: f(p, b).square().sum())(params, batch)[1]
            for f in (checked, pure)
        )
        assert_same(got, want)
        params = map_leaves(lambda t: t * 1.1, params)


class Installs(nn.Module):
    """Puts a hook on a layer in its first call, and knows that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.installed = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.line.register_forward_hook(lambda m, args, out: out + 1)
        self.installed = True
        return self.line(x)


def test_a_hook_that_is_put_on_once_stays() -> None:
    module = Installs()
    forward, params = from_module(module)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(forward(params, {"x": x}), module(x))
