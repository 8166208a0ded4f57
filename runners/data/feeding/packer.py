"""The packer: a process of its own that turns workers' documents into finished batches.

In the trainer's own process it would share the interpreter with the training loop.
"""

from __future__ import annotations

import copy
import logging
import pickle

from runners.data.feeding.stream import State, Stream
from runners.data.feeding.workers import Workers
from runners.data.packing.layout import batch_shapes, lay_out
from runners.shell.wire import Link

Job = tuple[Stream, State, bytes, int, int, int]


def serve(link: Link) -> None:
    """Answer a job with batches (the pickled state after each, and its arrays), LogRecords and, at
    the end, None. Each batch is answered when it is taken."""
    job: Job = link.receive()[0]
    stream, state, workers_job, num_workers, prefetch, level = job
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(_Forward(link))
    workers = Workers(num_workers, workers_job, link)
    shapes, ahead = batch_shapes(stream.spec), 0
    try:
        for rows, after in stream.batches(workers.feed, state):
            loan = link.lend(shapes)
            lay_out(rows, stream.spec, loan.arrays)
            # Within the message as bytes: few of the states are ever looked at.
            link.send(pickle.dumps(after), loan)
            ahead += 1
            if ahead == prefetch:
                link.receive()
                ahead -= 1
        link.send(None)
    finally:
        workers.close()


class _Forward(logging.Handler):
    """Sends log records to the trainer, which has the user's handlers."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        plain = copy.copy(record)  # without objects that could not be sent
        plain.msg, plain.args, plain.exc_info = self.format(record), None, None
        self._link.send(plain)
