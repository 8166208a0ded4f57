"""The trainer's end of a packer process: its batches, as tensors in the memory that both map."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator

from runners.data.feeding.stream import State, Stream
from runners.data.packing.collate import Batch, as_tensors
from runners.shell import process
from runners.shell.errors import UserError
from runners.shell.wire import Gone


class Packer:
    """A process that packs what `workers` processes encode. Close it when done.

    Args:
        stream, state: what batches, and from where on.
        job: what the workers do (see `pickled_job`).
        prefetch: batches that it makes before they are asked for.
    """

    def __init__(
        self, stream: Stream, job: bytes, state: State, workers: int, prefetch: int
    ) -> None:
        self._process = process.start("runners.data.feeding.packer", group=True)
        # Also runs at exit, and when the owner forgets.
        self.close = weakref.finalize(self, process.close, [self._process], group=True)
        level = logging.getLogger("runners").getEffectiveLevel()
        # sent now, so that workers start beside the caller's own work; in a thread, since the other
        # end is still importing and a socket's buffer is small
        told = (stream, state, job, workers, prefetch, level)
        self._sender = threading.Thread(target=self._tell, args=(told,), daemon=True)
        self._sender.start()

    def _tell(self, job: object) -> None:
        with contextlib.suppress(Gone, OSError):  # `receive` finds out too
            self._process.link.send(job)

    def batches(self) -> Iterator[tuple[Batch, bytes]]:
        """Batches with the pickled state after each.

        Raises what packer and workers raise, and UserError where one of them was killed. A batch's
        memory is used for another one when nothing refers to its tensors any more.
        """
        link, popen = self._process
        try:
            self._sender.join()
            while True:
                told, arrays = link.receive()
                if isinstance(told, logging.LogRecord):
                    logger = logging.getLogger(told.name)
                    if logger.isEnabledFor(told.levelno):
                        logger.handle(told)
                elif isinstance(told, Exception):
                    raise told
                elif told is None:
                    return
                else:
                    link.send(None)
                    yield as_tensors(arrays), told
        except Gone as error:
            raise UserError(
                f"The data packer {process.how_it_ended(popen)}: use fewer workers, or workers=0 "
                "to see more."
            ) from error
