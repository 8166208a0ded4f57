"""`bench train`: whole training steps, from plain PyTorch to all that `runners.train` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import kernels
from core import Longest, VLMConfig
from runners.benchmarks import cold_start, peers
from runners.benchmarks.clock import Ceiling, Clock, choose_clock, measured_ceilings
from runners.benchmarks.documents import Documents, batches_of, draw_documents, read_documents
from runners.benchmarks.ladder import TOPS, Plan, Rung, ladder, plans
from runners.benchmarks.pictures import pictures_of
from runners.benchmarks.records import Environment
from runners.benchmarks.report import console
from runners.benchmarks.roofline import Work, training_step
from runners.benchmarks.steps import (
    Closing,
    Entry,
    Measured,
    Pace,
    Ready,
    Steps,
    Turns,
    check_counts,
    check_known,
    find,
    first_loss,
    run_steps,
)
from runners.shell.cli import UsageError, explained
from runners.training.compose import Composed, compose
from runners.training.config import TrainConfig, check_preset, model_config
from runners.training.flops import training_flops
from runners.training.step import Learner
from runners.training.weights import build_params

# What a config may change of without another program being traced.
SAME_PROGRAM = {
    "optimizer": "adamw", "use_fused_adamw": True, "state_dtype": "fp32", "device_batch_size": 1,
}  # fmt: skip
PARTS = {"text", "vision", "projector"}
RUNGS = Steps(
    "train", "Training steps",
    ("rung", "tok/s", "x baseline", "MFU", "ms", "min - max", "peak GiB", "first step s", "steps",
     "loss"),
    "tok/s: real tokens over the median time of a whole step (forward, backward, clipping, "
    "optimizer), rounds over all rungs taking turns, everything of a rung freed before the next "
    "but its compiled programs; peers that compile take their steps in one round. With "
    "--device_batch_size=1 rows are computed one after the other and their gradients added up. "
    "MFU: 6 operations a weight and token and those of attention, recomputation not counted, over "
    "the data sheet's bf16 figure. peak: memory held at the worst moment from the second step on. "
    "first step: from building to its end, with whatever the rungs before left in the compilers' "
    "caches; -: it runs the programs of a rung before it. steps: until one came within 5% of the "
    "median. loss: of the first step, from the same weights and tokens.",
    "What each rung changes of the one before, or of the one it branches off:",
)  # fmt: skip
PICTURED = replace(
    RUNGS,
    headers=("rung", "tok/s", "pictures/s", *RUNGS.headers[2:]),
    legend=(
        f"{RUNGS.legend} Tokens are those that the decoder computes, pictures' included; MFU "
        "counts the vision tower and the projector on the patches of real pictures, forward and "
        "both gradients, each patch seeing all of its picture."
    ),
)


@dataclass(frozen=True)
class TrainBenchConfig:
    """Measures whole training steps of a preset's decoder (with --pictures, of the whole model),
    rung by rung, from plain PyTorch in fp32 to everything that `python -m runners.train` does; and
    what branches off from there."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. Its vision tower is left out unless there are
    --pictures."""
    rows: int = 8
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    lengths: float = 0.0
    """Documents of log-normal length with this sigma, a quarter of a row in the mean; the rungs
    before packing pad each to the longest. 0: each fills a row."""
    pictures: int = 0
    """Pictures at the head of each document, random, of the preset's size: the whole model trains.
    --lengths is then of the text behind them, in the mean as many tokens as the pictures; 0: each
    has just as many. Rows have room for as many pictures as `runners.train` would plan."""
    data: str | None = None
    """Documents of a LLaVA-format .json (or whatever else --data of `runners.train` takes) instead
    of drawn ones, encoded and packed as training does; the rungs before packing, and `padded`, pad
    each to the longest. Their pictures are left out, or with --pictures 1 shown: then the whole
    model trains."""
    image_root: str | None = None
    """Folder of the pictures of --data. Default: the file's own."""
    tokenizer: str | None = None
    """For --data: a Hugging Face tokenizer.json. Default: one trained on the data."""
    only: tuple[str, ...] = ()
    """Rungs and peers to measure, by the keys that --list prints. Default: all."""
    list: bool = False
    """Print the rungs and their keys, and measure nothing."""
    peers: bool = False
    """Measure Hugging Face transformers on the same shape too, compiled, and with Liger."""
    cold_start: bool = False
    """Time the program's start too, with cold and warm compiler caches."""
    steps: int = 5
    """Timed steps of a round, at most; a slow rung takes fewer."""
    warmup: int = 3
    """Steps before those, in each round, at least."""
    loaded: float = 2.0
    """Seconds of steps before those, in each round, at least: a card's clock falls under load."""
    rounds: int = 2
    """Rounds over all rungs: a GPU's clock changes from minute to minute."""
    minutes: float = 8.0
    """No rung is begun after so many."""
    out: str = "runs/bench"
    """Folder for train.jsonl, train.md and train.png; what is there is replaced."""


