"""Worker processes: fresh interpreters that talk to their owner over a socket.

Nothing is forked, because the trainer has threads and perhaps a CUDA context, and neither the
user's script nor torch is imported again. When the owner dies, for whatever reason, the socket
closes and the worker exits, even while it imports or computes. Signals that end a run are handled
by the owner: workers block them.
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

from runners.shell.errors import UserError
from runners.shell.wire import Gone, Link

# The thread watches before the slow imports begin. PR_SET_PDEATHSIG would end a process with the
# *thread* that started it.
_CODE = """
import os, select, threading, time
def watch():
    owner = select.poll()
    owner.register({fd}, 0)  # only hang-ups
    owner.poll()
    time.sleep({grace})
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
import importlib
from runners.shell import process
process.run(importlib.import_module({module!r}).serve, {fd})
"""
PATIENCE = 3.0  # seconds for a worker to exit; the packer waits for its workers
OWNERS = [s for n in ("SIGINT", "SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None]


class ElsewhereError(RuntimeError):
    """An error in another process, with its traceback."""


class Process(NamedTuple):
    link: Link
    popen: subprocess.Popen[bytes]


def start(module: str, *, group: bool = False) -> Process:
    """Starts a process that runs ``serve(link)`` of a module, given by its full name.

    group: the process leads a group, with all processes that it starts. When its owner dies, it has
    a moment to end them.

    Raises UserError if the system cannot start another process.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # One thread each: the number of workers is the number of cores to use.
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours = None
    try:
        ours, theirs = socket.socketpair()
        grace = PATIENCE if group else 0
        # Blocked here, because a process inherits its parent's mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, OWNERS)
        try:
            with theirs:
                code = _CODE.format(module=module, fd=theirs.fileno(), grace=grace)
                popen = subprocess.Popen(
                    [sys.executable, "-c", code],
                    env={**os.environ, "PYTHONPATH": path, **limits},
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    process_group=0 if group else None,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except OSError as error:
        if ours is not None:
            ours.close()
        raise UserError(
            f"cannot start a process of {module} ({error.strerror or error}): use fewer workers"
        ) from error
    return Process(Link(ours), popen)


def run(serve: Callable[[Link], None], fd: int) -> None:
    """The main function of a started process, until the other end closes. Sends its errors."""
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


def how_it_ended(popen: subprocess.Popen[bytes]) -> str:
    """How a process whose socket has closed ended, in words."""
    status = popen.wait()
    if status >= 0:
        return f"ended with status {status} (process {popen.pid}; its last words are above)"
    name = signal.Signals(-status).name
    why = "; a system out of memory does that" if name == "SIGKILL" else ""
    return f"was killed by {name} (process {popen.pid}{why})"


def close(processes: Sequence[Process], *, group: bool = False) -> None:
    """Closes the sockets and waits until the processes have ended; kills the others."""
    for link, _ in processes:
        link.close()
    for _, popen in processes:
        try:
            popen.wait(2 * PATIENCE if group else PATIENCE)  # it sees that the socket is closed
        except subprocess.TimeoutExpired:
            if group:
                os.killpg(popen.pid, signal.SIGKILL)
            else:
                popen.kill()
            popen.wait()
