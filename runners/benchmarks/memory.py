"""`bench memory`: what a training step holds, from fp32 to int8, and the longest row that fits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kernels
from core import PRESETS, Forward, Longest, VLMConfig, vlm
from params import init_params
from params.tree import Tree, flatten
from runners.benchmarks.bars import Bar, draw_bars
from runners.benchmarks.clock import first_line
from runners.benchmarks.documents import batches_of, draw_documents
from runners.benchmarks.entries import first_loss, quick_collection
from runners.benchmarks.fitting import Found, Search, Try, free, limited
from runners.benchmarks.ladder import text_only
from runners.benchmarks.records import Environment, environment
from runners.benchmarks.report import console, markdown_row, teller
from runners.benchmarks.training import choose_clock
from runners.shell.cli import UsageError, nearest
from runners.training.compose import choose_backends, compose, compute_dtype
from runners.training.config import TrainConfig, check_preset
from runners.training.step import GradFn, Learner
from runners.training.weights import build_params
from transforms import cast_matrices, checkpoint, fuse_loss, lora, quantize_int8, value_and_grad

SMALLEST, GRID = 1024, 128  # tokens: the shortest row that is tried, and the search's grid
QUICK = 2.0  # seconds of a step that is taken twice
ATTENTION = 2  # times the operations of attention: it runs at half of matmuls' speed or better
LEGEND = (
    "model: weights as they are kept and as they compute, adapters included. peak: the most that a "
    "training step holds, optimizer and its states included; steps are eager, in "
    "which the peaks are those of compiled blocks within 1%. tok/s: of that step. longest row: one "
    "row, a whole step within so much memory; the next longer one tried, at most 1/16 more, did "
    "not fit, or was known to hold more; or more: longer ones were not asked for; at least: a step "
    "of longer ones would have taken too long."
)


@dataclass(frozen=True)
class Way:
    """What is kept how. config: changes to the trainer's defaults. int8: frozen int8 weights under
    adapters that learn."""

    label: str
    config: TrainConfig
    int8: bool = False


def _ways() -> dict[str, Way]:
    plain = TrainConfig(
        device="auto", compile=False, cuda_graph=False, lr=1e-4, schedule="constant",
        warmup_steps=0,
    )  # fmt: skip
    dtypes = {
        "fp32": ("fp32", replace(plain, dtype="fp32"), False),
        "mixed": ("bf16 compute, fp32 states", replace(plain, dtype="bf16"), False),
        "bf16": ("bf16 states", replace(plain, dtype="bf16", state_dtype="bf16"), False),
        "int8": ("int8 weights, adapters", replace(plain, dtype="bf16"), True),
    }
    ways = {}
    for key, (label, config, int8) in dtypes.items():
        ways[key] = Way(label, config, int8)
        recomputing = replace(config, use_gradient_checkpointing=True)
        ways[f"{key}_checkpoint"] = Way(f"{label}, checkpointing", recomputing, int8)
    return ways


WAYS = _ways()


@dataclass(frozen=True)
class MemoryConfig:
    """Measures the memory of whole training steps of a preset's decoder, from fp32 to int8 weights
    under adapters, with and without checkpointing, and the longest row that can be trained."""

    preset: str = "vlm_1.5b"
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


@dataclass
class Row:
    key: str
    label: str
    model_bytes: int | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    status: str = "ok"
    reason: str | None = None
    longest: dict[str, int] | None = None  # GiB as a word -> tokens
    untried: list[str] = field(default_factory=list)  # where more would have taken too long


def run_memory(config: MemoryConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    clock = choose_clock(config.preset, "memory")
    return bench(config, clock.device, command, console())


def check(config: MemoryConfig) -> None:
    check_preset(config.preset)
    for name in ("rows", "length", "rank", "most"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    if not config.slowest > 0:
        raise UsageError(f"--slowest is in seconds, more than 0, not {config.slowest}")
    for limit in config.limits:
        if limit < 0:
            raise UsageError(f"--limits are GiB, 0 or more, not {limit}")
    for key in config.only:
        if key not in WAYS:
            hint = nearest(key, list(WAYS))
            raise UsageError(f"--only {key}: there are {', '.join(WAYS)}{hint}")


# -- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a way trains. gradients: their function for documents of so many tokens at most."""

    learner: Learner
    gradients: Callable[[int], GradFn]
    model: VLMConfig
    device: torch.device


