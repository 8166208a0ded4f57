"""Run an iterator in a thread of its own, a few items ahead of who uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


def in_background(iterator: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items in the same order; exceptions come out where the items are used.

    Closing the generator (or leaving a `for` over it) ends the thread, after its current item.
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

    thread = threading.Thread(target=run, name="data", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        ended.set()
        thread.join()
