"""Processes of our own beside the trainer: fresh interpreters that talk over a socket.

Nothing is forked (the trainer has threads, and perhaps a CUDA context), and the user's script is
not imported a second time, neither is torch. When the process that started one dies, for whatever
reason, the socket closes and the other ends, be it importing or in the middle of its work. The
signals by which a system or a terminal ends a run are its owner's to handle: here they are blocked.
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

# The thread watches from the first moment on, before the imports that take long. The kernel's own
# way (PR_SET_PDEATHSIG) would end a process with the *thread* that started it.
_CODE = """
import os, select, threading, time
def watch():
    owner = select.poll()
    owner.register({fd}, 0)  # only that it hung up
    owner.poll()
    time.sleep({grace})
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
import importlib
from runners.shell import process
process.run(importlib.import_module({module!r}).serve, {fd})
"""
PATIENCE = 3.0  # seconds that a worker has to end by itself; the packer waits for its workers
OWNERS = [s for n in ("SIGINT", "SIGTERM", "SIGHUP") if (s := getattr(signal, n, None)) is not None]


class ElsewhereError(RuntimeError):
    """A mistake in another process, with its traceback."""


class Process(NamedTuple):
    link: Link
    popen: subprocess.Popen[bytes]


def start(module: str, *, group: bool = False) -> Process:
    """Run `serve(link)` of a module, given by its full name. group: in a group of its own, with all
    that it starts.

    When its owner is gone, the leader of a group has a moment to end those that it started itself.
    Raises UserError where the system has no room for another process.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    # One thread each: there are as many workers as the user wants cores used.
    limits = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ours = None
    try:
        ours, theirs = socket.socketpair()
        grace = PATIENCE if group else 0
        # Blocked here, as a process has what its parent had when it was started
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
    """What the started process does, until the other end closes. What goes wrong is sent."""
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
    """In words, of a process whose socket has closed."""
    status = popen.wait()
    if status >= 0:
        return f"ended with status {status} (process {popen.pid}; its last words are above)"
    name = signal.Signals(-status).name
    why = "; a system out of memory does that" if name == "SIGKILL" else ""
    return f"was killed by {name} (process {popen.pid}{why})"


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
