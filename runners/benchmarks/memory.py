"""`bench memory`: what a training step holds, from fp32 to int8, and the longest row that fits."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kernels
from core import PRESETS, Longest, VLMConfig, vlm
from params import init_params
from params.tree import Tree, flatten
from runners.benchmarks.bars import Bar, draw_bars
from runners.benchmarks.clock import first_line
from runners.benchmarks.entries import first_loss, quick_collection
from runners.benchmarks.fitting import free, largest, limited
from runners.benchmarks.ladder import batches_of, draw_documents, text_only
from runners.benchmarks.records import Environment, environment
from runners.benchmarks.report import console, markdown_row, teller
from runners.benchmarks.training import choose_clock
from runners.cli import UsageError, nearest
from runners.compose import choose_backends, compose
from runners.config import TrainConfig, check_preset
from runners.setup import build_params
from runners.step import GradFn, Learner
from transforms import cast_matrices, checkpoint, fuse_loss, lora, quantize_int8, value_and_grad

SMALLEST, GRID = 1024, 128  # tokens: the shortest row that is tried, and the search's grid
MARGIN = 0.97  # of what two short rows foretell: fragments take some
LEGEND = (
    "model: weights as they are kept and as they compute, adapters included. peak: the most that a "
    "training step holds, optimizer included, after one that made its states; steps are eager, in "
    "which the peaks are those of compiled blocks within 1%. tok/s: of that step. longest row: one "
    "row, a whole step within so much memory; the next longer one tried, at most 1/16 more, did "
    "not fit."
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
    minutes: float = 8.0
    """No search is begun after so many."""
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
    for limit in config.limits:
        if limit < 0:
            raise UsageError(f"--limits are GiB, 0 or more, not {limit}")
    for key in config.only:
        if key not in WAYS:
            hint = nearest(key, list(WAYS))
            raise UsageError(f"--only {key}: there are {', '.join(WAYS)}{hint}")


# -- steps ----------------------------------------------------------------------------------------


@contextmanager
def learner_of(
    way: Way, model: VLMConfig, rank: int, longest: int, device: torch.device
) -> Iterator[tuple[Learner, GradFn]]:
    """What trains this way, and its gradients; all of it is gone at the end."""
    bounds = Longest(longest)
    if not way.int8:
        composed = compose(way.config, model, device, bounds)
        params, _ = build_params(way.config, model, device, None)
        learner = Learner(params, way.config, None, composed.dtype)
        del params
        backends, loss_fn = composed.backends, composed.loss_fn
    else:
        forward = lora(quantize_int8(vlm(model, longest=bounds)), rank=rank)
        params = forward.prepare(half_precision(model, device))
        if way.config.use_gradient_checkpointing:
            forward = checkpoint(forward)
        learner = Learner(params, way.config, None, torch.bfloat16)
        del params
        backends, loss_fn = choose_backends(way.config, device), fuse_loss(forward)
    with kernels.override(**backends):
        yield learner, value_and_grad(loss_fn)


def half_precision(model: VLMConfig, device: torch.device) -> Tree:
    """Fresh params with matrices of bf16: frozen ones need no more."""
    return cast_matrices(init_params(model, device=device), torch.bfloat16)


def model_bytes(learner: Learner) -> int:
    """Of the weights as they are kept and as they compute, each counted once."""
    leaves = [*flatten(learner.params).values(), *flatten(learner.working).values()]
    storages = {leaf.untyped_storage().data_ptr(): leaf for leaf in leaves}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())


def steps(
    way: Way, model: VLMConfig, rank: int, rows: int, length: int, device: torch.device
) -> tuple[int, int | None, float]:
    """Two steps of ``rows`` rows: bytes of the model, bytes of the second one's peak (None on a
    CPU), and its seconds."""
    batches, _ = batches_of(draw_documents(rows, length, 0.0), model.text.vocab_size, rows, True)
    cuda = device.type == "cuda"
    with learner_of(way, model, rank, length, device) as (learner, grad_fn):
        first_loss(learner.train_step(grad_fn, batches))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        first_loss(learner.train_step(grad_fn, batches))
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if cuda else None
        return model_bytes(learner), peak, seconds


def fits(way: Way, model: VLMConfig, rank: int, tokens: int, device: torch.device) -> bool:
    """Whether one row of so many tokens trains within what there is."""
    free(device)
    try:
        steps(way, model, rank, 1, tokens, device)
    except torch.OutOfMemoryError:
        return False
    finally:
        free(device)
    return True


def foretold(short: tuple[int, int], long: tuple[int, int], limit: float) -> int:
    """Tokens at which bytes reach a limit, on the line through two (tokens, bytes).

    >>> foretold((1000, 5_000), (2000, 6_000), 10_000)
    6000
    """
    slope = max((long[1] - short[1]) / (long[0] - short[0]), 1e-9)
    return max(0, int(long[0] + (limit - long[1]) / slope))


def longest_rows(
    config: MemoryConfig,
    way: Way,
    model: VLMConfig,
    device: torch.device,
    say: Callable[[str], None],
    late: Callable[[], bool],
) -> dict[str, int]:
    """The longest row that trains in each limit, by its name."""
    total = torch.cuda.get_device_properties(device).total_memory
    sizes = []
    for tokens in (2 * SMALLEST, 6 * SMALLEST):
        free(device)
        try:
            _, peak, _ = steps(way, model, config.rank, 1, tokens, device)
        except torch.OutOfMemoryError:
            break
        sizes.append((tokens, peak or 0))
    free(device)
    found: dict[str, int] = {}
    for limit in config.limits:
        if late():
            break
        gib = limit or total / 2**30
        allowed = MARGIN * min(gib * 2**30, total)
        guess = foretold(sizes[0], sizes[1], allowed) if len(sizes) == 2 else None
        with limited(gib, device):
            tokens = largest(
                lambda n: fits(way, model, config.rank, n, device),
                smallest=SMALLEST, most=config.most, grid=GRID, guess=guess,
            )  # fmt: skip
        name = limit_name(limit)
        found[name] = tokens
        more = " (more was not tried)" if tokens == config.most else ""
        say(f"{way.label}: the longest row in {name}: {tokens:,}{more}")
    return found


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

    def late() -> bool:
        return time.perf_counter() - started > 60 * config.minutes

    rows = [Row(key, way.label) for key, way in WAYS.items() if key in (config.only or WAYS)]
    with (folder / "memory.jsonl").open("w") as lines, quick_collection():
        for row in rows:
            measure(config, row, model, device)
            say(describe(row))
            print(json.dumps(asdict(row) | vars(where)), file=lines, flush=True)
        if config.longest and device.type == "cuda":
            for row in rows:
                if row.status != "error" and not late():
                    search = partial(longest_rows, config, WAYS[row.key], model, device, say, late)
                    row.longest = search()
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


def measure(config: MemoryConfig, row: Row, model: VLMConfig, device: torch.device) -> None:
    """Fills in a row; what fails is a result."""
    free(device)
    try:
        row.model_bytes, row.peak_bytes, seconds = steps(
            WAYS[row.key], model, config.rank, config.rows, config.length, device
        )
        row.tokens_per_second = config.rows * config.length / seconds
    except torch.OutOfMemoryError as error:
        row.status, row.reason = "out of memory", first_line(error)
    except Exception as error:  # the others go on
        row.status, row.reason = "error", f"{type(error).__name__}: {first_line(error)}"
    free(device)


def describe(row: Row) -> str:
    if row.model_bytes is None:
        return f"{row.label}: {row.status}: {row.reason}"
    peak = "" if row.peak_bytes is None else f", peak {row.peak_bytes / 2**30:.2f} GiB"
    return f"{row.label}: model {row.model_bytes / 2**30:.2f} GiB{peak}"


def headers(config: MemoryConfig) -> tuple[str, ...]:
    limits = tuple(f"longest row in {limit_name(limit)}" for limit in config.limits)
    return ("kept as", "model GiB", "peak GiB", "tok/s", *limits)


def cells(row: Row, config: MemoryConfig) -> tuple[str, ...]:
    """The columns after the name; status where there is no figure."""

    def gib(size: int | None) -> str:
        return "" if size is None else f"{size / 2**30:.2f}"

    def tokens(limit: float) -> str:
        found = (row.longest or {}).get(limit_name(limit))
        if found is None:
            return ""
        return f"{found:,}" + (" or more" if found == config.most else "")

    return (
        gib(row.model_bytes) or row.status,
        gib(row.peak_bytes),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        *(tokens(limit) for limit in config.limits),
    )


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
            more = " or more" if found == config.most else ""
            texts.append("" if found is None else f"{found:,}{more}")
        group = row.label.partition(", checkpointing")[0]
        bars.append(Bar(row.label, group, tuple(values), tuple(texts)))
    panels = ["model, GiB", *(["peak of a step, GiB"] if peaks else [])]
    panels += [f"longest row in {name}, thousand tokens" for name in limits]
    return draw_bars(path, title, panels, bars)
