"""The loader: packed batches without end (or one full pass), whose state can be saved."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np

from runners.data.background import begun, in_background
from runners.data.collate import Batch, collate
from runners.data.packing import WINDOW, PackSpec, choose_row
from runners.data.stats import Stats
from runners.data.types import BadRecordError, Document, Source
from runners.data.worker import Encode, Request, Result
from runners.data.workers import Workers, feed_here
from runners.errors import UserError

State = dict[str, Any]
Stream = Generator[tuple[Batch, State], None, None]
Feed = Callable[[Iterable[Request]], Iterator[tuple[Request, Result]]]
Waiting = tuple[tuple[int, int, int], Document]  # (epoch, item, piece) and what it gives


class Loader:
    """Iterate over batches of `source`, encoded by `encode`, packed after `spec`.

    Args:
        repeat: epochs without end; else one pass that drops nothing, the last batch padded.
        shuffle: a new order every epoch, a pure function of (seed, epoch).
        workers: background processes (0: all in this process, when asked). The batches are the
            same, bit for bit, for any number. They live as long as an iteration does.
        augment: give every item a seed of its own, so that the encoder may change its pictures.
        shard: (rank, world): this loader's part of the items.
        prefetch: finished batches that wait, with workers.
    `state_dict()` is that after the last batch handed out, and JSON-serialisable: epoch, position,
    the waiting documents by number, counts. A Loader of the same arguments that loads it goes on
    with the identical next batch.
    Raises UserError for empty data, or when more than 1% of the records cannot be used.
    """

    def __init__(
        self,
        source: Source,
        encode: Encode,
        spec: PackSpec,
        *,
        seed: int = 0,
        repeat: bool = True,
        shuffle: bool = True,
        workers: int = 0,
        augment: bool = False,
        shard: tuple[int, int] = (0, 1),
        prefetch: int = 2,
        window: int = WINDOW,
    ) -> None:
        rank, world = shard
        if not 0 <= rank < world or workers < 0 or prefetch < 1 or window < 1:
            raise ValueError(f"impossible {shard=}, {workers=}, {prefetch=} or {window=}")
        if len(source) < world:
            raise UserError(f"The data has {len(source)} records, too few for {world} process(es).")
        self.source, self.encode, self.spec = source, encode, spec
        self.seed, self.repeat, self.shuffle = seed, repeat, shuffle
        self.workers, self.augment, self.shard = workers, augment, shard
        self.prefetch, self.window = prefetch, window
        self._num_items = len(range(rank, len(source), world))
        self._state = self._initial = self._snapshot(0, 0, [], Stats())
        self._running: Generator[Batch, None, None] | None = None
        self._ahead = False  # it has been started, but not handed out

    @property
    def stats(self) -> Stats:
        """Counts up to the last batch handed out."""
        return Stats(**copy.deepcopy(self._state["stats"]))

    def state_dict(self) -> State:
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`. Raises UserError where it belongs to other data or settings."""
        ours, theirs = self._initial["of"], state.get("of", {})
        for name, value in ours.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"The saved position in the data has {name}={theirs.get(name)}, this run "
                    f"{name}={value}: resume with the same settings, or start a new run."
                )
        self.close()
        self._state = copy.deepcopy(state)

    def start(self) -> None:
        """Begin the iteration that the next `iter` hands out: workers import for 0.3 s and more,
        while the caller has other things to do."""
        self.close()
        self._running, self._ahead = begun(self._iterate()), True

    def __iter__(self) -> Iterator[Batch]:
        if self._running is None or not self._ahead:
            self.start()
        self._ahead = False
        assert self._running is not None
        return self._running

    def close(self) -> None:
        """End a running iteration, its thread and its processes. The state stays."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _iterate(self) -> Generator[Any, None, None]:
        seed = self.seed if self.augment else None
        if self.workers:
            workers = Workers(self.workers, self.source, self.encode, seed)
            stream = in_background(self._stream(workers.feed, self._state), self.prefetch)
        else:
            workers = None
            feed = functools.partial(feed_here, self.source, self.encode, seed)
            stream = self._stream(feed, self._state)
        try:
            yield None  # `begun`
            for batch, state in stream:
                self._state = state
                yield batch
        finally:
            stream.close()
            if workers:
                workers.close()
        self._state = self._initial  # a full pass is over: the next begins anew

    def _stream(self, feed: Feed, start: State) -> Stream:
        """Batches from the state `start` on, each with the state after it."""
        stats = Stats(**copy.deepcopy(start["stats"]))
        epoch, position = start["epoch"], start["position"]
        saved = [(e, i, piece) for e, i, piece in start["waiting"]]
        again = list(dict.fromkeys((e, i) for e, i, _ in saved))
        results = feed(itertools.chain(again, self._requests(epoch, position)))
        waiting = self._restore(saved, itertools.islice(results, len(again)))
        rows: list[list[Document]] = []

        def fill_rows(least: int) -> Iterator[tuple[Batch, State]]:
            while len(waiting) >= least:
                costs = [document.cost for _, document in waiting[: self.window]]
                chosen = choose_row(costs, self.spec.budget(rows))
                rows.append([waiting[k][1] for k in chosen])
                for k in reversed(chosen):
                    del waiting[k]
                stats.add_row(rows[-1], self.spec.row_len)
                if len(rows) == self.spec.rows or (least == 1 and not waiting):
                    batch = collate(rows, self.spec)
                    rows.clear()
                    refs = [ref for ref, _ in waiting]
                    yield batch, self._snapshot(epoch, position, refs, stats)

        yield from fill_rows(self.window)
        for (item_epoch, index), result in results:
            if item_epoch != epoch:
                stats.end_epoch(self._num_items)
                epoch, position = item_epoch, 0
            position += 1
            self._take(item_epoch, index, result, waiting, stats)
            yield from fill_rows(self.window)
        stats.check_epoch(self._num_items)
        yield from fill_rows(1)
        stats.report()

    def _take(
        self, epoch: int, index: int, result: Result, waiting: list[Waiting], stats: Stats
    ) -> None:
        """Put what an item gives among the waiting, or count why it gives nothing."""
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

    def _requests(self, epoch: int, position: int) -> Iterator[Request]:
        """Item numbers of this shard from a position on, in the order of their epochs."""
        rank, world = self.shard
        count = len(self.source)
        while True:
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(count)
            else:
                order = np.arange(count)
            for index in order[rank::world][position:]:
                yield epoch, int(index)
            if not self.repeat:
                return
            epoch, position = epoch + 1, 0

    def _restore(
        self, saved: list[tuple[int, int, int]], results: Iterable[tuple[Request, Result]]
    ) -> list[Waiting]:
        """The documents that waited when the state was saved, made again."""
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
                "records": len(self.source),
                "rows": spec.rows,
                "row_budget": list(spec.budget(())),
                "room": [spec.max_images, spec.max_patches],
            },
            "epoch": epoch,
            "position": position,
            "waiting": [list(ref) for ref in waiting],
            "stats": stats.to_dict(),
        }
