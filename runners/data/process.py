"""Processes of our own beside the trainer: fresh interpreters that talk over a socket.

Nothing is forked (the trainer has threads, and perhaps a CUDA context), and the user's script is
not imported a second time, neither is torch. When the process that started one dies, for whatever
reason, the socket closes and the other ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from runners.data.wire import Gone, Link
from runners.errors import UserError

_CODE = (
    "import importlib; from runners.data import process; "
    "process.run(importlib.import_module({0!r}).serve, {1})"
)
PATIENCE = 3.0  # seconds that a worker has to end by itself; the packer waits for its workers


class ElsewhereError(RuntimeError):
    """A mistake in another process, with its traceback."""


class Process(NamedTuple):
    link: Link
    popen: subprocess.Popen[bytes]


def start(module: str, *, group: bool = False, quiet: bool = False) -> Process:
    """Run `serve(link)` of a module, given by its full name. group: in a group of its own, with all
    that it starts.

    Such a group gets neither the terminal's Ctrl-C nor a SIGTERM that is meant for the trainer.
    quiet: it writes nowhere, so that whoever reads our output need not wait for its end.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # One thread each: there are as many workers as the user wants cores used.
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours, theirs = socket.socketpair()
    with theirs:
        popen = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(module, theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path, **limits},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if quiet else None,
            stderr=subprocess.DEVNULL if quiet else None,
            process_group=0 if group else None,
        )
    return Process(Link(ours), popen)


def run(serve: Callable[[Link], None], fd: int) -> None:
    """What the started process does, until the other end closes. What goes wrong is sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    link = Link(socket.socket(fileno=fd))
    with contextlib.suppress(Gone):
        try:
            serve(link)
        except Gone:
            raise
        except (UserError, ElsewhereError) as error:
            link.send(error)
        except Exception:
            name = serve.__module__
            link.send(ElsewhereError(f"in a process of {name}:\n{traceback.format_exc()}"))


def close(processes: Sequence[Process], *, group: bool = False) -> None:
    """Close their sockets and wait until they have ended; kill those that do not."""
    for link, _ in processes:
        link.close()
    for _, popen in processes:
        try:
            popen.wait(2 * PATIENCE if group else PATIENCE)  # it sees the closed socket
        except subprocess.TimeoutExpired:
            if group:
                os.killpg(popen.pid, signal.SIGKILL)
            else:
                popen.kill()
            popen.wait()
