"""`bench train`: whole training steps, from plain PyTorch to all that `runners.train` does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kernels
from core import PRESETS, Longest, VLMConfig
from runners.benchmarks import cold_start, peers
from runners.benchmarks.bars import Bar, draw_bars
from runners.benchmarks.ceilings import measure_ceilings
from runners.benchmarks.clock import Clock, CpuClock, CudaClock, DeviceLostError
from runners.benchmarks.entries import (
    Entry,
    Measured,
    Pace,
    Step,
    as_record,
    find,
    measure_round,
    quick_collection,
    times,
)
from runners.benchmarks.harness import Ceiling
from runners.benchmarks.ladder import (
    TOPS,
    Documents,
    Plan,
    Rung,
    batches_of,
    draw_documents,
    ladder,
    plans,
    text_only,
)
from runners.benchmarks.records import Environment, environment
from runners.benchmarks.report import console, markdown_row
from runners.benchmarks.roofline import Work, training_step
from runners.cli import UsageError, nearest
from runners.compose import Composed, compose
from runners.config import TrainConfig, check_preset, model_config
from runners.errors import UserError
from runners.flops import peak_flops, training_flops
from runners.setup import build_params
from runners.step import Learner

HEADERS = ("rung", "tok/s", "x baseline", "MFU", "ms", "min - max", "peak GiB", "first step s",
           "steps", "loss")  # fmt: skip
LEGEND = (
    "tok/s: real tokens over the median time of a whole step (forward, backward, clipping, "
    "optimizer), rounds over all rungs taking turns, everything of a rung freed before the next "
    "but its compiled programs; peers that compile take their steps in one round. With "
    "--device_batch_size=1 rows are computed one after the other and their gradients added up. "
    "MFU: 6 operations a weight and token and those of attention, recomputation not counted, over "
    "the data sheet's bf16 figure. peak: memory held at the worst moment from the second step on. "
    "first step: from building to its end, with whatever the rungs before left in the compilers' "
    "caches; -: it runs the programs of a rung before it. steps: until one came within 5% of the "
    "median. loss: of the first step, from the same weights and tokens."
)
# What a config may change of without another program being traced.
SAME_PROGRAM = {
    "optimizer": "adamw", "use_fused_adamw": True, "state_dtype": "fp32", "device_batch_size": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TrainBenchConfig:
    """Measures whole training steps of a preset's decoder, rung by rung, from plain PyTorch in fp32
    to everything that `python -m runners.train` does; and what branches off from there."""

    preset: str = "vlm_1.5b"
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6. Its vision tower is left out."""
    rows: int = 8
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    lengths: float = 0.0
    """Documents of log-normal length with this sigma, a quarter of a row in the mean; the rungs
    before packing pad each to the longest. 0: each fills a row."""
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
    if config.peers and config.lengths:
        raise UsageError("--peers measures full rows: leave --lengths out")
    known = known_keys(config)
    for key in config.only:
        if key not in known:
            hint = nearest(key, list(known))
            raise UsageError(f"--only {key}: there are {', '.join(known)}{hint}")


def known_keys(config: TrainBenchConfig) -> dict[str, str]:
    known = {rung.key: rung.label for rung in rungs_of(config, torch.cuda.is_available())}
    return known | ({key: peer.label for key, peer in peers.PEERS.items()} if config.peers else {})


def rungs_of(config: TrainBenchConfig, graphs: bool) -> tuple[Rung, ...]:
    return ladder(config.rows, config.lengths > 0, graphs)


