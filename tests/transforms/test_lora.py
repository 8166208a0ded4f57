"""Adapters: the formula, what trains, seeds, the way back, over int8 and beside other rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core import vlm
from params import num_bytes
from params.tree import flatten, map_leaves, unflatten
from transforms import (
    checkpoint,
    fake_quant,
    fuse_loss,
    lora,
    merge_lora,
    mixed_precision,
    quantize_int8,
    trainable,
    value_and_grad,
)

RANK, ALPHA = 2, 3.0


@pytest.fixture
def subject(micro, rough, example):
    config = micro["mlp"]
    return vlm(config), rough(config), example(config)


def adapted(forward, params, **options):
    """The forward with adapters, and params in which they do something."""
    forward = lora(forward, rank=RANK, alpha=ALPHA, **options)
    generator = torch.Generator().manual_seed(1)

    def shake(leaf: Tensor) -> Tensor:
        return leaf + 0.1 * torch.randn(leaf.shape, generator=generator).to(leaf)

    params = flatten(forward.prepare(params))
    return forward, unflatten({k: shake(v) if "lora" in k else v for k, v in params.items()})


def test_at_first_nothing_changes(subject) -> None:
    bare, params, batch = subject
    forward = lora(bare, rank=RANK)
    assert torch.equal(forward(forward.prepare(params), batch), bare(params, batch))


def test_adapters_follow_from_the_seed_and_the_path(subject) -> None:
    bare, params, _ = subject
    all_, some = lora(bare, rank=RANK), lora(bare, rank=RANK, select=("attn.q",))
    a, b = flatten(all_.prepare(params)), flatten(some.prepare(params))
    other = flatten(all_.prepare(params, seed=1))
    path = "text.blocks.1.attn.q.lora_a"
    assert torch.equal(a[path], b[path])
    assert not torch.equal(a[path], other[path])
    assert not torch.equal(a[path], a["text.blocks.0.attn.q.lora_a"])
    assert {p for p in b if "lora" in p} == {
        f"{s.path}.{half}"
        for s in bare.sites
        if s.kind == "linear" and s.path.endswith("attn.q")
        for half in ("lora_a", "lora_b")
    }
    spread = a["text.blocks.0.mlp.down.lora_a"].std() * 24**0.5
    assert 0.6 < spread < 1.4


def test_only_adapters_train(subject) -> None:
    bare, params, batch = subject
    forward, ready = adapted(bare, params)
    loss = fuse_loss(forward)
    _, grads = value_and_grad(loss)(ready, batch)
    assert set(flatten(grads)) == {p for p in flatten(ready) if "lora" in p}
    learning, frozen = trainable(ready)
    assert set(flatten(learning)) == set(flatten(grads))
    assert set(flatten(frozen)) == set(flatten(params))
    # others if they are named
    _, chosen = value_and_grad(loss, ("text.norm",))(ready, batch)
    assert set(flatten(chosen)) == {"text.norm.weight"}


def test_the_way_back(subject, assert_same) -> None:
    bare, params, batch = subject
    forward, ready = adapted(bare, params)
    merged = merge_lora(forward, ready, alpha=ALPHA)
    assert set(flatten(merged)) == set(flatten(params))
    assert_same(bare(merged, batch), forward(ready, batch), dtype=torch.float32)  # added up
    quantised = quantize_int8(forward)
    with pytest.raises(ValueError, match="is quantised: merge the adapters into the float params"):
        merge_lora(quantised, quantised.prepare(ready), alpha=ALPHA)
    with pytest.raises(ValueError, match="adapters at no linear of this forward"):
        merge_lora(bare, {**ready, "else": {"lora_a": torch.zeros(1, 1)}})


@pytest.mark.parametrize("rounding", [quantize_int8, fake_quant])
def test_adapters_lie_outside_of_rounding_in_either_order(subject, assert_same, rounding) -> None:
    """Of weights alone: table.py, with all numbers."""
    bare, params, batch = subject
    skip = ("lm_head", "vision")

    def round_(forward):
        return rounding(forward, skip=skip, activations="dynamic")

    outcomes = []
    for first, second in ((lora_step, round_), (round_, lora_step)):
        forward = fuse_loss(second(first(bare)))
        ready = forward.prepare(params)
        ready = unflatten(
            {
                p: t + 0.1 * torch.cos(torch.arange(t.numel())).view_as(t).to(t)
                if "lora" in p
                else t
                for p, t in flatten(ready).items()
            }
        )
        names = [leaf for leaf in flatten(ready) if "lora" in leaf]
        assert all(flatten(ready)[n].is_floating_point() for n in names)
        outcomes.append(value_and_grad(forward)(ready, batch))
    (value, grads), (again, same) = outcomes
    assert_same(again, value)
    assert_same(map_leaves(Tensor.float, same), map_leaves(Tensor.float, grads))
    assert set(flatten(grads)) == set(names)


def lora_step(forward):
    return lora(forward, rank=RANK, alpha=ALPHA)


def test_int8_with_adapters_is_small_and_learns(subject) -> None:
    bare, params, batch = subject
    params = map_leaves(Tensor.float, params)
    forward = fuse_loss(checkpoint(lora(quantize_int8(bare), rank=RANK, select=("text.blocks",))))
    ready = forward.prepare(params)
    assert num_bytes(ready) < num_bytes(params)
    first, _ = value_and_grad(forward)(ready, batch)
    flat = flatten(ready)
    for _ in range(30):
        _, grads = value_and_grad(forward)(unflatten(flat), batch)
        flat |= {p: flat[p] - 0.5 * g for p, g in flatten(grads).items()}
    last, _ = value_and_grad(forward)(unflatten(flat), batch)
    assert last < 0.8 * first


def test_in_half_precision_in_either_order(subject) -> None:
    bare, params, batch = subject
    _, ready = adapted(bare, map_leaves(Tensor.float, params))
    one, other = (fuse_loss(f(g(bare))) for f, g in ((lora_step, half), (half, lora_step)))
    want, grads = value_and_grad(one)(ready, batch)
    assert torch.equal(other(ready, batch), want)
    assert all(g.dtype == torch.float32 for g in flatten(grads).values())


def half(forward):
    return mixed_precision(forward, torch.bfloat16)


def test_errors_name_the_remedy(subject) -> None:
    bare, params, batch = subject
    with pytest.raises(ValueError, match="rank must be 1 or more, not 0"):
        lora(bare, rank=0)
    with pytest.raises(
        ValueError, match=r"text.norm.*nothing to adapt; of linears there are \['proj"
    ):
        lora(bare, rank=1, select=("text.norm",))
    with pytest.raises(ValueError, match="nonsense"):
        lora(bare, rank=1, select=("nonsense",))
    with pytest.raises(KeyError, match="has no adapter: params = "):
        lora(bare, rank=1)(params, batch)
    forward = lora(bare, rank=1)
    flat = flatten(params)
    del flat["text.blocks.0.attn.q.weight"]
    with pytest.raises(ValueError, match=r"no leaf text.blocks.0.attn.q.weight to adapt"):
        forward.prepare(unflatten(flat))
