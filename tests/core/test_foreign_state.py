"""What a foreign module keeps beside its params: buffers, its mode, what does not learn; blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.utils import prune

from core import Rule, as_module, from_module
from params.tree import Tree, flatten, map_leaves, map_with_path, merge
from tests.rounding import FP64
from transforms import checkpoint, fuse_loss, lora, quantize_int8, trainable, value_and_grad


class Statistics(nn.Module):
    """Batch norms, one of them in a block; a constant; a buffer that is not saved; one that is made
    anew at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)) for _ in range(2)
        )
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale + self.shift
        if self.training:
            self.calls = self.calls + 1
        return x + 1e-3 * self.calls


def loss(out: Any, b: Any) -> Any:
    return out.square().mean()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_buffers_come_back(checkpointed: bool, assert_same) -> None:
    """As they are after the module's own call, whoever differentiates, computed again or not."""
    module = Statistics().double().train()
    forward, params = from_module(module, buffers=True)
    forward = checkpoint(forward) if checkpointed else forward
    held = {name: leaf.clone() for name, leaf in flatten(params).items()}
    x = torch.randn(3, 16, 4, dtype=torch.float64) + 3
    plain = copy.deepcopy(module)
    tree = params

    def run(p: Tree, b: Any) -> Any:
        out, buffers = forward(p, b)
        return loss(out, b), buffers

    for each in x:
        want = plain(each)
        out, buffers = forward(tree, {"x": each})
        assert_same(out, want.detach())
        assert flatten(buffers).keys() == dict(module.named_buffers()).keys()
        learning, rest = trainable(tree, constant=forward.constant)
        if not checkpointed:
            of = grad(lambda p, b, rest=rest: run(merge(p, rest), b), has_aux=True)
            assert_same(of(learning, {"x": each})[1], buffers, 0)
        tree = merge(learning, buffers)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(flatten(tree)[name], buffer, rtol=FP64, atol=0)
    # nothing that the caller holds has changed, nor the module
    assert all(torch.equal(leaf, held[name]) for name, leaf in flatten(params).items())
    assert all(torch.equal(leaf, held[name]) for name, leaf in module.state_dict().items())


def test_value_and_grad_hands_buffers_on_and_does_not_train_them() -> None:
    class Lossy(Statistics):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square().mean()

    forward, params = from_module(Lossy().train(), buffers=True)
    (value, buffers), grads = value_and_grad(forward)(params, {"x": torch.randn(8, 4)})
    assert value.ndim == 0
    assert flatten(grads).keys() == {n for n, _ in Lossy().named_parameters()}
    assert buffers["layers"]["0"]["2"]["num_batches_tracked"] == 1


def test_a_loss_around_the_forward_hands_buffers_on(assert_same) -> None:
    """What is no Forward, too: buffers are differentiated there, and their gradients are 0."""
    forward, params = from_module(Statistics().train(), buffers=True)

    def run(p: Tree, b: Any) -> Any:
        out, buffers = forward(p, b)
        return loss(out, b), buffers

    batch = {"x": torch.randn(8, 4)}
    (value, buffers), grads = value_and_grad(run)(params, batch)
    assert_same(buffers, forward(params, batch)[1], rtol=1e-6)
    assert torch.equal(value, run(params, batch)[0])
    for name, leaf in flatten(grads).items():
        assert leaf.any() == (name not in flatten(buffers)), name


def test_names_that_transforms_use_are_refused() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.lora_a = nn.Parameter(torch.ones(4))

    with pytest.raises(ValueError, match=r"calls parameters of its own \['0.lora_a'\]: .*Rename"):
        from_module(nn.Sequential(Own()))


def test_buffers_that_are_lost_are_named() -> None:
    module = Statistics().train()
    forward, params = from_module(module)
    with pytest.warns(UserWarning, match=r"buffers of \['.*layers.0.2'.*buffers=True"):
        first = forward(params, {"x": torch.ones(3, 4)})
    assert torch.equal(forward(params, {"x": torch.ones(3, 4)}), first)  # it says so once
    forward, params = from_module(module.eval())
    forward(params, {"x": torch.ones(3, 4)})


