"""`bench train`: whole training steps, from plain PyTorch to the default of `runners.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

import kernels
from core import Bounds, VLMConfig
from runners.benchmarks import peers
from runners.benchmarks.documents import Documents, batches_of, draw_documents, read_documents
from runners.benchmarks.ladder import Rung, RungConfig, ladder, rung_configs
from runners.benchmarks.pictures import pictures_of
from runners.benchmarks.steps import (
    Entry,
    Ready,
    StepBench,
    Steps,
    check_counts,
    first_loss,
)
from runners.shell.cli import UsageError, explained
from runners.training.compose import Composed, compose
from runners.training.config import TrainConfig, model_config
from runners.training.flops import training_flops
from runners.training.step import Learner
from runners.training.weights import build_params

# Settings that do not change the traced program.
SAME_PROGRAM = {
    "optimizer": "adamw",
    "use_fused_adamw": True,
    "state_dtype": "fp32",
    "device_batch_size": 1,
}
PARTS = {"text", "vision", "projector"}
RUNGS = Steps(
    "train",
    "Training steps",
    (
        "rung",
        "tok/s",
        "x baseline",
        "MFU",
        "ms",
        "min - max",
        "peak GiB",
        "first step s",
        "steps",
        "loss",
    ),
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
)
PICTURED = replace(
    RUNGS,
    headers=("rung", "tok/s", "pictures/s", *RUNGS.headers[2:]),
    legend=(
        f"{RUNGS.legend} Tokens are the decoder's, pictures' included; MFU "
        "counts the vision tower and the projector on the patches of real pictures, forward and "
        "both gradients, each patch seeing all of its picture."
    ),
)


@dataclass(frozen=True)
class TrainBenchConfig(StepBench):
    """Measures whole training steps of a preset's decoder (with --pictures, of the whole model),
    rung by rung, from plain PyTorch in fp32 to everything that `python -m runners.train` does; and
    what branches off from there."""

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
    peers: bool = False
    """Measure Hugging Face transformers on the same shape too, compiled, and with Liger."""
    warmup: int = 3
    loaded: float = 2.0
    rounds: int = 2

    def keys(self) -> Mapping[str, str]:
        known = {rung.key: rung.label for rung in self.rungs(torch.cuda.is_available())}
        others = {key: peer.label for key, peer in peers.PEERS.items()} if self.peers else {}
        return known | others

    def check(self) -> None:
        super().check()
        check_counts(self, "rows", "length", "warmup")
        if not 0 <= self.lengths < 10:
            raise UsageError(f"--lengths must lie in [0, 10), not {self.lengths}")
        for name in ("lengths", "data"):
            if self.peers and getattr(self, name):
                raise UsageError(f"--peers measures full rows: leave --{name} out")
        self._check_data()
        if self.pictures:
            self._check_pictures()

    def _check_data(self) -> None:
        if self.data is None:
            for name in ("image_root", "tokenizer"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} goes with --data, which is not given")
            return
        if self.lengths:
            raise UsageError("--data has lengths of its own: leave --lengths out")
        if self.pictures > 1:
            raise UsageError("--data has pictures of its own: --pictures is 1, to show them, or 0")
        if self.data == "shapes" and not self.pictures:
            raise UsageError("--data shapes is nothing without its pictures: give --pictures 1")

    def _check_pictures(self) -> None:
        if self.pictures < 0:
            raise UsageError(f"--pictures must be 0 or more, not {self.pictures}")
        if self.peers:
            raise UsageError("--peers measures text alone: leave --pictures out")
        with explained(f"--pictures {self.pictures} with --preset {self.preset}"):
            pictures = pictures_of(model_config(self.start.model), self.pictures)
        if self.data is None and pictures is not None and pictures.tokens >= self.length:
            raise UsageError(
                f"--pictures {self.pictures} take {pictures.tokens} tokens, and text comes behind "
                f"them: --length must be more than {self.length}"
            )

    def rungs(self, graphs: bool) -> tuple[Rung, ...]:
        ragged = self.lengths > 0 or self.pictures > 0 or self.data is not None
        return ladder(self.rows, ragged, graphs)

    @property
    def start(self) -> TrainConfig:
        """The settings that no rung changes."""
        override = (*self.override, *(() if self.pictures else ("vision=none",)))
        return plain_config(self.preset, override, self.length)

    @cached_property
    def step(self) -> tuple[Documents, VLMConfig]:
        """A step's documents, and the model. Raises UserError for bad --data."""
        model = model_config(self.start.model)
        if self.data is not None:
            data = self.start.changed(
                data=self.data,
                image_root=self.image_root,
                tokenizer=self.tokenizer,
                val_fraction=0.0,
            )
            return read_documents(data, model, self.rows)
        pictures = pictures_of(model, self.pictures)
        return draw_documents(self.rows, self.length, self.lengths, pictures=pictures), model

    def table(self) -> Steps:
        documents, model = self.step
        return replace(PICTURED if documents.shown else RUNGS, about=about(model, documents))

    def entries(self, device: torch.device) -> list[Entry]:
        documents, model = self.step
        programs = Programs(model, device)
        made = rung_configs(self.rungs(device.type == "cuda"), self.start)
        entries = [
            entry_of(each, documents, programs)
            for key, each in made.items()
            if not self.only or key in self.only
        ]
        if self.peers:
            tokens = batches_of(documents, model.text.vocab_size, self.rows, True)[0][0]["tokens"]
            wanted = [key for key in peers.PEERS if not self.only or key in self.only]
            rows = tokens.view(self.rows, self.length)
            flops = training_flops(model, documents.load, PARTS)
            entries += peers.entries(wanted, model, rows, device, flops)
        return entries


