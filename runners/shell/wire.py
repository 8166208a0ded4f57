"""Messages between two of our processes: objects over a socket, arrays in memory that both map.

The sender fills a block of shared memory and sends its number; nothing of an array goes through the
socket, and the receiver copies nothing. When the receiver has let go of all arrays of a block, its
next message the other way says so, and the block is used again: fresh memory costs 0.4 ms a
megabyte where page faults are dear, used memory 0.02. Blocks have no names, so none can be left
over: they end with the last process that maps them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import socket
import struct
import tempfile
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[tuple[int, ...], str]]  # of each array: shape, and dtype by name
Arrays = dict[str, np.ndarray]
_ALIGN = 64  # bytes: where an array may begin
_LEAST = 1 << 16
MOST = 32
_HEAD = struct.Struct("<QqQ")  # bytes of the message; number (-1: none) and size of its block


class Gone(Exception):  # noqa: N818 - nothing went wrong, somebody left
    """The other end has closed."""


@dataclass
class Loan:
    """A block to fill: `arrays` have the shapes asked for, their values are undefined."""

    arrays: Arrays
    shapes: Shapes
    number: int
    size: int
    fd: int | None  # of a block that the other end has not seen yet


class Link:
    """One end of a connection. Whoever receives unpickles: only for processes that we start.

    `most`: blocks that may be in use at this end, as each takes a file descriptor (a process has
    1,024 of them by default). Arrays that come beyond that are copied.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._blocks: list[mmap.mmap] = []  # ours to fill
        self._free: list[int] = []
        self._seen: dict[int, mmap.mmap] = {}  # the other end's
        self._unused: deque[int] = deque()  # of those: to be given back
        self._held = 0  # of those: not given back
        self.most = MOST

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        """What was received stays valid."""
        with contextlib.suppress(OSError):  # the other end may have gone
            self._end.shutdown(socket.SHUT_RDWR)  # ends a `send` of another thread, too
        self._end.close()

    def lend(self, shapes: Shapes) -> Loan:
        """A block for arrays of these shapes, to be filled and sent."""
        need = sum(_room(*shape) for shape in shapes.values())
        fitting = [number for number in self._free if len(self._blocks[number]) >= need]
        fd = None
        if fitting:
            number = min(fitting, key=lambda number: len(self._blocks[number]))
            self._free.remove(number)
        else:  # Powers of two, so that much the same size fits later; untouched pages cost nothing.
            number, fd = len(self._blocks), _memory_file()
            os.ftruncate(fd, size := max(_LEAST, 1 << (need - 1).bit_length()))
            self._blocks.append(mmap.mmap(fd, size))
        block = self._blocks[number]
        arrays = _arrays_in(np.frombuffer(block, np.uint8), shapes)
        return Loan(arrays, shapes, number, len(block), fd)

    def send(self, thing: Any, loan: Loan | None = None) -> None:
        """What `receive` gives at the other end. Raises Gone where that has closed."""
        unused = [self._unused.popleft() for _ in range(len(self._unused))]
        self._held -= len(unused)
        body = pickle.dumps((thing, loan.shapes if loan else {}, unused), protocol=5)
        number, size = (loan.number, loan.size) if loan else (-1, 0)
        head = _HEAD.pack(len(body), number, size)
        try:
            if loan is None or loan.fd is None:
                self._end.sendall(head + body)
            else:
                socket.send_fds(self._end, [head], [loan.fd])
                self._end.sendall(body)
        except ConnectionError as error:
            raise Gone from error
        finally:
            if loan is not None and loan.fd is not None:
                os.close(loan.fd)

    def receive(self) -> tuple[Any, Arrays]:
        """The next thing sent, and its arrays: writable, and the receiver's own for as long as
        anything refers to one of them. Raises Gone where the other end has closed."""
        try:
            head, fds, _, _ = socket.recv_fds(self._end, _HEAD.size, 1)
            length, number, size = _HEAD.unpack(self._all(head, _HEAD.size))
            for fd in fds:
                self._seen[number] = mmap.mmap(fd, size)
                os.close(fd)
            body = self._all(self._end.recv(length), length)
        except ConnectionError as error:
            raise Gone from error
        thing, shapes, unused = pickle.loads(body)
        self._free.extend(unused)
        if number < 0:
            return thing, {}
        # Every view keeps this one alive, however it was cut: numpy and torch both see to that.
        whole = np.frombuffer(self._seen[number], np.uint8)
        weakref.finalize(whole, self._unused.append, number).atexit = False
        arrays = _arrays_in(whole, shapes)
        self._held += 1
        if self._held - len(self._unused) > self.most:
            arrays = {name: array.copy() for name, array in arrays.items()}
        return thing, arrays

    def _all(self, part: bytes, size: int) -> bytes:
        """The rest of what has begun to come."""
        while len(part) < size:
            more = self._end.recv(size - len(part)) if part else b""
            if not more:
                raise Gone
            part += more
        return part


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("arrays")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _room(shape: tuple[int, ...], dtype: str) -> int:
    size = prod(shape) * np.dtype(dtype).itemsize
    return size + -size % _ALIGN


def _arrays_in(block: np.ndarray, shapes: Shapes) -> Arrays:
    arrays, at = {}, 0
    for name, (shape, dtype) in shapes.items():
        arrays[name] = np.ndarray(shape, dtype, block, at)
        at += _room(shape, dtype)
    return arrays