def run_train_bench(config: TrainBenchConfig, command: str) -> int:
    """Raises UserError where there is no GPU for a preset that needs one, UsageError for a flag out
    of its range."""
    check(config)
    output = console()
    if config.list:
        for key, label in known_keys(config).items():
            output.print(escape(f"{key:20} {label}"), highlight=False)
        return 0
    return bench(config, choose_clock(config.preset, "train"), command, output)


def check(config: TrainBenchConfig) -> None:
    check_preset(config.preset)
    if config.loaded < 0:
        raise UsageError(f"--loaded is in seconds, 0 or more, not {config.loaded}")
    check_counts(config, "rows", "length", "steps", "warmup", "rounds")
    if not 0 <= config.lengths < 10:
        raise UsageError(f"--lengths must lie in [0, 10), not {config.lengths}")
    for name in ("lengths", "data"):
        if config.peers and getattr(config, name):
            raise UsageError(f"--peers measures full rows: leave --{name} out")
    check_data(config)
    check_pictures(config)
    check_known("only", config.only, list(known_keys(config)))


def check_data(config: TrainBenchConfig) -> None:
    if config.data is None:
        for name in ("image_root", "tokenizer"):
            if getattr(config, name) is not None:
                raise UsageError(f"--{name} goes with --data, which is not given")
        return
    if config.lengths:
        raise UsageError("--data has lengths of its own: leave --lengths out")
    if config.pictures > 1:
        raise UsageError("--data has pictures of its own: --pictures is 1, to show them, or 0")
    if config.data == "shapes" and not config.pictures:
        raise UsageError("--data shapes is nothing without its pictures: give --pictures 1")


def check_pictures(config: TrainBenchConfig) -> None:
    if config.pictures < 0:
        raise UsageError(f"--pictures must be 0 or more, not {config.pictures}")
    if not config.pictures:
        return
    for name in ("peers", "cold_start"):
        if getattr(config, name):
            raise UsageError(f"--{name} measures text alone: leave --pictures out")
    with explained(f"--pictures {config.pictures} with --preset {config.preset}"):
        pictures = pictures_of(model_config(starting_config(config).model), config.pictures)
    if config.data is None and pictures is not None and pictures.tokens >= config.length:
        raise UsageError(
            f"--pictures {config.pictures} take {pictures.tokens} tokens, and text comes behind "
            f"them: --length must be more than {config.length}"
        )


def rungs_of(config: TrainBenchConfig, graphs: bool) -> tuple[Rung, ...]:
    ragged = config.lengths > 0 or config.pictures > 0 or config.data is not None
    return ladder(config.rows, ragged, graphs)


def known_keys(config: TrainBenchConfig) -> dict[str, str]:
    known = {rung.key: rung.label for rung in rungs_of(config, torch.cuda.is_available())}
    return known | ({key: peer.label for key, peer in peers.PEERS.items()} if config.peers else {})


def starting_config(config: TrainBenchConfig) -> TrainConfig:
    """What no rung changes."""
    override = (*config.override, *(() if config.pictures else ("vision=none",)))
    return plain_config(config.preset, override, config.length)


