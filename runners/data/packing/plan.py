"""Packing: which documents share a row.

Rows hold `row_len` tokens. From a window of waiting documents each row takes the oldest, and with
it the set that leaves the fewest tokens unused (minimum bin slack: Gupta and Ho 1999). The sums of
lengths that can be reached are the bits of a Python integer, so that a document costs one shift and
one "or". Among equally full rows the one with the oldest documents is taken: rows stay close to a
random sample of the stream, and no document waits for ever.

Only a batch's shape is static. So the room for pictures belongs to a batch, and its rows share it:
room for each row would be larger, and a vision tower computes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple

from runners.data.encode.images import ImageSpec
from runners.data.types import Cost, Document

WINDOW = 256


class Budget(NamedTuple):
    """The limits of a row."""

    tokens: int
    documents: int
    images: int
    patches: int

    def holds(self, *costs: Cost) -> bool:
        return (
            sum(c.tokens for c in costs) <= self.tokens
            and len(costs) <= self.documents
            and sum(c.images for c in costs) <= self.images
            and sum(c.patches for c in costs) <= self.patches
        )


@dataclass(frozen=True)
class PackSpec:
    """The static shapes of a batch: `rows` rows of `row_len` tokens.

    max_docs: the most that *one row* may hold. max_images, max_patches: the most in *a batch*,
    wherever they are. kept_images, kept_patches: what each row leaves of them for every row that is
    still to be filled. Hence N = rows * row_len, S = rows * (max_docs + 1), P = max_patches (a
    multiple of merge**2), M = max_images + 1. A text-only spec has images=None and no image fields.
    """

    row_len: int
    rows: int
    max_docs: int
    max_images: int = 0
    max_patches: int = 0
    images: ImageSpec | None = None
    pad_token: int = 0
    vocab_size: int | None = None  # when given, every token is checked against it
    kept_images: int = 0
    kept_patches: int = 0

    def __post_init__(self) -> None:
        for name in ("row_len", "rows", "max_docs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if bool(self.images) != bool(self.max_images) or bool(self.images) != bool(
            self.max_patches
        ):
            raise ValueError("images, max_images and max_patches go together: set all or none")
        if self.images and self.max_patches % self.images.merge**2:
            raise ValueError(
                f"max_patches ({self.max_patches}) must be a multiple of merge**2 "
                f"({self.images.merge**2})"
            )
        first = self.budget(())
        if min(self.kept_images, self.kept_patches, first.images, first.patches) < 0:
            raise ValueError(
                f"{self.rows - 1} rows keep {self.kept_images} pictures and {self.kept_patches} "
                f"patches each, of {self.max_images} and {self.max_patches}"
            )

    def budget(self, rows: Sequence[Sequence[Document]]) -> Budget:
        """What the next row of a batch may take, after these."""
        after = self.rows - len(rows) - 1
        taken = [document.cost for row in rows for document in row]
        return Budget(
            self.row_len,
            self.max_docs,
            self.max_images - sum(c.images for c in taken) - after * self.kept_images,
            self.max_patches - sum(c.patches for c in taken) - after * self.kept_patches,
        )

    def fits(self, cost: Cost) -> bool:
        """Whether a document fits into the first row of a batch alone."""
        return self._most.holds(cost)

    @cached_property  # read for every document
    def _most(self) -> Budget:
        return self.budget(())


def choose_row(costs: Sequence[Cost], budget: Budget) -> list[int]:
    """Indices (ascending) of the waiting documents for the next row: the oldest that fits, and the
    set that leaves the fewest tokens beside it. Empty if none fits.

    If that set breaks a budget of documents or pictures, the largest that fit are taken instead,
    one after the other. A document that `PackSpec.fits` waits for the next batch at most.
    """
    first = next((i for i, cost in enumerate(costs) if budget.holds(cost)), None)
    if first is None:
        return []
    room = budget.tokens - costs[first].tokens
    mask = (1 << (room + 1)) - 1
    # reach[k]: bit t is set if some of the k youngest have t tokens together.
    reach = [1]
    for cost in reversed(costs[first + 1 :]):
        reach.append((reach[-1] | reach[-1] << cost.tokens) & mask)
    left = reach.pop().bit_length() - 1
    chosen = [first]
    for i in range(first + 1, len(costs)):  # from the oldest: if the rest can still be reached
        without = reach.pop()
        tokens = costs[i].tokens
        if tokens <= left and without >> (left - tokens) & 1:
            chosen.append(i)
            left -= tokens
    if budget.holds(*(costs[i] for i in chosen)):
        return chosen
    return _largest_first(costs, first, budget)


def _largest_first(costs: Sequence[Cost], first: int, budget: Budget) -> list[int]:
    chosen = [first]
    # plain numbers: with small pictures every row is chosen here
    tokens, documents, images, patches = _minus(budget, costs[first])
    for i in sorted(range(first + 1, len(costs)), key=lambda i: (-costs[i].tokens, i)):
        needs = costs[i]
        if (
            needs.tokens <= tokens
            and documents
            and needs.images <= images
            and needs.patches <= patches
        ):
            chosen.append(i)
            tokens, documents = tokens - needs.tokens, documents - 1
            images, patches = images - needs.images, patches - needs.patches
    return sorted(chosen)


def _minus(budget: Budget, cost: Cost) -> Budget:
    tokens, documents, images, patches = budget
    return Budget(tokens - cost.tokens, documents - 1, images - cost.images, patches - cost.patches)


def plan_spec(
    documents: Iterable[Document],
    *,
    row_len: int,
    rows: int,
    images: ImageSpec | None = None,
    margin: float = 1.02,
    pad_token: int = 0,
    vocab_size: int | None = None,
) -> PackSpec:
    """A spec whose room suits a sample of documents: for pictures, `margin` times a batch's mean
    need; for documents, of which empty ones cost nothing, a tenth more than a row's.

    Tight room keeps the work done for nothing small; every document of the sample fits. Raises
    ValueError if there are no documents.
    """
    costs = [document.cost for document in documents]
    if not costs:
        raise ValueError("plan_spec needs at least one document")
    full_rows = sum(cost.tokens for cost in costs) / row_len
    cell = images.merge**2 if images else 1

    def room(needs: list[int], unit: int) -> tuple[int, int]:
        """For a batch; and what is kept of it for each row to come, the mean need if the largest
        document leaves so much."""
        mean, most = sum(needs) / full_rows, max(needs)
        whole = max(ceil(margin * mean * rows / unit), ceil(most / unit), 1)
        spare = (whole - ceil(most / unit)) // max(1, rows - 1)
        return unit * whole, unit * min(int(mean / unit), spare)

    max_images, kept_images = room([cost.images for cost in costs], 1)
    max_patches, kept_patches = room([cost.patches for cost in costs], cell)
    spec = PackSpec(
        row_len=row_len,
        rows=rows,
        max_docs=ceil(max(1.1 * len(costs) / full_rows, 1)),
        pad_token=pad_token,
        vocab_size=vocab_size,
    )
    if images is None:
        return spec
    # A model with vision has image fields, even for a sample without pictures.
    return replace(
        spec,
        images=images,
        max_images=max_images,
        max_patches=max_patches,
        kept_images=kept_images,
        kept_patches=kept_patches,
    )
