"""Feeds: from item numbers to documents, in order, here or in background processes."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from runners.data.types import Source
from runners.data.wire import receive
from runners.data.worker import Encode, Request, Result, encode_item
from runners.errors import UserError

CHUNK = 16  # items a message
AHEAD = 2  # messages a worker has before it
_CODE = "import sys; from runners.data.worker import serve; serve(int(sys.argv[1]))"


def feed_here(
    source: Source, encode: Encode, seed: int | None, requests: Iterable[Request]
) -> Iterator[tuple[Request, Result]]:
    """Encode in this process, one item when it is asked for."""
    for request in requests:
        yield request, encode_item(source, encode, seed, *request)


class Workers:
    """`count` background processes that encode items of a source. Close them when done.

    Source and encoder are pickled to them, so both must be importable from modules.
    """

    def __init__(self, count: int, source: Source, encode: Encode, seed: int | None) -> None:
        if "__main__" in (type(source).__module__, type(encode).__module__):
            raise UserError(
                "Data workers cannot import what the started script itself defines: move the "
                "source into a module of its own, or use workers=0."
            )
        job = pickle.dumps((source, encode, seed))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        # Also runs at exit, and when the owner forgets.
        self.close = weakref.finalize(self, _close, self._connections, self._processes)
        for _ in range(count):
            ours, theirs = Pipe()
            self._connections.append(ours)
            self._processes.append(_start(theirs.fileno()))
            theirs.close()
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
        self._send(worker, pickle.dumps(chunk))
        return worker, chunk

    def _send(self, worker: int, message: bytes) -> None:
        try:
            self._connections[worker].send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):
            self._receive(worker)  # what it had to say before it ended
            raise

    def _receive(self, worker: int) -> list[Result]:
        try:
            answer = receive(self._connections[worker])
        except (EOFError, ConnectionResetError) as error:
            status = self._processes[worker].wait()
            raise UserError(
                f"Data worker {worker} ended with status {status} (-9: out of memory; else its "
                "last words are above): use fewer workers, or workers=0 to see more."
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    remaining = iter(requests)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield chunk


def _start(fd: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # One thread each: there are as many workers as the user wants cores used.
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, str(fd)],
        env={**os.environ, "PYTHONPATH": path, **limits},
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
    )


def _close(connections: list[Connection], processes: list[subprocess.Popen[bytes]]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        try:
            process.wait(timeout=5)  # it sees the closed pipe
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
