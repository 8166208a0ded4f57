"""value_and_grad: what learns, what does not, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core import Forward, as_module, vlm
from params.tree import flatten, merge
from transforms import fuse_loss, quantize_int8, trainable, unfused_loss, value_and_grad


def quadratic(p, batch):
    flat = flatten(p)
    return sum((flat[k].double() ** 2).sum() * (i + 1) for i, k in enumerate(sorted(flat)))


def test_value_and_gradients_by_hand() -> None:
    p = {"a": torch.tensor([1.0, 2.0]), "b": {"c": torch.tensor(3.0)}}
    value, grads = value_and_grad(quadratic)(p, None)
    assert value == 1 + 4 + 2 * 9
    assert grads["a"].tolist() == [2.0, 4.0]
    assert grads["b"]["c"].item() == 12.0
    assert not value.requires_grad
    assert not any(g.requires_grad for g in flatten(grads).values())


def test_params_are_left_alone() -> None:
    p = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(1.0, requires_grad=True)}
    before = {k: (t, t.clone(), t.requires_grad) for k, t in p.items()}
    value_and_grad(quadratic)(p, None)
    for k, (t, copy, needs) in before.items():
        assert p[k] is t
        assert torch.equal(t, copy)
        assert t.requires_grad == needs
        assert t.grad is None


def test_select_takes_patterns_and_leaves_the_rest_out(micro, rough, example, assert_same) -> None:
    config = micro["mlp"]
    params, batch, loss = rough(config), example(config), fuse_loss(vlm(config))
    everything = flatten(value_and_grad(loss)(params, batch)[1])
    for select, count in (
        (["projector"], 4),
        (["text.blocks.-1", "norm"], 12),
        (["mlp.*.bias"], 4),
    ):
        value, grads = value_and_grad(loss, select)(params, batch)
        got = flatten(grads)
        assert torch.equal(value, loss(params, batch))
        assert len(got) == count, sorted(got)
        for path, g in got.items():
            assert_same(g, everything[path])
    assert set(flatten(value_and_grad(loss, ["projector"])(params, batch)[1])) == {
        "projector.up.weight",
        "projector.up.bias",
        "projector.down.weight",
        "projector.down.bias",
    }


def test_frozen_parts_cost_no_backward(micro, rough, example) -> None:
    """With the head alone learning, the backward pass is one matmul for the weight."""
    config = micro["untied"]
    params, batch, loss = rough(config), example(config), unfused_loss(vlm(config))

    def flops(select) -> int:
        with FlopCounterMode(display=False) as counter:
            if select == ():
                loss(params, batch)
            else:
                value_and_grad(loss, select)(params, batch)
        return counter.get_total_flops()

    tokens, head = len(batch["tokens"]), params["text"]["lm_head"]["weight"].numel()
    assert flops(["lm_head"]) == flops(()) + 2 * tokens * head
    assert flops(None) > flops(["lm_head"]) * 1.5


def test_a_leaf_that_is_not_used_gets_zeros(micro, rough, example) -> None:
    config, text = micro["mlp"], micro["text"]
    params, loss = rough(config), fuse_loss(vlm(config))
    _, grads = value_and_grad(loss)(params, example(text))  # no pictures
    flat = flatten(grads)
    assert flat.keys() == flatten(params).keys()
    for path, g in flat.items():
        assert g.shape == flatten(params)[path].shape
        if not path.startswith("text."):
            assert not g.any(), path
    assert any(g.any() for g in flat.values())


def test_unknown_patterns_and_what_cannot_learn(micro, rough, example) -> None:
    config = micro["untied"]
    params, batch = rough(config), example(config)
    with pytest.raises(ValueError, match="'projectr' matches nothing"):
        value_and_grad(fuse_loss(vlm(config)), ["projectr"])(params, batch)
    forward = quantize_int8(vlm(config))
    prepared = forward.prepare(params)
    with pytest.raises(ValueError, match=r"nothing that \('embed',\) names can learn"):
        value_and_grad(fuse_loss(forward), ["embed"])(prepared, batch)
    # a part that can: the bias learns, the int8 weight beside it is left where it is
    _, grads = value_and_grad(fuse_loss(forward), ["blocks.0.attn.q"])(prepared, batch)
    assert set(flatten(grads)) == {"text.blocks.0.attn.q.bias"}


def test_trainable_parts_every_leaf_once(micro, rough) -> None:
    config = micro["untied"]
    prepared = quantize_int8(vlm(config)).prepare(rough(config))
    for select in (None, ["blocks.0"], ["lm_head", "norm"]):
        learns, frozen = trainable(prepared, select)
        assert flatten(merge(learns, frozen)).keys() == flatten(prepared).keys()
        assert all(t.is_floating_point() for t in flatten(learns).values())
        assert not any(p.endswith(("_int8", "_scale")) for p in flatten(learns))


def test_a_parameter_that_is_called_scale_learns() -> None:
    """CLIP's logit_scale, a layer_scale: only the partner of an int8 leaf is frozen."""
    p = {
        "logit_scale": torch.tensor(2.0),
        "layer_scale": torch.ones(3),
        "weight_int8": torch.ones(2, 2, dtype=torch.int8),
        "weight_scale": torch.ones(2, 1),
    }
    learns, frozen = trainable(p)
    assert set(learns) == {"logit_scale", "layer_scale"}
    assert set(frozen) == {"weight_int8", "weight_scale"}
    module = as_module(Forward(lambda site: lambda params, batch: params["logit_scale"], ()), p)
    assert {n for n, _ in module.named_parameters()} == {"logit_scale", "layer_scale"}


def test_a_loss_that_nothing_learns_from_says_so() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(
        ValueError, match=r"none of the leaves that learn \(a, b\): they are frozen"
    ):
        value_and_grad(lambda p, b: p["a"].detach().sum())(params, None)
    with pytest.raises(TypeError, match="the loss is a dict: loss_fn must return one tensor"):
        value_and_grad(lambda p, b: {"loss": p["a"].sum()})(params, None)  # type: ignore[arg-type]
    value, grads = value_and_grad(lambda p, b: (p["a"].sum(), b))(params, 3)  # type: ignore[arg-type]
    assert value == (2, 3)
    assert not grads["b"].any()


def test_bf16_params_get_bf16_gradients(micro, rough, example) -> None:
    config = micro["text"]
    params = rough(config, dtype=torch.bfloat16)
    value, grads = value_and_grad(fuse_loss(vlm(config)))(params, example(config))
    assert value.dtype == torch.float32
    assert {g.dtype for g in flatten(grads).values()} == {torch.bfloat16}