def plain_config(preset: str, override: Sequence[str], length: int) -> TrainConfig:
    """The trainer's defaults. The rate is small: the numbers must stay ordinary ones."""
    return TrainConfig.of(
        preset=preset, override=tuple(override), device="auto", sequence_len=length, lr=1e-4,
        schedule="constant", warmup_steps=0,
    )  # fmt: skip


def documents_of(config: TrainBenchConfig) -> tuple[Documents, VLMConfig]:
    """What a step is made of, and the model that learns it. Raises UserError for bad --data."""
    start = starting_config(config)
    model = model_config(start.model)
    if config.data is not None:
        data = start.changed(
            data=config.data,
            image_root=config.image_root,
            tokenizer=config.tokenizer,
            val_fraction=0.0,
        )
        return read_documents(data, model, config.rows)
    pictures = pictures_of(model, config.pictures)
    return draw_documents(config.rows, config.length, config.lengths, pictures=pictures), model


class Programs:
    """Composed losses, one for all rungs that compute the same function at the same shapes."""

    def __init__(self, model: VLMConfig, device: torch.device) -> None:
        self.model, self.device = model, device
        self.made: dict[Any, Composed] = {}
        self.owner: dict[Any, str] = {}

    def shared(self, key: str, plan: Plan) -> str | None:
        """The rung that compiles for this one, or None; to be asked in the order of measuring."""
        owner = self.owner.setdefault(self._key(plan), key)
        return None if owner == key or not plan.config.speed.compile else owner

    def get(self, plan: Plan, longest: Longest) -> Composed:
        key = self._key(plan)
        if key not in self.made:
            self.made[key] = compose(plan.config, self.model, self.device, longest)
        return self.made[key]

    def _key(self, plan: Plan) -> Any:
        shape = (plan.packed, plan.config.data.device_batch_size)
        return plan.config.changed(**SAME_PROGRAM), shape


@dataclass(frozen=True)
class Trained:
    """What a row trains, and how: for further figures of it."""

    plan: Plan
    programs: Programs
    composed: Composed
    learner: Learner


Figures = Callable[[Trained], dict[str, Any]]


@contextmanager
def training(
    plan: Plan,
    documents: Documents,
    programs: Programs,
    figures: Figures = lambda trained: {},
    short: int | None = None,
) -> Iterator[Ready]:
    """A rung's step, as `runners.train` takes it: params, optimizer and gradients of its own.

    short: tokens of a row on which a step is taken beforehand, so that the first on these documents
    can be timed.
    """
    at_once = documents.rows_at_once(plan.config.data.device_batch_size, plan.packed)
    vocab = programs.model.text.vocab_size
    batches, longest = batches_of(documents, vocab, at_once, plan.packed)
    composed = programs.get(plan, longest)
    with kernels.override(**composed.backends):
        params, _ = build_params(plan.config, programs.model, programs.device, None)
        learner = Learner(params, plan.config, None, composed.matrices)
        del params
        grad_fn = composed.gradients()
        if short is not None:
            few, _ = batches_of(draw_documents(1, short, 0.0), vocab, at_once, True)
            first_loss(learner.train_step(grad_fn, few))
        trained = Trained(plan, programs, composed, learner)
        step = partial(learner.train_step, grad_fn, batches)
        yield Ready(step, partial(figures, trained))


def entry_of(
    plan: Plan, documents: Documents, programs: Programs, key: str = "", **changes: Any
) -> Entry:
    """A rung as a row. changes: of the row's fields, and of `training`'s arguments."""
    rung, key = plan.rung, key or plan.rung.key
    options = {name: changes.pop(name) for name in ("figures", "short") if name in changes}
    made = Entry(
        key, rung.label, rung.phase, rung.flags(),
        partial(training, plan, documents, programs, **options),
        documents.tokens, training_flops(programs.model, documents.load, PARTS), documents.shown,
        programs.shared(key, plan),
    )  # fmt: skip
    return replace(made, **changes)


