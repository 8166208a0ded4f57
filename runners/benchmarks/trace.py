"""`bench trace`: the kernels that the default training step runs, against its start-up report."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import kernels
from runners.benchmarks.records import environment, write_lines
from runners.benchmarks.report import Line, Table, console
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.config import TrainConfig, parse_config
from runners.training.setup import Job, prepare
from runners.training.step import Learner

# Kernels of attention libraries, as the profiler names them: flash-attn and torch's copy of it say
# flash, cuDNN sdpa or fmha.
ATTENTION = re.compile(r"flash|fmha|sdpa|attention_\w*kernel", re.IGNORECASE)


@dataclass(frozen=True)
class TraceConfig:
    """Profiles one step of `python -m runners.train` on the GPU and lists its kernels; fails if one
    is absent that the run's report promises."""

    warmup: int = 4
    """Steps before the one that is looked at: the first ones compile."""
    out: str = "runs/bench"
    """Folder for trace.jsonl, a line a kernel."""
    chrome: bool = False
    """Write trace.json too, for chrome://tracing or ui.perfetto.dev."""


@dataclass(frozen=True)
class Seen:
    """A kernel of the traced step."""

    name: str
    ours: bool
    calls: int
    us: float  # on the device, all calls together


def run_trace(config: TraceConfig, command: str) -> int:
    """Raises UserError where there is no GPU, and for a promise that is not kept."""
    if config.warmup < 1:
        raise UsageError(f"--warmup must be 1 or more, not {config.warmup}")
    if not torch.cuda.is_available():
        raise UserError("bench trace profiles a GPU, and PyTorch sees none here")
    training = parse_config([], gpu=True).changed(tensorboard=False)
    return trace(config, training, command, console())


def trace(config: TraceConfig, training: TrainConfig, command: str, output: Console) -> int:
    job = prepare(training)
    try:
        record = profile_step(job, config.warmup)
    finally:
        job.data.loader.close()
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    seen = kernels_of(record, job.device)
    where = environment(job.device, command, {})
    write_lines(folder / "trace.jsonl", map(asdict, seen), where)
    if config.chrome:
        record.export_chrome_trace(str(folder / "trace.json"))
    show(seen, job.composed.report, output)
    absent = broken_promises(job.composed.report, [kernel.name for kernel in seen])
    if absent:
        raise UserError(
            f"the report promises {', '.join(absent)}, but the traced step runs no such kernel"
        )
    output.print(f"Every promised kernel is in the step. In {folder}: trace.jsonl")
    return 0


def profile_step(job: Job, warmup: int) -> profile:
    """One training step after some others, made of the runners' own pieces."""
    learner = Learner(job.params, job.config.optim, job.select, job.composed.matrices)
    grad_fn = job.composed.gradients(job.select)
    batches = iter(job.data.loader)
    cuda = job.device.type == "cuda"

    def step() -> None:
        group = [next(batches) for _ in range(job.config.optim.grad_accum_steps)]
        learner.train_step(grad_fn, group)
        if cuda:
            torch.cuda.synchronize()

    watched = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with kernels.override(**job.composed.backends):
        for _ in range(warmup):
            step()
        with profile(activities=watched) as record:
            step()
    return record


def kernels_of(record: profile, device: torch.device) -> list[Seen]:
    """What ran on the device, the longest first. (On a CPU: the operators.)"""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    mine = our_kernels()
    total: dict[str, tuple[int, float]] = {}
    events: Any = record.events()
    for event in events:
        if event.device_type == kind:
            calls, us = total.get(event.name, (0, 0.0))
            total[event.name] = (calls + 1, us + event.time_range.elapsed_us())
    found = [Seen(name, name in mine, calls, us) for name, (calls, us) in total.items()]
    return sorted(found, key=lambda kernel: -kernel.us)


def our_kernels() -> set[str]:
    """The names of all Triton kernels in `kernels`."""
    names: set[str] = set()
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        members = vars(importlib.import_module(module.name))
        names |= {n for n in members if n.endswith("_kernel") and not n.startswith("_")}
    return names


def promised(report: Sequence[str]) -> list[str]:
    """The fused operations that a run's report says it uses, through Triton or a flash library.

    >>> promised(["Using flash attention (torch varlen)", "Using fused kernels (triton): rope"])
    ['attention', 'rope']
    """
    found = []
    for line in report:
        if line.startswith("Using fused cross-entropy (triton"):
            found.append("cross_entropy")
        elif line.startswith("Using flash attention ("):
            found.append("attention")
        elif line.startswith("Using fused kernels (triton): "):
            found += re.findall(r"[a-z]\w+", line.partition(": ")[2])
    return list(dict.fromkeys(found))


def broken_promises(report: Sequence[str], names: Sequence[str]) -> list[str]:
    """The promised operations of which no kernel is among the names.

    >>> broken_promises(["Using fused kernels (triton): rope, swiglu"], ["rope_forward_kernel"])
    ['swiglu']
    """
    return [op for op in promised(report) if not any(_belongs(name, op) for name in names)]


def _belongs(name: str, op: str) -> bool:
    if op == "attention":
        return ATTENTION.search(name) is not None
    if op in ("swiglu", "geglu"):  # one kernel, with the activation as a constant
        op = "glu"
    return re.search(rf"(^|_){op}_(\w+_)?kernel", name) is not None


def show(seen: Sequence[Seen], report: Sequence[str], output: Console) -> None:
    for line in report:
        output.print(escape(line), highlight=False, soft_wrap=True)
    total = max(sum(kernel.us for kernel in seen), 1e-9)
    lines = [
        Line((k.name[:70], str(k.calls), f"{k.us:,.0f}", f"{k.us / total:.1%}"))
        for k in seen
        if k.ours or ATTENTION.search(k.name)
    ]
    headers = ("kernel", "calls", "us", "of the device's time")
    Table("our kernels, and those of attention, in one step", headers, lines).show(output)
