import math
from dataclasses import dataclass, field

import pytest
import torch

from params import Leaf, count, count_leaves, flatten, init_params
from params.init import leaf_seed


@dataclass(frozen=True)
class Config:
    extra: dict = field(default_factory=dict)

    def param_spec(self):
        return {
            **self.extra,
            "w": Leaf((64, 32)),
            "blocks": {str(i): {"w": Leaf((64, 32), std=0.5)} for i in range(3)},
            "norm": Leaf((32,), "ones"),
            "bias": Leaf((32,), "zeros"),
            "scalar": Leaf((), "ones"),
        }


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def test_shapes_and_constants():
    params = init_params(Config())
    spec = flatten(Config().param_spec())
    assert {p: tuple(x.shape) for p, x in flatten(params).items()} == {
        p: leaf.shape for p, leaf in spec.items()
    }
    assert count(params) == count_leaves(Config().param_spec()) == 4 * 64 * 32 + 65
    assert torch.equal(params["norm"], torch.ones(32))
    assert torch.equal(params["bias"], torch.zeros(32))
    assert params["scalar"] == 1


def test_normal_leaves_have_their_spread():
    params = init_params(Config(), seed=1)
    for leaf, std in ((params["w"], 0.02), (params["blocks"]["1"]["w"], 0.5)):
        n = leaf.numel()
        # five standard errors: of the mean std/sqrt(n), of the standard deviation std/sqrt(2n)
        assert abs(leaf.mean()) < 5 * std / math.sqrt(n)
        assert abs(leaf.std() - std) < 5 * std / math.sqrt(2 * n)


def test_deterministic_and_blind_to_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = flatten(init_params(Config(), seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = flatten(init_params(Config(), seed=3))
    other = flatten(init_params(Config(), seed=4))
    assert all(same(first[p], second[p]) for p in first)
    assert not torch.equal(first["w"], other["w"])


def test_a_leaf_depends_on_no_other():
    before = flatten(init_params(Config()))
    after = flatten(init_params(Config({"new": {"w": Leaf((5, 5))}})))
    assert set(after) - set(before) == {"new.w"}
    assert all(same(before[p], after[p]) for p in before)


def test_leaves_of_one_shape_differ():
    blocks = init_params(Config())["blocks"]
    drawn = [blocks[i]["w"].flatten() for i in "012"]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(64 * 32)


def test_a_leafs_stream_is_the_same_on_every_machine_and_in_every_version():
    assert leaf_seed(0, "text.embed.weight") == 0x3783CFA76D828280
    assert leaf_seed(1, "text.embed.weight") != leaf_seed(0, "text.embed.weight")
    assert leaf_seed(1, "1:a") != leaf_seed(11, ":a")


def test_lower_precision_is_the_fp32_draw_rounded():
    full, half = init_params(Config()), init_params(Config(), dtype=torch.bfloat16)
    for path, leaf in flatten(half).items():
        assert same(leaf, flatten(full)[path].bfloat16())


def test_meta_has_shapes_only():
    params = init_params(Config(), device="meta", dtype=torch.float16)
    assert all(x.is_meta and x.dtype == torch.float16 for x in flatten(params).values())
    assert count(params) == count_leaves(Config().param_spec())


def test_bad_input():
    with pytest.raises(ValueError, match=r"cannot be torch\.int8"):
        init_params(Config(), dtype=torch.int8)
    with pytest.raises(ValueError, match="normal, zeros, ones, not 'uniform'"):
        Leaf((3,), "uniform")
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="std"):
            Leaf((3,), std=bad)
    with pytest.raises(ValueError, match="shape"):
        Leaf((3, -1))
