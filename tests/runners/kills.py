"""Kills runs at their operations on files and lets them go on: the results have the same bits.

    python -m tests.runners.kills ROOM [K ...]     # every operation, or only these

An operation is an open, a rename, a removal, a new folder or a flush below the run's folder. A file
that is about to be flushed is cut in half first: so it may look after a kill. Each killed run is
resumed, killed again, at another operation, and resumed to its end. Prints a line for each, and
exits with 1 if one differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG

import torch
from rich.console import Console

from runners.train import train
from runners.training.config import TrainConfig
from runners.training.metrics import Display, read_metrics
from tests.runners.conftest import BASE

WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def count_operations(below: str, last: int) -> Callable[[], int]:
    """Counts from now on; the ``last`` one (counted from 1) is not done: the process is killed."""
    seen = 0

    def one(cut: int | None = None) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            if cut is not None:
                os.ftruncate(cut, os.fstat(cut).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[object, ...]) -> None:
        path = args[0] if event in WATCHED else None
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(below):
            one()

    fsync = os.fsync

    def flush(fd: int) -> None:
        new = os.readlink(f"/proc/self/fd/{fd}").endswith(".part") and S_ISREG(os.fstat(fd).st_mode)
        one(fd if new else None)
        fsync(fd)

    sys.addaudithook(audit)
    os.fsync = flush
    return lambda: seen


def attempt(config: TrainConfig, last: int) -> tuple[int, int]:
    """Trains in a fork of this process. Returns its status and the operations that it counted."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            counted = int(pipe.read() or 0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), counted
    status = 1
    try:
        torch.set_num_threads(1)
        counted_so_far = count_operations(config.run.runs_dir, last)
        train(config, Display(1, console=Console(quiet=True)))
        os.write(write, str(counted_so_far()).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def result(folder: Path) -> str:
    """A digest of all that a run came to."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())
    for state in sorted((folder / "state").iterdir()):
        digest.update(state.name.encode() + (state / "state.safetensors").read_bytes())
    for row in read_metrics(folder):
        kept = {k: v for k, v in row.items() if k in ("step", "loss", "val_loss", "tokens")}
        digest.update(json.dumps(kept).encode())
    parts = [p.name for p in folder.rglob("*") if ".part" in p.name or p.name.startswith(".")]
    return f"{digest.hexdigest()[:16]} {parts}"


def main(room: Path, chosen: list[int]) -> int:
    base = BASE.changed(steps=4, val_every=2, save_every=1, log_every=1, resume="auto")

    def config(name: str) -> TrainConfig:
        return base.changed(name="run", runs_dir=str(room.absolute() / name))

    status, operations = attempt(config("whole"), 0)
    want = result(room / "whole" / "run")
    print(f"whole: status {status}, {operations} operations, {want}", flush=True)
    failed = status != 0
    for k in chosen or range(1, operations + 1):
        run = config(f"killed{k}")
        again = 1 + 7 * k % operations
        ends = [attempt(run, last)[0] for last in (k, again, 0)]
        got = result(Path(run.run.runs_dir) / "run") if ends[-1] == 0 else "did not end"
        ok = got == want and ends[0] == -signal.SIGKILL and ends[1] in (0, -signal.SIGKILL)
        failed |= not ok
        print(f"{k} {again}: {'the same' if ok else f'WRONG: {ends} {got}'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]))
