"""Groups: the numbers of their members one after the other, opened only as far as rules require."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from core import Forward, Rule, vlm
from core.explain import open_groups
from params.tree import Tree, flatten, map_leaves
from transforms import (
    checkpoint,
    fake_quant,
    fuse_loss,
    lora,
    mixed_precision,
    quantize_int8,
    value_and_grad,
)


def opened(forward: Forward) -> Forward:
    """With a rule that changes nothing at every norm and GLU: no group is fused."""
    for kind in ("norm", "glu"):
        forward = forward.with_rule(Rule(kind, lambda f, path: f, name="open"))
    return forward


def seen(forward: Forward) -> Forward:
    """With a rule that changes nothing at every linear."""
    return forward.with_rule(Rule("linear", lambda f, path: lambda p, x: f(p, x), name="seen"))


WAYS: dict[str, Callable[[Forward], Forward]] = {
    "bare": lambda f: f,
    "lora": partial(lora, rank=2),
    "lora on some": partial(lora, rank=2, select=("attn.[qv]", "blocks.1.mlp.down")),
    "int8": quantize_int8,
    "int8, lora": lambda f: lora(quantize_int8(f), rank=2),
    "int8 on some, lora": lambda f: lora(quantize_int8(f, skip=("attn.q", "mlp.up")), rank=2),
    "fake_quant, lora": lambda f: lora(fake_quant(f), rank=2),
    "fake_quant with activations": partial(fake_quant, activations="dynamic"),
    "a probe": seen,
    "a probe, lora": lambda f: lora(seen(f), rank=2),
    "mixed precision in its own dtype, lora": lambda f: lora(
        mixed_precision(f, torch.float64), rank=2
    ),
    "checkpoint, lora": lambda f: checkpoint(lora(f, rank=2)),
}


@pytest.mark.parametrize("config", ["text", "untied"])
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(
    config: str, way: str, micro, rough, example, assert_same: Callable[..., None]
) -> None:
    batch = example(micro[config])
    made = WAYS[way](vlm(micro[config]))
    params = made.prepare(rough(micro[config]))
    params = map_leaves(lambda x: x + 0.1 if x.is_floating_point() and not x.any() else x, params)
    got, want = (value_and_grad(fuse_loss(f))(params, batch) for f in (made, opened(made)))
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    weights = [path for path in flatten(params) if path.endswith("lora_b")]
    assert all(flatten(got[1])[path].any() for path in weights)


def kept(forward: Forward, params: Tree, batch: dict[str, Tensor]) -> int:
    """Bytes kept for backward, each memory once, params not counted."""
    own = {leaf.untyped_storage().data_ptr() for leaf in flatten(params).values()}
    memory: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            memory[storage.data_ptr()] = storage.nbytes()
        return x

    for path, leaf in flatten(params).items():
        leaf.requires_grad_("lora" in path or not any("lora" in p for p in flatten(params)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward(params, batch)
        return sum(memory.values()) if loss.requires_grad else 0


def test_adapters_keep_neither_normed_inputs_nor_activations(micro, rough, example) -> None:
    config = micro["text"]
    text = config.text
    batch = example(config, rows=2, length=40)
    made = lora(vlm(config), rank=2)
    params = made.prepare(rough(config))
    less = kept(fuse_loss(opened(made)), params, batch) - kept(fuse_loss(made), params, batch)
    # of each block the two normed inputs [N, D] and the activation [N, F], fp64; rounded down,
    # because the fused functions keep a statistic a row
    assert less >= 80 * text.layers * (2 * text.dim + text.mlp_dim) * 8 * 0.8


def test_explain_says_which_groups_are_open_and_why(micro) -> None:
    bare = vlm(micro["text"])
    groups = [line for line in bare.explain().splitlines() if line.startswith("group")]
    assert [line.split()[1:] for line in groups] == [
        [f"text.blocks.{i}.{name}", "fused"] for i in range(2) for name in ("attn_in", "mlp")
    ]
    assert open_groups(bare.sites, bare.rules) == []
    adapted = lora(bare, rank=2, select=("attn.q",))
    assert open_groups(adapted.sites, adapted.rules) == ["attn_in: fused with lora (2 times)"]
    quantised = lora(quantize_int8(bare, skip=("lm_head", "attn")), rank=2)
    assert open_groups(quantised.sites, quantised.rules) == [
        "attn_in: fused with lora (2 times)",
        "mlp: open for quantize_int8 (linear) (2 times)",
    ]
    with_norms = bare.with_rule(Rule("norm", lambda f, path: f, ("mlp_norm",), "probe"))
    assert "mlp: open for probe (norm) (2 times)" in open_groups(with_norms.sites, with_norms.rules)


def test_rules_name_their_stage(micro) -> None:
    bare = vlm(micro["text"])
    with pytest.raises(ValueError, match=r"no stage is 'last'; stages: kernel, cast"):
        bare.with_rule(Rule("linear", lambda f, path: f, stage="last"))
    inside, outside = lora(quantize_int8(bare), rank=2), quantize_int8(lora(bare, rank=2))
    linear = [[r.name for r in f.rules if r.kind == "linear"] for f in (inside, outside)]
    assert linear == [["quantize_int8", "lora"]] * 2
