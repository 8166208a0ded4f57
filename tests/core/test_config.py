"""Configs: what follows from the numbers, there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from core import (
    PRESETS,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
    VLMConfig,
    config_from_dict,
    make_batch,
    preset,
    vlm,
)
from params import count_leaves, init_params
from params.tree import count, flatten
from transforms import unfused_loss, value_and_grad

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("small", 134_515_008),  # SmolLM2-135M
        ("vlm_1.5b", 1_543_714_304),  # Qwen2-1.5B
        ("text_8b", 8_030_261_248),  # Llama-3.1-8B
    ],
)
def test_decoders_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert VLMConfig(preset(name).text).num_params() == published


def test_num_params_is_what_init_makes_and_what_its_formula_says(micro) -> None:
    for config in micro.values():
        assert config.num_params() == count(init_params(config))
    t = PRESETS["small"].text
    d, f, share = t.dim, t.mlp_dim, t.kv_heads / t.heads
    block = 2 * d * d + 2 * d * d * share + 3 * d * f + 2 * d
    assert VLMConfig(t).num_params() == t.vocab_size * d + t.layers * block + d


def test_every_preset_has_a_spec_and_a_forward_whose_leaves_agree() -> None:
    for name, config in PRESETS.items():
        spec = flatten(config.param_spec())
        assert count_leaves(config.param_spec()) == config.num_params(), name
        for leaf in spec.values():
            assert leaf.init == "normal" or len(leaf.shape) == 1, name
        owners = {path.rpartition(".")[0] for path in spec}
        sites = {(site.kind, site.path) for site in vlm(config).sites}
        paths = {path for _, path in sites}
        heads = {path for path in owners if path.endswith(("q_norm", "k_norm"))}
        assert owners - heads <= paths, name
        assert {("rope", path.rpartition(".")[0]) for path in heads} <= sites, name


def test_init_scale_keeps_activations_at_unit_size() -> None:
    """Std 1/sqrt(fan in), and 1/sqrt(2 layers) less where a layer adds to the residual stream."""
    config = PRESETS["small"].text
    spec = flatten(config.param_spec())
    assert spec["blocks.0.attn.q.weight"].std == pytest.approx(config.dim**-0.5)
    assert spec["blocks.0.mlp.down.weight"].std == pytest.approx(
        config.mlp_dim**-0.5 / math.sqrt(2 * config.layers)
    )


# -- floating-point operations ------------------------------------------------------------------


def count_flops(run) -> tuple[int, int]:
    """Operations of matmuls with a weight, and of batched ones (attention): torch's count."""
    counter = FlopCounterMode(display=False)
    with kernels.override(attention="plain"), counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in counts.items() if op in (aten.bmm, aten.baddbmm))
    return sum(counts.values()) - batched, batched


@pytest.mark.parametrize("name", ["text", "untied"])
def test_flops_per_token_are_those_of_the_matmuls(micro, name: str) -> None:
    config, length = micro[name], 16
    batch = make_batch(torch.randint(2, 61, (1, length)))
    params, forward = init_params(config), vlm(config)

    dense, attention = count_flops(lambda: forward(params, batch))
    weights = config.flops_per_token(0, training=False)
    assert dense == length * weights
    # torch counts all length x length scores, causal or not; the config half of them
    causal = config.flops_per_token(length, training=False) - weights
    assert attention == 2 * length * causal

    trained, _ = count_flops(lambda: value_and_grad(unfused_loss(forward))(params, batch))
    assert trained == length * config.flops_per_token(0)


def test_flops_of_a_window_are_those_of_the_keys_seen(micro) -> None:
    full = micro["text"]
    window = dataclasses.replace(full.text, window=4, global_every=2)
    config = VLMConfig(window)
    base = full.flops_per_token(0, training=False)
    per_key = 4 * full.text.heads * full.text.head_size
    assert config.flops_per_token(0, training=False) == base
    # layer 0 sees 4 keys, layer 1 half the context
    assert config.flops_per_token(100, training=False) == base + per_key * (4 + 50)
    assert config.flops_per_token(6, training=False) == base + per_key * (3 + 3)


@pytest.mark.parametrize("name", ["mlp", "resampler"])
def test_flops_per_patch_are_those_of_the_matmuls(micro, example, name: str) -> None:
    config = micro[name]
    params, forward = init_params(config), vlm(config)
    batch = example(config, rows=1)
    patches = batch["patches"].shape[0]
    text = {k: v for k, v in batch.items() if "image" not in k and "patch" not in k}
    both = sum(count_flops(lambda: forward(params, batch)))
    counted = both - sum(count_flops(lambda: forward(params, text)))
    claimed = patches * config.flops_per_patch(patches, training=False)
    claimed += patches * 2 * 4 * config.vision.dim  # mixing four rows of the position table
    if name == "resampler":
        # counted, because the packed row is square, but only queries ask, and keys and values of
        # queries are theirs: the claim leaves out what patches ask for in vain
        rows, q = patches + config.projector.queries, config.projector.queries
        claimed += 4 * config.vision.dim * rows * (rows - q) * config.projector.layers
    assert counted == claimed


