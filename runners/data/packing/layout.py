"""From rows of documents to a batch's arrays, of static shapes (see `PackSpec`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runners.data.packing.plan import PackSpec
from runners.data.types import NO_LABEL, Document
from runners.shell.errors import UserError
from runners.shell.wire import Arrays, Shapes

Rows = Sequence[Sequence[Document]]


def batch_shapes(spec: PackSpec) -> Shapes:
    """The fields of a batch, each with its shape and dtype."""
    total = spec.rows * spec.row_len
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": ((total,), "int64"),
        "labels": ((total,), "int64"),
        "positions": ((total,), "int64"),
        "cu_seqlens": ((spec.rows * (spec.max_docs + 1) + 1,), "int32"),
    }
    images = spec.images
    if images is not None:
        resampler = images.projector == "resampler"
        num_images = spec.max_images + 1
        slots = images.queries * num_images if resampler else images.tokens(spec.max_patches)
        shapes |= {
            "patches": ((spec.max_patches, images.patch_dim), "uint8"),
            "patch_positions": ((spec.max_patches, 2), "int64"),
            "image_cu_seqlens": ((num_images + 1,), "int32"),
            "image_slots": ((slots,), "int64"),
        }
    return shapes


def lay_out(rows: Rows, spec: PackSpec, batch: Arrays) -> None:
    """Writes rows of documents as one batch into the arrays of `batch_shapes`.

    Raises ValueError for a row or batch over its budget, UserError for a token outside of the
    vocabulary.
    """
    n, total = spec.row_len, spec.rows * spec.row_len
    tokens, labels = batch["tokens"], batch["labels"]
    bounds, starts = [0], []
    documents = [document for row in rows for document in row]
    if len(rows) > spec.rows:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {spec.rows}")
    for r in range(spec.rows):
        at, row = r * n, rows[r] if r < len(rows) else ()
        if sum(len(d.tokens) for d in row) > n or len(row) > spec.max_docs:
            raise ValueError(f"a row of {len(row)} documents is over the budget of {spec}")
        end = at
        for document in row:
            starts.append(end)
            end += len(document.tokens)
            bounds.append(end)
        if end > at:
            np.concatenate([document.tokens for document in row], out=tokens[at:end])
            np.concatenate([document.labels for document in row], out=labels[at:end])
        if end < at + n:  # a row's padding is a document of its own
            tokens[end : at + n] = spec.pad_token
            labels[end : at + n] = NO_LABEL
            bounds.append(at + n)
    _check_vocabulary(documents, tokens, labels, spec)
    np.subtract(np.arange(total), np.repeat(bounds[:-1], np.diff(bounds)), out=batch["positions"])
    batch["cu_seqlens"][: len(bounds)] = bounds
    batch["cu_seqlens"][len(bounds) :] = total
    if spec.images is not None:
        _lay_out_images(documents, starts, spec, batch)


def _lay_out_images(
    documents: Sequence[Document], starts: Sequence[int], spec: PackSpec, batch: Arrays
) -> None:
    assert spec.images is not None
    num_patches, num_images = spec.max_patches, spec.max_images + 1
    counts = [count for d in documents for count in d.patch_counts]
    used = sum(counts)
    if used > num_patches or len(counts) >= num_images:
        raise ValueError(f"{len(counts)} pictures of {used} patches are over the budget of {spec}")
    patches, places, slots = batch["patches"], batch["patch_positions"], batch["image_slots"]
    np.concatenate([patches[:0], *(d.patches for d in documents)], out=patches[:used])
    np.concatenate([places[:0], *(d.patch_positions for d in documents)], out=places[:used])
    patches[used:] = 0
    places[used:] = 0
    # Unused patches are spread over the unused pictures: as one picture they could cost attention
    # more than all real ones. Where all pictures have one size, so do these, for a dense batch.
    unused = num_images - len(counts)
    step = -(-(num_patches - used) // unused)
    step += -step % spec.images.merge**2
    if spec.images.fit == "square":
        step = max(step, spec.images.square_patches)
    rest = np.minimum(used + step * np.arange(1, unused + 1), num_patches)
    batch["image_cu_seqlens"][:] = np.concatenate([np.cumsum([0, *counts]), rest])
    # Both projectors number their tokens in the order of the pictures, so slots are contiguous.
    flat = np.concatenate([slots[:0], *(d.slots for d in documents)])
    lengths = np.array([len(d.slots) for d in documents], np.int64)
    flat += np.repeat(np.array(starts, np.int64), lengths)
    slots[: len(flat)] = flat
    slots[len(flat) :] = spec.rows * spec.row_len


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
