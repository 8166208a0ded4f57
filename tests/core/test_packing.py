"""Packing changes nothing, and what lies in unused slots never matters. All in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import kernels
from core import Bounds, Rule, VLMConfig, check_batch, make_batch, stack_examples, vlm
from core.batch import Batch
from params.tree import Tree, map_leaves
from transforms import fuse_loss, unfused_loss, value_and_grad

IMAGE = 1
EYES = ["mlp", "resampler", "sincos"]


def document(config: VLMConfig, length: int, *sides: tuple[int, int], seed: int = 0) -> Batch:
    """One document with pictures of the given (height, width), floats."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    tokens = torch.randint(2, config.text.vocab_size, (1, length), generator=generator)
    images, start = [], 1
    for height, width in sides:
        count = config.image_tokens(height * width // 16)
        tokens[0, start : start + count] = IMAGE
        start += count + 1
        pixels = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
        images.append(pixels * 2 - 1)
    return make_batch(tokens, config=config, images=images, image_token=IMAGE)


def pack(
    config: VLMConfig,
    documents: Sequence[Batch],
    *,
    spare: tuple[int, int, int, int] = (0, 0, 0, 0),
    fill: float = 0.0,
) -> Batch:
    """One batch of all documents, with so many spare tokens, patches, pictures and documents.

    fill: what spare pixels hold; spare tokens and places hold nonsense.
    """
    more_tokens, more_patches, more_pictures, more_documents = spare
    n = sum(len(d["tokens"]) for d in documents) + more_tokens
    seen = [d for d in documents if "patches" in d]
    p = sum(len(d["patches"]) for d in seen) + more_patches
    out: dict[str, list[Tensor]] = {}
    starts, ends, offset, patch_offset = [0], [0], 0, 0
    for d in documents:
        for name in ("tokens", "labels", "positions"):
            out.setdefault(name, []).append(d[name])
        if "patches" in d:
            for name in ("patches", "patch_positions"):
                out.setdefault(name, []).append(d[name])
            out.setdefault("image_slots", []).append(d["image_slots"] + offset)
            ends += (d["image_cu_seqlens"][1:] + patch_offset).tolist()
            patch_offset += len(d["patches"])
        offset += len(d["tokens"])
        starts.append(offset)
    if more_tokens:
        out["tokens"].append(torch.arange(more_tokens) % config.text.vocab_size)
        out["labels"].append(torch.full((more_tokens,), -100))
        out["positions"].append(torch.full((more_tokens,), 7))
        starts.append(n)
    if more_patches:
        out["patches"].append(torch.full((more_patches, 48), fill, dtype=torch.float64))
        out["patch_positions"].append(torch.full((more_patches, 2), -1))
        ends.append(p)
    batch = {name: torch.cat(parts) for name, parts in out.items()}
    batch["cu_seqlens"] = torch.tensor(starts + [n] * more_documents).int()
    if seen:
        batch["image_cu_seqlens"] = torch.tensor(ends + [p] * more_pictures).int()
        if config.projector.kind == "mlp":
            slots = p // config.vision.merge**2
        else:
            slots = (len(batch["image_cu_seqlens"]) - 1) * config.projector.queries
        unused = torch.full((slots - len(batch["image_slots"]),), n)
        batch["image_slots"] = torch.cat([batch["image_slots"], unused])
    check_batch(batch, config)
    return batch


def documents_of(config: VLMConfig) -> list[Batch]:
    """Text, a square picture, text, a wide and a tall picture in one document, a tiny picture."""
    return [
        document(config, 5),
        document(config, 9, (16, 16)),
        document(config, 1),
        document(config, 13, (8, 32), (24, 8)),
        document(config, 6, (8, 8)),
    ]


SPARES = [(0, 0, 0, 0), (6, 8, 0, 0), (3, 4, 3, 4)]


def mean_of(values: list[tuple[Tensor, Tree]], documents: Sequence[Batch]) -> tuple[Tensor, Tree]:
    counts = [int((d["labels"] >= 0).sum()) for d in documents]
    shares = [count / sum(counts) for count in counts]
    loss = sum(share * value for share, (value, _) in zip(shares, values, strict=True))
    grads = map_leaves(
        lambda *leaves: sum(s * leaf for s, leaf in zip(shares, leaves, strict=True)),
        *(g for _, g in values),
    )
    return loss, grads


@pytest.mark.parametrize("attention", ["padded", "plain"])
@pytest.mark.parametrize("spare", SPARES)
@pytest.mark.parametrize("name", EYES)
def test_packing_changes_nothing(micro, rough, assert_same, name, spare, attention: str) -> None:
    config = micro[name]
    params, forward = rough(config), vlm(config)
    documents = documents_of(config)
    packed = pack(config, documents, spare=spare, fill=torch.nan)
    with kernels.override(attention=attention):
        logits = forward(params, packed)
        assert logits.isfinite().all()  # padding's rows too: they must not poison a sum
        lengths = packed["cu_seqlens"].diff().tolist()
        for d, rows in zip(documents, logits.split(lengths), strict=False):  # without padding's
            assert_same(rows, forward(params, d))
        for loss in (unfused_loss(forward), fuse_loss(forward)):
            value, grads = value_and_grad(loss)(params, packed)
            alone = [value_and_grad(loss)(params, d) for d in documents]
            want, want_grads = mean_of(alone, documents)
            assert_same(value, want)
            assert_same(grads, want_grads)


@pytest.mark.parametrize("name", EYES)
def test_one_document_sees_nothing_of_another(micro, rough, name: str) -> None:
    """Changing one document (its picture, its words) changes no bit of the others' logits."""
    config = micro[name]
    params, forward = rough(config), vlm(config)
    documents = documents_of(config)
    before = forward(params, pack(config, documents))
    documents[1] = document(config, 9, (16, 16), seed=1)
    packed = pack(config, documents)
    after = forward(params, packed)
    lengths = packed["cu_seqlens"].diff().tolist()
    pairs = zip(before.split(lengths), after.split(lengths), strict=True)
    changed = [not torch.equal(a, b) for a, b in pairs]
    assert changed == [False, True, False, False, False]


@pytest.mark.parametrize("name", EYES)
def test_a_picture_does_reach_its_document(micro, rough, name: str) -> None:
    config = micro[name]
    params, forward = rough(config), vlm(config)
    d = document(config, 9, (16, 16))
    base = forward(params, d)
    for patch in range(16):  # every patch counts, and none before the picture's place is changed
        pixels = d["patches"].clone()
        pixels[patch] += 0.5
        moved = (forward(params, d | {"patches": pixels}) != base).any(1)
        assert not moved[0]
        assert moved[1 + config.image_tokens(16) :].all()


@pytest.mark.parametrize("name", EYES)
def test_two_aspects_in_one_batch_are_each_alone(micro, rough, assert_same, name: str) -> None:
    """Also: neither the order of pictures nor the one that comes before matters."""
    config = micro[name]
    params, forward = rough(config), vlm(config)
    wide, tall = document(config, 8, (8, 24)), document(config, 9, (24, 8))
    want = [forward(params, d) for d in (wide, tall)]
    both = forward(params, pack(config, [wide, tall])).split([8, 9])
    swapped = forward(params, pack(config, [tall, wide])).split([9, 8])
    for i in (0, 1):
        assert_same(both[i], want[i])
        assert_same(swapped[1 - i], want[i])


def drivers(loss, params: Tree, batch: Batch) -> dict[str, Tree]:
    stacked = stack_examples([batch, batch])
    return {
        "value_and_grad": value_and_grad(loss)(params, batch)[1],
        "torch.func.grad": grad(loss)(params, batch),
        "vmap": map_leaves(lambda g: g[1], vmap(grad(loss), (None, 0))(params, stacked)),
    }


@pytest.mark.parametrize("name", EYES)
def test_nan_in_unused_slots_changes_nothing(micro, rough, assert_same, name: str) -> None:
    config = micro[name]
    params, forward = rough(config), vlm(config)
    documents = documents_of(config)
    clean = pack(config, documents, spare=(3, 4, 2, 2))
    poisoned = pack(config, documents, spare=(3, 4, 2, 2), fill=torch.nan)
    assert poisoned["patches"].isnan().any()
    assert torch.equal(forward(params, poisoned), forward(params, clean))
    loss = fuse_loss(forward)
    clean_grads = drivers(loss, params, clean)
    for driver, grads in drivers(loss, params, poisoned).items():
        assert_same(grads, clean_grads[driver], 0)
        assert_same(grads, clean_grads["value_and_grad"])


@pytest.mark.parametrize("name", EYES)
def test_nan_in_features_of_unused_slots_changes_nothing(micro, rough, assert_same, name) -> None:
    """Whatever the projector says for a slot that no token waits for."""
    config = micro[name]
    params, forward = rough(config), vlm(config)
    batch = pack(config, documents_of(config), spare=(3, 4, 2, 2))
    unused = batch["image_slots"] == len(batch["tokens"])
    assert unused.any()

    def poison(f, path):
        return lambda p, x: torch.where(unused[:, None], torch.nan, f(p, x))

    last = "projector.out" if name == "resampler" else "projector.down"
    poisoned = forward.with_rule(Rule("linear", poison, (last,)))
    assert torch.equal(poisoned(params, batch), forward(params, batch))
    want = value_and_grad(fuse_loss(forward))(params, batch)[1]
    assert_same(value_and_grad(fuse_loss(poisoned))(params, batch)[1], want, 0)
    assert_same(grad(fuse_loss(poisoned))(params, batch), want)


def test_nan_in_unlabelled_rows_reaches_no_gradient_of_the_head(micro, rough) -> None:
    """Padding's hidden states may be anything once no label asks for them."""
    config = micro["untied"]
    params, forward = rough(config), vlm(config)
    batch = make_batch(torch.randint(2, 61, (2, 6)))
    batch["labels"][6:] = -100

    def poison(f, path):
        return lambda p, x: torch.cat([f(p, x)[:6], torch.full_like(x[6:], torch.nan)])

    poisoned = forward.with_rule(Rule("norm", poison, ("text.norm",)))
    want = value_and_grad(fuse_loss(forward))(params, batch)
    got = value_and_grad(fuse_loss(poisoned))(params, batch)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1]["text"]["lm_head"]["weight"], want[1]["text"]["lm_head"]["weight"])


