"""From rows of documents to a batch: a flat dict of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from runners.data.packing.layout import Rows, batch_shapes, lay_out
from runners.data.packing.plan import WINDOW, PackSpec, choose_row
from runners.data.types import Document
from runners.shell.wire import Arrays

Batch = dict[str, torch.Tensor]


class Place(NamedTuple):
    """Where a document's tokens lie: tokens[start : start + length] of batches[batch]."""

    batch: int
    start: int
    length: int


def collate(rows: Rows, spec: PackSpec) -> Batch:
    """Lay rows of documents out as one batch (shapes: see `PackSpec`; CPU tensors).

    tokens, labels, positions [N] int64; cu_seqlens [S+1] int32, a row's padding being a document of
    its own and further entries N; with pictures also patches [P, 3*p*p] uint8, patch_positions
    [P, 2], image_cu_seqlens [M+1] int32 and image_slots [K] int64, unused slots N.
    Fewer rows than spec.rows leave the last ones empty. Raises ValueError where a row or the
    batch is over its budget, UserError for a token outside the vocabulary.
    """
    shapes = batch_shapes(spec)
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
    lay_out(rows, spec, arrays)
    return as_tensors(arrays)


def as_tensors(arrays: Arrays) -> Batch:
    """The same memory as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


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
