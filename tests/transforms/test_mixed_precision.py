"""A cast where params enter: the numbers of a low-precision model, the gradients of its params."""

from __future__ import annotations

import pytest
import torch

from core import Rule, TextConfig, VLMConfig, from_module, make_batch, vlm
from params import init_params
from params.tree import flatten, map_leaves, unflatten
from transforms import (
    checkpoint,
    fake_quant,
    fuse_loss,
    mixed_precision,
    quantize_int8,
    unfused_loss,
    value_and_grad,
)


def matrices_to(params, dtype: torch.dtype):
    return map_leaves(lambda t: t.to(dtype) if t.ndim >= 2 else t, params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["untied", "mlp", "resampler"])
def test_is_the_model_with_cast_matrices(
    micro, rough, example, assert_same, name: str, dtype: torch.dtype
) -> None:
    config = micro[name]
    params, batch, bare = rough(config, dtype=torch.float32), example(config), vlm(config)
    forward = mixed_precision(bare, dtype)
    want = bare(matrices_to(params, dtype), batch)
    got = forward(params, batch)
    assert got.dtype == want.dtype == dtype
    assert torch.equal(got, want)

    low = matrices_to(params, dtype)
    # one site after the other, as the cast has them, and not several fused: bit for bit
    singly = bare.with_rule(Rule("linear", lambda f, path: f))
    want_loss, want_grads = value_and_grad(fuse_loss(singly))(low, batch)
    for loss in (
        fuse_loss(forward),
        checkpoint(fuse_loss(forward)),
        fuse_loss(checkpoint(forward)),
    ):
        value, grads = value_and_grad(loss)(params, batch)
        assert value.dtype == torch.float32
        assert torch.equal(value, want_loss)
        assert {g.dtype for g in flatten(grads).values()} == {torch.float32}
        # a tied weight's two gradients meet in fp32 here, in the low dtype there
        tied = {"text.embed.weight"} if config.text.tied else set()
        for path, g in flatten(grads).items():
            want_g = flatten(want_grads)[path].float()
            rtol = 2.0**-7 if path in tied else 0.0
            assert_same(g, want_g, rtol)

    # Fused, the gradients of an activation that goes several ways are added up in another order:
    # up to two roundings a block, of which there are two. (That of a key's bias is 0 but for
    # roundings: softmax does not see it.)
    value, grads = value_and_grad(fuse_loss(bare))(low, batch)
    assert torch.equal(value, want_loss)
    got, want = (
        {path: g.float() for path, g in flatten(tree).items() if ".k.bias" not in path}
        for tree in (grads, want_grads)
    )
    assert_same(unflatten(got), unflatten(want), 8 * torch.finfo(dtype).eps)


def test_gradients_are_those_of_fp32_to_low_precision(micro, rough, example) -> None:
    config = micro["mlp"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    want = flatten(value_and_grad(unfused_loss(vlm(config)))(params, batch)[1])
    got = flatten(value_and_grad(fuse_loss(mixed_precision(vlm(config))))(params, batch)[1])
    overlap = sum((want[p] * got[p]).sum() for p in want)
    sizes = [sum(g[p].square().sum() for p in want).sqrt() for g in (want, got)]
    assert overlap / (sizes[0] * sizes[1]) > 0.99


def test_norms_and_biases_stay(micro, rough, example) -> None:
    """A norm's weight of 1 + 2 ** -10, which bf16 would round away, still counts."""
    config = micro["untied"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    forward = mixed_precision(vlm(config), torch.bfloat16)
    params["text"]["norm"]["weight"] = torch.ones(16)
    seen = []

    def watch(f, path):
        return lambda p, x: seen.append(p["weight"]) or f(p, x)

    forward = mixed_precision(vlm(config).with_rule(Rule("norm", watch, ("text.norm",))))
    forward(params, batch)
    assert seen[0].dtype == torch.float32


def test_hugging_face(assert_same) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    forward, params = from_module(model)
    ids = torch.randint(0, 31, (2, 5))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    got = mixed_precision(forward)(params, batch)
    assert got.dtype == torch.bfloat16
    want = model.to(torch.bfloat16)(input_ids=ids).logits  # every norm's weight is 1: bf16 holds it
    assert_same(got.float(), want.detach().float(), 2.0**-6)
    value, grads = value_and_grad(fuse_loss(checkpoint(mixed_precision(forward))))(params, batch)
    assert value.dtype == torch.float32
    assert {g.dtype for g in flatten(grads).values()} == {torch.float32}


@pytest.mark.parametrize("first", ["fake", "mixed"])
def test_training_sees_the_weights_that_will_be_deployed(first: str) -> None:
    """fake_quant in bf16 is as near to the int8 model as bf16 is, not as far as no rounding is."""
    config = VLMConfig(TextConfig(64, 64, 2, 2, 1, 128, tied=False))
    params, batch = init_params(config), make_batch(torch.randint(0, 64, (2, 32)))
    bare = vlm(config)
    deployed = quantize_int8(bare, skip=())
    want = deployed(deployed.prepare(params), batch)
    steps = [lambda f: fake_quant(f, skip=()), mixed_precision]
    forward = bare
    for step in steps if first == "fake" else reversed(steps):
        forward = step(forward)

    def noise(logits: torch.Tensor, reference: torch.Tensor) -> float:
        return float((logits.float() - reference).square().mean() / reference.square().mean())

    in_bf16 = noise(mixed_precision(bare)(params, batch), bare(params, batch))
    assert noise(forward(params, batch), want) < 1.5 * in_bf16