def test_as_module_keeps_buffers_and_its_mode() -> None:
    module = Statistics().train()
    forward, params = from_module(module)
    back = as_module(forward, map_leaves(torch.clone, params))
    assert back.state_dict().keys() == module.state_dict().keys()
    x = {"x": torch.randn(8, 4) + 2}
    want = copy.deepcopy(module)
    for _ in range(3):
        torch.testing.assert_close(back(x), want(**x))
    for name, leaf in want.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], leaf)
    assert not torch.equal(back(x), back.eval()(x))
    torch.testing.assert_close(back(x), want.eval()(**x), rtol=0.2, atol=0.2)  # one call more
    assert not back.training
    fresh = as_module(forward, params).eval()
    fresh.load_state_dict(want.state_dict())
    torch.testing.assert_close(fresh(x), want(**x))


def test_modes() -> None:
    """Dropout between a gated MLP's layers: with it, none; without it, a site."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.drop(torch.nn.functional.silu(self.a(x)) * self.b(x)))

    module, x = Mlp().train(), torch.randn(9, 6)
    forward, params = from_module(module)
    module.eval()
    assert "glu" not in {s.kind for s in forward.sites}
    assert not torch.equal(forward(params, {"x": x}), module(x))
    quiet = quantize_int8(forward, skip=()).with_mode(False)
    assert "glu" in {s.kind for s in quiet.sites}
    same = quantize_int8(from_module(module)[0], skip=())
    assert torch.equal(quiet(quiet.prepare(params), {"x": x}), same(same.prepare(params), {"x": x}))
    eval_module = as_module(forward, params).eval()
    assert torch.equal(eval_module({"x": x}), module(x))
    assert not torch.equal(eval_module.train()({"x": x}), module(x))


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4).requires_grad_(False)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 10)
        self.a.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(self.table(ids)).tanh())


def test_frozen_parameters_get_no_gradients() -> None:
    module = Partly()
    forward, params = from_module(module, head="b")
    assert forward.module.frozen == {"table.weight", "a.bias"}
    batch = {"ids": torch.randint(10, (2, 5)), "labels": torch.randint(10, (2, 5))}
    learn = {"a.weight", "b.weight", "b.bias"}
    loss_fn = fuse_loss(forward)
    assert flatten(value_and_grad(loss_fn)(params, batch)[1]).keys() == learn
    assert flatten(value_and_grad(loss_fn, ["a"])(params, batch)[1]).keys() == {"a.weight"}
    with pytest.raises(ValueError, match=r"table.weight.*requires_grad is False in the module"):
        value_and_grad(loss_fn, ["table"])(params, batch)
    adapted = fuse_loss(lora(forward, rank=2))
    names = flatten(value_and_grad(adapted)(adapted.prepare(params), batch)[1]).keys()
    assert names == {"a.lora_a", "a.lora_b"}

    def by_hand(p: Tree, b: Any) -> Tensor:
        return loss_fn(p, b)

    # where a function stands around the forward, and under torch.func: exactly 0
    still = map_with_path(lambda n, t: torch.full_like(t, n in forward.module.frozen), params)
    assert not jvp(lambda p: by_hand(p, batch), (params,), (still,))[1].any()
    for grads in (value_and_grad(by_hand)(params, batch)[1], grad(by_hand)(params, batch)):
        for name, leaf in flatten(grads).items():
            assert bool(leaf.any()) == (name in learn), name
    assert {n for n, p in as_module(forward, params).named_parameters() if p.requires_grad} == learn
    forward, params = from_module(module.requires_grad_(False), head="b")
    assert not forward.module.frozen


def test_complex_parameters_learn() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x.to(torch.complex64) @ self.w).square().mean()

    module, x = Complex(), torch.randn(2, 4)
    forward, params = from_module(module)
    module(x).backward()
    grads = value_and_grad(forward)(params, {"x": x})[1]
    torch.testing.assert_close(grads["w"], module.w.grad)
    assert "knows the dtype torch.complex64" in forward.explain()
    assert [n for n, _ in as_module(forward, params).named_parameters()] == ["w"]


# -- blocks ---------------------------------------------------------------------------------------


class Pairs(nn.Module):
    def __init__(self, of: Any, apart: str) -> None:
        super().__init__()
        self.layers, self.apart = nn.ModuleList(of() for _ in range(3)), apart

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if self.apart == "called":
                x = x + layer(x)
            elif self.apart == "by name":
                x = x + layer["line"](layer["norm"](x))
            elif self.apart == "index":
                x = x + self.layers[i][1](self.layers[i][0](x))
            elif self.apart == "length":
                for part in [layer[j] for j in range(len(layer))]:
                    x = part(x)
            else:
                norm, line = layer
                x = x + line(norm(x))
        return x


def both() -> list[nn.Module]:
    return [nn.LayerNorm(8), nn.Linear(8, 8)]


APART = {
    "list": (lambda: nn.ModuleList(both()), "iterate"),
    "index": (lambda: nn.ModuleList(both()), "index"),
    "dict": (lambda: nn.ModuleDict(zip(("norm", "line"), both(), strict=True)), "by name"),
    "sequential": (lambda: nn.Sequential(*both()), "iterate"),
    "sequential index": (lambda: nn.Sequential(*both()), "index"),
    "sequential length": (lambda: nn.Sequential(*both()), "length"),
}


@pytest.mark.parametrize("name", APART)
def test_blocks_that_are_taken_apart(name: str, assert_same) -> None:
    module, x = Pairs(*APART[name]), torch.randn(2, 8)
    forward, params = from_module(module)
    assert torch.equal(forward(params, {"x": x}), module(x))
    doubled = forward.with_rule(Rule("linear", lambda f, path: lambda p, v: 2 * f(p, v)))
    twice = copy.deepcopy(module)
    for m in twice.modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, args, out: 2 * out)
    assert_same(doubled(params, {"x": x}), twice(x).detach())
    if any(s.kind == "block" for s in forward.sites):
        with pytest.raises(ValueError, match=r"takes the block layers.0 apart.*blocks=\(\)"):
            checkpoint(forward)(params, {"x": x})
        loose, _ = from_module(module, blocks=())
        assert "block" not in {s.kind for s in loose.sites}
    else:
        with pytest.raises(ValueError, match="blocks="):
            checkpoint(forward)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.line(self.norm(x)).tanh()


class Plain(nn.Module):
    """Lists of plain layers, beside a block that is used many times."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.drops = nn.ModuleList(nn.Dropout(0.1) for _ in range(3))
        self.shared = nn.ModuleList([Cell()])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        for line, norm, drop in zip(self.lines, self.norms, self.drops, strict=True):
            x = drop(line(norm(x)))
        for _ in range(4):
            x = self.shared[0](x)
        return x


