"""`bench lengths`: the training step on rows of many lengths, of as many tokens where they fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

from core import VLMConfig
from runners.benchmarks.clock import Clock, DeviceLostError
from runners.benchmarks.documents import Documents, batches_of, draw_documents
from runners.benchmarks.entries import (
    Entry,
    Measured,
    Pace,
    Step,
    first_loss,
    free,
    measure_round,
    quick_collection,
)
from runners.benchmarks.harness import Ceiling
from runners.benchmarks.ladder import TOPS, Plan, Rung, ladder, plans, text_only
from runners.benchmarks.records import environment
from runners.benchmarks.report import console, teller
from runners.benchmarks.step_report import Layout, Report, describe
from runners.benchmarks.training import (
    Programs,
    choose_clock,
    learning,
    measured_ceilings,
    strict_fp32,
    training,
)
from runners.shell.cli import UsageError, nearest
from runners.shell.errors import UserError
from runners.training.config import Policy, TrainConfig, check_preset, model_config
from runners.training.flops import peak_flops, training_flops

LONG = "checkpoint"  # the rung of rows that are longer than a step has tokens
SHORT = 2048  # tokens of the row that a line of one step is made ready on
LAYOUT = Layout(
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


@dataclass
class LengthRow(Measured):
    """A line of the table."""

    rows: int = 0
    row_len: int = 0


@dataclass(frozen=True)
class Line:
    """What a line measures. once: by a single step."""

    key: str
    plan: Plan
    documents: Documents
    once: bool

    def measured(self, model: VLMConfig) -> LengthRow:
        """With no figures yet."""
        documents = self.documents
        rows, row_len = len(documents.rows), documents.row_len
        flops = training_flops(model, documents.load, {"text"})
        return LengthRow(
            f"{self.key}@{row_len}",
            f"{rows} x {row_len:,}, {self.key}" + (", one step" if self.once else ""), self.key,
            flags(self.plan.config), documents.tokens, flops, rows=rows, row_len=row_len,
        )  # fmt: skip


def run_lengths(config: LengthsConfig, command: str) -> int:
    """Raises UserError where there is no GPU for a preset that needs one, UsageError for a flag out
    of its range."""
    check(config)
    return bench(config, choose_clock(config.preset, "lengths"), command, console())


def check(config: LengthsConfig) -> None:
    check_preset(config.preset)
    for name in ("tokens", "once", "steps", "warmup"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    if not config.lengths or min(config.lengths) < 2:
        raise UsageError("--lengths are tokens of a row, 2 or more each")
    for name, given, known in (
        ("only", config.only, list(rungs_of(1))),
        ("checkpoint_policy", config.checkpoint_policy, list(get_args(Policy))),
    ):
        for word in given:
            if word not in known:
                hint = nearest(word, known)
                raise UsageError(f"--{name} {word}: there are {', '.join(known)}{hint}")
    if not config.checkpoint_policy:
        raise UsageError("--checkpoint_policy needs a value (see --help)")


def rungs_of(rows: int) -> dict[str, Rung]:
    """The ladder's, by their keys."""
    return {rung.key: rung for rung in ladder(rows, False, torch.cuda.is_available())}


def starting_config(config: LengthsConfig, length: int, policy: str) -> TrainConfig:
    """What no rung changes. The rate is small: the numbers must stay ordinary ones."""
    return TrainConfig(
        preset=config.preset, override=(*config.override, "vision=none"), sequence_len=length,
        lr=1e-4, schedule="constant", warmup_steps=0, checkpoint_policy=policy,  # type: ignore[arg-type]
    )  # fmt: skip


