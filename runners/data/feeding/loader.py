"""The loader: packed batches without end (or one full pass), whose state can be saved."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Generator, Iterator
from typing import Any

from runners.data.feeding.packers import Packer
from runners.data.feeding.stream import State, Stream
from runners.data.feeding.workers import check_workers, feed_here, pickled_job
from runners.data.packing.collate import Batch, collate
from runners.data.packing.plan import WINDOW, PackSpec
from runners.data.stats import Stats
from runners.data.types import Encode, Source
from runners.shell.errors import UserError


class Loader:
    """Iterate over batches of `source`, encoded by `encode`, packed after `spec`.

    Args:
        repeat: epochs without end; else one pass that drops nothing, the last batch padded.
        shuffle: a new order every epoch, a pure function of (seed, epoch).
        workers: background processes that encode, and then one more that packs (0: all in this
            process, when asked). The batches are the same, bit for bit, for any number. They live
            as long as an iteration does.
        augment: give every item a seed of its own, so that the encoder may change its pictures.
        shard: (rank, world): this loader's part of the items.
        prefetch: finished batches that wait, with workers.
        data: what stands for the source's content, so that a state of other data is told.
    `state_dict()` is that after the last batch handed out, and JSON-serialisable: epoch, position,
    the waiting documents by number, counts. A Loader of the same arguments that loads it goes on
    with the identical next batch.
    Raises UserError for empty data, for more than 4 workers a core, or when more than 1% of the
    records cannot be used.
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
        data: str = "",
    ) -> None:
        rank, world = shard
        if not 0 <= rank < world or workers < 0 or prefetch < 1 or window < 1:
            raise ValueError(f"impossible {shard=}, {workers=}, {prefetch=} or {window=}")
        if len(source) < world:
            raise UserError(f"The data has {len(source)} records, too few for {world} process(es).")
        check_workers(workers)
        self.source, self.encode, self.workers, self.prefetch = source, encode, workers, prefetch
        self.stream = Stream(len(source), spec, seed, repeat, shuffle, augment, shard, window, data)
        self._initial = self.stream.start()
        self._state: State | bytes = self._initial  # bytes: pickled
        self._running: Generator[Any, None, None] | None = None
        self._ahead = False  # it has been started, but not handed out

    @property
    def stats(self) -> Stats:
        """Counts up to the last batch handed out."""
        return Stats(**self.state_dict()["stats"])

    def state_dict(self) -> State:
        if isinstance(self._state, bytes):
            return pickle.loads(self._state)
        return copy.deepcopy(self._state)

    def same_data(self, state: State) -> bool:
        """Whether a state is of the data that this loader reads."""
        return state.get("of", {}).get("data") == self.stream.data

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
        self._running, self._ahead = self._iterate(), True
        next(self._running)

    def __iter__(self) -> Iterator[Batch]:
        if self._running is None or not self._ahead:
            self.start()
        self._ahead = False
        assert self._running is not None
        return self._running

    def close(self) -> None:
        """End a running iteration and its processes. The state stays."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _iterate(self) -> Generator[Any, None, None]:
        batches = self._from_packer() if self.workers else self._made_here()
        try:
            yield next(batches)  # the processes have begun, and closing ends them
            for batch, state in batches:
                self._state = state
                yield batch
        finally:
            batches.close()
        self._state = self._initial  # a full pass is over: the next begins anew

    def _made_here(self) -> Generator[Any, None, None]:
        """Nothing, then batches, each with the state after it."""
        yield None
        feed = functools.partial(feed_here, self.source, self.encode, self._item_seed)
        for rows, state in self.stream.batches(feed, self.state_dict()):
            yield collate(rows, self.stream.spec), state

    def _from_packer(self) -> Generator[Any, None, None]:
        job = pickled_job(self.source, self.encode, self._item_seed)
        packer = Packer(self.stream, job, self.state_dict(), self.workers, self.prefetch)
        try:
            yield None
            yield from packer.batches()
        finally:
            packer.close()

    @property
    def _item_seed(self) -> int | None:
        return self.stream.seed if self.stream.augment else None
