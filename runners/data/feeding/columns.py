"""Sends documents from workers to the packer: the arrays of many are joined, and cut again there.

Receiving a document as a part of five joined arrays takes a tenth of the time of unpickling it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runners.data.types import BadRecordError, Document, Result
from runners.shell.wire import Arrays, Link, Shapes

_COLUMNS = ("tokens", "labels", "slots", "patches", "patch_positions")
# id, lengths of tokens, slots and patches, patch_counts, truncated
_Head = tuple[str, int, int, int, tuple[int, ...], int]
Heads = list[list[_Head] | BadRecordError]


def send_results(link: Link, results: Sequence[Result]) -> None:
    """Send what `results_of` makes of a message. All documents' arrays are of the same kinds."""
    heads: Heads = [
        result if isinstance(result, BadRecordError) else [_head(document) for document in result]
        for result in results
    ]
    documents = [d for r in results if not isinstance(r, BadRecordError) for d in r]
    if not documents:
        link.send(heads)
        return
    columns = {name: [getattr(d, name) for d in documents] for name in _COLUMNS}
    shapes: Shapes = {
        name: ((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype.str)
        for name, parts in columns.items()
    }
    loan = link.lend(shapes)
    for name, parts in columns.items():
        np.concatenate(parts, out=loan.arrays[name])
    link.send(heads, loan)


def results_of(heads: Heads, arrays: Arrays) -> list[Result]:
    """The results, whose documents' arrays are views."""
    if not arrays:
        return [head if isinstance(head, BadRecordError) else [] for head in heads]
    tokens, labels, slots, patches, places = (arrays[name] for name in _COLUMNS)
    t = s = p = 0
    results: list[Result] = []
    for head in heads:
        if isinstance(head, BadRecordError):
            results.append(head)
            continue
        documents = []
        for name, length, num_slots, num_patches, counts, truncated in head:
            t0, s0, p0 = t, s, p
            t, s, p = t + length, s + num_slots, p + num_patches
            cut = tokens[t0:t], labels[t0:t], slots[s0:s], patches[p0:p], places[p0:p]
            documents.append(Document(name, *cut, counts, truncated))
        results.append(documents)
    return results


def _head(d: Document) -> _Head:
    return d.id, len(d.tokens), len(d.slots), len(d.patches), d.patch_counts, d.truncated
