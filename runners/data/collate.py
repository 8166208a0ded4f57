"""From rows of documents to a batch: a flat dict of tensors with static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from runners.data.packing import WINDOW, PackSpec, choose_row
from runners.data.types import NO_LABEL, Document
from runners.errors import UserError

Batch = dict[str, torch.Tensor]


class Place(NamedTuple):
    """Where a document's tokens lie: tokens[start : start + length] of batches[batch]."""

    batch: int
    start: int
    length: int


def collate(rows: Sequence[Sequence[Document]], spec: PackSpec) -> Batch:
    """Lay rows of documents out as one batch (shapes: see `PackSpec`; CPU tensors).

    tokens, labels, positions [N] int64; cu_seqlens [S+1] int32, a row's padding being a document of
    its own and further entries N; with pictures also patches [P, 3*p*p] uint8, patch_positions
    [P, 2], image_cu_seqlens [M+1] int32 and image_slots [K] int64, unused slots N.
    Fewer rows than spec.rows leave the last ones empty. Raises ValueError where a row or the
    batch is over its budget, UserError for a token outside the vocabulary.
    """
    n, total = spec.row_len, spec.rows * spec.row_len
    tokens = np.full(total, spec.pad_token, np.int64)
    labels = np.full(total, NO_LABEL, np.int64)
    positions = np.empty(total, np.int64)
    ends = []
    documents, starts = [], []
    if len(rows) > spec.rows:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {spec.rows}")
    for r in range(spec.rows):
        at, row = r * n, rows[r] if r < len(rows) else ()
        if sum(len(d.tokens) for d in row) > n or len(row) > spec.max_docs:
            raise ValueError(f"a row of {len(row)} documents is over the budget of {spec}")
        for document in row:
            starts.append(at)
            documents.append(document)
            end = at + len(document.tokens)
            tokens[at:end] = document.tokens
            labels[at:end] = document.labels
            positions[at:end] = np.arange(end - at)
            ends.append(end)
            at = end
        if at < (r + 1) * n:
            positions[at : (r + 1) * n] = np.arange((r + 1) * n - at)
            ends.append((r + 1) * n)
    _check_vocabulary(documents, tokens, labels, spec)
    cu_seqlens = np.full(spec.rows * (spec.max_docs + 1) + 1, total, np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(ends) + 1] = ends
    batch = {"tokens": tokens, "labels": labels, "positions": positions, "cu_seqlens": cu_seqlens}
    if spec.images is not None:
        batch |= _image_fields(documents, starts, total, spec)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _image_fields(
    documents: Sequence[Document], starts: Sequence[int], total: int, spec: PackSpec
) -> dict[str, np.ndarray]:
    assert spec.images is not None
    num_patches, num_images = spec.max_patches, spec.max_images + 1
    counts = [count for d in documents for count in d.patch_counts]
    used = sum(counts)
    if used > num_patches or len(counts) >= num_images:
        raise ValueError(f"{len(counts)} pictures of {used} patches are over the budget of {spec}")
    patches = np.zeros((num_patches, spec.images.patch_dim), np.uint8)
    patch_positions = np.zeros((num_patches, 2), np.int64)
    np.concatenate([patches[:0], *(d.patches for d in documents)], out=patches[:used])
    np.concatenate(
        [patch_positions[:0], *(d.patch_positions for d in documents)], out=patch_positions[:used]
    )
    # Unused patches are shared out among the unused pictures: as one picture they would cost
    # attention more than all real ones (a tenth of 38,000 patches squared, against 600 x 64 x 64).
    # Where all real pictures are of one size, so are these: attention can lay them side by side.
    unused = num_images - len(counts)
    step = -(-(num_patches - used) // unused)
    step += -step % spec.images.merge**2
    if spec.images.fit == "square":
        step = max(step, spec.images.square_patches)
    rest = np.minimum(used + step * np.arange(1, unused + 1), num_patches)
    image_cu_seqlens = np.concatenate([np.cumsum([0, *counts]), rest]).astype(np.int32)
    # Both projectors number their tokens in the order of the pictures, so slots are contiguous.
    resampler = spec.images.projector == "resampler"
    num_tokens = spec.images.queries * num_images if resampler else spec.images.tokens(num_patches)
    slots = np.full(num_tokens, total, np.int64)
    taken = [d.slots + start for d, start in zip(documents, starts, strict=True)]
    flat = np.concatenate([slots[:0], *taken])
    slots[: len(flat)] = flat
    return {
        "patches": patches,
        "patch_positions": patch_positions,
        "image_cu_seqlens": image_cu_seqlens,
        "image_slots": slots,
    }


def _check_vocabulary(
    documents: Sequence[Document], tokens: np.ndarray, labels: np.ndarray, spec: PackSpec
) -> None:
    limit = spec.vocab_size
    if limit is None or max(tokens.max(), labels.max()) < limit:
        return
    for document in documents:
        worst = max(document.tokens.max(), document.labels.max())
        if worst >= limit:
            raise UserError(
                f"Record {document.id!r} has token {worst}, outside the model's vocabulary of "
                f"{limit}: take the tokenizer that belongs to the model."
            )
    raise ValueError(f"pad_token {spec.pad_token} is outside the vocabulary of {limit}")


def batch_documents(
    documents: Sequence[Document], spec: PackSpec
) -> tuple[list[Batch], list[Place]]:
    """Pack all of some documents, none dropped: the batches, and where each document lies.

    The last batch may have empty rows. Raises ValueError for a document that no row can hold.
    """
    for document in documents:
        if not spec.fits(document.cost):
            raise ValueError(f"document {document.id!r} ({document.cost}) does not fit {spec}")
    waiting = list(range(len(documents)))
    places = [Place(0, 0, 0)] * len(documents)
    batches: list[Batch] = []
    rows: list[list[Document]] = []
    while waiting:
        chosen = choose_row([documents[i].cost for i in waiting[:WINDOW]], spec.budget(rows))
        at = len(rows) * spec.row_len
        for k in chosen:
            length = len(documents[waiting[k]].tokens)
            places[waiting[k]] = Place(len(batches), at, length)
            at += length
        rows.append([documents[waiting[k]] for k in chosen])
        for k in reversed(chosen):
            del waiting[k]
        if len(rows) == spec.rows or not waiting:
            batches.append(collate(rows, spec))
            rows = []
    return batches, places