@contextmanager
def trained_by(way: Way, model: VLMConfig, rank: int, device: torch.device) -> Iterator[Trained]:
    """Params, optimizer and gradients of a way, for rows of any length; all of it is gone at the
    end."""
    if not way.int8:

        def loss_of(length: int) -> Forward:
            return compose(way.config, model, device, Longest(length)).loss_fn

        params, _ = build_params(way.config, model, device, None)
        dtype = compute_dtype(way.config, device)[0]
    else:

        def forward_of(length: int) -> Forward:
            return lora(quantize_int8(vlm(model, longest=Longest(length))), rank=rank)

        def loss_of(length: int) -> Forward:
            forward = forward_of(length)
            recomputing = way.config.use_gradient_checkpointing
            return fuse_loss(checkpoint(forward) if recomputing else forward)

        params = forward_of(1).prepare(half_precision(model, device))
        dtype = torch.bfloat16
    learner = Learner(params, way.config, None, dtype)
    del params
    with kernels.override(**choose_backends(way.config, device)):
        yield Trained(learner, lambda length: value_and_grad(loss_of(length)), model, device)


def half_precision(model: VLMConfig, device: torch.device) -> Tree:
    """Fresh params with matrices of bf16: frozen ones need no more."""
    return cast_matrices(init_params(model, device=device), torch.bfloat16)


def model_bytes(learner: Learner) -> int:
    """Of the weights as they are kept and as they compute, each counted once."""
    leaves = [*flatten(learner.params).values(), *flatten(learner.working).values()]
    storages = {leaf.untyped_storage().data_ptr(): leaf for leaf in leaves}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())


def step(trained: Trained, rows: int, length: int) -> Try:
    """One of ``rows`` rows; its bytes are 0 on a CPU. Raises torch.OutOfMemoryError, after which
    another can be taken."""
    vocab, cuda = trained.model.text.vocab_size, trained.device.type == "cuda"
    batches, _ = batches_of(draw_documents(rows, length, 0.0), vocab, rows, True)
    grad_fn = trained.gradients(length)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    first_loss(trained.learner.train_step(grad_fn, batches))
    seconds = time.perf_counter() - started
    needed = torch.cuda.max_memory_allocated() if cuda else 0
    taken = torch.cuda.max_memory_reserved() if cuda else 0
    return Try(rows * length, needed, taken, seconds)


def attempt(trained: Trained, tokens: int, limit: int) -> Try | None:
    """A step on one row of so many tokens within so many bytes; None if they do not suffice."""
    free(trained.device)
    try:
        with limited(limit / 2**30, trained.device):
            return step(trained, 1, tokens)
    except torch.OutOfMemoryError:
        return None
    finally:
        free(trained.device)  # all that depends on the length is gone


def work(model: VLMConfig, rows: int, length: int) -> float:
    """Operations of a step, those of attention counted as often as they may be slower."""
    none, all_of_it = model.flops_per_token(0), model.flops_per_token(length)
    return rows * length * (none + ATTENTION * (all_of_it - none))


