"""Both ways between a Forward and nn.Module; the user's module stays as it was."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from core import Rule, as_module, from_module, make_batch, stack_examples, vlm
from params.tree import flatten, map_leaves, unflatten
from tests.models import language
from tests.rounding import FP32
from transforms import checkpoint, fuse_loss, quantize_int8, unfused_loss, value_and_grad

VOCAB = 23


class Scale(nn.Module):
    """Owns one vector, as a norm does, but is none."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)
        self.scale, self.drop = Scale(), nn.Dropout(0.3)
        self.register_buffer("shift", torch.full((8,), 0.1 * index))
        self.kind = f"block {index}"

    def forward(self, x: Tensor, mask: Tensor, *, power: int = 1) -> tuple[Tensor, int]:
        h = self.down(F.gelu(self.up(self.norm(x + self.shift)))) * mask**power
        return x + self.drop(self.scale(h)), power


class Foreign(nn.Module):
    """What people write: padding_idx, a tied head, dropout, buffers, odd arguments, no HF."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 8, padding_idx=0)
        self.layers = nn.ModuleList(Block(i) for i in range(3))
        self.final = nn.LayerNorm(8)
        self.out = nn.Linear(8, VOCAB, bias=not tied)
        if tied:
            self.out.weight = self.table.weight
        self.loose = nn.Parameter(torch.randn(8))
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        x, mask = self.table(tokens) + self.loose, (tokens != 0).unsqueeze(-1)
        for layer in self.layers:
            assert layer.kind.startswith("block")
            x, _ = layer(x, mask, power=2)
        return self.out(self.final(x))


def foreign_batch(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCAB, (rows, length))
    tokens[:, 3] = 0
    return {"tokens": tokens, "labels": torch.randint(0, VOCAB, (rows, length))}


def llama_batch(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    batch = foreign_batch(rows, length)
    return {"input_ids": batch["tokens"], "labels": batch["labels"]}


def make(kind: str) -> tuple[nn.Module, dict[str, Tensor], str | None]:
    """A module, a batch for it, and what ``head`` to give."""
    if kind.startswith("llama"):
        tied = kind == "llama tied"
        module = language("Llama", tie_word_embeddings=tied, attn_implementation="eager")
        return module, llama_batch(), None
    return Foreign(kind == "foreign tied"), foreign_batch(), "out"


FOREIGN = ["foreign tied", "foreign", "llama tied", "llama"]


def reference(module: nn.Module, params: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """The loss and gradients of the module itself, holding these params."""
    module = copy.deepcopy(module)
    names = dict(module.named_parameters())
    with torch.no_grad():
        for name, leaf in flatten(params).items():
            names[name].copy_(leaf)
    kwargs = {k: v for k, v in batch.items() if k != "labels"}
    out = module(**kwargs)
    logits = out if isinstance(out, Tensor) else out.logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return loss.detach(), unflatten({name: p.grad for name, p in names.items()})


# -- from_module --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FOREIGN)
def test_forward_is_the_module(kind: str, assert_same) -> None:
    module, batch, head = make(kind)
    forward, params = from_module(module, head=head)
    out = module(**{k: v for k, v in batch.items() if k != "labels"})
    assert torch.equal(forward(params, batch), out if isinstance(out, Tensor) else out.logits)
    assert list(flatten(params)) == [name for name, _ in module.named_parameters()]
    for name, p in module.named_parameters():
        assert flatten(params)[name].data_ptr() == p.data_ptr()

    other = map_leaves(lambda t: t * 1.3 + 0.05, params)  # other params than the module's own
    want, want_grads = reference(module, other, batch)
    drivers = [value_and_grad(unfused_loss(forward)), value_and_grad(fuse_loss(forward))]
    drivers.append(lambda p, b: (want, grad(unfused_loss(forward))(p, b)))
    for driver in drivers:
        value, grads = driver(other, batch)
        assert_same(value, want)
        assert_same(grads, want_grads)


def snapshot(module: nn.Module) -> list[Any]:
    """Everything one could change: identities, values, flags, hooks, instance attributes."""
    state = []
    for name, m in module.named_modules():
        hooks = {k: list(v) for k, v in vars(m).items() if "hooks" in k}
        state.append((name, id(m), type(m), m.training, sorted(vars(m)), hooks))
        state += [(name, k, id(v)) for k, v in vars(m).items() if not k.startswith("_")]
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        state.append((name, id(t), t.requires_grad, t.device, t.grad, t.flatten().tolist()))
    return state


@pytest.mark.parametrize("kind", FOREIGN)
def test_the_module_is_untouched(kind: str) -> None:
    module, batch, _ = make(kind)
    calls: list[str] = []
    last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
    last.register_full_backward_hook(lambda *a: calls.append("backward"))
    module.register_forward_hook(lambda *a: calls.append("forward"))
    module.train()
    next(module.parameters()).requires_grad_(False)
    before, rng = snapshot(module), torch.get_rng_state()
    forward, params = from_module(module)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), rng)
    value_and_grad(lambda p, b: checkpoint(forward)(p, b).sum())(params, batch)
    assert snapshot(module) == before


def test_a_stateful_parametrization_is_not_advanced() -> None:
    """Spectral norm iterates whenever its weight is read in training mode."""
    module = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    )
    before = snapshot(module)
    from_module(module)
    assert snapshot(module) == before


@pytest.mark.parametrize("where", ["out", "layers.1.up", "layers.1.norm", "layers.1", "final"])
@pytest.mark.parametrize("pre", [True, False])
def test_forward_hooks_run_wherever_they_sit(where: str, pre: bool) -> None:
    module, batch = Foreign(), foreign_batch()
    target = module.get_submodule(where)
    if pre:
        target.register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    else:
        double = lambda m, args, out: (out[0] * 2, out[1]) if isinstance(out, tuple) else out * 2  # noqa: E731
        target.register_forward_hook(double)
    plain = copy.deepcopy(module)
    forward, params = from_module(module)
    want = module(batch["tokens"])
    assert torch.equal(forward(params, batch), want)
    assert torch.equal(checkpoint(forward)(params, batch), want)
    assert torch.equal(plain(batch["tokens"]), want)


def test_a_patched_forward_is_kept() -> None:
    module, batch = Foreign(), foreign_batch()
    up = module.layers[0].up
    up.forward = lambda x: F.linear(x, up.weight, up.bias) * 3
    forward, params = from_module(module)
    assert torch.equal(forward(params, batch), module(batch["tokens"]))
    other = map_leaves(lambda t: t * 1.3 + 0.05, params)  # what it captured is not the caller's
    got = forward(other, batch)
    assert not torch.equal(got, forward(params, batch))
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(flatten(other)[name].clone())
    assert torch.equal(got, module(batch["tokens"]))


def test_padding_idx_gets_no_gradient(assert_same) -> None:
    module, batch = Foreign(tied=False), foreign_batch()
    forward, params = from_module(module, head="out")
    _, want = reference(module, params, batch)
    assert not want["table"]["weight"][0].any()
    assert_same(value_and_grad(unfused_loss(forward))(params, batch)[1], want)
    assert_same(grad(unfused_loss(forward))(params, batch), want)


def test_embeddings_that_do_more_than_look_up_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Embedding(5, 4, max_norm=1.0)
            self.frequency = nn.Embedding(5, 4, scale_grad_by_freq=True)
            self.plain = nn.Embedding(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.frequency(ids) + self.plain(ids)

    module = Odd()
    forward, params = from_module(module)
    assert [s.path for s in forward.sites if s.kind == "embed"] == ["plain"]
    assert "frequency (Embedding): max_norm, sparse or scale_grad_by_freq" in forward.explain()
    ids = torch.tensor([1, 1, 2])
    module(ids).sum().backward()
    _, grads = value_and_grad(lambda p, b: forward(p, b).sum())(params, {"ids": ids})
    assert torch.equal(grads["frequency"]["weight"], module.frequency.weight.grad)


def test_what_is_found() -> None:
    forward, _ = from_module(Foreign(tied=True), head="out")
    found = {(s.kind, s.path, s.outermost) for s in forward.sites}
    inner = {
        (kind, f"layers.{i}.{name}", False)
        for i in range(3)
        for kind, name in (("norm", "norm"), ("linear", "up"), ("linear", "down"))
    }
    assert found == inner | {
        *(("block", f"layers.{i}", True) for i in range(3)),
        ("embed", "table", True),
        ("norm", "final", True),
        ("head", "table", True),  # tied: where the params hold the weight
    }
    untied, _ = from_module(Foreign(tied=False), head="out")
    assert [s.path for s in untied.select(("head",), ("lm_head",))] == ["out"]
    assert [s.path for s in untied.select(("block",), ("layers.-1",))] == ["layers.2"]


@pytest.mark.parametrize("kind", ["foreign tied", "llama"])
def test_every_site_of_a_module_is_reached(kind: str) -> None:
    module, batch, head = make(kind)
    forward, params = from_module(module, head=head)
    reached = []

    def wrap(f, path):
        return lambda p, *args: reached.append(path) or f(p, *args)

    watched = forward
    for site_kind in {s.kind for s in forward.sites}:
        watched = watched.with_rule(Rule(site_kind, wrap))
    assert torch.equal(watched(params, batch), forward(params, batch))
    assert sorted(reached) == sorted(s.path for s in forward.sites)


def test_norms_are_found_by_what_they_do() -> None:
    class RMS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * self.g

    class Picky(nn.Module):
        """Refuses what it is probed with, in its own way, and counts its calls."""

        calls: list[int] = []  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            assert x.shape[1] == 7, "seven or nothing"
            return x * self.w + torch.rand(())

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = RMS(), Picky(), Scale()
            self.d, self.e = nn.GroupNorm(2, 8), nn.BatchNorm1d(7)

        def forward(self, x: Tensor) -> Tensor:
            return self.e(self.c(self.b(self.a(x))))

    module, rng = Mine(), torch.get_rng_state()
    forward, _ = from_module(module)
    assert [(s.kind, s.path) for s in forward.sites] == [("norm", "a")]
    assert module.b.seen == 0
    assert torch.equal(torch.get_rng_state(), rng)


def test_dropout_draws_what_the_module_draws() -> None:
    module, batch = Foreign().train(), foreign_batch()
    forward, params = from_module(module)
    torch.manual_seed(3)
    want = module(batch["tokens"])
    torch.manual_seed(3)
    assert torch.equal(forward(params, batch), want)
    module.eval()  # the forward keeps the mode it was made in
    torch.manual_seed(3)
    assert torch.equal(forward(params, batch), want)


def test_a_block_used_twice_is_one_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
            other = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
            self.layers = nn.ModuleList([block, block, other])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x

    module, x = Twice(), torch.randn(3, 4)
    forward, params = from_module(module)
    assert set(params["layers"]) == {"0", "2"}
    other = map_leaves(lambda t: t * 1.3, params)
    want = functional_call(module, flatten(other), (x,))
    assert torch.equal(checkpoint(forward)(other, {"x": x}), want)
    loss = lambda p, b: checkpoint(forward)(p, b).square().sum()  # noqa: E731
    plain = lambda p, b: functional_call(module, flatten(p), (b["x"],)).square().sum()  # noqa: E731
    got, want_grads = grad(loss)(other, {"x": x}), grad(plain)(other, {"x": x})
    for path, g in flatten(got).items():
        torch.testing.assert_close(g, flatten(want_grads)[path])


def test_a_weight_shared_by_two_layers_is_one_leaf(assert_same) -> None:
    class Shared(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.layers[2].up.weight = self.layers[0].up.weight

    module, batch = Shared(), foreign_batch()
    forward, params = from_module(module, head="out")
    assert "layers.2.up.weight" not in flatten(params)
    other = map_leaves(lambda t: t * 1.2, params)
    want, want_grads = reference(module, other, batch)
    for loss in (unfused_loss(forward), fuse_loss(checkpoint(forward))):
        value, grads = value_and_grad(loss)(other, batch)
        assert_same(value, want)
        assert_same(grads, want_grads)
        assert_same(grad(loss)(other, batch), want_grads)


def test_call_says_how_a_batch_becomes_arguments() -> None:
    module, batch = Foreign(), foreign_batch()
    renamed = {"ids": batch["tokens"]}
    forward, params = from_module(module, call=lambda run, b: run(b["ids"]) * 2)
    assert torch.equal(forward(params, renamed), module(batch["tokens"]) * 2)


def test_batch_keys_that_fit_nothing() -> None:
    forward, params = from_module(Foreign())
    with pytest.raises(ValueError, match=r"\['ids', 'labels'\], none of which .*tokens.*call="):
        forward(params, {"ids": torch.zeros(1, 1), "labels": torch.zeros(1)})


@pytest.mark.parametrize("head", ["nowhere", "layers.0", "table"])
def test_a_wrong_head_lists_the_linears(head: str) -> None:
    with pytest.raises(ValueError, match=rf"head='{head}' names no linear layer.*'out'"):
        from_module(Foreign(), head=head)


def test_without_a_head_there_is_nothing_to_fuse() -> None:
    forward, _ = from_module(Foreign())
    with pytest.raises(ValueError, match=r"fuse_loss needs the output head.*head='path.*linear"):
        fuse_loss(forward)


def test_a_model_that_changes_its_logits_cannot_be_fused() -> None:
    class Capped(Foreign):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.sigmoid(super().forward(tokens))

    class Halved(Foreign):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) / torch.tensor(2.0)

    batch = foreign_batch()
    for module in (Capped(), Halved()):
        forward, params = from_module(module, head="out")
        assert torch.equal(forward(params, batch), module(batch["tokens"]))
        with pytest.raises(TypeError, match=r"Logits|of its logits after the head"):
            fuse_loss(forward)(params, batch)


def test_params_that_lack_a_leaf_say_which() -> None:
    forward, params = from_module(Foreign())
    flat = flatten(params)
    lacking = unflatten({k: v for k, v in flat.items() if k != "layers.1.scale.gain"})
    with pytest.raises(ValueError, match=r"layers\.1\.scale\.gain"):
        forward(lacking, foreign_batch())


# -- as_module ----------------------------------------------------------------------------------


def bridged(kind: str, micro, rough, example):
    """(forward, params, batch, two examples of it)"""
    if kind in micro:
        config = micro[kind]
        batches = [example(config, rows=1, seed=seed) for seed in (1, 2)]
        return vlm(config), rough(config), example(config), batches
    module, batch, head = make(kind)
    forward, params = from_module(module, head=head)
    params = map_leaves(lambda t: t * 1.1 + 0.01, params)
    return forward, params, batch, [{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)]


BRIDGED = ["untied", "mlp", "resampler", "foreign tied", "llama tied", "llama"]


@pytest.mark.parametrize("kind", BRIDGED)
def test_as_module_is_bit_equal(kind: str, micro, rough, example, assert_same) -> None:
    bare, params, batch, examples = bridged(kind, micro, rough, example)
    stacked = stack_examples(examples)
    for forward in (bare, unfused_loss(bare), fuse_loss(checkpoint(bare))):
        module = as_module(forward, map_leaves(torch.zeros_like, params))

        def through(p, b, module=module):
            return functional_call(module, flatten(p), (b,))

        assert torch.equal(through(params, batch), forward(params, batch))

        def of(run, both=(forward, through)):
            """What a driver makes of the forward and of the module, its outputs summed."""
            return [run(lambda p, b, f=f: f(p, b).sum()) for f in both]

        (value, want), (got_value, got) = of(lambda f: value_and_grad(f)(params, batch))
        assert torch.equal(got_value, value)
        assert_same(got, want, 0)
        want, got = of(lambda f: grad(f)(params, batch))
        assert_same(got, want, 0)
        want, got = of(lambda f: vmap(grad(f), (None, 0))(params, stacked))
        assert_same(got, want, 0)
        want, got = (vmap(f, (None, 0))(params, stacked) for f in (forward, through))
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", BRIDGED)
def test_round_trip(kind: str, micro, rough, example) -> None:
    forward, params, batch, _ = bridged(kind, micro, rough, example)
    forward = fuse_loss(checkpoint(forward))
    module = as_module(forward, params)
    again, back = from_module(module)
    assert again is forward
    assert flatten(back).keys() == flatten(params).keys() | forward.module.buffers.keys()
    for path, leaf in flatten(back).items():
        assert torch.equal(leaf, {**forward.module.buffers, **flatten(params)}[path])
    assert torch.equal(again(back, batch), forward(params, batch))
    assert torch.equal(module(batch), forward(params, batch))


def test_state_dict_names_are_paths_and_memory_is_shared(micro, rough) -> None:
    params = rough(micro["mlp"])
    module = as_module(vlm(micro["mlp"]), params)
    assert module.state_dict().keys() == flatten(params).keys()
    assert {n for n, _ in module.named_parameters()} == flatten(params).keys()
    for name, p in module.named_parameters():
        assert p.data_ptr() == flatten(params)[name].data_ptr()
        assert p.requires_grad


def test_state_dict_of_a_hugging_face_model_keeps_its_names() -> None:
    module = language("Llama")
    forward, params = from_module(module)
    assert as_module(forward, params).state_dict().keys() == module.state_dict().keys()


def test_as_module_trains_moves_and_loads(micro, rough, example) -> None:
    config = micro["untied"]
    loss, batch = fuse_loss(vlm(config)), example(config)
    module = as_module(loss, map_leaves(torch.clone, rough(config)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first = module(batch)
    first.backward()
    optimizer.step()
    assert module(batch) < first
    single = copy.deepcopy(module).to(torch.float32)
    assert single(batch).dtype == torch.float32
    torch.testing.assert_close(single(batch).double(), module(batch), rtol=FP32, atol=0)
    fresh = as_module(loss, rough(config, seed=5))
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(batch), module(batch))


def test_int8_params_become_buffers(micro, rough, example) -> None:
    config = micro["mlp"]
    forward, batch = quantize_int8(vlm(config)), example(config)
    params = forward.prepare(rough(config))
    module = as_module(forward, params)
    buffers = {name for name, _ in module.named_buffers()}
    assert buffers == {p for p in flatten(params) if p.endswith(("_int8", "_scale", "_dtype"))}
    assert module.state_dict().keys() == flatten(params).keys()
    assert torch.equal(module(batch), forward(params, batch))
    other = forward.prepare(rough(config, seed=3))
    assert torch.equal(functional_call(module, flatten(other), (batch,)), forward(other, batch))
    again, back = from_module(module)
    assert torch.equal(again(back, batch), forward(params, batch))


def test_a_native_model_inside_a_foreign_one(micro, rough) -> None:
    """as_module's module is a module like any other: part of a larger one."""
    config = micro["text"]
    params = rough(config)

    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm, self.scale = as_module(vlm(config), params), nn.Parameter(torch.tensor(2.0))

        def forward(self, tokens: Tensor) -> Tensor:
            return self.lm(make_batch(tokens)) * self.scale

    tokens = torch.randint(2, 61, (2, 5))
    forward, outer = from_module(Larger())
    assert torch.equal(
        forward(outer, {"tokens": tokens}), vlm(config)(params, make_batch(tokens)) * 2
    )
    halved = map_leaves(lambda t: t * 0.5, outer)
    want = vlm(config)(map_leaves(lambda t: t * 0.5, params), make_batch(tokens))
    assert torch.equal(forward(halved, {"tokens": tokens}), want)


def test_a_frozen_dataclass_stays_frozen(micro) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        vlm(micro["text"]).finish = None  # type: ignore[misc]
