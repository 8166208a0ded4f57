"""The model against Hugging Face's (weights mapped by name, fp64, gradients too) and plain maths.

Hugging Face computes norms and rotary angles in fp32 whatever the dtype. Where the comparison is
to be sharp, its norms are torch's own RMSNorm and its angles ours (which have a test of their own).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from core import (
    ProjectorConfig,
    Rule,
    TextConfig,
    VisionConfig,
    VLMConfig,
    make_batch,
    patchify,
    vlm,
)
from core.forward import Site
from core.model.text import rope_angles
from core.model.vision import (
    grid_coordinates,
    learned_positions,
    sincos_positions,
    vision_tower,
)
from params.tree import flatten, unflatten
from tests.rounding import ulps
from transforms import unfused_loss, value_and_grad

SHARP = 256 * 4  # terms: as tests/conftest.py has it, of sums of up to 256
SIZES = {"vocab_size": 61, "dim": 16, "layers": 3, "heads": 4, "kv_heads": 2, "mlp_dim": 24}
HF_SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
TEXT_NAMES = {
    r"text\.blocks\.": "model.layers.",
    r"text\.embed\.": "model.embed_tokens.",
    r"text\.norm\.": "model.norm.",
    r"text\.lm_head\.": "lm_head.",
    r"attn_norm": "input_layernorm",
    r"mlp_norm": "post_attention_layernorm",
    r"attn\.([qkvo])\.": r"self_attn.\1_proj.",
    r"attn\.([qk])_norm": r"self_attn.\1_norm",
    r"mlp\.(gate|up|down)\.": r"mlp.\1_proj.",
}
EYE_NAMES = {
    r"blocks\.": "encoder.layers.",
    r"patch_embed\.": "embeddings.patch_embedding.",
    r"positions\.": "embeddings.position_embedding.",
    r"^norm\.": "post_layernorm.",
    r"attn_norm": "layer_norm1",
    r"mlp_norm": "layer_norm2",
    r"attn\.([qkv])\.": r"self_attn.\1_proj.",
    r"attn\.o\.": "self_attn.out_proj.",
    r"mlp\.up": "mlp.fc1",
    r"mlp\.down": "mlp.fc2",
}


def renamed(path: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        path = re.sub(ours, theirs, path)
    return path


# -- decoders -----------------------------------------------------------------------------------


def decoder(kind: str) -> tuple[TextConfig, nn.Module]:
    transformers = pytest.importorskip("transformers")
    common = HF_SIZES | {"attn_implementation": "sdpa", "rms_norm_eps": 1e-5}
    if kind == "llama":
        theirs = transformers.LlamaConfig(**common, tie_word_embeddings=False)
        return TextConfig(**SIZES, norm_eps=1e-5, tied=False), transformers.LlamaForCausalLM(theirs)
    if kind == "qwen2":
        theirs = transformers.Qwen2Config(**common, tie_word_embeddings=True)
        return TextConfig(**SIZES, norm_eps=1e-5, qkv_bias=True), transformers.Qwen2ForCausalLM(
            theirs
        )
    theirs = transformers.Qwen3Config(**common, head_dim=6, tie_word_embeddings=True)
    ours = TextConfig(**SIZES, norm_eps=1e-5, head_dim=6, qk_norm=True)
    return ours, transformers.Qwen3ForCausalLM(theirs)


class OurAngles(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rope_angles(position_ids[0], self.config.head_size, self.config.rope_theta)
        return torch.cat([cos, cos], -1)[None].to(x), torch.cat([sin, sin], -1)[None].to(x)


def sharpen(model: nn.Module, config: TextConfig) -> None:
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            exact = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            exact.weight = module.weight
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, exact)
    model.model.rotary_emb = OurAngles(config)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_decoder_is_hugging_faces(rough, assert_same, kind: str, exact: bool) -> None:
    text, model = decoder(kind)
    config = VLMConfig(text)
    params = rough(config)
    flat = {renamed(path, TEXT_NAMES): leaf for path, leaf in flatten(params).items()}
    model = model.double().eval()
    assert flat.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(flat, strict=False)
    dtype = None if exact else torch.float32  # of the plain model's norms and angles
    if exact:
        sharpen(model, text)

    tokens = torch.randint(0, 61, (2, 11))
    batch = make_batch(tokens)
    logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    assert_same(vlm(config)(params, batch), logits.detach(), SHARP, dtype)

    loss = F.cross_entropy(logits, batch["labels"])
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    value, grads = value_and_grad(unfused_loss(vlm(config)))(params, batch)
    assert_same(value, loss.detach(), SHARP, dtype)
    ours = {renamed(path, TEXT_NAMES): g for path, g in flatten(grads).items()}
    assert_same(unflatten(ours), unflatten(theirs), SHARP, dtype)


def test_rope_angles_are_positions_times_frequencies() -> None:
    positions = torch.tensor([0, 1, 7, 4095])
    cos, sin = rope_angles(positions, 8, 500_000.0)
    frequencies = 500_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angles = positions[:, None].double() * frequencies
    # an angle is off by a few fp32 roundings of its own size
    limit = 4 * 2.0**-24 * angles.clamp_min(1)
    assert ((cos - angles.cos()).abs() <= limit).all()
    assert ((sin - angles.sin()).abs() <= limit).all()
    assert cos.dtype == sin.dtype == torch.float32


def test_softcap_bounds_the_logits(micro, rough, example, assert_same) -> None:
    config = micro["untied"]
    params, batch = rough(config), example(config)
    params["text"]["lm_head"]["weight"] *= 20
    raw = vlm(config)(params, batch)
    capped = VLMConfig(dataclasses.replace(config.text, softcap=3.0))
    got = vlm(capped)(params, batch)
    assert raw.abs().max() > 30
    assert_same(got, 3 * torch.tanh(raw / 3))


def dense_decoder(config: TextConfig, params, batch) -> Tensor:
    """The same maths without packing tricks: one dense mask, torch's own functions."""
    p, documents = params["text"], torch.zeros_like(batch["tokens"])
    for start in batch["cu_seqlens"][1:-1].tolist():
        documents[start:] += 1
    n, d = len(documents), config.head_size
    gap = torch.arange(n)[:, None] - torch.arange(n)
    cos, sin = rope_angles(batch["positions"], d, config.rope_theta)
    x = p["embed"]["weight"][batch["tokens"]]
    norm = partial(F.rms_norm, normalized_shape=(config.dim,), eps=config.norm_eps)

    def turn(t: Tensor) -> Tensor:  # [H, N, Dh]
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    for layer in range(config.layers):
        block = p["blocks"][str(layer)]
        window = config.window_of(layer)
        seen = (documents[:, None] == documents) & (gap >= 0)
        if window is not None:
            seen &= gap < window
        h = norm(x, weight=block["attn_norm"]["weight"])
        q, k, v = (
            (h @ block["attn"][name]["weight"].mT).unflatten(1, (-1, d)).transpose(0, 1)
            for name in "qkv"
        )
        groups = config.heads // config.kv_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = turn(q) @ turn(k).mT / d**0.5
        o = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        x = x + o.transpose(0, 1).flatten(1) @ block["attn"]["o"]["weight"].mT
        h = norm(x, weight=block["mlp_norm"]["weight"])
        mlp = {name: leaf["weight"] for name, leaf in block["mlp"].items()}
        x = x + (F.silu(h @ mlp["gate"].mT) * (h @ mlp["up"].mT)) @ mlp["down"].mT
    return norm(x, weight=p["norm"]["weight"]) @ p["embed"]["weight"].mT


