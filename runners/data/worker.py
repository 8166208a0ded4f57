"""The background worker: a process of its own that turns item numbers into documents.

It is a fresh interpreter that talks over a pipe: nothing is forked (the trainer has threads, and
perhaps a CUDA context), the user's script is not imported a second time, neither is torch, and when
the trainer dies for whatever reason the pipe closes and the worker ends.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from runners.data.encode import item_seed
from runners.data.types import BadRecordError, Conversation, Document, Source
from runners.data.wire import send
from runners.errors import UserError

Encode = Callable[[Conversation, int | None], list[Document]]
Result = list[Document] | BadRecordError
Request = tuple[int, int]  # epoch, item


def encode_item(source: Source, encode: Encode, seed: int | None, epoch: int, index: int) -> Result:
    """The documents of one item: a pure function of its arguments. Bad records are returned."""
    try:
        return encode(source[index], None if seed is None else item_seed(seed, epoch, index))
    except BadRecordError as error:
        return error


def serve(fd: int) -> None:
    """Answer lists of requests with lists of results, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    connection = Connection(fd)
    try:
        source, encode, seed = pickle.loads(connection.recv_bytes())  # sent by our own trainer
        while True:
            requests: list[Request] = connection.recv()
            send(connection, [encode_item(source, encode, seed, *r) for r in requests])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the trainer has closed, or is gone
    except UserError as error:
        send(connection, error)
    except Exception:
        send(connection, RuntimeError("in a data worker:\n" + traceback.format_exc()))