def test_plain_layers_are_sites_and_one_block_is_a_block(assert_same) -> None:
    module, batch = Plain(), {"x": torch.randn(2, 8)}
    forward, params = from_module(module)
    sites = {(s.kind, s.path) for s in forward.sites}
    assert {("linear", f"lines.{i}") for i in range(3)} <= sites
    assert {("norm", f"norms.{i}") for i in range(3)} <= sites
    assert [path for kind, path in sites if kind == "block"] == ["shared.0"]
    run = lambda f: value_and_grad(lambda p, b: f(p, b).square().mean())(params, batch)[1]  # noqa: E731
    assert_same(run(checkpoint(forward)), run(forward), 0)


def test_blocks_by_name() -> None:
    module = nn.Sequential(nn.Linear(8, 8), Cell())
    call = lambda run, x: run(x)  # noqa: E731
    forward, params = from_module(module, call=call, blocks=("1",))
    assert [s.path for s in forward.sites if s.kind == "block"] == ["1"]
    x = torch.randn(2, 8)
    assert torch.equal(checkpoint(forward)(params, x), module(x))
    with pytest.raises(ValueError, match=r"'nowhere' matches nothing.*modules"):
        from_module(module, blocks=("nowhere",))
    with pytest.raises(ValueError, match="shared is not a block: ModuleList"):
        from_module(Plain(), blocks=("shared",))


