"""flash-attn 4's kernels, compiled in processes of their own before the first step asks for them.

The first run on a machine compiles them, some 10 s beside an H200. In a thread that would hide
nothing: Python's lock is held for two thirds of it. So a process compiles each, for a GPU that it
does not open, into the cache that `program_cache` keeps, and the first attention waits for
it. The processes' own imports take 5 s there. `expect` begins those before the trainer's imports
do, where the cache is empty; so nothing that takes long may be imported here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runners.shell import process
from runners.shell.process import ElsewhereError, Process
from runners.shell.wire import Gone

MODULE = "runners.shell.compiler"
PARTS = ("forward", "backward")
CORES = 8  # enough for the trainer, its data and these
PATIENCE = 180.0  # seconds for what takes 6 beside an H200
_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and Linux inside Windows
_LIBRARIES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "apache-tvm-ffi")
_log = logging.getLogger(__name__)
_spare: list[Process] = []


class Attention(NamedTuple):
    """What decides which kernels compute an attention in bf16: as `kernels.attention` is called."""

    tokens: int
    documents: int
    heads: int
    kv_heads: int
    head_dim: int
    longest: int
    length: int | None
    causal: bool
    window: int | None
    deterministic: bool


class Job(NamedTuple):
    attention: Attention
    part: str  # of PARTS
    environment: dict[str, str]  # what the libraries are told: their caches, and the GPU
    mark: Path  # touched when its kernels are in the cache


def expect() -> None:
    """Starts processes that import what compiling needs, if the cache seems to be empty.

    Before the device is known, let alone the model: `begin` tells them what to compile, or ends
    them. With few cores they would only slow down the trainer's imports, and begin later.
    """
    if (os.cpu_count() or 1) < CORES or not any(map(os.path.exists, _DEVICES)):
        return
    if os.environ.get("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED") == "0":
        return
    if not installed() or any(_kept().rglob("*.o")):
        return
    _spare.extend(process.start(MODULE, quiet=True) for _ in PARTS)


def installed() -> bool:
    """Whether flash-attn 4 is, by its folder: importing it takes 1.4 s beside an H200."""
    spec = importlib.util.find_spec("flash_attn")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return any((Path(folder) / "cute").is_dir() for folder in folders)


def _kept() -> Path:
    """The folder of all that flash-attn 4 keeps, whatever the device."""
    told = os.environ.get(
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    )  # kernels.runtime.program_cache.FOLDER
    if told:
        return Path(told)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nanovision" / "flash-attn-4"


def begin(attentions: Sequence[Attention]) -> None:
    """Compiles what the cache lacks for these, each part of each in a process; does not wait.

    The current CUDA device is what it is compiled for. Without a GPU, flash-attn 4 or a cache
    nothing happens. Where a process fails a warning says so, and the call compiles for itself.
    """
    jobs = _jobs(attentions) if attentions and installed() else []
    if jobs:
        from kernels.attention import attention_flash
    for job in jobs:
        helper = _spare.pop() if _spare else process.start(MODULE, quiet=True)
        with contextlib.suppress(Gone):  # `_finish` will say so
            helper.link.send(job)
        attention_flash.before_first(job.part, functools.partial(_finish, job, helper))
    for helper in _spare:
        _end(helper)
    _spare.clear()


def _end(helper: Process) -> None:
    """At once: it may be importing, and holds nothing that matters."""
    helper.link.close()
    helper.popen.kill()
    helper.popen.wait()


def _jobs(attentions: Sequence[Attention]) -> list[Job]:
    import torch

    from kernels.runtime import program_cache

    if not torch.cuda.is_available():
        return []
    program_cache.keep()
    folder = os.environ.get(program_cache.FOLDER)
    if os.environ.get(program_cache.ENABLED) != "1" or folder is None:
        return []
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    target = f"{gpu.major}{gpu.minor}"
    environment = {
        name: os.environ[name]
        for name in (program_cache.ENABLED, program_cache.FOLDER, program_cache.QUACK_FOLDER)
        if name in os.environ
    } | {
        "FLASH_ATTENTION_ARCH": f"sm_{target}",
        "FLASH_ATTENTION_NUM_SMS": str(gpu.multi_processor_count),
        "CUTE_DSL_ARCH": f"sm_{target}a",
        "QUACK_ARCH": target,
    }
    jobs = []
    for kind, attention in {_kind(attention): attention for attention in attentions}.items():
        for part in PARTS:
            known = repr((kind, part, sorted(environment.items()), _versions()))
            name = hashlib.sha256(known.encode()).hexdigest()[:32]
            mark = Path(folder) / f"{name}.compiled"
            if not mark.exists():
                jobs.append(Job(attention, part, environment, mark))
    return jobs


def _kind(attention: Attention) -> Attention:
    """What the library compiles one set of kernels for: not for each size (4.0.0b36)."""
    length = attention.length
    return attention._replace(
        tokens=0,
        documents=int(attention.documents > 256),
        longest=min(attention.longest, 512),  # the shortest may lie in one tile
        length=None if length is None else min(length, 512),
        window=None if attention.window is None else 1,
    )


@functools.cache
def _versions() -> tuple[str, ...]:
    found = [f"{sys.version_info.major}.{sys.version_info.minor}"]
    for library in _LIBRARIES:
        try:
            found.append(importlib.metadata.version(library))
        except importlib.metadata.PackageNotFoundError:  # a checkout that is on the path
            found.append("")
    return tuple(found)


def _finish(job: Job, helper: Process) -> None:
    """Waits until a job is done."""
    answer: object = ElsewhereError(f"its process takes over {PATIENCE:.0f} s")
    try:
        if select.select([helper.link], [], [], PATIENCE)[0]:
            answer, _ = helper.link.receive()
    except Gone:
        answer = ElsewhereError("its process ended")
    _end(helper)
    if isinstance(answer, Exception):
        _log.warning(
            "flash-attn 4's %s was not compiled ahead, and is now, which takes longer: %s",
            job.part, answer,
        )  # fmt: skip