def starting_config(config: TrainBenchConfig) -> TrainConfig:
    """What no rung changes. The rate is small: the numbers must stay ordinary ones."""
    return TrainConfig(
        preset=config.preset, override=(*config.override, "vision=none"), device="auto",
        sequence_len=config.length, lr=1e-4, schedule="constant", warmup_steps=0,
    )  # fmt: skip


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
    config, model = plan.config, programs.model
    at_once = config.device_batch_size
    batches, longest = batches_of(documents, model.text.vocab_size, at_once, plan.packed)
    composed = programs.get(plan, longest)
    with kernels.override(**composed.backends):
        params, _ = build_params(config, model, programs.device, None)
        learner = Learner(params, config, None, composed.dtype)
        del params
        yield partial(learner.train_step, composed.gradients(), batches)


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
    for key, plan in plans(
        rungs_of(config, device.type == "cuda"), starting_config(config)
    ).items():
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

    def say(line: str) -> None:
        line = f"{time.perf_counter() - started:6.1f} s  {line}"
        output.print(escape(line), highlight=False, soft_wrap=True)

    model = text_only(model_config(starting_config(config)))
    documents = draw_documents(config.rows, config.length, config.lengths)
    lost: str | None = None
    with clock.session(), strict_fp32(), quick_collection():
        where = environment(clock.device, command, ceilings(clock))
        for line in (*where.lines(), about(model, documents)):
            say(line)
        clock.free()
        entries = entries_of(config, model, documents, clock.device)
        flops = training_flops(model, documents.load, {"text"})
        rows = [
            Measured(e.key, e.label, e.phase, e.changed, documents.tokens, flops) for e in entries
        ]
        report = Report(folder, rows, where, peak_flops(clock.device, torch.bfloat16), output)
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
    kind = "each a row" if documents.full else f"mean {documents.tokens / count:.0f}"
    return (
        f"{model.num_params():,} parameters; a step: {documents.tokens:,} tokens in "
        f"{count} documents ({kind}), {len(documents.rows)} rows of {documents.row_len:,} packed"
        + ("" if documents.full else f", {count} of {documents.padded_len():,} padded")
    )


def describe(row: Measured, peak: float | None) -> str:
    if not row.samples:
        return f"{row.label}: {row.status}: {row.reason}"
    mfu, first, held = row.mfu(peak), row.warm_up, row.left_bytes or 0
    return (
        f"{row.label}: {row.tokens_per_second:,.0f} tokens/s, {row.ms:,.1f} ms"
        + (f", {mfu:.1%} MFU" if mfu else "")
        + (f", peak {row.peak_bytes / 2**30:.1f} GiB" if row.peak_bytes else "")
        + (f", first step {first:.0f} s" if first else "")
        + f", loss {row.loss:.4f}"
        + (f" ({held / 2**30:.1f} GiB were left by those before)" if held > 2**30 else "")
    )


def report_floor(
    model: VLMConfig, documents: Documents, rows: Sequence[Measured], where: Environment
) -> list[str]:
    """The least time of the top rung's step by this run's ceilings, and the share reached."""
    there = (row for key in TOPS if (row := find(rows, key)) is not None and row.samples)
    top = next(there, None)
    if top is None:
        return []
    ceilings: Mapping[Ceiling, float] = where.ceilings  # type: ignore[assignment]
    works = training_step(model, documents.lengths)
    floor = sum(work.floor(ceilings) for work in works)
    parts = [floor_line(work, ceilings) for work in works]
    return [
        f"The floor of '{top.label}', by the ceilings of this run:",
        *parts,
        f"- together {floor:.1f} ms; measured {top.ms:.1f} ms: {floor / top.ms:.0%} of the way",
    ]


def floor_line(work: Work, ceilings: Mapping[Ceiling, float]) -> str:
    amounts = [
        *([f"{work.operations / 1e12:,.3g} TFLOP"] if work.operations else []),
        *([f"{work.moved / 1e9:,.3g} GB"] if work.moved else []),
    ]
    return f"- {work.part}: {', '.join(amounts)}, {work.floor(ceilings):.3g} ms"


