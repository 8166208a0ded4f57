"""The stream of batches: the order of items, their packing, and a state after each batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runners.data.packing.plan import PackSpec, choose_row
from runners.data.stats import Stats
from runners.data.types import BadRecordError, Document, Request, Result
from runners.shell.errors import UserError

State = dict[str, Any]
Feed = Callable[[Iterable[Request]], Iterator[tuple[Request, Result]]]
Waiting = tuple[tuple[int, int, int], Document]  # (epoch, item, piece) and what it gives


@dataclass(frozen=True)
class Stream:
    """The order of items and their packing; arguments as of `Loader`.

    records: number of items in the source. data: a digest of them.
    """

    records: int
    spec: PackSpec
    seed: int
    repeat: bool
    shuffle: bool
    augment: bool
    shard: tuple[int, int]
    window: int
    data: str = ""

    def start(self) -> State:
        """The state before the first batch."""
        return self._snapshot(0, 0, [], Stats())

    def batches(
        self, feed: Feed, start: State
    ) -> Generator[tuple[list[list[Document]], State], None, None]:
        """Rows of batches from the state `start` on, each with the state after it."""
        stats = Stats(**copy.deepcopy(start["stats"]))
        epoch, position = start["epoch"], start["position"]
        saved = [(e, i, piece) for e, i, piece in start["waiting"]]
        again = list(dict.fromkeys((e, i) for e, i, _ in saved))
        results = feed(itertools.chain(again, self.requests(epoch, position)))
        waiting = self._restore(saved, itertools.islice(results, len(again)))
        rows: list[list[Document]] = []

        def fill_rows(least: int) -> Iterator[tuple[list[list[Document]], State]]:
            while len(waiting) >= least:
                costs = [document.cost for _, document in waiting[: self.window]]
                chosen = choose_row(costs, self.spec.budget(rows))
                rows.append([waiting[k][1] for k in chosen])
                for k in reversed(chosen):
                    del waiting[k]
                stats.add_row(rows[-1], self.spec.row_len)
                if len(rows) == self.spec.rows or (least == 1 and not waiting):
                    refs = [ref for ref, _ in waiting]
                    yield rows, self._snapshot(epoch, position, refs, stats)
                    rows.clear()

        yield from fill_rows(self.window)
        for (item_epoch, index), result in results:
            if item_epoch != epoch:
                stats.end_epoch(self._num_items)
                epoch, position = item_epoch, 0
            position += 1
            self._take(item_epoch, index, result, waiting, stats)
            if len(waiting) >= self.window:
                yield from fill_rows(self.window)
        stats.check_epoch(self._num_items)
        yield from fill_rows(1)
        stats.report()

    def requests(self, epoch: int, position: int) -> Iterator[Request]:
        """Item numbers of this shard from a position on, in the order of their epochs."""
        rank, world = self.shard
        while True:
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.records)
            else:
                order = np.arange(self.records)
            for index in order[rank::world][position:]:
                yield epoch, int(index)
            if not self.repeat:
                return
            epoch, position = epoch + 1, 0

    @property
    def _num_items(self) -> int:
        rank, world = self.shard
        return len(range(rank, self.records, world))

    def _take(
        self, epoch: int, index: int, result: Result, waiting: list[Waiting], stats: Stats
    ) -> None:
        """Adds an item's documents to the waiting ones, or counts why it has none."""
        for piece, document in enumerate(() if isinstance(result, BadRecordError) else result):
            if not self.spec.fits(document.cost):
                most = self.spec.budget(())
                result = BadRecordError(
                    "over a row's budget",
                    f"record {document.id!r} takes {document.cost}, more than a row's budget of "
                    f"{most.images} pictures and {most.patches} patches",
                )
                break
            waiting.append(((epoch, index, piece), document))
            stats.add_document(document)
        if isinstance(result, BadRecordError):
            stats.skip(result, self._num_items)
        else:
            stats.good += 1

    def _restore(
        self, saved: list[tuple[int, int, int]], results: Iterable[tuple[Request, Result]]
    ) -> list[Waiting]:
        """Makes the documents that were waiting when the state was saved."""
        made: dict[Request, list[Document]] = {}
        for request, result in results:
            if isinstance(result, BadRecordError):
                raise UserError(f"The data has changed since the run was saved: {result}.")
            made[request] = result
        try:
            return [(ref, made[ref[0], ref[1]][ref[2]]) for ref in saved]
        except IndexError:
            raise UserError("The data has changed since the run was saved.") from None

    def _snapshot(
        self, epoch: int, position: int, waiting: list[tuple[int, int, int]], stats: Stats
    ) -> State:
        spec = self.spec
        return {
            "of": {
                "seed": self.seed,
                "shuffle": self.shuffle,
                "repeat": self.repeat,
                "augment": self.augment,
                "shard": list(self.shard),
                "window": self.window,
                "records": self.records,
                "rows": spec.rows,
                "row_budget": list(spec.budget(())),
                "room": [spec.max_images, spec.max_patches],
                "data": self.data,
            },
            "epoch": epoch,
            "position": position,
            "waiting": [list(ref) for ref in waiting],
            "stats": stats.to_dict(),
        }
