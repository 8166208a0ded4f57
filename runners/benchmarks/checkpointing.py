"""`bench checkpointing`: what each way to checkpoint saves and costs; how long a row then fits."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from core import PRESETS, Forward, Longest, make_batch, vlm
from core.batch import Batch
from params import init_params
from params.tree import Tree, flatten
from runners.benchmarks.report import console
from runners.cli import UsageError, nearest
from runners.errors import UserError
from transforms import checkpoint, compile, fuse_loss, mixed_precision, value_and_grad

WAYS: dict[str, Callable[[Forward], Forward]] = {
    "none": lambda f: f,
    "every block": checkpoint,
    "every 2nd block": lambda f: checkpoint(f, every=2),
    "attention kept": lambda f: checkpoint(f, policy="attention"),
    "dots kept": lambda f: checkpoint(f, policy="dots"),
    "dots and attention kept": lambda f: checkpoint(f, policy=("dots", "attention")),
    "offload": lambda f: checkpoint(f, policy="offload"),
}
SMALLEST, STEP = 256, 128  # tokens: where the search for the longest row begins, and its grid


@dataclass(frozen=True)
class CheckpointingConfig:
    """Measures loss and gradients (bf16 over fp32 weights, no optimizer) of a preset's decoder, for
    every way to checkpoint: tokens a second, and memory above params and gradients."""

    preset: str = "vlm_1.5b"
    rows: int = 8
    """Documents of a batch."""
    length: int = 2048
    """Tokens of each."""
    only: tuple[str, ...] = ()
    """Ways to measure, such as 'none,every block'. Default: all."""
    compiled: bool = True
    """Measure through torch.compile too."""
    steps: int = 5
    """Timed steps, after two that are not."""
    longest: tuple[float, ...] = ()
    """Find the longest row that trains in so many GiB, params and gradients included, with and
    without checkpointing, such as 24,48,139."""
    out: str = "runs/bench"
    """Folder for checkpointing.jsonl."""


@dataclass(frozen=True)
class Measured:
    """One way, measured. Memory in GiB; tokens per second of the median step."""

    way: str
    compiled: bool
    tokens_per_second: float
    peak: float  # of the whole step
    above: float  # the same less params and their gradients
    error: str | None = None


def run_checkpointing(config: CheckpointingConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    if not torch.cuda.is_available():
        raise UserError("bench checkpointing measures a GPU's memory, and PyTorch sees none here")
    return bench(config, torch.device("cuda"), command, console())


def check(config: CheckpointingConfig) -> None:
    if config.preset not in PRESETS:
        hint = nearest(config.preset, list(PRESETS))
        raise UsageError(f"no preset {config.preset!r}{hint} (presets: {', '.join(PRESETS)})")
    for name in ("rows", "length", "steps"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    for way in config.only:
        if way not in WAYS:
            raise UsageError(f"--only {way}: there are {', '.join(WAYS)}{nearest(way, list(WAYS))}")


def bench(config: CheckpointingConfig, device: torch.device, command: str, output: Console) -> int:
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }
    params = init_params(PRESETS[config.preset], device=device)["text"]
    found: list[Measured] = []
    with (folder / "checkpointing.jsonl").open("w") as lines:
        for compiled in (False, True) if config.compiled else (False,):
            for way in config.only or WAYS:
                if way == "offload" and compiled:
                    continue  # for eager autograd
                found.append(measure(config, way, compiled, {"text": params}, device))
                print(json.dumps(asdict(found[-1]) | where), file=lines, flush=True)
                output.print(describe(found[-1]), highlight=False)
        for limit in config.longest:
            for way in ("none", "every block", "offload"):
                tokens = longest_row(config, way, limit, {"text": params}, device)
                record = {"way": way, "gib": limit, "tokens": tokens}
                print(json.dumps(record | where), file=lines, flush=True)
                output.print(f"longest row in {limit:g} GiB, {way}: {tokens:,}", highlight=False)
    show(found, output)
    return 0


def loss_of(config: CheckpointingConfig, way: str, compiled: bool, length: int) -> Forward:
    model = PRESETS[config.preset]
    text_only = type(model)(model.text)
    forward = mixed_precision(vlm(text_only, longest=Longest(document=length)))
    loss = fuse_loss(WAYS[way](forward))
    return compile(loss, dynamic=False) if compiled else loss


def batch_of(config: CheckpointingConfig, rows: int, length: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    vocabulary = PRESETS[config.preset].text.vocab_size
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    return {name: tensor.to(device) for name, tensor in make_batch(tokens).items()}


def measure(
    config: CheckpointingConfig, way: str, compiled: bool, params: Tree, device: torch.device
) -> Measured:
    """A way that runs out of memory is a result too."""
    torch._dynamo.reset()
    _free(device)
    cuda = device.type == "cuda"
    step = value_and_grad(loss_of(config, way, compiled, config.length))
    batch = batch_of(config, config.rows, config.length, device)
    fixed = 2 * sum(leaf.nbytes for leaf in flatten(params).values())  # params and gradients
    times = []
    try:
        for i in range(2 + config.steps):
            if cuda and i == 2:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step(params, batch)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        return Measured(way, compiled, 0.0, float("inf"), float("inf"), str(error).split("\n")[0])
    peak = torch.cuda.max_memory_allocated() if cuda else fixed
    seconds = statistics.median(times[2:])
    tokens = config.rows * config.length
    return Measured(way, compiled, tokens / seconds, peak / 2**30, (peak - fixed) / 2**30)


def longest_row(
    config: CheckpointingConfig, way: str, gib: float, params: Tree, device: torch.device
) -> int:
    """The longest row whose loss and gradients fit, within 1/8 or 128 tokens; 0 if none does."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device)
    try:
        good, bad = 0, SMALLEST
        while _fits(config, way, bad, params, device):
            good, bad = bad, 2 * bad
        while good and bad - good > max(good // 8, STEP):
            middle = (good + bad) // 2 // STEP * STEP
            if _fits(config, way, middle, params, device):
                good = middle
            else:
                bad = middle
        return good
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _fits(
    config: CheckpointingConfig, way: str, length: int, params: Tree, device: torch.device
) -> bool:
    _free(device)
    try:
        batch = batch_of(config, 1, length, device)
        value_and_grad(loss_of(config, way, False, length))(params, batch)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    return True


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(row: Measured) -> str:
    how = "compiled" if row.compiled else "eager"
    if row.error is not None:
        return f"{row.way}, {how}: {row.error}"
    return (
        f"{row.way}, {how}: {row.tokens_per_second:,.0f} tokens/s, "
        f"{row.above:.1f} GiB above params and gradients"
    )


def show(rows: list[Measured], output: Console) -> None:
    table = Table(title="loss and gradients", title_justify="left")
    for header in ("checkpointing", "by", "tokens/s", "of none's", "peak GiB", "above GiB"):
        table.add_column(header, justify="left" if header in ("checkpointing", "by") else "right")
    base = {row.compiled: row.tokens_per_second for row in rows if row.way == "none"}
    for row in rows:
        of = base.get(row.compiled)
        share = f"{row.tokens_per_second / of:.1%}" if of else ""
        how = "compiled" if row.compiled else "eager"
        table.add_row(
            row.way, how, f"{row.tokens_per_second:,.0f}", share, f"{row.peak:.1f}",
            f"{row.above:.1f}",
        )  # fmt: skip
    output.print(table)
