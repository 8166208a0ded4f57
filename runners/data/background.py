"""Run an iterator in a thread of its own, a few items ahead of who uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def in_background(iterator: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items in the same order; exceptions come out where the items are used.

    The thread begins now. Closing the generator (or leaving a `for` over it) ends it, after its
    current item.
    """
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(ahead)
    ended = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> None:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:  # look again whether anybody still waits
                continue

    def run() -> None:
        try:
            for item in iterator:
                put((item,))
                if ended.is_set():
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    def items() -> Generator[Any, None, None]:
        thread = threading.Thread(target=run, name="data", daemon=True)
        thread.start()
        try:
            yield None  # the thread has begun, and closing ends it
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item[0]
        finally:
            ended.set()
            thread.join()

    return begun(items())


def begun(generator: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The generator after its first yield, which gives nothing: all up to there has been done."""
    next(generator)
    return generator
