"""Several processes that speak through gloo, with a deadline: one hang must not end a test run."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MEET = 60.0  # seconds two processes may take to start and add one number
WORK = 120.0  # and for all they do


def _member(rank: int, world: int, folder: str, work: Callable[[int, Path], None]) -> None:
    room = Path(folder)
    with open(room / f"{rank}.stack", "w") as stack:
        faulthandler.dump_traceback_later(MEET - 15, file=stack)
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may not resolve
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=WORK),
        )
        together = torch.ones(1)
        dist.all_reduce(together)
        assert together.item() == world
        (room / f"{rank}.met").touch()
        work(rank, room)
        dist.barrier()  # nobody leaves while another still listens
        dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
    # All has been done and written. An ordinary end has once aborted a process, in some forty runs
    # of a suite: "terminate called without an active exception", from a thread of a C++ library.
    os._exit(0)


def run_together(work: Callable[[int, Path], None], room: Path, world: int = 2) -> None:
    """Runs `work(rank, room)` in `world` processes of one gloo group.

    Processes that cannot even add a number through gloo (a machine without loopback connections)
    skip the test, after `MEET` seconds if they hang, with the stack of where the first of them
    stood; whatever happens after that fails it.
    """
    context = mp.start_processes(
        _member, (world, str(room), work), nprocs=world, join=False, start_method="spawn"
    )
    assert context is not None
    met = [room / f"{rank}.met" for rank in range(world)]
    start = time.monotonic()
    try:
        while not context.join(timeout=1.0):
            waited = time.monotonic() - start
            if waited > MEET and not all(file.exists() for file in met):
                stack = room / "0.stack"
                where = stack.read_text() if stack.exists() else "the process did not start"
                pytest.skip(f"{world} gloo processes did not meet within {MEET:.0f} s: {where}")
            assert waited < WORK, f"{world} processes did not end within {WORK:.0f} s"
    except mp.ProcessRaisedException as error:
        if any(file.exists() for file in met):
            raise
        pytest.skip(f"gloo does not start here: {str(error).strip().splitlines()[-1]}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
