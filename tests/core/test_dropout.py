"""Dropout as a pure function of (seed, salt, position)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.func import grad, vmap

import core.model.text
from core import VLMConfig, make_batch, stack_examples, vlm
from core.model.layers import dropout
from params.tree import map_leaves
from transforms import checkpoint, fuse_loss, value_and_grad

SIZE = (200, 500)
COUNT = math.prod(SIZE)


def mask(seed: int, salt: int = 0, rate: float = 0.5) -> torch.Tensor:
    return dropout(torch.ones(SIZE), rate, torch.tensor(seed), salt) != 0


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    deviations = []
    for seed in range(8):
        out = dropout(torch.ones(SIZE), rate, torch.tensor(seed), salt=3)
        kept = out != 0
        assert torch.equal(out[kept], torch.full_like(out[kept], 1 / (1 - rate)))
        sigma = math.sqrt(rate * (1 - rate) / COUNT)
        deviations.append((kept.double().mean().item() - (1 - rate)) / sigma)
    assert max(map(abs, deviations)) < 4  # standard normal: beyond 4 once in 16,000


def test_rows_and_columns_are_dropped_evenly() -> None:
    """No stripes: along either axis the kept count is binomial (chi-square, 5 sigma)."""
    kept = mask(5).double()
    for axis, other in ((0, SIZE[0]), (1, SIZE[1])):
        z = (kept.sum(axis) - other / 2) / math.sqrt(other / 4)
        n = len(z)
        assert abs(z.square().sum().item() - n) < 5 * math.sqrt(2 * n)


@pytest.mark.parametrize(
    ("a", "b"),
    [((0, 0), (1, 0)), ((0, 0), (0, 1)), ((7, 1), (8, 0)), ((0, 2), (2, 0)), ((3, 0), (-3, 0))],
)
def test_seeds_and_salts_give_independent_masks(a: tuple[int, int], b: tuple[int, int]) -> None:
    agree = (mask(*a) == mask(*b)).double().mean().item()
    assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(COUNT)


def test_neighbours_are_independent() -> None:
    kept = mask(11).flatten()
    for lag in (1, 2, 32, 500):
        agree = (kept[:-lag] == kept[lag:]).double().mean().item()
        assert abs(agree - 0.5) < 4 * 0.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_dtype_and_leaves_the_global_generator_alone(dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    out = dropout(torch.ones(9, 7, dtype=dtype), 0.3, torch.tensor(1), 0)
    assert out.dtype == dtype
    assert torch.equal(torch.get_rng_state(), state)


def test_no_seed_or_no_rate_is_the_identity() -> None:
    x = torch.randn(4)
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, torch.tensor(1), 0) is x


def test_infinities_that_are_dropped_are_gone() -> None:
    x = torch.full((1000,), torch.inf)
    out = dropout(x, 0.5, torch.tensor(0), 0)
    assert not out.isnan().any()
    assert (out == 0).any()


def test_the_gradient_is_the_mask() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    out = dropout(x, 0.4, torch.tensor(2), 1)
    (g,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(g, (out != 0).double() / (1 - 0.4))


def test_compiles_to_the_same_mask() -> None:
    x = torch.randn(40, 25)
    compiled = torch.compile(dropout, backend="aot_eager", fullgraph=True)
    for seed in (0, 2**40 + 3, -1):
        args = (x, 0.25, torch.tensor(seed), 5)
        assert torch.equal(compiled(*args), dropout(*args))


# -- in the model -------------------------------------------------------------------------------


@pytest.fixture
def wet(micro) -> VLMConfig:
    return VLMConfig(dataclasses.replace(micro["text"].text, dropout=0.3))


@pytest.fixture
def shallow(wet) -> VLMConfig:
    return VLMConfig(dataclasses.replace(wet.text, layers=1))


def test_without_a_seed_there_is_none(wet, micro, rough, example) -> None:
    params, batch = rough(wet), example(wet)
    dry = vlm(micro["text"])
    assert torch.equal(vlm(wet)(params, batch), dry(params, batch))
    assert torch.equal(dry(params, batch | {"seed": torch.tensor(1)}), dry(params, batch))


def test_with_a_seed_it_is_deterministic(wet, rough, example) -> None:
    params, batch, forward = rough(wet), example(wet), vlm(wet)
    one, again, two = (forward(params, batch | {"seed": torch.tensor(s)}) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, two)
    assert not torch.allclose(one, forward(params, batch))


def test_every_call_has_its_own_salt(wet, rough, example, monkeypatch) -> None:
    salts = []

    def watch(x, rate, seed, salt):
        assert rate == 0.3
        salts.append(int(salt))
        return dropout(x, rate, seed, salt)

    forward = vlm(wet)
    monkeypatch.setattr(core.model.text, "dropout", watch)
    forward(rough(wet), example(wet) | {"seed": torch.tensor(0)})
    assert len(salts) == 2 * wet.text.layers  # after attention and after the MLP of every layer
    assert len(set(salts)) == len(salts)


def test_same_masks_when_a_block_is_recomputed(wet, rough, example, assert_same) -> None:
    params, batch = rough(wet), example(wet) | {"seed": torch.tensor(4)}
    bare, saving = fuse_loss(vlm(wet)), fuse_loss(checkpoint(vlm(wet)))
    value, grads = value_and_grad(bare)(params, batch)
    for got in (value_and_grad(saving)(params, batch)[1], grad(saving)(params, batch)):
        assert_same(got, grads)
    assert torch.equal(saving(params, batch), value)
    other = value_and_grad(bare)(params, batch | {"seed": torch.tensor(5)})[1]
    with pytest.raises(AssertionError):
        assert_same(grads, other, rtol=1e-3)


def test_vmap_gives_each_example_its_own_mask(wet, rough, assert_same) -> None:
    params, loss = rough(wet), fuse_loss(checkpoint(vlm(wet)))
    tokens = torch.randint(2, 61, (1, 9))
    examples = [make_batch(tokens, seed=seed) for seed in (1, 2)]
    stacked = vmap(grad(loss), (None, 0))(params, stack_examples(examples))
    alone = [value_and_grad(loss)(params, e)[1] for e in examples]
    for i in (0, 1):
        assert_same(map_leaves(lambda g, i=i: g[i], stacked), alone[i])
    with pytest.raises(AssertionError):
        assert_same(alone[0], alone[1], rtol=1e-3)


def test_compiled_loss_drops_the_same(shallow, rough, example, assert_same) -> None:
    params, batch = rough(shallow), example(shallow) | {"seed": torch.tensor(4)}
    loss = fuse_loss(checkpoint(vlm(shallow)))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, grads = value_and_grad(compiled)(params, batch)
    want, want_grads = value_and_grad(loss)(params, batch)
    assert_same(value, want)
    assert_same(grads, want_grads)
    # another seed is another tensor, not another program
    with torch.compiler.set_stance("fail_on_recompile"):
        other = value_and_grad(compiled)(params, batch | {"seed": torch.tensor(5)})[0]
    assert_same(other, loss(params, batch | {"seed": torch.tensor(5)}))
