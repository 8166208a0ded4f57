"""`bench checkpointing`: what each way to checkpoint saves and costs; how long a row then fits."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from core import PRESETS, Forward, Longest, make_batch, vlm
from core.batch import Batch
from params import init_params
from params.tree import Tree, flatten, unflatten
from runners.benchmarks.fitting import free, largest, limited
from runners.benchmarks.report import console
from runners.shell.cli import UsageError, nearest
from runners.shell.errors import UserError
from runners.training.config import check_preset
from transforms import checkpoint, compile, fuse_loss, mixed_precision, value_and_grad

WAYS: dict[str, Callable[[Forward], Forward]] = {
    "none": lambda f: f,
    "every block": checkpoint,
    "every 2nd block": lambda f: checkpoint(f, every=2),
    "attention kept": lambda f: checkpoint(f, policy="attention"),
    "dots kept": lambda f: checkpoint(f, policy="dots"),
    "dots and attention kept": lambda f: checkpoint(f, policy=("dots", "attention")),
    # half of the activations, at the least time
    "every 4th block but for attention; dots and attention between": lambda f: checkpoint(
        f, every=4, policy="attention", between=("dots", "attention")
    ),
    "offload": lambda f: checkpoint(f, policy="offload"),
}
BY: dict[str, Callable[[Forward], Forward]] = {
    "eager": lambda f: f,
    "compiled blocks": lambda f: compile(f, blocks=True, dynamic=False),
    "compiled": lambda f: compile(f, dynamic=False),
}
COMPUTE = torch.bfloat16
SMALLEST, STEP = 2048, 128  # tokens: where the search for the longest row begins, and its grid


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
    by: tuple[str, ...] = tuple(BY)
    """How: eager, 'compiled blocks', compiled."""
    steps: int = 5
    """Timed steps of a round, after two that are not."""
    rounds: int = 2
    """Rounds over all ways: a GPU's clock changes from minute to minute."""
    longest: tuple[float, ...] = ()
    """Find the longest row that trains in so many GiB, params and gradients included, with and
    without checkpointing, such as 24,48,139."""
    most: int = 131_072
    """Tokens of the longest row that is tried: attention's time grows with their square."""
    out: str = "runs/bench"
    """Folder for checkpointing.jsonl."""


@dataclass(frozen=True)
class Measured:
    """One way, measured. Memory in GiB; tokens per second of the median step."""

    way: str
    by: str
    tokens_per_second: float
    peak: float  # of the whole step
    activations: float  # what lies there between forward and backward beside params and gradients
    warm_up: float  # seconds of the first step
    error: str | None = None


def run_checkpointing(config: CheckpointingConfig, command: str) -> int:
    """Raises UserError where there is no GPU, UsageError for a flag out of its range."""
    check(config)
    if not torch.cuda.is_available():
        raise UserError("bench checkpointing measures a GPU's memory, and PyTorch sees none here")
    return bench(config, torch.device("cuda", torch.cuda.current_device()), command, console())


def check(config: CheckpointingConfig) -> None:
    check_preset(config.preset)
    for name in ("rows", "length", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    for flag, given, known in (("only", config.only, WAYS), ("by", config.by, BY)):
        for name in given:
            if name not in known:
                hint = nearest(name, list(known))
                raise UsageError(f"--{flag} {name}: there are {', '.join(known)}{hint}")


def bench(config: CheckpointingConfig, device: torch.device, command: str, output: Console) -> int:
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    where = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
    }
    params: Tree = {"text": init_params(PRESETS[config.preset], device=device)["text"]}
    ways = [
        Timer(config, way, by, params, device)
        for by in config.by
        for way in config.only or WAYS
        if not (way == "offload" and by != "eager")  # for eager autograd
    ]
    with (folder / "checkpointing.jsonl").open("w") as lines:
        for turn in range(config.rounds):
            for timer in ways:
                timer.round()
                if turn == 0:
                    output.print(describe(timer.measured()), highlight=False)
        found = [timer.measured() for timer in ways]
        for row in found:
            print(json.dumps(asdict(row) | where), file=lines, flush=True)
        show(found, output)
        for limit in config.longest:
            for way in config.only or ("none", "every block"):
                tokens = longest_row(config, way, limit, params, device)
                record = {"way": way, "gib": limit, "tokens": tokens, "most": config.most}
                print(json.dumps(record | where), file=lines, flush=True)
                more = " (more was not tried)" if tokens == config.most else ""
                output.print(
                    f"longest row in {limit:g} GiB, {way}: {tokens:,}{more}", highlight=False
                )
    return 0


def loss_of(config: CheckpointingConfig, way: str, by: str, length: int) -> Forward:
    model = PRESETS[config.preset]
    text_only = type(model)(model.text)
    forward = mixed_precision(vlm(text_only, longest=Longest(document=length)))
    return BY[by](fuse_loss(WAYS[way](forward)))


