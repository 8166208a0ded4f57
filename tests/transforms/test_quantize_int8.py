"""Int8 weights, and training for them: sizes, numbers, gradients, what is skipped and refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from core import Rule, TextConfig, VLMConfig, as_module, from_module, vlm
from params import dequantize_weight, init_params, quantize_weight
from params.tree import flatten, map_leaves, num_bytes, unflatten
from tests.models import language
from transforms import (
    cast_matrices,
    fake_quant,
    fuse_loss,
    mixed_precision,
    quantize_int8,
    unfused_loss,
    value_and_grad,
)


def quantised(params) -> set[str]:
    """Paths of what prepare made int8."""
    return {p.removesuffix(".weight_int8") for p in flatten(params) if p.endswith("_int8")}


def rounded(params, paths: set[str]):
    """Float params whose weights at these paths went to int8 and back."""
    flat = flatten(params)
    for path in paths:
        w = flat[f"{path}.weight"]
        flat[f"{path}.weight"] = dequantize_weight(*quantize_weight(w), w.dtype)
    return unflatten(flat)


# -- size ---------------------------------------------------------------------------------------


def test_half_the_bytes_of_bf16() -> None:
    config = VLMConfig(TextConfig(1000, 256, 2, 4, 2, 768))
    params = init_params(config, dtype=torch.bfloat16)
    forward = quantize_int8(vlm(config), skip=())
    ratio = num_bytes(params) / num_bytes(forward.prepare(params))
    assert 1.95 < ratio < 2.0  # a scale is 4 bytes for a row of 256 and more


def test_leaves_of_a_quantised_weight(micro, rough) -> None:
    config = micro["untied"]
    params = rough(config)
    flat = flatten(quantize_int8(vlm(config)).prepare(params))
    q = "text.blocks.0.attn.q"
    assert f"{q}.weight" not in flat
    assert flat[f"{q}.weight_int8"].dtype == torch.int8
    assert flat[f"{q}.weight_int8"].shape == (16, 16)
    assert flat[f"{q}.weight_scale"].dtype == torch.float32
    assert flat[f"{q}.weight_scale"].shape == (16, 1)
    assert flat[f"{q}.bias"] is flatten(params)[f"{q}.bias"]
    assert flatten(params)[f"{q}.weight"].is_floating_point()  # the given params are as they were


# -- what is skipped ----------------------------------------------------------------------------

TEXT_LINEARS = {
    f"text.blocks.{i}.{name}"
    for i in (0, 1)
    for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
}
EYE = {
    "vision.patch_embed",
    "vision.positions",
    *(
        f"vision.blocks.{i}.{name}"
        for i in (0, 1)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    ),
}
BRIDGE = {"projector.up", "projector.down"}


@pytest.mark.parametrize(
    ("name", "skip", "want"),
    [
        ("text", ("lm_head",), TEXT_LINEARS),  # tied: the embedding stays too
        ("text", (), TEXT_LINEARS | {"text.embed"}),
        ("text", ("text.embed",), TEXT_LINEARS),
        ("untied", ("lm_head",), TEXT_LINEARS | {"text.embed"}),
        ("untied", (), TEXT_LINEARS | {"text.embed", "text.lm_head"}),
        ("untied", ("embed", "lm_head"), TEXT_LINEARS),
        ("mlp", ("lm_head",), TEXT_LINEARS | EYE | BRIDGE),
        ("mlp", ("lm_head", "vision"), TEXT_LINEARS | BRIDGE),
        ("mlp", ("text", "projector", "vision.blocks"), {"vision.patch_embed", "vision.positions"}),
        ("text", ("lm_head", "blocks.0"), {p for p in TEXT_LINEARS if ".1." in p}),
        ("text", ("lm_head", "blocks.-1"), {p for p in TEXT_LINEARS if ".0." in p}),
        ("text", ("lm_head", "mlp.*"), {p for p in TEXT_LINEARS if "attn" in p}),
        (
            "mlp",
            ("lm_head", "text.blocks.-1"),
            {p for p in TEXT_LINEARS if ".0." in p} | EYE | BRIDGE,
        ),
    ],
)
def test_skip(micro, rough, example, assert_same, name: str, skip, want: set[str]) -> None:
    config = micro[name]
    params, batch = rough(config, dtype=torch.float32), example(config)
    forward = quantize_int8(vlm(config), skip=skip)
    prepared = forward.prepare(params)
    assert quantised(prepared) == want
    untouched = {p: t for p, t in flatten(prepared).items() if p in flatten(params)}
    assert all(t is flatten(params)[p] for p, t in untouched.items())
    # and the forward agrees with what was prepared
    expected = vlm(config)(rounded(params, want), batch)
    assert_same(forward(prepared, batch), expected)
    assert_same(fake_quant(vlm(config), skip=skip)(params, batch), expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("skip", [(), ("lm_head",), ("layers.-1", "lm_head")])
def test_skip_in_a_hugging_face_model(assert_same, tied: bool, skip: tuple[str, ...]) -> None:
    module = language("Llama", tie_word_embeddings=tied, attn_implementation="eager")
    bare, params = from_module(module)
    forward = quantize_int8(bare, skip=skip)
    prepared = forward.prepare(params)
    got = quantised(prepared)
    assert ("lm_head" in got) == (not tied and skip == ())
    assert ("model.embed_tokens" in got) == (not tied or skip == ())
    assert any("layers.1" in p for p in got) == ("layers.-1" not in skip)
    batch = {"input_ids": torch.randint(0, 31, (2, 5))}
    want = bare(rounded(params, got), batch)
    assert_same(forward(prepared, batch), want)
    assert_same(fake_quant(bare, skip=skip)(params, batch), want)
    assert_same(as_module(forward, prepared)(batch), want)


@pytest.mark.parametrize("transform", [quantize_int8, fake_quant])
def test_what_is_refused(micro, transform) -> None:
    forward = vlm(micro["mlp"])
    with pytest.raises(ValueError, match="'visoin' matches nothing; did you mean 'vision'"):
        transform(forward, skip=("lm_head", "visoin"))
    with pytest.raises(ValueError, match="leaves nothing to quantise"):
        transform(forward, skip=("text", "vision", "projector"))
    with pytest.raises(ValueError, match="activations is None or 'dynamic', not 'static'"):
        transform(forward, activations="static")


def test_params_and_forward_must_belong_together(micro, rough, example) -> None:
    config = micro["untied"]
    params, batch = rough(config), example(config)
    forward = quantize_int8(vlm(config))
    prepared = forward.prepare(params)
    with pytest.raises(KeyError, match=r"params = forward.prepare\(params\) comes first"):
        forward(params, batch)
    with pytest.raises(KeyError, match="prepared by a transform that this forward does not have"):
        vlm(config)(prepared, batch)
    with pytest.raises(ValueError, match=r"no leaf .*\.weight to quantise"):
        forward.prepare(prepared)


# -- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("name", ["untied", "mlp", "resampler"])
def test_fake_numbers_are_the_int8_numbers(
    micro, rough, example, assert_same, name: str, activations: str | None
) -> None:
    config = micro[name]
    params, batch = rough(config, dtype=torch.float32), example(config)
    options = {"skip": (), "activations": activations}
    real, fake = quantize_int8(vlm(config), **options), fake_quant(vlm(config), **options)
    got = real(real.prepare(params), batch)
    assert_same(fake(params, batch), got)
    assert_same(fuse_loss(fake)(params, batch), unfused_loss(fake)(params, batch))
    bare = vlm(config)(params, batch)
    assert not torch.allclose(got, bare, rtol=1e-3)  # it does round
    noise = (got - bare).square().mean() / bare.square().mean()
    assert noise < 10**-2  # SQNR over 20 dB, as torchao asks


def test_dynamic_rounds_the_inputs_too(micro, rough, example) -> None:
    config = micro["text"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    for transform in (quantize_int8, fake_quant):
        outs = []
        for activations in (None, "dynamic"):
            forward = transform(vlm(config), activations=activations)
            outs.append(forward(forward.prepare(params), batch))
        assert not torch.equal(*outs)


# -- gradients; those of params are in table.py --------------------------------------------------


def test_gradients_to_inputs(micro, rough, example, assert_same) -> None:
    config = micro["mlp"]
    params, batch = rough(config, dtype=torch.float32), example(config)
    forward = quantize_int8(vlm(config), skip=("lm_head",))
    prepared = forward.prepare(params)
    pixels = batch["patches"].float() / 127.5 - 1

    def of_pixels(f, p):
        return grad(lambda x: unfused_loss(f)(p, batch | {"patches": x}))(pixels)

    want = of_pixels(vlm(config), rounded(params, quantised(prepared)))
    assert want.abs().max() > 0
    assert_same(of_pixels(forward, prepared), want)
    stacked = torch.stack([pixels, pixels * 0.5])
    each = vmap(grad(lambda x: fuse_loss(forward)(prepared, batch | {"patches": x})))(stacked)
    assert_same(each[0], want)


def test_fake_dynamic_under_vmap_is_each_alone(micro, rough, example, assert_same) -> None:
    config = micro["text"]
    params = rough(config, dtype=torch.float32)
    batches = [example(config, rows=1, seed=seed) for seed in (0, 1)]
    stacked = {k: torch.stack([b[k] for b in batches]) for k in batches[0]}
    loss = fuse_loss(fake_quant(vlm(config), activations="dynamic"))
    each = vmap(grad(loss), (None, 0))(params, stacked)
    for i, batch in enumerate(batches):
        want = value_and_grad(loss)(params, batch)[1]
        assert_same(map_leaves(lambda g, i=i: g[i], each), want)


def test_zero_rows_stay_zero(micro, rough, example) -> None:
    config = micro["text"]
    params, batch = rough(config), example(config)
    params["text"]["blocks"]["0"]["mlp"]["down"]["weight"][3] = 0
    forward = quantize_int8(vlm(config))
    prepared = forward.prepare(params)
    down = prepared["text"]["blocks"]["0"]["mlp"]["down"]
    assert not down["weight_int8"][3].any()
    assert forward(prepared, batch).isfinite().all()
    assert fake_quant(vlm(config))(params, batch).isfinite().all()


# -- with mixed precision -----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["quantize", "mixed"])
@pytest.mark.parametrize("name", ["untied", "mlp"])
def test_int8_weights_compute_in_the_low_precision(
    micro, rough, example, first: str, name: str
) -> None:
    config = micro[name]
    params, batch = rough(config, dtype=torch.float32), example(config)
    seen = {}

    def watch(f, path):
        return lambda p, *args: seen.setdefault(path, args[0].dtype) and f(p, *args)

    steps = [lambda f: quantize_int8(f, skip=()), mixed_precision]
    forward = vlm(config).with_rule(Rule("attention", watch))
    for step in steps if first == "quantize" else reversed(steps):
        forward = step(forward)
    prepared = forward.prepare(params)
    logits = forward(prepared, batch)
    assert logits.dtype == torch.bfloat16
    assert set(seen.values()) == {torch.bfloat16}
    paths = quantised(prepared)
    want = vlm(config)(rounded(params, paths), batch)
    noise = (logits.float() - want).square().mean() / want.square().mean()
    assert noise < 10**-3  # bf16 rounds at 2 ** -9
    loss, grads = value_and_grad(fuse_loss(forward))(prepared, batch)
    assert loss.dtype == torch.float32
    assert {g.dtype for g in flatten(grads).values()} == {torch.float32}


def test_rounding_is_per_output_channel(micro, rough) -> None:
    """Scaling one row of a weight changes that row's scale alone."""
    config = micro["text"]
    params = rough(config)
    forward = quantize_int8(vlm(config))
    before = flatten(forward.prepare(params))
    changed = map_leaves(Tensor.clone, params)
    changed["text"]["blocks"]["1"]["attn"]["o"]["weight"][2] *= 8
    after = flatten(forward.prepare(changed))
    moved = {p for p in before if not torch.equal(before[p], after[p])}
    assert moved == {"text.blocks.1.attn.o.weight_scale"}  # eight is exact: the codes stay
    ratio = after["text.blocks.1.attn.o.weight_scale"] / before["text.blocks.1.attn.o.weight_scale"]
    assert ratio.flatten().tolist() == [8.0 if i == 2 else 1.0 for i in range(16)]


