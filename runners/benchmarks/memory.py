"""`bench memory`: what a training step holds, from fp32 to int8, and the longest row that fits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from params.tree import flatten
from runners.benchmarks.clock import Ceiling, Clock, choose_clock, measured_ceilings
from runners.benchmarks.documents import draw_documents
from runners.benchmarks.fitting import limit_name, longest_rows
from runners.benchmarks.ladder import Rung, plans
from runners.benchmarks.report import console
from runners.benchmarks.steps import (
    Entry,
    Pace,
    Steps,
    Turns,
    check_counts,
    check_known,
    run_steps,
)
from runners.benchmarks.training import Programs, Trained, entry_of, plain_config
from runners.shell.cli import UsageError
from runners.training.config import check_preset, model_config
from runners.training.step import Learner

EAGER = {"compile": False, "cuda_graph": False}
KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed": ("bf16 compute, fp32 states", {"dtype": "bf16"}),
    "bf16": ("bf16 states", {"dtype": "bf16", "state_dtype": "bf16"}),
    "int8": ("int8 weights, adapters", {"dtype": "bf16", "quantize": "int8"}),
    "fp32": ("fp32", {"dtype": "fp32"}),  # slow: it takes no time from the others
}
LEGEND = (
    "model: weights as they are kept and as they compute, adapters included. peak: the most that a "
    "training step holds, optimizer and its states included; steps are eager, in which the peaks "
    "are those of compiled blocks within 1%. tok/s: of that step. longest row: one row, a whole "
    "step within so much memory; the next longer one tried, at most 1/16 more, did not fit; or "
    "more: longer ones were not asked for; at least: a step of longer ones would have taken too "
    "long."
)


def rungs_of(rank: int) -> list[Rung]:
    """What is kept how, with and without checkpointing."""
    rungs = []
    for key, (label, changes) in KEPT.items():
        adapters = {"lora_rank": rank} if "quantize" in changes else {}
        whole = EAGER | changes | adapters
        again = {"use_gradient_checkpointing": True}
        rungs.append(Rung(key, label, label, None, whole))
        rungs.append(Rung(f"{key}_checkpoint", f"{label}, checkpointing", label, key, again))
    return rungs


@dataclass(frozen=True)
class MemoryConfig:
    """Measures the memory of whole training steps of a preset's decoder, from fp32 to int8 weights
    under adapters, with and without checkpointing, and the longest row that can be trained."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. Its vision tower is left out."""
    rows: int = 8
    """Rows of the step whose peak is measured."""
    length: int = 2048
    """Tokens of each."""
    rank: int = 16
    """Of the adapters over int8 weights."""
    only: tuple[str, ...] = ()
    """Ways to measure: fp32, mixed, bf16, int8, and each with _checkpoint. Default: all."""
    limits: tuple[float, ...] = (24.0, 48.0, 0.0)
    """Find the longest row that trains in so many GiB; 0: the whole card."""
    longest: bool = True
    """Search for the longest rows (on a GPU)."""
    most: int = 131_072
    """Tokens of the longest row that is tried: attention's time grows with their square."""
    slowest: float = 25.0
    """Seconds of a step on the longest row that is tried, at most, going by those before it."""
    minutes: float = 8.0
    """No row is tried whose step would end after so many."""
    out: str = "runs/bench"
    """Folder for memory.jsonl, memory.md and memory.png; what is there is replaced."""


def run_memory(config: MemoryConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "memory"), command, console())


def check(config: MemoryConfig) -> None:
    check_preset(config.preset)
    check_counts(config, "rows", "length", "rank", "most")
    if not config.slowest > 0:
        raise UsageError(f"--slowest is in seconds, more than 0, not {config.slowest}")
    for limit in config.limits:
        if limit < 0:
            raise UsageError(f"--limits are GiB, 0 or more, not {limit}")
    check_known("only", config.only, [rung.key for rung in rungs_of(1)])


def model_bytes(learner: Learner) -> int:
    """Of the weights as they are kept and as they compute, each counted once."""
    leaves = [*flatten(learner.params).values(), *flatten(learner.working).values()]
    storages = {leaf.untyped_storage().data_ptr(): leaf for leaf in leaves}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())


def entries_of(config: MemoryConfig, device: torch.device) -> list[Entry]:
    started = time.perf_counter()
    start = plain_config(config.preset, (*config.override, "vision=none"), config.length)
    documents = draw_documents(config.rows, config.length, 0.0)
    programs = Programs(model_config(start.model), device)
    searched = config.limits if config.longest and device.type == "cuda" else ()

    def allowed() -> float:
        left = 60 * config.minutes - (time.perf_counter() - started)
        return min(config.slowest, left)

    def figures(trained: Trained) -> dict[str, Any]:
        held = {"model GiB": model_bytes(trained.learner) / 2**30}
        return held | longest_rows(trained, searched, config.most, allowed) if searched else held

    return [
        entry_of(plan, documents, programs, figures=figures)
        for key, plan in plans(rungs_of(config.rank), start).items()
        if not config.only or key in config.only
    ]


def bench(
    config: MemoryConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    names = tuple(limit_name(limit) for limit in config.limits)
    table = Steps(
        "memory", "Memory of a training step",
        ("kept as", "model GiB", "peak GiB", "tok/s", *names), LEGEND,
        "Each as flags of `python -m runners.train`, checkpointing on top:",
        f"{config.rows} rows of {config.length:,} tokens; adapters of rank {config.rank}",
        baseline="mixed",
    )  # fmt: skip
    turns = Turns(Pace(2, 2), 1, config.minutes, config.out)
    entries = entries_of(config, clock.device)
    return run_steps(table, turns, entries, clock, command, output, ceilings)