@pytest.mark.parametrize("attention", ["padded", "plain"])
@pytest.mark.parametrize(("window", "every"), [(None, 0), (1, 0), (3, 0), (3, 2), (99, 0)])
def test_windows_and_documents_against_a_dense_mask(
    micro, rough, assert_same, attention: str, window: int | None, every: int
) -> None:
    text = dataclasses.replace(micro["text"].text, window=window, global_every=every)
    config = VLMConfig(text)
    params = rough(config)
    batch = make_batch(torch.randint(2, 61, (1, 20)))
    ends = [0, 7, 8, 20]
    batch["cu_seqlens"] = torch.tensor([*ends, 20, 20], dtype=torch.int32)
    batch["positions"] = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(ends)])
    with kernels.override(attention=attention):
        got = vlm(config)(params, batch)
    assert_same(got, dense_decoder(text, params, batch), SHARP)


# -- the eye ------------------------------------------------------------------------------------


def look(config: VisionConfig, params, images: list[Tensor]) -> list[Tensor]:
    """Features of each picture ``[rows, cols, D]``."""
    cut = [patchify(image, config.patch_size, config.merge) for image in images]
    sizes = [len(patches) for patches, _ in cut]
    places = [place for _, place in cut]
    out = vision_tower(
        Site({}),
        config,
        params,
        patches=torch.cat([patches for patches, _ in cut]),
        positions=torch.cat(places),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).int(),
        valid=torch.ones(sum(sizes), dtype=torch.bool),
    )
    grids = []
    for features, place in zip(out.split(sizes), places, strict=True):
        grid = out.new_zeros(*(place.amax(0) + 1).tolist(), config.dim)
        grids.append(grid.index_put(tuple(place.T), features))
    return grids


