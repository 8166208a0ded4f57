"""`bench lengths`: the training step on rows of many lengths, of as many tokens where they fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from rich.console import Console

from runners.benchmarks.clock import Ceiling, Clock, choose_clock, measured_ceilings
from runners.benchmarks.documents import draw_documents
from runners.benchmarks.ladder import TOPS, Plan, Rung, ladder, plans
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
from runners.benchmarks.training import Programs, entry_of, plain_config
from runners.shell.cli import UsageError
from runners.training.config import TrainConfig, check_preset, flags_of, model_config
from runners.training.settings import Policy

LONG = "checkpoint"  # the rung of rows that are longer than a step has tokens
SHORT = 2048  # tokens of the row that a line of one step is made ready on
TABLE = Steps(
    "lengths", "Training steps by row length",
    ("rows x tokens", "tok/s", "MFU", "ms", "min - max", "peak GiB", "timed", "loss"),
    "Every row is one document. tok/s: over the median time of a whole step (forward, backward, "
    "clipping, optimizer). MFU: 6 operations a weight and token and those of causal attention, "
    "recomputation not counted, over the data sheet's bf16 figure. peak: memory held at the worst "
    "moment of a timed step. timed: how many were; a line of one step is not compiled by "
    "torch.compile, and made ready by a step on a short row. loss: of the first step on such rows.",
    "As flags of `python -m runners.train`:",
)  # fmt: skip


@dataclass(frozen=True)
class LengthsConfig:
    """Measures whole training steps of a preset's decoder on rows of many lengths, each one
    document: as many rows as make --tokens, or one. What does not fit is a line of the table."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. Its vision tower is left out."""
    lengths: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    """Tokens of a row."""
    tokens: int = 16_384
    """Of a step, where a row is not longer."""
    only: tuple[str, ...] = ()
    """Rungs to measure each length on, by the keys that `bench train --list` prints. Default:
    graph (on a CPU: blocks); checkpoint for rows longer than --tokens."""
    checkpoint_policy: tuple[str, ...] = ("nothing",)
    """What recomputed blocks keep, where the rung does not say: nothing, dots, attention,
    dots+attention, offload. Of several, each has lines of its own."""
    once: int = 262_144
    """Rows of so many tokens or more take a single timed step: no warm-up but a step on a row of
    2,048, and neither torch.compile nor a CUDA graph, whose time would be the step's."""
    steps: int = 5
    """Timed steps of the others, at most; slow ones take fewer."""
    warmup: int = 2
    """Steps before those."""
    minutes: float = 8.0
    """No line is begun after so many."""
    out: str = "runs/bench"
    """Folder for lengths.jsonl, lengths.md and lengths.png; what is there is replaced."""


def run_lengths(config: LengthsConfig, command: str) -> int:
    """Raises UserError where there is no GPU for a preset that needs one, UsageError for a flag out
    of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "lengths"), command, console())


def check(config: LengthsConfig) -> None:
    check_preset(config.preset)
    check_counts(config, "tokens", "once", "steps", "warmup")
    if not config.lengths or min(config.lengths) < 2:
        raise UsageError("--lengths are tokens of a row, 2 or more each")
    check_known("only", config.only, list(rungs_of(1)))
    check_known("checkpoint_policy", config.checkpoint_policy, get_args(Policy))
    if not config.checkpoint_policy:
        raise UsageError("--checkpoint_policy needs a value (see --help)")


def rungs_of(rows: int) -> dict[str, Rung]:
    """The ladder's, by their keys."""
    return {rung.key: rung for rung in ladder(rows, False, torch.cuda.is_available())}


def entries_of(config: LengthsConfig, device: torch.device) -> list[Entry]:
    """Length by length, the rungs and, where they recompute without saying what is kept, the
    policies. Lines of one length share what they compile."""
    entries = []
    usual = next(key for key in TOPS if key in rungs_of(1))
    model = model_config(plain_config(config.preset, (*config.override, "vision=none"), 1).model)
    for length in config.lengths:
        documents = draw_documents(max(1, config.tokens // length), length, 0.0)
        programs, rows = Programs(model, device), len(documents.rows)
        for rung in config.only or (usual if length <= config.tokens else LONG,):
            for name, plan in ways(config, rung, rows, length).items():
                once: dict[str, Any] = {}
                if length >= config.once:
                    once = {"short": min(SHORT, length), "pace": Pace(1, 0)}
                label = f"{rows} x {length:,}, {name}" + (", one step" if once else "")
                entries.append(
                    entry_of(
                        plan,
                        documents,
                        programs,
                        f"{name}@{length}",
                        label=label,
                        phase=name,
                        changed=flags(plan.config),
                        shape=length,
                        **once,
                    )
                )
    return entries


def ways(config: LengthsConfig, key: str, rows: int, length: int) -> dict[str, Plan]:
    """A rung by each of the policies; those that do not matter to it make no way of their own."""
    made = {}
    for policy in config.checkpoint_policy:
        start = plain_config(config.preset, (*config.override, "vision=none"), length)
        start = start.changed(device="auto", checkpoint_policy=policy)
        plan = plans(list(rungs_of(rows).values()), start)[key]
        name, changes = key, dict[str, Any]()
        if not plan.config.speed.use_gradient_checkpointing:
            changes["checkpoint_policy"] = "nothing"
        elif plan.config.speed.checkpoint_policy == policy != "nothing":
            name = f"{key} ({policy})"
        if length >= config.once:
            changes |= {"compile": False, "cuda_graph": False}
        made[name] = replace(plan, config=plan.config.changed(**changes))
    return made


def flags(config: TrainConfig) -> str:
    """A config as a command line has it, what is the default left out.

    >>> flags(TrainConfig.of(override=("vision=none",), use_fp8=True))
    '--override vision=none --use_fp8=1'
    """
    usual, words = flags_of(TrainConfig()), []
    for name, value in flags_of(config).items():
        if value == usual[name]:
            continue
        if isinstance(value, tuple):
            words.append(" ".join((f"--{name}", *value)))
        else:
            words.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
    return " ".join(words)


def bench(
    config: LengthsConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    about = f"A step: {config.tokens:,} tokens of text, or one row where that is longer"
    turns = Turns(Pace(config.steps, config.warmup), 1, config.minutes, config.out)
    entries = entries_of(config, clock.device)
    table = replace(TABLE, about=about)
    return run_steps(table, turns, entries, clock, command, output, ceilings)