def entries_of(
    config: TrainBenchConfig, model: VLMConfig, documents: Documents, device: torch.device
) -> list[Entry]:
    """The rungs and peers that --only leaves."""
    programs = Programs(model, device)
    made = plans(rungs_of(config, device.type == "cuda"), starting_config(config))
    entries = [
        entry_of(plan, documents, programs)
        for key, plan in made.items()
        if not config.only or key in config.only
    ]
    if config.peers:
        tokens = batches_of(documents, model.text.vocab_size, config.rows, True)[0][0]["tokens"]
        wanted = [key for key in peers.PEERS if not config.only or key in config.only]
        rows = tokens.view(config.rows, config.length)
        flops = training_flops(model, documents.load, PARTS)
        entries += peers.entries(wanted, model, rows, device, flops)
    return entries


def bench(
    config: TrainBenchConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    documents, model = documents_of(config)
    table = replace(PICTURED if documents.shown else RUNGS, about=about(model, documents))
    pace = Pace(config.steps, config.warmup, config.loaded)

    def closing(rows: Sequence[Measured], where: Environment) -> Closing:
        starts = []
        if config.cold_start:
            shape = (config.preset, config.override, config.rows, config.length)
            starts = cold_start.measure(*shape)
        lines = [*floor_of(model, documents, rows, where), *map(cold_start.describe, starts)]
        return lines, [vars(start) for start in starts]

    return run_steps(
        table, Turns(pace, config.rounds, config.minutes, config.out),
        entries_of(config, model, documents, clock.device), clock, command, output, ceilings,
        closing,
    )  # fmt: skip


def about(model: VLMConfig, documents: Documents) -> str:
    count = len(documents.lengths)
    at_once = f" ({documents.rows_at_once(len(documents.rows), False)} at once)"
    shortest, longest = min(documents.lengths), max(documents.lengths)
    mean = f"mean {documents.tokens / count:.0f}, {shortest:,} to {longest:,}"
    kind = "each a row" if documents.full else mean
    return (
        f"{model.num_params():,} parameters; a step: {documents.tokens:,} tokens in "
        f"{count} documents ({kind}), {len(documents.rows)} rows of {documents.row_len:,} packed"
        + ("" if documents.full else f", {count} of {documents.padded_len():,} padded{at_once}")
        + about_pictures(documents)
    )


def about_pictures(documents: Documents) -> str:
    images, spec = documents.images, documents.spec
    if images is None or spec is None:
        return ""
    patches = images.square_patches
    return (
        f"; {documents.shown} pictures of {images.image_size} px ({patches:,} patches, "
        f"{images.tokens(patches)} tokens), packed rows having room for {spec.max_images}"
    )


def floor_of(
    model: VLMConfig, documents: Documents, rows: Sequence[Measured], where: Environment
) -> list[str]:
    """The least time of the top rung's step by this run's ceilings, and the share reached."""
    there = (row for key in TOPS if (row := find(rows, key)) is not None and row.samples)
    if (top := next(there, None)) is None:
        return []
    ceilings: Mapping[Ceiling, float] = where.ceilings  # type: ignore[assignment]
    if model.projector is not None and model.projector.kind == "resampler":
        return ["No floor: the work of a resampler is not counted by parts."]
    works = training_step(model, documents.lengths, documents.load.pictures.tolist())
    floor = sum(work.floor(ceilings) for work in works)
    return [
        f"The floor of '{top.label}', by the ceilings of this run:",
        *(_part(work, ceilings) for work in works),
        f"- together {floor:.1f} ms; measured {top.ms:.1f} ms: {floor / top.ms:.0%} of the way",
    ]


def _part(work: Work, ceilings: Mapping[Ceiling, float]) -> str:
    amounts = [
        *([f"{work.operations / 1e12:,.3g} TFLOP"] if work.operations else []),
        *([f"{work.moved / 1e9:,.3g} GB"] if work.moved else []),
    ]
    return f"- {work.part}: {', '.join(amounts)}, {work.floor(ceilings):.3g} ms"