def test_config_with_dropout_and_quantisation(micro, rough, example, assert_same) -> None:
    config = VLMConfig(dataclasses.replace(micro["text"].text, dropout=0.5))
    params = rough(config, dtype=torch.float32)
    batch = example(config) | {"seed": torch.tensor(3)}
    forward = quantize_int8(vlm(config))
    got = forward(forward.prepare(params), batch)
    assert_same(fake_quant(vlm(config))(params, batch), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rows_of_a_table_come_in_the_dtype_that_it_had(dtype: torch.dtype, assert_same) -> None:
    """Also where nothing else of the model has that dtype, and after a cast."""
    module = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8, bias=False))
    forward, params = from_module(module.to(dtype), call=lambda run, ids: run(ids))
    int8, ids = quantize_int8(forward), torch.randint(0, 9, (2, 5))
    prepared = int8.prepare(params)
    out = int8(prepared, ids)
    assert out.dtype == dtype
    want = fake_quant(forward)(params, ids)
    assert_same(out, want, 4, torch.float32 if dtype == torch.float64 else dtype)
    with pytest.raises(ValueError, match=r"no leaf of params can learn .*int8.*lora"):
        value_and_grad(lambda p, b: int8(p, b).sum())(prepared, ids)
    cast = cast_matrices(prepared, torch.bfloat16)
    assert int8(cast, ids).dtype == torch.bfloat16
    assert cast["0"]["weight_scale"].dtype == torch.float32
    flat = as_module(int8, prepared).state_dict()
    assert flat["0.weight_dtype"].dtype == dtype
