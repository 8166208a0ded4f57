"""Feeds: from item numbers to documents, in order, here or in worker processes."""

from __future__ import annotations

import itertools
import os
import pickle
import select
import weakref
from collections import deque
from collections.abc import Iterable, Iterator

from runners.data.feeding.columns import results_of
from runners.data.feeding.worker import encode_item
from runners.data.types import Encode, Request, Result, Source
from runners.shell import process
from runners.shell.errors import UserError
from runners.shell.wire import Gone, Link

CHUNK = 16  # items a message
AHEAD = 2  # messages a worker has before it
MOST = 4  # workers a core
BLOCKS = 512  # of results in use: 122 for batches of 580 documents, 8 rows of 4,096 tokens


def feed_here(
    source: Source, encode: Encode, seed: int | None, requests: Iterable[Request]
) -> Iterator[tuple[Request, Result]]:
    """Encodes in this process, one item at a time."""
    for request in requests:
        yield request, encode_item(source, encode, seed, *request)


def cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(count: int) -> None:
    """Raises UserError for more workers, each a process, than the cores can use."""
    if count > (most := MOST * cores()):
        raise UserError(
            f"{count} workers are too many: {most} are {MOST} for each of the {cores()} cores that "
            "this process may use"
        )


def pickled_job(source: Source, encode: Encode, seed: int | None) -> bytes:
    """The workers' job, pickled. Source and encoder must be importable from modules."""
    if "__main__" in (type(source).__module__, type(encode).__module__):
        raise UserError(
            "Data workers cannot import what the started script itself defines: move the "
            "source into a module of its own, or use workers=0."
        )
    return pickle.dumps((source, encode, seed))


class Workers:
    """`count` processes that encode items after a pickled job. Close them when done.

    owner: the link to the receiver of the results; once it closes, waiting for them raises Gone.
    """

    def __init__(self, count: int, job: bytes, owner: Link | None = None) -> None:
        self._processes: list[process.Process] = []
        self._waits: list[select.poll] = []
        # Also runs at exit, and when the owner forgets.
        self.close = weakref.finalize(self, process.close, self._processes)
        gone = select.poll()
        if owner is not None:
            gone.register(owner, 0)
        for _ in range(count):
            if gone.poll(0):
                raise Gone
            self._processes.append(process.start("runners.data.feeding.worker"))
            self._processes[-1].link.most = max(AHEAD, BLOCKS // count)
            wait = select.poll()
            wait.register(self._processes[-1].link, select.POLLIN)
            if owner is not None:
                wait.register(owner, 0)  # only for its hanging up
            self._waits.append(wait)
        for worker in range(count):
            self._send(worker, job)

    def feed(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
        """Results in the order of the requests, whatever the number of workers."""
        chunks = _chunks(requests)
        asked: deque[tuple[int, list[Request]]] = deque()
        for i, chunk in enumerate(itertools.islice(chunks, AHEAD * len(self._processes))):
            asked.append(self._ask(i % len(self._processes), chunk))
        while asked:
            worker, chunk = asked.popleft()
            results = self._receive(worker)
            for following in itertools.islice(chunks, 1):
                asked.append(self._ask(worker, following))
            yield from zip(chunk, results, strict=True)

    def _ask(self, worker: int, chunk: list[Request]) -> tuple[int, list[Request]]:
        self._send(worker, chunk)
        return worker, chunk

    def _send(self, worker: int, message: object) -> None:
        try:
            self._processes[worker].link.send(message)
        except Gone:
            self._receive(worker)  # reports what it said before it ended
            raise

    def _receive(self, worker: int) -> list[Result]:
        link, popen = self._processes[worker]
        if all(fd != link.fileno() for fd, _ in self._waits[worker].poll()):
            raise Gone
        try:
            answer, arrays = link.receive()
        except Gone as error:
            raise UserError(
                f"Data worker {worker} {process.how_it_ended(popen)}: use fewer workers, or "
                "workers=0 to see more."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return results_of(answer, arrays)


def _chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    remaining = iter(requests)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield chunk