class Report:
    """Writes what is measured."""

    def __init__(
        self,
        folder: Path,
        rows: Sequence[Measured],
        where: Environment,
        peak: float | None,
        output: Console,
    ) -> None:
        self.folder, self.rows, self.where = folder, rows, where
        self.peak, self.output = peak, output
        self.path = folder / "train.jsonl"
        self.path.write_text("")

    def json(self, row: Measured) -> str:
        known = as_record(row, self.peak, find(self.rows, "baseline"))
        return json.dumps(known | vars(self.where)) + "\n"

    def line(self, row: Measured) -> None:
        """What is known so far; `finish` replaces these lines."""
        with self.path.open("a") as lines:
            lines.write(self.json(row))

    def cells(self, row: Measured) -> tuple[str, ...]:
        """The columns after the name, for a row with figures."""
        factor, mfu = times(row, find(self.rows, "baseline")), row.mfu(self.peak)
        return (
            f"{row.tokens_per_second:,.0f}",
            f"{factor:.2f}x" if factor else "",
            f"{mfu:.1%}" if mfu else "",
            f"{row.ms:,.1f}",
            f"{min(row.samples):,.1f} - {max(row.samples):,.1f}",
            f"{row.peak_bytes / 2**30:.1f}" if row.peak_bytes else "",
            "-" if row.warm_up is None else f"{row.warm_up:.1f}",
            str(row.warm_steps),
            f"{row.loss:.4f}",
        )

    def finish(self, what: str, closing: Sequence[str], starts: Sequence[Any]) -> None:
        """train.jsonl, train.md, train.png, and the table in the terminal."""
        records = [self.json(row) for row in self.rows]
        records += [json.dumps(vars(start) | vars(self.where)) + "\n" for start in starts]
        self.path.write_text("".join(records))
        title = f"training step, {self.where.device}, {self.where.date[:10]}"
        drawn = self.draw(title)
        page = self.markdown(what, closing, "train.png" if drawn else None)
        (self.folder / "train.md").write_text(page)
        self.show()
        for line in closing:
            self.output.print(escape(line), highlight=False, soft_wrap=True)
        written = ", ".join(sorted(p.name for p in self.folder.glob("train.*")))
        self.output.print(escape(f"In {self.folder}: {written}"), highlight=False)

    def show(self) -> None:
        table = Table(title="training step", title_justify="left", title_style="bold")
        for header in HEADERS:
            table.add_column(header, justify="left" if header == "rung" else "right")
        phase = None
        for row in self.rows:
            if phase is not None and row.phase != phase:
                table.add_section()
            phase = row.phase
            if row.samples:
                table.add_row(escape(row.label), *self.cells(row))
            else:
                table.add_row(escape(row.label), row.status, style="red")
        self.output.print(table)
        for row in self.rows:
            if not row.samples:
                line = f"{row.label}: {row.status}: {row.reason}"
                self.output.print(escape(line), highlight=False, soft_wrap=True)

    def markdown(self, what: str, closing: Sequence[str], picture: str | None) -> str:
        out = [
            f"# Training steps, {self.where.date[:10]}", "", f"`{self.where.command}`", "",
            *self.where.lines(), "", f"{what}.", "", LEGEND, "",
        ]  # fmt: skip
        if picture is not None:
            out += [f"![tokens a second and memory, by rung]({picture})", ""]
        out += [
            markdown_row(("phase", *HEADERS)),
            markdown_row(["---"] * 2 + ["---:"] * (len(HEADERS) - 1)),
        ]
        for i, row in enumerate(self.rows):
            phase = row.phase if i == 0 or self.rows[i - 1].phase != row.phase else ""
            cells = self.cells(row) if row.samples else (row.status, *[""] * (len(HEADERS) - 2))
            out.append(markdown_row([phase, row.label, *cells]))
        out += ["", "What each rung changes of the one before, or of the one it branches off:", ""]
        out += [f"- {row.label}: `{row.changed}`" for row in self.rows]
        absent = [f"- {r.label}: {r.status}: {r.reason}" for r in self.rows if not r.samples]
        out += ["", "Not measured:", "", *absent] if absent else []
        out += ["", *closing] if closing else []
        return "\n".join(out).rstrip() + "\n"

    def draw(self, title: str) -> bool:
        baseline = find(self.rows, "baseline")
        bars = []
        for row in self.rows:
            if not row.samples:
                bars.append(Bar(row.label, row.phase, (None, None), (row.status, "")))
                continue
            factor = times(row, baseline)
            speed = f"{row.tokens_per_second:,.0f}" + (f" ({factor:.1f}x)" if factor else "")
            gib = None if row.peak_bytes is None else row.peak_bytes / 2**30
            memory = "" if gib is None else f"{gib:.1f}"
            bars.append(Bar(row.label, row.phase, (row.tokens_per_second, gib), (speed, memory)))
        with_memory = any(bar.values[1] is not None for bar in bars)
        panels = ("tokens a second", "peak memory, GiB") if with_memory else ("tokens a second",)
        if not with_memory:
            bars = [replace(bar, values=bar.values[:1], texts=bar.texts[:1]) for bar in bars]
        return draw_bars(self.folder / "train.png", title, panels, bars)