def lines_of(config: LengthsConfig) -> list[Line]:
    """Length by length, the rungs and, where they recompute without saying what is kept, the
    policies."""
    lines, known = [], rungs_of(1)
    usual = next(key for key in TOPS if key in known)
    for length in config.lengths:
        documents = draw_documents(max(1, config.tokens // length), length, 0.0)
        for key in config.only or (usual if length <= config.tokens else LONG,):
            for name, plan in ways(config, key, len(documents.rows), length).items():
                lines.append(Line(name, plan, documents, length >= config.once))
    return lines


def ways(config: LengthsConfig, key: str, rows: int, length: int) -> dict[str, Plan]:
    """A rung by each of the policies; those that do not matter to it make no way of their own."""
    made = {}
    for policy in config.checkpoint_policy:
        plan = plans(list(rungs_of(rows).values()), starting_config(config, length, policy))[key]
        name, changes = key, dict[str, Any]()
        if not plan.config.use_gradient_checkpointing:
            changes["checkpoint_policy"] = "nothing"
        elif plan.config.checkpoint_policy == policy != "nothing":
            name = f"{key} ({policy})"
        if length >= config.once:
            changes |= {"compile": False, "cuda_graph": False}
        made[name] = replace(plan, config=replace(plan.config, **changes))
    return made


def flags(config: TrainConfig) -> str:
    """A config as a command line has it, what is the default left out.

    >>> flags(TrainConfig(override=("vision=none",), use_fp8=True))
    '--override vision=none --use_fp8=1'
    """
    usual, words = TrainConfig(), []
    for field in fields(config):
        value = getattr(config, field.name)
        if value == getattr(usual, field.name):
            continue
        if isinstance(value, tuple):
            words.append(" ".join((f"--{field.name}", *value)))
        else:
            words.append(f"--{field.name}={int(value) if isinstance(value, bool) else value}")
    return " ".join(words)


@contextmanager
def once(line: Line, programs: Programs) -> Iterator[Step]:
    """A step that can be timed the first time: one on a short row has compiled the kernels and made
    the optimizer's states."""
    vocab, at_once = programs.model.text.vocab_size, line.plan.config.device_batch_size
    batches, longest = batches_of(line.documents, vocab, at_once, True)
    short, _ = batches_of(
        draw_documents(1, min(SHORT, line.documents.row_len), 0.0), vocab, at_once, True
    )
    with learning(line.plan, longest, programs) as (learner, grad_fn):
        first_loss(learner.train_step(grad_fn, short))
        yield partial(learner.train_step, grad_fn, batches)


def bench(
    config: LengthsConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    """Measures, and writes figures after every line, so that what ends a run early takes nothing
    along. Raises UserError if the device was lost on the way."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    say = teller(output)
    lines = lines_of(config)
    model = text_only(model_config(starting_config(config, config.lengths[0], "nothing")))
    rows = [line.measured(model) for line in lines]
    lost: str | None = None
    with clock.session(), strict_fp32(), quick_collection():
        where = environment(clock.device, command, ceilings(clock))
        for text in (*where.lines(), about(model, config)):
            say(text)
        clock.free()
        peak = peak_flops(clock.device, torch.bfloat16)
        report = Report(folder, rows, where, peak, output, LAYOUT)
        try:
            take_steps(config, model, lines, rows, clock, report, say, started)
        except DeviceLostError as error:
            lost = str(error)
    report.finish(about(model, config), [], [])
    if lost is not None:
        raise UserError(f"the device was lost ({lost}); what was measured before it is written")
    return 0


def take_steps(
    config: LengthsConfig,
    model: VLMConfig,
    lines: Sequence[Line],
    rows: Sequence[LengthRow],
    clock: Clock,
    report: Report,
    say: Callable[[str], None],
    started: float,
) -> None:
    """Fills the rows in. Lines of one length share what they compile; it goes with the length."""
    programs, length = Programs(model, clock.device), lines[0].documents.row_len
    for line, row in zip(lines, rows, strict=True):
        if time.perf_counter() - started > 60 * config.minutes:
            row.status, row.reason = "not begun", f"{config.minutes:g} minutes were over"
            continue
        if row.row_len != length:
            programs, length = Programs(model, clock.device), row.row_len
            torch._dynamo.reset()
            free(clock)
        if line.once:
            start, pace = partial(once, line, programs), Pace(1, 0)
        else:
            start = partial(training, line.plan, line.documents, programs)
            pace = Pace(config.steps, config.warmup)
        shared = programs.shared(row.key, line.plan)
        entry = Entry(row.key, row.label, row.phase, row.changed, start, shared)
        measure_round(entry, row, clock, pace)
        report.line(row)
        say(describe(row, report.peak))


def about(model: VLMConfig, config: LengthsConfig) -> str:
    return (
        f"{model.num_params():,} parameters, text alone; a step: {config.tokens:,} tokens, or one "
        "row where that is longer"
    )
