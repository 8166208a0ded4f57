"""`bench train`: whole training steps, from plain PyTorch to all that `runners.train` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import kernels
from core import PRESETS, Longest, VLMConfig
from runners.benchmarks import cold_start, peers
from runners.benchmarks.ceilings import measure_ceilings
from runners.benchmarks.clock import Clock, CpuClock, CudaClock, DeviceLostError
from runners.benchmarks.documents import Documents, batches_of, draw_documents, read_documents
from runners.benchmarks.entries import (
    Entry,
    Measured,
    Pace,
    Step,
    measure_round,
    quick_collection,
)
from runners.benchmarks.harness import Ceiling
from runners.benchmarks.ladder import Plan, Rung, ladder, plans, text_only
from runners.benchmarks.pictures import pictures_of
from runners.benchmarks.records import environment
from runners.benchmarks.report import console, teller
from runners.benchmarks.step_report import PICTURED, RUNGS, Report, describe, report_floor
from runners.shell.cli import UsageError, explained, nearest
from runners.shell.errors import UserError
from runners.training.compose import Composed, compose
from runners.training.config import TrainConfig, check_preset, model_config
from runners.training.flops import peak_flops, training_flops
from runners.training.step import GradFn, Learner
from runners.training.weights import build_params

# What a config may change of without another program being traced.
SAME_PROGRAM = {
    "optimizer": "adamw", "use_fused_adamw": True, "state_dtype": "fp32", "device_batch_size": 1,
}  # fmt: skip


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
    """Measure the program too, from its start to full speed, with cold and warm compiler caches."""
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


def choose_clock(preset: str, name: str) -> Clock:
    """The GPU's; a CPU's for presets that one can train. Raises UserError."""
    if torch.cuda.is_available():
        return CudaClock()
    if text_only(PRESETS[preset]).num_params() > 2e8:
        raise UserError(
            f"bench {name} measures a GPU, and PyTorch sees none here (--preset tiny runs anywhere)"
        )
    return CpuClock()


def measured_ceilings(clock: Clock) -> dict[Ceiling, float]:
    """Of this run; on a CPU with sizes that take no time."""
    if clock.device.type == "cuda":
        return measure_ceilings(clock, loaded=0.5)
    return measure_ceilings(clock, copied=2**20, side=64, rounds=1)


def check(config: TrainBenchConfig) -> None:
    check_preset(config.preset)
    if config.loaded < 0:
        raise UsageError(f"--loaded is in seconds, 0 or more, not {config.loaded}")
    for name in ("rows", "length", "steps", "warmup", "rounds"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    if not 0 <= config.lengths < 10:
        raise UsageError(f"--lengths must lie in [0, 10), not {config.lengths}")
    for name in ("lengths", "data"):
        if config.peers and getattr(config, name):
            raise UsageError(f"--peers measures full rows: leave --{name} out")
    check_data(config)
    check_pictures(config)
    known = known_keys(config)
    for key in config.only:
        if key not in known:
            hint = nearest(key, list(known))
            raise UsageError(f"--only {key}: there are {', '.join(known)}{hint}")


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
        pictures = pictures_of(model_config(starting_config(config)), config.pictures)
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
    """What no rung changes. The rate is small: the numbers must stay ordinary ones."""
    without = () if config.pictures else ("vision=none",)
    return TrainConfig(
        preset=config.preset, override=(*config.override, *without), device="auto",
        sequence_len=config.length, lr=1e-4, schedule="constant", warmup_steps=0,
    )  # fmt: skip


def documents_of(config: TrainBenchConfig) -> tuple[Documents, VLMConfig]:
    """What a step is made of, and the model that learns it. Raises UserError for bad --data."""
    start = starting_config(config)
    model = model_config(start)
    if config.data is not None:
        data = replace(
            start, data=config.data, image_root=config.image_root, tokenizer=config.tokenizer,
            val_fraction=0.0,
        )  # fmt: skip
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
        return None if owner == key or not plan.config.compile else owner

    def get(self, plan: Plan, longest: Longest) -> Composed:
        key = self._key(plan)
        if key not in self.made:
            self.made[key] = compose(plan.config, self.model, self.device, longest)
        return self.made[key]

    def _key(self, plan: Plan) -> Any:
        shape = (plan.packed, plan.config.device_batch_size)
        return replace(plan.config, **SAME_PROGRAM), shape  # type: ignore[arg-type]


@contextmanager
def training(plan: Plan, documents: Documents, programs: Programs) -> Iterator[Step]:
    """A rung's step, as `runners.train` takes it: params, optimizer and gradients of its own."""
    at_once = documents.rows_at_once(plan.config.device_batch_size, plan.packed)
    vocab = programs.model.text.vocab_size
    batches, longest = batches_of(documents, vocab, at_once, plan.packed)
    with learning(plan, longest, programs) as (learner, grad_fn):
        yield partial(learner.train_step, grad_fn, batches)


