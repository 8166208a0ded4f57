"""`bench foreign`: training steps of a Hugging Face model, by itself and through `from_module`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import Forward, VLMConfig, from_module
from params.tree import unflatten
from runners.benchmarks import peers
from runners.benchmarks.clock import DeviceLostError
from runners.benchmarks.documents import batches_of, draw_documents
from runners.benchmarks.entries import Entry, Measured, Pace, Step, measure_round, quick_collection
from runners.benchmarks.records import environment
from runners.benchmarks.report import console, teller
from runners.benchmarks.step_report import RUNGS, Report, describe
from runners.benchmarks.training import choose_clock, measured_ceilings
from runners.shell.cli import UsageError, nearest
from runners.shell.errors import UserError
from runners.training.config import TrainConfig, check_preset, model_config
from runners.training.flops import peak_flops, training_flops
from runners.training.step import GradFn, Learner
from transforms import checkpoint, compile, cuda_graph, fuse_kernels, fuse_loss, value_and_grad

LAYOUT = replace(
    RUNGS,
    name="foreign",
    title="Training steps of a Hugging Face model",
    headers=("forward", *(h for h in RUNGS.headers[1:] if h != "x baseline")),
    legend=(
        "Weights and moments are bf16, rounded stochastically in our rows, to nearest in Liger's. "
        "tok/s: over the median time of a whole step (forward, backward, clipping, AdamW). MFU: 6 "
        "operations a weight and token and those of attention, recomputation not counted, over the "
        "data sheet's bf16 figure. peak: memory held at the worst moment from the second step on. "
        "first step: from building to its end. loss: of the first step."
    ),
    changes="What each row runs:",
)


@dataclass(frozen=True)
class ForeignConfig:
    """Measures training steps of Hugging Face's Qwen2 in a preset's shape, unpatched: the module by
    itself, through `from_module` with our transforms, and with Liger's kernels."""

    preset: str = "vlm_1.5b"
    """Its decoder gives the shape."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as text.layers=6."""
    rows: int = 8
    """Rows of a step."""
    length: int = 2048
    """Tokens of a row."""
    only: tuple[str, ...] = ()
    """Rows of the table to measure, by the keys that --list prints. Default: all."""
    list: bool = False
    """Print the keys and measure nothing."""
    steps: int = 5
    """Timed steps of a round, at most."""
    warmup: int = 3
    """Steps before those, in each round, at least."""
    loaded: float = 2.0
    """Seconds of steps before those, in each round, at least."""
    rounds: int = 2
    """Rounds over all rows of the table."""
    minutes: float = 8.0
    """No row is begun after so many."""
    out: str = "runs/bench"
    """Folder for foreign.jsonl, foreign.md and foreign.png; what is there is replaced."""


@dataclass(frozen=True)
class Way:
    """A loss made of the foreign forward, and whether its gradients are one CUDA graph."""

    label: str
    code: str  # as the page shows it
    loss: Callable[[Forward], Forward]
    graph: bool = False


def _kernels(forward: Forward) -> Forward:
    return fuse_loss(fuse_kernels(forward))


def _checkpointed(forward: Forward) -> Forward:
    return fuse_loss(checkpoint(fuse_kernels(forward)))


WAYS: dict[str, Way] = {
    "loss": Way("fused loss", "fuse_loss(forward)", fuse_loss),
    "kernels": Way("+ fused kernels", "fuse_loss(fuse_kernels(forward))", _kernels),
    "graph": Way(
        "+ CUDA graph", "cuda_graph(value_and_grad(fuse_loss(fuse_kernels(forward))))",
        _kernels, graph=True,
    ),
    "blocks": Way(
        "fused, compiled by blocks", "compile(fuse_loss(fuse_kernels(forward)), blocks=True)",
        lambda forward: compile(_kernels(forward), blocks=True),
    ),
    "checkpoint": Way(
        "fused, checkpointing", "fuse_loss(checkpoint(fuse_kernels(forward)))", _checkpointed
    ),
    "checkpoint_graph": Way(
        "fused, checkpointing, CUDA graph",
        "cuda_graph(value_and_grad(fuse_loss(checkpoint(fuse_kernels(forward)))))",
        _checkpointed, graph=True,
    ),
}  # fmt: skip
LIGER = ("hf_liger", "hf_liger_checkpoint")
ITSELF = "module"


def run_foreign(config: ForeignConfig, command: str) -> int:
    """Raises UserError without a GPU for a large preset, UsageError for a flag out of range."""
    check(config)
    output = console()
    if config.list:
        for key, label in labels().items():
            output.print(f"{key:20} {label}", highlight=False)
        return 0
    clock = choose_clock(config.preset, "foreign")
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    without_vision = (*config.override, "vision=none")
    model = model_config(TrainConfig(preset=config.preset, override=without_vision))
    documents = draw_documents(config.rows, config.length, 0.0)
    say, started = teller(output), time.perf_counter()
    with clock.session(), quick_collection():
        where = environment(clock.device, command, measured_ceilings(clock))
        for line in where.lines():
            say(line)
        clock.free()
        tokens = batches_of(documents, model.text.vocab_size, config.rows, True)[0][0]["tokens"]
        batch = as_batch(tokens.view(config.rows, config.length))
        entries = entries_of(config, model, batch, clock.device)
        flops = training_flops(model, documents.load, {"text"})
        rows = [
            Measured(e.key, e.label, e.phase, e.changed, documents.tokens, flops) for e in entries
        ]
        peak = peak_flops(clock.device, torch.bfloat16)
        report = Report(folder, rows, where, peak, output, LAYOUT)
        lost = take_turns(config, entries, rows, clock, report, say, started)
    about = f"Qwen2ForCausalLM, {model.num_params():,} parameters, {config.rows} x {config.length}"
    report.finish(f"{about} tokens a step", [], [])
    if lost is not None:
        raise UserError(f"the device was lost ({lost}); what was measured before it is written")
    return 0