def plain_config(preset: str, override: Sequence[str], length: int) -> TrainConfig:
    """The trainer's defaults with a small learning rate, which keeps the numbers ordinary."""
    return TrainConfig.of(
        preset=preset,
        override=tuple(override),
        device="auto",
        sequence_len=length,
        lr=1e-4,
        schedule="constant",
        warmup_steps=0,
    )


class Programs:
    """Composed losses, one for all rungs that compute the same function at the same shapes."""

    def __init__(self, model: VLMConfig, device: torch.device) -> None:
        self.model, self.device = model, device
        self.made: dict[Any, Composed] = {}
        self.owner: dict[Any, str] = {}

    def shared(self, key: str, plan: RungConfig) -> str | None:
        """The earlier rung whose compiled programs this one runs, or None."""
        owner = self.owner.setdefault(self._key(plan), key)
        return None if owner == key or not plan.config.speed.compile else owner

    def get(self, plan: RungConfig, bounds: Bounds) -> Composed:
        key = self._key(plan)
        if key not in self.made:
            self.made[key] = compose(plan.config, self.model, self.device, bounds)
        return self.made[key]

    def _key(self, plan: RungConfig) -> Any:
        shape = (plan.packed, plan.config.data.device_batch_size)
        return plan.config.changed(**SAME_PROGRAM), shape


@dataclass(frozen=True)
class Trained:
    """A row's config and state, for further figures."""

    plan: RungConfig
    programs: Programs
    composed: Composed
    learner: Learner


Figures = Callable[[Trained], dict[str, Any]]


@contextmanager
def training(
    plan: RungConfig,
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
    batches, bounds = batches_of(documents, vocab, at_once, plan.packed)
    composed = programs.get(plan, bounds)
    with kernels.override(**composed.backends):
        params, _ = build_params(plan.config, programs.model, programs.device, None)
        learner = Learner(params, plan.config.optim, None, composed.matrices)
        del params
        grad_fn = composed.gradients()
        if short is not None:
            few, _ = batches_of(draw_documents(1, short, 0.0), vocab, at_once, True)
            first_loss(learner.train_step(grad_fn, few))
        trained = Trained(plan, programs, composed, learner)
        step = partial(learner.train_step, grad_fn, batches)
        yield Ready(step, partial(figures, trained))


def entry_of(
    plan: RungConfig, documents: Documents, programs: Programs, key: str = "", **changes: Any
) -> Entry:
    """A rung as a row. changes: of the row's fields, and of `training`'s arguments."""
    rung, key = plan.rung, key or plan.rung.key
    options = {name: changes.pop(name) for name in ("figures", "short") if name in changes}
    made = Entry(
        key,
        rung.label,
        rung.phase,
        rung.flags(),
        partial(training, plan, documents, programs, **options),
        documents.tokens,
        training_flops(programs.model, documents.load, PARTS),
        documents.shown,
        programs.shared(key, plan),
    )
    return replace(made, **changes)


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