@contextmanager
def learning(plan: Plan, longest: Longest, programs: Programs) -> Iterator[tuple[Learner, GradFn]]:
    """What a rung trains, and its gradients, for batches that keep these bounds."""
    composed = programs.get(plan, longest)
    with kernels.override(**composed.backends):
        params, _ = build_params(plan.config, programs.model, programs.device, None)
        learner = Learner(params, plan.config, None, composed.dtype)
        del params
        yield learner, composed.gradients()


@contextmanager
def strict_fp32() -> Iterator[None]:
    """fp32 means fp32: no TF32 in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def entries_of(
    config: TrainBenchConfig, model: VLMConfig, documents: Documents, device: torch.device
) -> list[Entry]:
    """The rungs and peers that --only leaves."""
    programs = Programs(model, device)
    made = []
    rungs = rungs_of(config, device.type == "cuda")
    for key, plan in plans(rungs, starting_config(config)).items():
        if config.only and key not in config.only:
            continue
        rung = plan.rung
        start = partial(training, plan, documents, programs)
        shared = programs.shared(key, plan)
        made.append(Entry(key, rung.label, rung.phase, rung.flags(), start, shared))
    if config.peers:
        tokens = batches_of(documents, model.text.vocab_size, config.rows, True)[0][0]["tokens"]
        rows = tokens.view(config.rows, config.length)
        for key, peer in peers.PEERS.items():
            if not config.only or key in config.only:
                start = partial(peers.training, peer, model, rows, device)
                made.append(
                    Entry(key, peer.label, "peers", peer.describe(), start, once=peer.compiled)
                )
    return made


def bench(
    config: TrainBenchConfig,
    clock: Clock,
    command: str,
    output: Console,
    ceilings: Callable[[Clock], dict[Ceiling, float]] = measured_ceilings,
) -> int:
    """Measures, and writes figures after every rung, so that what ends a run early takes nothing
    along. Raises UserError if the device was lost on the way."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    say = teller(output)
    documents, model = documents_of(config)
    lost: str | None = None
    with clock.session(), strict_fp32(), quick_collection():
        where = environment(clock.device, command, ceilings(clock))
        for line in (*where.lines(), about(model, documents)):
            say(line)
        clock.free()
        entries = entries_of(config, model, documents, clock.device)
        flops = training_flops(model, documents.load, {"text", "vision", "projector"})
        shown = documents.shown
        rows = [
            Measured(e.key, e.label, e.phase, e.changed, documents.tokens, flops, pictures=shown)
            for e in entries
        ]
        peak = peak_flops(clock.device, torch.bfloat16)
        report = Report(folder, rows, where, peak, output, PICTURED if shown else RUNGS)
        try:
            take_turns(config, entries, rows, clock, report, say, started)
        except DeviceLostError as error:
            lost = str(error)
    floor = report_floor(model, documents, rows, where)
    starts = []
    if config.cold_start and lost is None:
        shape = (config.preset, config.override, config.rows, config.length)
        starts = cold_start.measure(*shape, say)
    report.finish(about(model, documents), [*floor, *cold_start.lines(starts)], starts)
    if lost is not None:
        raise UserError(f"the device was lost ({lost}); what was measured before it is written")
    return 0


def take_turns(
    config: TrainBenchConfig,
    entries: Sequence[Entry],
    rows: Sequence[Measured],
    clock: Clock,
    report: Report,
    say: Callable[[str], None],
    started: float,
) -> None:
    pace = Pace(config.steps, config.warmup, config.loaded)
    for turn in range(config.rounds):
        for entry, row in zip(entries, rows, strict=True):
            if time.perf_counter() - started > 60 * config.minutes:
                if turn == 0:
                    row.status, row.reason = "not begun", f"{config.minutes:g} minutes were over"
                continue
            before = row.status
            measure_round(entry, row, clock, pace)
            report.line(row)
            if turn == 0 or row.status != before:
                say(describe(row, report.peak))


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