def check(config: ForeignConfig) -> None:
    check_preset(config.preset)
    for name in ("rows", "length", "steps", "rounds"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(config, name)}")
    known = list(labels())
    for key in config.only:
        if key not in known:
            raise UsageError(f"--only {key}: there are {', '.join(known)}{nearest(key, known)}")


def labels() -> dict[str, str]:
    """The table's rows by key."""
    return (
        {ITSELF: "the module by itself"}
        | {key: way.label for key, way in WAYS.items()}
        | {key: peers.PEERS[key].label for key in LIGER}
    )


def as_batch(rows: Tensor) -> dict[str, Tensor]:
    """``[B, T]`` tokens as the module's arguments, labels shifted."""
    labels = torch.full_like(rows, -100)
    labels[:, :-1] = rows[:, 1:]
    return {"input_ids": rows, "labels": labels}


def entries_of(
    config: ForeignConfig, model: VLMConfig, batch: Mapping[str, Tensor], device: torch.device
) -> list[Entry]:
    """The rows of the table that --only leaves."""
    wanted = config.only or tuple(labels())
    made = []
    if ITSELF in wanted:
        start = partial(training, None, model, batch, device)
        made.append(Entry(ITSELF, labels()[ITSELF], "itself", "module(**batch).loss", start))
    for key, way in WAYS.items():
        if key in wanted and not (way.graph and device.type == "cpu"):
            start = partial(training, way, model, batch, device)
            made.append(Entry(key, way.label, "from_module", way.code, start))
    for key in LIGER:
        if key in wanted:
            peer = peers.PEERS[key]
            start = partial(peers.training, peer, model, batch["input_ids"], device)
            made.append(Entry(key, peer.label, "peers", peer.describe(), start))
    return made


@contextmanager
def training(
    way: Way | None, model: VLMConfig, batch: Mapping[str, Tensor], device: torch.device
) -> Iterator[Step]:
    """A step of the module by itself (``way`` None), or of a loss made of its forward."""
    built = peers.build_model(model, device, batch["input_ids"].shape[1]).to(torch.bfloat16)
    forward, params = from_module(built, call=_without_mask)
    grad_fn: GradFn = partial(_module_gradients, built)
    if way is not None:
        grad_fn = value_and_grad(way.loss(forward))
        if way.graph:
            grad_fn = cuda_graph(grad_fn)
    config = TrainConfig(
        lr=1e-4, schedule="constant", warmup_steps=0, state_dtype="bf16", optimizer="adamw"
    )
    learner = Learner(params, config, None, torch.bfloat16)
    own = {name: batch[name] for name in ("input_ids", "labels")}

    def gradients(params: Any, given: Mapping[str, Tensor]) -> Any:
        return grad_fn(params, {name: given[name] for name in own})

    yield lambda: learner.train_step(gradients, [own])


def _without_mask(run: Callable[..., Any], batch: Mapping[str, Tensor]) -> Any:
    """Rows are full, so attention needs no mask but the causal one. transformers finds that out by
    reading positions off the GPU, which it cannot do while a CUDA graph is recorded: it then makes
    a mask, for which torch has a slower attention. An empty table of masks says so beforehand."""
    return run(
        input_ids=batch["input_ids"], attention_mask={"full_attention": None}, use_cache=False
    ).logits


def _module_gradients(built: Any, params: Any, batch: Mapping[str, Tensor]) -> Any:
    """The module's own loss; its parameters share memory with ``params``."""
    named = dict(built.named_parameters())
    loss = built(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    grads = torch.autograd.grad(loss, list(named.values()))
    return loss.detach(), unflatten(dict(zip(named, grads, strict=True)))


def take_turns(
    config: ForeignConfig,
    entries: Sequence[Entry],
    rows: Sequence[Measured],
    clock: Any,
    report: Report,
    say: Callable[[str], None],
    started: float,
) -> str | None:
    """Fills in the rows. Returns what was said when the device was lost, if it was."""
    pace = Pace(config.steps, config.warmup, config.loaded)
    for turn in range(config.rounds):
        for entry, row in zip(entries, rows, strict=True):
            if time.perf_counter() - started > 60 * config.minutes:
                if turn == 0:
                    row.status, row.reason = "not begun", f"{config.minutes:g} minutes were over"
                continue
            try:
                measure_round(entry, row, clock, pace)
            except DeviceLostError as error:
                return str(error)
            report.line(row)
            if turn == 0:
                say(describe(row, report.peak))
    return None
