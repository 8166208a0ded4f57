"""Batches: flat dicts of tensors, always packed, with static shapes.

=================  ===============  ==============================================================
field              shape, dtype     meaning
=================  ===============  ==============================================================
tokens             [N] int64        N tokens, documents one after the other
labels             [N] int64        the next token of the same document; -100: no loss here
positions          [N] int64        restart at 0 with each document
cu_seqlens         [S+1] int32      where documents start and end; padding is one more document,
                                    and the unused tail repeats N
patches            [P, 3*p*p]       uint8 pixels (3 p p), or floats scaled to [-1, 1]
patch_positions    [P, 2] int64     row and column of the patch in its picture
image_cu_seqlens   [M+1] int32      as cu_seqlens, in patches; the unused tail repeats P
image_slots        [K] int64        which of the N tokens image token k replaces; unused: N
seed               [] int64         optional: drives all randomness (dropout); absent: none
=================  ===============  ==============================================================

The four image fields come together or not at all. Unused slots may hold anything. Patches are
stored cell by cell (merge x merge patches, row-major inside the cell), cells row-major.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from core.config import VLMConfig

Batch = dict[str, Tensor]
IGNORE = -100
TEXT_FIELDS = ("tokens", "labels", "positions", "cu_seqlens")
IMAGE_FIELDS = ("patches", "patch_positions", "image_cu_seqlens", "image_slots")
FIELDS = (*TEXT_FIELDS, *IMAGE_FIELDS, "seed")


def patchify(image: Tensor, patch_size: int, merge: int) -> tuple[Tensor, Tensor]:
    """A picture ``[3, H, W]`` to patches ``[P, 3 p p]`` and their (row, col) ``[P, 2]`` int64.

    Raises ValueError if H or W is not a multiple of ``patch_size * merge``.
    """
    channels, height, width = image.shape
    cell = patch_size * merge
    if channels != 3 or height % cell or width % cell or not height or not width:
        raise ValueError(
            f"a picture must be [3, H, W] with sides that are multiples of {cell} "
            f"(patch_size {patch_size} x merge {merge}), not {list(image.shape)}: resize it first"
        )
    order = "(r i) (c j) -> (r c i j)"
    cut = "ch (r i y) (c j x) -> (r c i j) (ch y x)"
    patches = rearrange(image, cut, i=merge, j=merge, y=patch_size, x=patch_size)
    rows, cols = torch.meshgrid(
        torch.arange(height // patch_size), torch.arange(width // patch_size), indexing="ij"
    )
    places = [rearrange(axis, order, i=merge, j=merge) for axis in (rows, cols)]
    return patches, torch.stack(places, dim=1)


def make_batch(
    tokens: Tensor,
    labels: Tensor | None = None,
    *,
    config: VLMConfig | None = None,
    images: Sequence[Tensor] | None = None,
    image_token: int | None = None,
    seed: int | None = None,
) -> Batch:
    """A packed batch of equally long rows, each a document.

    Args:
        tokens: ``[B, T]`` int64.
        labels: ``[B, T]``, already shifted. Default: the row's next token, or -100 where that is
            ``image_token``.
        config: how pictures are cut; needed only with them.
        images: pictures ``[3, H, W]``, uint8 or floats in [-1, 1], in the order of their runs of
            ``image_token`` in ``tokens``.
        image_token: the placeholder of an image token.
        seed: drives dropout.

    Raises:
        ValueError: pictures and placeholders do not match.

    >>> batch = make_batch(torch.tensor([[5, 6, 7], [8, 9, 5]]))
    >>> batch["labels"].tolist(), batch["cu_seqlens"].tolist()
    ([6, 7, -100, 9, 5, -100], [0, 3, 6])
    """
    rows, length = tokens.shape
    if labels is None:
        labels = torch.full_like(tokens, IGNORE)
        labels[:, :-1] = tokens[:, 1:]
        if image_token is not None:
            labels[labels == image_token] = IGNORE
    batch = {
        "tokens": tokens.flatten(),
        "labels": labels.flatten(),
        "positions": torch.arange(length, device=tokens.device).repeat(rows),
        "cu_seqlens": torch.arange(rows + 1, dtype=torch.int32, device=tokens.device) * length,
    }
    if seed is not None:
        batch["seed"] = torch.tensor(seed, device=tokens.device)
    return batch | _image_fields(batch["tokens"], config, images, image_token)


def _image_fields(
    tokens: Tensor,
    config: VLMConfig | None,
    images: Sequence[Tensor] | None,
    image_token: int | None,
) -> Batch:
    if not images:
        return {}
    if config is None or config.vision is None or image_token is None:
        raise ValueError("pictures need a config with a vision tower, and image_token")
    vision = config.vision
    cut = [patchify(image, vision.patch_size, vision.merge) for image in images]
    sizes = [len(patches) for patches, _ in cut]
    slots = (tokens == image_token).nonzero().flatten()
    wanted = sum(config.image_tokens(size) for size in sizes)
    if len(slots) != wanted:
        raise ValueError(
            f"{len(images)} pictures take {wanted} image tokens, but the tokens hold {len(slots)} "
            f"placeholders ({image_token})"
        )
    ends = torch.tensor([0, *sizes], dtype=torch.int32, device=tokens.device).cumsum(0)
    return {
        "patches": torch.cat([patches for patches, _ in cut]).to(tokens.device),
        "patch_positions": torch.cat([places for _, places in cut]).to(tokens.device),
        "image_cu_seqlens": ends.to(torch.int32),
        "image_slots": slots,
    }


def stack_examples(examples: Sequence[Batch]) -> Batch:
    """Batches of equal shapes to one with a leading example axis, for ``torch.func.vmap``.

    Raises ValueError naming the field where fields or shapes differ.
    """
    first = examples[0]
    for i, example in enumerate(examples):
        if differs := set(example) ^ set(first):
            raise ValueError(f"example {i} and example 0 differ in fields: {sorted(differs)}")
        for name, tensor in example.items():
            if tensor.shape != first[name].shape:
                raise ValueError(
                    f"{name} is {list(tensor.shape)} in example {i} but "
                    f"{list(first[name].shape)} in example 0"
                )
    return {name: torch.stack([example[name] for example in examples]) for name in first}


def check_batch(batch: dict[str, Any], config: VLMConfig) -> None:
    """Raises ValueError, naming the field, for a batch that does not fit the config or itself.

    It reads values, so it waits for the device: call it on a run's first batch and in tests.
    """
    check_fields(batch)
    if missing := [name for name in TEXT_FIELDS if name not in batch]:
        raise ValueError(f"the batch lacks {missing[0]!r}")
    have = [name for name in IMAGE_FIELDS if name in batch]
    if have and len(have) < len(IMAGE_FIELDS):
        raise ValueError(f"the batch has {have} but lacks {sorted(set(IMAGE_FIELDS) - set(have))}")
    n, vocab = batch["tokens"].shape[0], config.text.vocab_size
    for name in ("tokens", "labels"):
        low, high = (IGNORE if name == "labels" else 0), vocab - 1
        values = batch[name]
        wrong = (values < low) | (values > high) | ((values < 0) & (values != IGNORE))
        if wrong.any():
            raise ValueError(
                f"{name} holds {int(values[wrong][0])}, outside the vocabulary of {vocab}: "
                "the tokenizer and the model config do not belong together"
            )
    _check_shape(batch, "labels", n)
    _check_shape(batch, "positions", n)
    _check_ends("cu_seqlens", batch["cu_seqlens"], n)
    if not have:
        return
    if config.vision is None or config.projector is None:
        raise ValueError("the batch has pictures but the config has no vision tower")
    patches, slots = batch["patches"], batch["image_slots"]
    if patches.shape[1] != config.vision.patch_dim:
        raise ValueError(f"patches are {patches.shape[1]} wide, not {config.vision.patch_dim}")
    _check_ends("image_cu_seqlens", batch["image_cu_seqlens"], patches.shape[0])
    _check_shape(batch, "patch_positions", len(patches), 2)
    if config.projector.kind == "mlp":
        _check_shape(batch, "image_slots", len(patches) // config.vision.merge**2)
    else:
        pictures = len(batch["image_cu_seqlens"]) - 1
        _check_shape(batch, "image_slots", pictures * config.projector.queries)
    if ((slots < 0) | (slots > n)).any():
        raise ValueError(f"image_slots holds a place outside the {n} tokens")
    _check_slots(slots, batch, config)


def _check_slots(slots: Tensor, batch: dict[str, Any], config: VLMConfig) -> None:
    """Each picture's tokens lie in one document, all or none, in the pictures' order."""
    assert config.vision is not None
    assert config.projector is not None
    used = slots < batch["tokens"].shape[0]
    if len(slots[used].unique()) < int(used.sum()):
        raise ValueError("image_slots gives one token to two image tokens")
    if (slots[used].diff() < 0).any():
        raise ValueError("image_slots must rise: pictures lie in the order of their tokens")
    number = torch.arange(len(slots), device=slots.device)
    if config.projector.kind == "mlp":
        ends = batch["image_cu_seqlens"][1:].long()
        picture = torch.bucketize(number * config.vision.merge**2, ends, right=True)
    else:
        picture = number // config.projector.queries
    document = torch.bucketize(slots, batch["cu_seqlens"][1:].long(), right=True)
    same = picture[1:] == picture[:-1]
    for differs, what in (
        (used[1:] != used[:-1], "leaves out a part of picture"),
        (used[1:] & (document[1:] != document[:-1]), "puts two documents' tokens into picture"),
    ):
        if (wrong := same & differs).any():
            raise ValueError(
                f"image_slots {what} {int(picture[1:][wrong][0])}: each document holds as many "
                "image tokens as its pictures give"
            )


def check_fields(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that no model reads, such as a misspelt one."""
    if strange := [name for name in batch if name not in FIELDS]:
        near = difflib.get_close_matches(strange[0], FIELDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"the batch has the field {strange[0]!r}, which nothing reads: {hint}"
            f"There are {', '.join(FIELDS)}"
        )


def _check_shape(batch: dict[str, Any], name: str, *shape: int) -> None:
    if tuple(batch[name].shape) != shape:
        raise ValueError(f"{name} is {list(batch[name].shape)}, not {list(shape)} as the rest says")


def _check_ends(name: str, ends: Tensor, total: int) -> None:
    if ends.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, not {ends.dtype}")
    if ends[0] != 0 or ends[-1] != total or (ends.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to {total}; it is {ends.tolist()[:8]}...")