def longest_rows(
    config: MemoryConfig,
    row: Row,
    trained: Trained,
    say: Callable[[str], None],
    left: Callable[[], float],
) -> None:
    """Finds the longest row that trains in each limit. left: seconds until the time is up."""
    total = torch.cuda.get_device_properties(trained.device).total_memory
    tokens, first = config.rows * config.length, min(SMALLEST, config.most)
    peaks, pace = [], None
    if row.peak_bytes is not None and row.tokens_per_second is not None:
        # Eight short rows hold what a long one does; a row of half the tokens gives the slope.
        peaks = [(tokens, row.peak_bytes)]
        first = max(first, min(tokens // 2, config.most) // GRID * GRID)
        done = work(trained.model, config.rows, config.length)
        pace = tokens / row.tokens_per_second / done
    search = Search(
        partial(attempt, trained), smallest=SMALLEST, most=config.most, grid=GRID,
        work=lambda n: work(trained.model, 1, n), slowest=lambda: min(config.slowest, left()),
        peaks=peaks, pace=pace,
    )  # fmt: skip
    if search.foretold(first) <= min(config.slowest, left()):
        search.attempt_at(first, total)
    found: dict[str, Found] = {}
    for gib in sorted(config.limits, key=lambda gib: gib or total):
        name = limit_name(gib)
        answer = search.largest(min(int(gib * 2**30), total) if gib else total)
        if answer is None:
            say(f"{row.label}: the longest row in {name}: not found in the time")
            continue
        found[name] = answer
        more = {"full": "", "most": " (more was not tried)", "time": " or more (time)"}[answer.end]
        say(f"{row.label}: the longest row in {name}: {answer.size:,}{more}")
    row.longest = {name: answer.size for name, answer in found.items()}
    row.untried = [name for name, answer in found.items() if answer.end == "time"]


def limit_name(limit: float) -> str:
    return f"{limit:g} GiB" if limit else "the card"


# -- the run --------------------------------------------------------------------------------------


def bench(config: MemoryConfig, device: torch.device, command: str, output: Console) -> int:
    """Measures, and writes what is known after every way."""
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    model = text_only(PRESETS[config.preset])
    where = environment(device, command, {})
    started = time.perf_counter()

    say = teller(output)

    def left() -> float:
        return 60 * config.minutes - (time.perf_counter() - started)

    rows = [Row(key, way.label) for key, way in WAYS.items() if key in (config.only or WAYS)]
    # The slow ones last: they take no time from the others.
    order = sorted(rows, key=lambda row: WAYS[row.key].config.dtype == "fp32")
    with (folder / "memory.jsonl").open("w") as lines, quick_collection():
        for row in order:
            measure(config, row, model, device, say, left)
            print(json.dumps(asdict(row) | vars(where)), file=lines, flush=True)
    records = [json.dumps(asdict(row) | vars(where)) + "\n" for row in rows]
    (folder / "memory.jsonl").write_text("".join(records))
    title = f"memory of a training step, {where.device}, {where.date[:10]}"
    drawn = draw(folder / "memory.png", title, rows, config)
    (folder / "memory.md").write_text(markdown(rows, config, where, drawn))
    show(rows, config, output)
    written = ", ".join(sorted(p.name for p in folder.glob("memory.*")))
    output.print(escape(f"In {folder}: {written}"), highlight=False)
    return 0


def measure(
    config: MemoryConfig,
    row: Row,
    model: VLMConfig,
    device: torch.device,
    say: Callable[[str], None],
    left: Callable[[], float],
) -> None:
    """Fills in a row; what fails is a result."""
    free(device)
    try:
        with trained_by(WAYS[row.key], model, config.rank, device) as trained:
            row.model_bytes = model_bytes(trained.learner)
            measure_step(config, row, trained)
            say(describe(row))
            if config.longest and device.type == "cuda":
                longest_rows(config, row, trained, say, left)
    except torch.OutOfMemoryError as error:  # of its weights
        row.status, row.reason = "out of memory", first_line(error)
        say(describe(row))
    except Exception as error:  # the others go on
        row.status, row.reason = "error", f"{type(error).__name__}: {first_line(error)}"
        say(describe(row))
    free(device)


def measure_step(config: MemoryConfig, row: Row, trained: Trained) -> None:
    """A step, after one on two rows that compiles kernels; where it is quick, the second such, for
    in the first the allocator goes to the device for more."""
    try:
        step(trained, min(2, config.rows), config.length)
        made = step(trained, config.rows, config.length)
        if made.seconds < QUICK:
            made = step(trained, config.rows, config.length)
    except torch.OutOfMemoryError as error:
        row.status, row.reason = "out of memory", first_line(error)
        return
    row.peak_bytes = made.needed or None
    row.tokens_per_second = config.rows * config.length / made.seconds


def describe(row: Row) -> str:
    if row.status != "ok":
        return f"{row.label}: {row.status}: {row.reason}"
    peak = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 2**30:.2f} GiB"
    return f"{row.label}: model {(row.model_bytes or 0) / 2**30:.2f} GiB{peak}"


def headers(config: MemoryConfig) -> tuple[str, ...]:
    limits = tuple(f"longest row in {limit_name(limit)}" for limit in config.limits)
    return ("kept as", "model GiB", "peak GiB", "tok/s", *limits)


def cells(row: Row, config: MemoryConfig) -> tuple[str, ...]:
    """The columns after the name; status where there is no figure."""

    def gib(size: int | None) -> str:
        return "" if size is None else f"{size / 2**30:.2f}"

    return (
        gib(row.model_bytes) or row.status,
        gib(row.peak_bytes)
        or ("" if row.model_bytes is None or row.status == "ok" else row.status),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        *(longest_cell(row, limit_name(limit), config) for limit in config.limits),
    )


def longest_cell(row: Row, name: str, config: MemoryConfig) -> str:
    """The longest row in a limit, as the table has it."""
    found = (row.longest or {}).get(name)
    if found is None:
        return ""
    if name in row.untried:
        return f"at least {found:,} (time)"
    return f"{found:,}" + (" or more" if found == config.most else "")


def show(rows: Sequence[Row], config: MemoryConfig, output: Console) -> None:
    table = Table(title="memory of a training step", title_justify="left", title_style="bold")
    for i, header in enumerate(headers(config)):
        table.add_column(header, justify="right" if i else "left")
    for row in rows:
        table.add_row(escape(row.label), *cells(row, config), style=_style(row))
    output.print(table)
    for line in reasons(rows):
        output.print(escape(line), highlight=False, soft_wrap=True)


def _style(row: Row) -> str | None:
    return None if row.status == "ok" else "red"


def reasons(rows: Sequence[Row]) -> list[str]:
    return [f"{row.label}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]


def markdown(rows: Sequence[Row], config: MemoryConfig, where: Environment, drawn: bool) -> str:
    known = ", ".join(f"{name} {v}" for name, v in where.versions.items() if v)
    total = f" ({where.memory_gib:.0f} GiB)" if where.memory_gib else ""
    out = [
        f"# Memory of a training step, {where.date[:10]}", "", f"`{where.command}`", "",
        f"{where.device}{total}, driver {where.driver}, Python {where.python}, {known}.", "",
        f"{text_only(PRESETS[config.preset]).num_params():,} parameters, {config.rows} rows of "
        f"{config.length:,} tokens; adapters of rank {config.rank}.", "", LEGEND, "",
    ]  # fmt: skip
    if drawn:
        out += ["![memory, by what is kept how](memory.png)", ""]
    names = headers(config)
    out += [markdown_row(names), markdown_row(["---"] + ["---:"] * (len(names) - 1))]
    out += [markdown_row((row.label, *cells(row, config))) for row in rows]
    out += ["", *(f"- {line}" for line in reasons(rows))] if reasons(rows) else []
    return "\n".join(out).rstrip() + "\n"


def draw(path: Path, title: str, rows: Sequence[Row], config: MemoryConfig) -> bool:
    limits = [limit_name(limit) for limit in config.limits] if any(r.longest for r in rows) else []
    peaks = any(row.peak_bytes is not None for row in rows)
    bars = []
    for row in rows:
        sizes = [row.model_bytes, *([row.peak_bytes] if peaks else [])]
        values: list[float | None] = [None if s is None else s / 2**30 for s in sizes]
        texts = ["" if v is None else f"{v:.1f}" for v in values]
        if row.status != "ok":
            texts[0] = row.status
        for name in limits:
            found = (row.longest or {}).get(name)
            values.append(None if found is None else found / 1000)
            texts.append(longest_cell(row, name, config))
        group = row.label.partition(", checkpointing")[0]
        bars.append(Bar(row.label, group, tuple(values), tuple(texts)))
    panels = ["model, GiB", *(["peak of a step, GiB"] if peaks else [])]
    panels += [f"longest row in {name}, thousand tokens" for name in limits]
    return draw_bars(path, title, panels, bars)
