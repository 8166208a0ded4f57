"""Python objects with large arrays over a connection, each array's bytes copied once a side.

`Connection.send` would copy pictures four times, most of it with the interpreter's lock held, which
the loader's thread shares with the training loop. Here arrays go beside the pickle, as they lie in
memory (protocol 5, PEP 574), and are read into memory of their own while the lock is free.
"""

from __future__ import annotations

import json
import os
import pickle
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

LARGE = 1 << 17  # bytes: smaller arrays are cheaper inside the pickle than by system calls


def send(connection: Connection, thing: Any) -> None:
    """What `receive` gives at the other end. Raises what sending to a closed pipe raises."""
    parts: list[memoryview] = []

    def inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < LARGE:
            return True
        parts.append(view)
        return False

    parts.insert(0, memoryview(pickle.dumps(thing, protocol=5, buffer_callback=inside)))
    connection.send_bytes(json.dumps([part.nbytes for part in parts]).encode())
    for part in parts:
        while part.nbytes:
            part = part[os.write(connection.fileno(), part) :]


def receive(connection: Connection) -> Any:
    """The next thing that `send` sent. Raises EOFError where the other end has closed.

    Only from processes that we started: it unpickles.
    """
    pickled, *buffers = [_read(connection, n) for n in json.loads(connection.recv_bytes())]
    return pickle.loads(pickled, buffers=buffers)


def _read(connection: Connection, size: int) -> memoryview:
    whole = memoryview(np.empty(size, np.uint8).data)
    rest = whole
    while rest.nbytes:
        read = os.readv(connection.fileno(), [rest])
        if not read:
            raise EOFError
        rest = rest[read:]
    return whole