def test_all_slots_unused_is_a_batch_of_text(micro, rough, assert_same) -> None:
    """Patches are there (the shapes are static) but no picture is."""
    for name in EYES:
        config = micro[name]
        params, forward = rough(config), vlm(config)
        d = document(config, 9, (16, 16))
        text = {k: d[k] for k in ("tokens", "labels", "positions", "cu_seqlens")}
        blind = d | {
            "patches": torch.full_like(d["patches"], torch.nan),
            "image_slots": torch.full_like(d["image_slots"], 9),
        }
        assert torch.equal(forward(params, blind), forward(params, text))
        grads = value_and_grad(fuse_loss(forward))(params, blind)[1]
        want = value_and_grad(fuse_loss(forward))(params, text)[1]
        assert_same(grads, want)
        assert all(not g.any() for g in [grads["vision"]["patch_embed"]["weight"]])


def test_pictures_known_to_be_equal_give_the_same_logits(micro, rough, example, assert_same):
    for name in ("mlp", "resampler"):
        config = micro[name]
        params, batch = rough(config), example(config)
        equal = vlm(config, bounds=Bounds(max_patches=16, equal_pictures=True))
        assert_same(equal(params, batch), vlm(config)(params, batch))
        with pytest.raises(ValueError, match="length must be at least 1 and divide"):
            vlm(config, bounds=Bounds(max_patches=15, equal_pictures=True))(params, batch)
    with pytest.raises(ValueError, match="equal_pictures needs max_patches"):
        Bounds(equal_pictures=True)
