"""What the first kernels on a GPU wait for, begun while the data is still being prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kernels import launch


@contextmanager
def warming(device: torch.device) -> Iterator[None]:
    """Inside, threads open the device and hash Triton's library; at its end both are done.

    Both are work outside of Python, which meanwhile reads data and imports. Beside the tokenizing
    of a sample the hash added 0.2 to 0.27 s instead of 0.33 to 0.44 (two slow cores, busy); beside
    imports, which hold Python's lock, it saves nothing. On a CPU there is nothing to do.
    """
    work = (lambda: _open(device), _hash_triton) if device.type == "cuda" else ()
    threads = [threading.Thread(target=_quietly, args=(one,), name="warming") for one in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _open(device: torch.device) -> None:
    """Makes the device's context, and what cuBLAS sets up for its first product."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(ones, ones)


def _hash_triton() -> None:
    """Triton names its cached kernels by a hash of itself, of 500 MB: once a process."""
    if launch.triton is not None:
        launch.triton.runtime.cache.triton_key()


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        return  # the first kernel meets the same, and says so in the main thread