def test_no_vision_no_vision_flops(micro) -> None:
    assert micro["text"].flops_per_patch(16) == 0.0
    assert micro["mlp"].flops_per_patch(16) == 3 * micro["mlp"].flops_per_patch(16, training=False)


# -- there and back -----------------------------------------------------------------------------


def test_a_config_survives_json(micro) -> None:
    for config in (*micro.values(), *PRESETS.values()):
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_absent_fields_take_their_defaults(micro) -> None:
    data = micro["text"].to_dict()
    del data["text"]["rope_theta"], data["vision"], data["projector"]
    assert config_from_dict(data) == micro["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": {"dims": 3}}, "text has no field 'dims'; it has vocab_size, dim"),
        ({"vision": {"dim": 16}}, "vision lacks the field 'heads'"),
        ({"txt": {}}, "no part 'txt'; it has text, vision, projector"),
    ],
)
def test_a_foreign_config_names_the_field(micro, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({**micro["mlp"].to_dict(), **change})


def test_a_config_needs_a_decoder() -> None:
    with pytest.raises(ValueError, match="lacks the part 'text'"):
        config_from_dict({"vision": None})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("text", {"kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ("text", {"dim": 18}, r"dim \(18\) must be a multiple of heads \(4\)"),
        ("text", {"dim": 12}, "even head size, not 3"),
        (
            "vision",
            {"positions": "rope"},
            "positions must be one of learned, sincos2d, not 'rope'",
        ),
        ("vision", {"heads": 3}, r"dim \(16\) must be a multiple of heads \(3\)"),
        ("vision", {"image_size": 20}, r"image_size \(20\) must be a multiple of .*4 x 2"),
        ("projector", {"kind": "cnn"}, "projector.kind must be one of mlp, resampler"),
        ("text", {"layers": 0}, "text.layers must be 1 or more, not 0"),
        ("text", {"layers": 10**9}, "text.layers must be at most 10000, not 1000000000"),
        ("text", {"dim": 16.0}, "text.dim must be a whole number, not 16.0"),
        ("text", {"dim": True}, "text.dim must be a whole number, not True"),
        ("text", {"softcap": math.nan}, "text.softcap must be a finite number, not nan"),
        ("text", {"dropout": 1}, "text.dropout must be less than 1, not 1"),
        ("text", {"tied": 1}, "text.tied must be true or false, not 1"),
        ("text", {"norm_eps": "x" * 99}, "text.norm_eps must be a number, not 'xxx.*[.]{3}$"),
        ("vision", {"patch_size": 0}, "vision.patch_size must be 1 or more, not 0"),
    ],
)
def test_impossible_numbers_are_refused(micro, part: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(getattr(micro["mlp"], part), **change)


def test_eye_and_bridge_come_together(micro) -> None:
    with pytest.raises(ValueError, match="vision and projector come together"):
        VLMConfig(micro["text"].text, vision=micro["mlp"].vision)
    with pytest.raises(ValueError, match="vision and projector come together"):
        VLMConfig(micro["text"].text, projector=ProjectorConfig())


def test_resampler_heads_must_fit(micro) -> None:
    config = dataclasses.replace(
        micro["resampler"], projector=ProjectorConfig("resampler", heads=3)
    )
    with pytest.raises(ValueError, match=r"resampler heads \(3\) must divide vision.dim \(16\)"):
        config.param_spec()


def test_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no preset 'smal'; did you mean 'small'"):
        preset("smal")


def test_windows_alternate_with_global_layers() -> None:
    config = TextConfig(8, 8, 6, 2, 2, 8, window=5, global_every=3)
    assert [config.window_of(i) for i in range(6)] == [5, 5, None, 5, 5, None]
    local = dataclasses.replace(config, global_every=0)
    assert [local.window_of(i) for i in range(6)] == [5] * 6
    free = dataclasses.replace(config, window=None)
    assert [free.window_of(i) for i in range(6)] == [None] * 6


def test_image_tokens(micro) -> None:
    assert micro["mlp"].image_tokens(16) == 4
    assert micro["resampler"].image_tokens(16) == 3
    with pytest.raises(ValueError, match="no vision tower"):
        micro["text"].image_tokens(16)
    assert VisionConfig(8, 1, 2, 8, 4, 32, merge=2).grid == 8
