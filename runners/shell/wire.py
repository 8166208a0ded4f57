"""Messages between two processes: objects over a socket, arrays in shared memory.

The sender fills a block of shared memory and sends its number: no array passes through the socket,
and the receiver copies nothing. Once the receiver has released all arrays of a block, its next
message says so and the sender reuses the block, because fresh memory costs page faults (0.4 ms
per megabyte, against 0.02). Blocks have no names: they end with the last process that maps them.
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


class Gone(Exception):  # noqa: N818 - not an error
    """The other end has closed."""


@dataclass
class Loan:
    """A block to fill: ``arrays`` have the requested shapes and undefined values."""

    arrays: Arrays
    shapes: Shapes
    number: int
    size: int
    fd: int | None  # of a block that is new to the other end


class Link:
    """One end of a connection. The receiver unpickles: only for processes that we start.

    ``most``: received blocks in use at once, because each takes a file descriptor (by default a
    process has 1,024). Further arrays are copied.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._blocks: list[mmap.mmap] = []  # ours to fill
        self._free: list[int] = []
        self._seen: dict[int, mmap.mmap] = {}  # the other end's
        self._unused: deque[int] = deque()  # of those: to be returned
        self._held = 0  # of those: not returned yet
        self.most = MOST

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        """Closes the connection. Received arrays stay valid."""
        with contextlib.suppress(OSError):  # the other end may have gone
            self._end.shutdown(socket.SHUT_RDWR)  # also ends another thread's `send`
        self._end.close()

    def lend(self, shapes: Shapes) -> Loan:
        """A block for arrays of these shapes, to fill and send."""
        need = sum(_room(*shape) for shape in shapes.values())
        fitting = [number for number in self._free if len(self._blocks[number]) >= need]
        fd = None
        if fitting:
            number = min(fitting, key=lambda number: len(self._blocks[number]))
            self._free.remove(number)
        else:  # powers of two, so that similar sizes fit later; untouched pages cost nothing
            number, fd = len(self._blocks), _memory_file()
            os.ftruncate(fd, size := max(_LEAST, 1 << (need - 1).bit_length()))
            self._blocks.append(mmap.mmap(fd, size))
        block = self._blocks[number]
        arrays = _arrays_in(np.frombuffer(block, np.uint8), shapes)
        return Loan(arrays, shapes, number, len(block), fd)

    def send(self, thing: Any, loan: Loan | None = None) -> None:
        """Sends an object, and arrays in a loan. Raises Gone if the other end has closed."""
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
        """The next object and its arrays, writable and valid as long as they are referenced. Raises
        Gone if the other end has closed."""
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
        # All views, of numpy and torch, keep this array alive.
        whole = np.frombuffer(self._seen[number], np.uint8)
        weakref.finalize(whole, self._unused.append, number).atexit = False
        arrays = _arrays_in(whole, shapes)
        self._held += 1
        if self._held - len(self._unused) > self.most:
            arrays = {name: array.copy() for name, array in arrays.items()}
        return thing, arrays

    def _all(self, part: bytes, size: int) -> bytes:
        """A part of a message and the rest of its ``size`` bytes."""
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