def test_an_attribute_that_is_set_on_a_layer_reaches_its_code() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Step() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                layer.factor = i + 2.0
                x = layer(x)
            return x

    class Step(Cell):
        factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    module, x = Told(), torch.randn(2, 8)
    forward, params = from_module(module)
    assert torch.equal(forward(params, {"x": x}), module(x))


# -- modules that cannot be taken as they are -----------------------------------------------------


def test_old_weight_norm_and_pruning_keep_their_numbers(assert_same) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        normed = nn.utils.weight_norm(nn.Linear(8, 8))
    pruned = nn.Linear(8, 8)
    prune.l1_unstructured(pruned, "weight", 0.5)
    module, x = nn.Sequential(normed, pruned), torch.randn(2, 8)
    forward, params = from_module(module, call=lambda run, x: run(x))
    other = map_leaves(lambda t: t * 1.3 + 0.1, params)
    want = functional_call(module, flatten(other), (x,))
    assert_same(forward(other, x), want)
    assert "hooks" in forward.explain()


def test_wrappers() -> None:
    inner = nn.Sequential(nn.Linear(4, 4))
    forward, params = from_module(torch.compile(inner), call=lambda run, x: run(x))
    x = torch.randn(2, 4)
    assert torch.equal(forward(params, x), inner(x))
    assert list(flatten(params)) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match=r"DataParallel wraps: module\.module"):
        from_module(nn.DataParallel(inner))
    with pytest.raises(ValueError, match="lazy parameters: call it once"):
        from_module(nn.Sequential(nn.LazyLinear(4)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(ValueError, match="TorchScript"):
        from_module(torch.jit.script(nn.Sequential(nn.Linear(4, 4))))


def test_outputs_that_are_no_logits_say_what_to_do() -> None:
    forward, params = from_module(nn.LSTM(8, 8))
    with pytest.raises(TypeError, match=r"returned tuple \(2 parts\).*call=lambda"):
        forward(params, {"input": torch.randn(1, 3, 8)})


def test_a_module_that_checkpoints_itself() -> None:
    class Own(Plain):
        gradient_checkpointing = False

        def forward(self, x: Tensor) -> Tensor:
            if self.gradient_checkpointing:
                return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            return super().forward(x)

    class Always(Own):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.lines[0], x, use_reentrant=False)

    module, batch = Own(), {"x": torch.randn(2, 8)}
    module.gradient_checkpointing = True
    with pytest.warns(UserWarning, match="the module checkpoints itself"):
        forward, params = from_module(module)
    value_and_grad(lambda p, b: forward(p, b).sum())(params, batch)
    assert module.gradient_checkpointing
    forward, params = from_module(Always())
    with pytest.raises(RuntimeError, match=r"lines.0 was called outside of the forward"):
        value_and_grad(lambda p, b: forward(p, b).sum())(params, batch)


# -- explain --------------------------------------------------------------------------------------


def test_explain_lists_what_is_no_site_and_why() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.register_buffer("bias", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight) + self.bias

    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs two devices")

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return torch.softmax(torch.matmul(q, k.mT), -1) @ v

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routers = nn.ModuleList([Router(), Router()])
            self.picky, self.attends = Picky(8, 8), Attends()
            self.conv, self.cls = nn.Conv2d(3, 8, 1), nn.Parameter(torch.zeros(1, 1, 8))
            self.mha, self.odd = nn.MultiheadAttention(8, 2), nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.attends(x)

    forward, params = from_module(All())
    table, _, below = forward.explain(params).partition("no sites:\n")
    for line in (
        "weight     picky.weight",
        "weight     routers.0.weight",
        "weight     mha.in_proj_weight",
        "weight     mha.out_proj.weight",
    ):
        assert " ".join(line.split()) in " ".join(table.split())
    for reason in (
        "routers.* (Router): it looks like a linear, but has buffers (2 times)",
        "picky (Picky): its probe ended in: RuntimeError: needs two devices",
        "attends (Attends): attention written out (softmax)",
        "conv.weight [8, 3, 1, 1] of Conv2d: a convolution is not a site",
        "cls [1, 1, 8] of All: a dimension of 1",
        "mha (MultiheadAttention): torch's own attention",
        "odd (GroupNorm): its probe ended in",
    ):
        assert reason in below, reason
