"""`bench checkpointing`: what each way to checkpoint saves and costs; how long a row then fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from params.tree import flatten, unflatten
from runners.benchmarks.clock import Ceiling, Clock, choose_clock, measured_ceilings
from runners.benchmarks.documents import batches_of, draw_documents
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
from runners.training.config import check_preset, model_config

ON = {"use_gradient_checkpointing": True}
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "every block": ON,
    "every 2nd block": ON | {"checkpoint_every": 2},
    "attention kept": ON | {"checkpoint_policy": "attention"},
    "dots kept": ON | {"checkpoint_policy": "dots"},
    "dots and attention kept": ON | {"checkpoint_policy": "dots+attention"},
    # half of the activations, at the least time
    "every 4th block but for attention; dots and attention between": ON
    | {
        "checkpoint_every": 4, "checkpoint_policy": "attention",
        "checkpoint_between": "dots+attention",
    },
    "offload": ON | {"checkpoint_policy": "offload"},
}  # fmt: skip
BY: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "cuda_graph": False},
    "compiled blocks": {"compile": True, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False, "compile_scope": "whole"},
}
LEGEND = (
    "Whole steps, the optimizer included. cost: of throughput, against no checkpointing done the "
    "way that is measured first. activations: what lies there between forward and backward, "
    "beside params and the gradient of the head. longest row: one row, an eager step within so "
    "much memory."
)


@dataclass(frozen=True)
class CheckpointingConfig:
    """Measures training steps of a preset's decoder (bf16 over fp32 weights) for every way to
    checkpoint: tokens a second, the peak, and the activations."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. Its vision tower is left out."""
    rows: int = 8
    """Documents of a batch."""
    length: int = 2048
    """Tokens of each."""
    only: tuple[str, ...] = ()
    """Ways to measure, such as 'none,every block'. Default: all."""
    by: tuple[str, ...] = tuple(BY)
    """How: eager, 'compiled blocks', compiled."""
    steps: int = 5
    """Timed steps of a round, after two that are not."""
    rounds: int = 2
    """Rounds over all ways: a GPU's clock changes from minute to minute."""
    longest: tuple[float, ...] = ()
    """Find the longest row that trains in so many GiB, with and without checkpointing, such as
    24,48,139."""
    most: int = 131_072
    """Tokens of the longest row that is tried: attention's time grows with their square."""
    minutes: float = 20.0
    """No way is begun after so many."""
    out: str = "runs/bench"
    """Folder for checkpointing.jsonl, checkpointing.md and checkpointing.png."""


def run_checkpointing(config: CheckpointingConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "checkpointing"), command, console())


def check(config: CheckpointingConfig) -> None:
    check_preset(config.preset)
    check_counts(config, "rows", "length", "steps", "rounds", "most")
    check_known("only", config.only, list(WAYS))
    check_known("by", config.by, list(BY))


def rungs_of(config: CheckpointingConfig) -> list[Rung]:
    """All ways by all compilers, but that offloading is for eager autograd."""
    return [
        Rung(f"{way}, {by}", way, by, None, {"dtype": "bf16"} | BY[by] | WAYS[way])
        for by in config.by
        for way in config.only or WAYS
        if not (way == "offload" and by != "eager")
    ]


def entries_of(config: CheckpointingConfig, device: torch.device) -> list[Entry]:
    start = plain_config(config.preset, (*config.override, "vision=none"), config.length)
    documents = draw_documents(config.rows, config.length, 0.0)
    programs = Programs(model_config(start.model), device)
    searched = config.only or ("none", "every block")

    def figures(trained: Trained) -> dict[str, Any]:
        if device.type != "cuda":
            return {}
        rung, found = trained.plan.rung, {}
        if config.longest and rung.label in searched and rung.phase == config.by[0]:
            found = longest_rows(trained, config.longest, config.most, lambda: float("inf"))
        return {"activations GiB": activations(trained, config) / 2**30} | found

    return [
        entry_of(plan, documents, programs, figures=figures)
        for plan in plans(rungs_of(config), start).values()
    ]


def activations(trained: Trained, config: CheckpointingConfig) -> int:
    """Bytes that a forward leaves for the backward, less the gradients that the fused loss makes
    beforehand."""
    programs, vocab = trained.programs, trained.programs.model.text.vocab_size
    documents = draw_documents(config.rows, config.length, 0.0)
    (batch,), _ = batches_of(documents, vocab, config.rows, True)
    batch = {name: tensor.to(programs.device) for name, tensor in batch.items()}
    working = flatten(trained.learner.working)
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in working.items()}
    before = torch.cuda.memory_allocated()
    loss = trained.composed.loss_fn(unflatten(leaves), batch)
    kept = torch.cuda.memory_allocated() - before
    head = "text.lm_head.weight" if "text.lm_head.weight" in leaves else "text.embed.weight"
    del loss
    return kept - leaves[head].nbytes


def bench(
    config: CheckpointingConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    table = Steps(
        "checkpointing", "Checkpointing",
        ("checkpointing", "tok/s", "cost", "activations GiB", "peak GiB", "first step s", "loss",
         *(limit_name(limit) for limit in config.longest)),
        LEGEND, "Each as flags of `python -m runners.train`:",
        f"{config.rows} rows of {config.length:,} tokens", baseline=f"none, {config.by[0]}",
    )  # fmt: skip
    turns = Turns(Pace(config.steps, 2), config.rounds, config.minutes, config.out)
    entries = entries_of(config, clock.device)
    return run_steps(table, turns, entries, clock, command, output, ceilings)