def batch_of(config: CheckpointingConfig, rows: int, length: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    vocabulary = PRESETS[config.preset].text.vocab_size
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    return {name: tensor.to(device) for name, tensor in make_batch(tokens).items()}


class Timer:
    """One way, timed a round at a time. A way that runs out of memory is a result too."""

    def __init__(
        self, config: CheckpointingConfig, way: str, by: str, params: Tree, device: torch.device
    ) -> None:
        self.way, self.by, self.config, self.params, self.device = way, by, config, params, device
        self.loss = loss_of(config, way, by, config.length)
        self.batch = batch_of(config, config.rows, config.length, device)
        self.times: list[float] = []
        self.peak = self.activations = self.warm_up = 0.0
        self.error: str | None = None

    def round(self) -> None:
        if self.error is not None:
            return
        free(self.device)
        step = value_and_grad(self.loss)
        try:
            for i in range(2 + self.config.steps):
                start = time.perf_counter()
                step(self.params, self.batch)
                _wait(self.device)
                seconds = time.perf_counter() - start
                if not self.warm_up:
                    self.warm_up = seconds
                if i >= 2:
                    self.times.append(seconds)
            if self.device.type == "cuda" and not self.peak:
                self.peak, self.activations = memory_of(step, self.loss, self.params, self.batch)
        except torch.OutOfMemoryError as error:
            self.error = str(error).split("\n")[0]

    def measured(self) -> Measured:
        tokens = self.config.rows * self.config.length
        speed = 0.0 if self.error is not None else tokens / statistics.median(self.times)
        return Measured(
            self.way, self.by, speed, self.peak / 2**30, self.activations / 2**30, self.warm_up,
            self.error,
        )  # fmt: skip


def memory_of(
    step: Callable[[Tree, Batch], Any], loss_fn: Forward, params: Tree, batch: Batch
) -> tuple[float, float]:
    """Bytes: the peak of a step; and what its forward leaves for the backward, less the gradients
    that the fused loss makes beforehand."""
    torch.cuda.reset_peak_memory_stats()
    step(params, batch)
    peak = torch.cuda.max_memory_allocated()
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
    before = torch.cuda.memory_allocated()
    loss = loss_fn(unflatten(leaves), batch)
    kept = torch.cuda.memory_allocated() - before
    head = "text.lm_head.weight" if "text.lm_head.weight" in leaves else "text.embed.weight"
    del loss
    return float(peak), float(kept - leaves[head].numel() * COMPUTE.itemsize)


def longest_row(
    config: CheckpointingConfig, way: str, gib: float, params: Tree, device: torch.device
) -> int:
    """The longest row whose loss and gradients were computed within so much memory, ``most`` at
    most: doubled until one does not fit, then halved in between to 1/16 of it. 0: none fits."""
    with limited(gib, device):
        return largest(
            lambda tokens: _fits(config, way, tokens, params, device),
            smallest=SMALLEST, most=config.most, grid=STEP,
        )  # fmt: skip


def row_step(
    config: CheckpointingConfig, way: str, tokens: int, params: Tree, device: torch.device
) -> None:
    batch = batch_of(config, 1, tokens, device)
    value_and_grad(loss_of(config, way, "eager", tokens))(params, batch)
    _wait(device)


def _fits(
    config: CheckpointingConfig, way: str, tokens: int, params: Tree, device: torch.device
) -> bool:
    free(device)
    try:
        row_step(config, way, tokens, params, device)
    except torch.OutOfMemoryError:
        return False
    return True


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(row: Measured) -> str:
    if row.error is not None:
        return f"{row.way}, {row.by}: {row.error}"
    return (
        f"{row.way}, {row.by}: {row.tokens_per_second:,.0f} tokens/s, activations "
        f"{row.activations:.1f} GiB, peak {row.peak:.1f} GiB, first step {row.warm_up:.0f} s"
    )


def show(rows: list[Measured], output: Console) -> None:
    table = Table(title="loss and gradients", title_justify="left")
    words = ("checkpointing", "by")
    for header in (*words, "tokens/s", "cost", "activations GiB", "share", "peak GiB", "first s"):
        table.add_column(header, justify="left" if header in words else "right")
    fastest = {row.by: row.tokens_per_second for row in rows if row.way == "none"}
    leanest = min((row.activations for row in rows if row.way == "none"), default=0.0)
    for row in rows:
        of = fastest.get(row.by)
        table.add_row(
            row.way, row.by, f"{row.tokens_per_second:,.0f}",
            f"{1 - row.tokens_per_second / of:.1%}" if of else "", f"{row.activations:.1f}",
            f"{row.activations / leanest:.0%}" if leanest else "", f"{row.peak:.1f}",
            f"{row.warm_up:.0f}",
        )  # fmt: skip
    output.print(table)