def eye(merge: int) -> VisionConfig:
    return VisionConfig(16, 3, 2, 24, patch_size=4, image_size=24, merge=merge)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_the_eye_is_siglips(rough, micro, assert_same, merge: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = eye(merge)
    params = rough(VLMConfig(micro["text"].text, config, ProjectorConfig()))["vision"]
    model = (
        transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=24,
                patch_size=4,
                vision_use_head=False,
                attn_implementation="sdpa",
            )
        )
        .double()
        .eval()
    )
    flat = {renamed(path, EYE_NAMES): leaf for path, leaf in flatten(params).items()}
    kernel = "embeddings.patch_embedding.weight"
    flat[kernel] = flat[kernel].unflatten(1, (3, 4, 4))
    prefix = next(n for n, _ in model.named_parameters()).split("embeddings.")[0]
    flat = {prefix + name: leaf for name, leaf in flat.items()}
    assert flat.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(flat, strict=False)

    pixels = torch.rand(2, 3, 24, 24, dtype=torch.float64) * 2 - 1
    want = model(pixel_values=pixels).last_hidden_state  # [2, 36, D], row-major
    weights = torch.randn_like(want)
    (want * weights).sum().backward()

    leaves = {name: leaf.requires_grad_() for name, leaf in flatten(params).items()}
    got = torch.stack(look(config, unflatten(leaves), list(pixels))).flatten(1, 2)
    assert_same(got.detach(), want.detach(), SHARP)
    grads = torch.autograd.grad((got * weights).sum(), list(leaves.values()))
    theirs = {name.removeprefix(prefix): p.grad for name, p in model.named_parameters()}
    ours = dict(zip(leaves, grads, strict=True))
    want = {name: theirs[renamed(name, EYE_NAMES)].view_as(grad) for name, grad in ours.items()}
    assert_same(unflatten(ours), unflatten(want), SHARP)


