"""One owner for a run's folder: a lock that ends with its process, however that ends.

The lock is an flock on ``FOLDER/.lock``, which names its holder. Network file systems pass it on to
their server (NFS since Linux 2.6.12, except with the mount options ``nolock`` and ``local_lock``:
then it holds on one machine only). On file systems without locks a warning says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

from runners.shell.cli import explained
from runners.shell.errors import UserError

LOCK = ".lock"
_log = logging.getLogger(__name__)


class BusyError(UserError):
    """Another process owns the folder."""


class Lock:
    """The ownership of a folder, which is made if it does not exist. Release it when done.

    Raises BusyError naming the process that owns it, UserError if it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: list[Path] = []
        self._fd = -1
        owner = f"process {os.getpid()} on {socket.gethostname()}\n"
        with explained(f"cannot create {folder} (choose another place with --runs_dir)"):
            try:
                self._fd = self._open()
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, owner.encode(), 0)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Gives up the folder, and removes the folders that this lock created if they are empty."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()  # while it is held, so that the file is ours
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):  # not empty
            for folder in reversed(self._made):
                folder.rmdir()
        self._made = []

    def _open(self) -> int:
        for _ in range(100):
            self._make(self.folder)
            try:
                fd = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # its owner has just removed the folder
                continue
            try:
                self._take(fd)
                if os.fstat(fd).st_ino == _inode(self.folder / LOCK):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # its owner has just removed the lock
        raise FileNotFoundError(f"{self.folder} cannot be created")

    def _make(self, folder: Path) -> None:
        if not folder.exists():
            self._make(folder.absolute().parent)
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                self._made.append(folder)

    def _take(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"{self.folder} is in use by {_owner(fd)}: wait for its end, stop it, or choose "
                "another --name"
            ) from None
        except OSError as error:
            text = "%s cannot be locked (%s): see to it that no other process uses this run"
            _log.warning(text, self.folder, error.strerror)


def _inode(path: Path) -> int | None:
    try:
        return path.stat(follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None


def _owner(fd: int) -> str:
    for _ in range(20):  # the owner may be about to write its name
        if said := os.pread(fd, 200, 0).decode(errors="replace").strip():
            return said
        time.sleep(0.05)
    return "another process"