@pytest.mark.parametrize("size", [(6, 6), (2, 2), (4, 10), (12, 2), (18, 6), (7, 5), (1, 1)])
def test_positions_are_interpolated_bilinearly(size: tuple[int, int]) -> None:
    grid, dim, (rows, cols) = 6, 8, size
    table = torch.randn(grid * grid, dim, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    where = grid_coordinates(places, torch.tensor([0, rows * cols]).int(), grid)
    got = learned_positions(Site({}), {"weight": table}, where, grid)
    image = table.view(1, grid, grid, dim).permute(0, 3, 1, 2)
    want = F.interpolate(image, size, mode="bilinear", align_corners=False)
    want = want[0].permute(1, 2, 0).flatten(0, 1)
    if size == (grid, grid):
        assert torch.equal(got, table)
    # the shares are fp32: coordinates up to 6, times entries of about 4, four of them
    torch.testing.assert_close(got, want, rtol=0, atol=ulps(torch.float32, 6 * 4 * 4))


def test_a_grid_of_one_has_one_position() -> None:
    table = torch.randn(1, 4, dtype=torch.float64)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    where = grid_coordinates(places, torch.tensor([0, 6]).int(), 1)
    assert torch.equal(learned_positions(Site({}), {"weight": table}, where, 1), table.expand(6, 4))


def test_sincos_positions_are_those_of_the_paper() -> None:
    where = torch.tensor([[0.0, 0.0], [1.0, 2.5], [3.0, 0.0]])
    dim = 8
    got = sincos_positions(where, dim)
    for i, (row, col) in enumerate(where.tolist()):
        halves = []
        for x in (row, col):
            angles = torch.tensor([x / 10_000 ** (k / (dim // 4)) for k in range(dim // 4)])
            halves += [angles.sin(), angles.cos()]
        torch.testing.assert_close(got[i], torch.cat(halves), rtol=0, atol=ulps(torch.float32, 8))


def test_sincos_eye_runs_and_needs_no_table(micro, rough, example) -> None:
    vision = dataclasses.replace(micro["mlp"].vision, positions="sincos2d")
    config = dataclasses.replace(micro["mlp"], vision=vision)
    params = rough(config)
    assert "positions" not in params["vision"]
    batch = example(config)
    moved = batch | {"patch_positions": batch["patch_positions"].flip(1)}
    assert not torch.allclose(vlm(config)(params, batch), vlm(config)(params, moved))


def test_uint8_pixels_are_scaled_to_plus_minus_one(micro, rough, example, assert_same) -> None:
    config = micro["mlp"]
    params, batch = rough(config), example(config)
    scaled = batch | {"patches": batch["patches"].double() / 127.5 - 1}
    ends = batch | {"patches": torch.where(batch["patches"] < 128, 0, 255).to(torch.uint8)}
    signs = batch | {"patches": torch.where(batch["patches"] < 128, -1.0, 1.0)}
    forward = vlm(config)
    assert_same(forward(params, batch), forward(params, scaled), dtype=torch.float32)  # pixels
    assert torch.equal(forward(params, ends), forward(params, signs))


def test_image_tokens_are_mlps_of_cells(micro, rough, example, assert_same) -> None:
    """Pixel shuffle: the token at a placeholder is the MLP of its cell's four features."""
    config = micro["mlp"]
    params, batch = rough(config), example(config, rows=1)
    image = torch.rand(3, 16, 16, dtype=torch.float64) * 2 - 1
    batch["patches"] = patchify(image, 4, 2)[0]
    (features,) = look(config.vision, params["vision"], [image])  # [4, 4, D]
    cells = features.view(2, 2, 2, 2, 16).transpose(1, 2).reshape(4, 64)
    p = params["projector"]
    h = F.gelu(F.linear(cells, p["up"]["weight"], p["up"]["bias"]), approximate="tanh")
    want = F.linear(h, p["down"]["weight"], p["down"]["bias"])

    seen = []
    text = params["text"]
    x = text["embed"]["weight"][batch["tokens"]].clone()
    x[batch["image_slots"]] = want

    def watch(f, path):
        return lambda p, x, *rest: seen.append(x) or f(p, x, *rest)

    vlm(config).with_rule(Rule("block", watch, ("text.blocks.0",)))(params, batch)
    assert_same(seen[0], x, SHARP)


def test_resampler_is_perceivers(micro, rough, example, assert_same) -> None:
    """Flamingo's resampler, picture by picture, with torch's own attention."""
    config = micro["resampler"]
    params, batch = rough(config), example(config, rows=1)
    image = torch.rand(3, 8, 24, dtype=torch.float64) * 2 - 1
    patches, places = patchify(image, 4, 2)
    batch |= {"patches": patches, "patch_positions": places}
    batch["image_cu_seqlens"] = torch.tensor([0, len(patches)]).int()
    eye_params = params["vision"]
    features = vision_tower(
        Site({}),
        config.vision,
        eye_params,
        patches,
        places,
        batch["image_cu_seqlens"],
        torch.ones(len(patches), dtype=torch.bool),
    )

    def norm(p, x):
        return F.layer_norm(x, (16,), p["weight"], p["bias"], config.vision.norm_eps)

    def dense(p, x):
        return F.linear(x, p["weight"], p["bias"])

    p = params["projector"]
    latents = p["queries"]["weight"]
    for layer in range(config.projector.layers):
        b = p["blocks"][str(layer)]
        asked = norm(b["latent_norm"], latents)
        both = torch.cat([norm(b["patch_norm"], features), asked])
        q, k, v = (
            dense(b["attn"][name], x).unflatten(1, (2, 8)).transpose(0, 1)
            for name, x in (("q", asked), ("k", both), ("v", both))
        )
        o = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
        latents = latents + dense(b["attn"]["o"], o)
        h = norm(b["mlp_norm"], latents)
        h = F.gelu(dense(b["mlp"]["up"], h), approximate="tanh")
        latents = latents + dense(b["mlp"]["down"], h)
    want = dense(p["out"], norm(p["norm"], latents))

    seen = []

    def watch(f, path):
        return lambda p, x, *rest: seen.append(x) or f(p, x, *rest)

    vlm(config).with_rule(Rule("block", watch, ("text.blocks.0",)))(params, batch)
    assert_same(seen[0][batch["image_slots"]], want, SHARP)
