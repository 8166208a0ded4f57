"""`bench lengths`, `bench memory`, `bench checkpointing`: training steps with other settings.

Each is a table of the trainer's configs, measured as the rungs of `bench train` are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch

from params.tree import flatten, unflatten
from runners.benchmarks.documents import batches_of, draw_documents
from runners.benchmarks.fitting import limit_name, longest_rows
from runners.benchmarks.ladder import TOPS, Rung, RungConfig, ladder, rung_configs
from runners.benchmarks.steps import (
    Entry,
    StepBench,
    StepPace,
    Steps,
    check_counts,
    check_known,
)
from runners.benchmarks.training import Programs, Trained, entry_of, plain_config
from runners.shell.cli import UsageError
from runners.training.config import TrainConfig, flags_of, model_config
from runners.training.settings import Policy
from runners.training.step import Learner

TEXT = "vision=none"  # the change to a preset that leaves its vision tower out
EAGER = {"compile": False, "cuda_graph": False}
ON = {"use_gradient_checkpointing": True}
LONG = "checkpoint"  # the rung of rows longer than a step's tokens
SHORT = 2048  # tokens of the row that warms up a line of one step


# -- lengths --------------------------------------------------------------------------------------

LENGTHS = Steps(
    "lengths",
    "Training steps by row length",
    ("rows x tokens", "tok/s", "MFU", "ms", "min - max", "peak GiB", "timed", "loss"),
    "Every row is one document. tok/s: over the median time of a whole step (forward, backward, "
    "clipping, optimizer). MFU: 6 operations a weight and token and those of causal attention, "
    "recomputation not counted, over the data sheet's bf16 figure. peak: memory held at the worst "
    "moment of a timed step. timed: how many steps were; a line of one step is not compiled by "
    "torch.compile, and a step on a short row warms it up. loss: of the first step on such rows.",
    "As flags of `python -m runners.train`:",
)


@dataclass(frozen=True)
class LengthsConfig(StepBench):
    """Measures whole training steps of a preset's decoder on rows of many lengths, each one
    document: as many rows as make --tokens, or one. What does not fit is a line of the table."""

    lengths: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    """Tokens of a row."""
    tokens: int = 16_384
    """Of a step, where a row is not longer."""
    only: tuple[str, ...] = ()
    """Rungs to measure each length on, by the keys that --list prints. Default: graph (on a CPU:
    blocks); checkpoint for rows longer than --tokens."""
    checkpoint_policy: tuple[str, ...] = ("nothing",)
    """What recomputed blocks keep, where the rung does not say: nothing, dots, attention,
    dots+attention, offload. Of several, each has lines of its own."""
    once: int = 262_144
    """Rows of at least this many tokens take a single timed step: no warm-up but a step on a row of
    2,048, and neither torch.compile nor a CUDA graph, whose time would be the step's."""

    def keys(self) -> Mapping[str, str]:
        return {rung.key: rung.label for rung in self._rungs(1)}

    def check(self) -> None:
        super().check()
        check_counts(self, "tokens", "once", "warmup")
        if not self.lengths or min(self.lengths) < 2:
            raise UsageError("--lengths are tokens of a row, 2 or more each")
        check_known("checkpoint_policy", self.checkpoint_policy, get_args(Policy))
        if not self.checkpoint_policy:
            raise UsageError("--checkpoint_policy needs a value (see --help)")

    def table(self) -> Steps:
        about = f"A step: {self.tokens:,} tokens of text, or one row where that is longer"
        return replace(LENGTHS, about=about)

    def entries(self, device: torch.device) -> list[Entry]:
        """Length by length, the rungs and, where they recompute without saying what is kept, the
        policies. Lines of one length share what they compile."""
        entries = []
        usual = next(key for key in TOPS if key in self.keys())
        model = model_config(plain_config(self.preset, (*self.override, TEXT), 1).model)
        for length in self.lengths:
            documents = draw_documents(max(1, self.tokens // length), length, 0.0)
            programs, rows = Programs(model, device), len(documents.rows)
            once: dict[str, Any] = {}
            if length >= self.once:
                once = {"short": min(SHORT, length), "pace": StepPace(1, 0)}
            for key in self.only or (usual if length <= self.tokens else LONG,):
                for name, made in self._by_policy(key, rows, length).items():
                    label = f"{rows} x {length:,}, {name}" + (", one step" if once else "")
                    changes: dict[str, Any] = {"label": label, "phase": name, "shape": length}
                    changes |= {"changed": flags(made.config), **once}
                    entries.append(
                        entry_of(made, documents, programs, f"{name}@{length}", **changes)
                    )
        return entries

    def _rungs(self, rows: int) -> tuple[Rung, ...]:
        return ladder(rows, False, torch.cuda.is_available())

    def _by_policy(self, key: str, rows: int, length: int) -> dict[str, RungConfig]:
        """A rung by each of the policies; one that does not matter to the rung adds no line."""
        made = {}
        for policy in self.checkpoint_policy:
            start = plain_config(self.preset, (*self.override, TEXT), length)
            start = start.changed(device="auto", checkpoint_policy=policy)
            one = rung_configs(self._rungs(rows), start)[key]
            name, changes, speed = key, dict[str, Any](), one.config.speed
            if not speed.use_gradient_checkpointing:
                changes["checkpoint_policy"] = "nothing"
            elif speed.checkpoint_policy == policy != "nothing":
                name = f"{key} ({policy})"
            if length >= self.once:
                changes |= EAGER
            made[name] = replace(one, config=one.config.changed(**changes))
        return made


def flags(config: TrainConfig) -> str:
    """A config as a command line has it, defaults left out.

    >>> flags(TrainConfig.of(override=("vision=none",), use_fp8=True))
    '--override vision=none --use_fp8=1'
    """
    usual, words = flags_of(TrainConfig()), []
    for name, value in flags_of(config).items():
        if value == usual[name]:
            continue
        if isinstance(value, tuple):
            words.append(" ".join((f"--{name}", *value)))
        else:
            words.append(f"--{name}={int(value) if isinstance(value, bool) else value}")
    return " ".join(words)


# -- rows of one length, by other settings --------------------------------------------------------


@dataclass(frozen=True)
class SettingsBench(StepBench):
    """Measures a table of settings on rows of one length."""

    rows: int = 8
    """Rows of a step."""
    length: int = 2048
    """Tokens of each."""
    most: int = 131_072
    """Tokens of the longest row that is tried: attention's time grows with their square."""

    def rungs(self) -> list[Rung]:
        raise NotImplementedError

    def figures(self, trained: Trained, started: float) -> dict[str, Any]:
        """More columns of a row."""
        raise NotImplementedError

    def keys(self) -> Mapping[str, str]:
        return {rung.key: rung.label for rung in self.rungs()}

    def check(self) -> None:
        super().check()
        check_counts(self, "rows", "length", "most")

    def chosen(self) -> list[str]:
        return [key for key in self.keys() if not self.only or key in self.only]

    def entries(self, device: torch.device) -> list[Entry]:
        start = plain_config(self.preset, (*self.override, TEXT), self.length)
        documents = draw_documents(self.rows, self.length, 0.0)
        programs, made = Programs(model_config(start.model), device), []
        configs, started = rung_configs(self.rungs(), start), time.perf_counter()
        for key in self.chosen():
            made.append(
                entry_of(
                    configs[key],
                    documents,
                    programs,
                    figures=lambda trained: self.figures(trained, started),
                )
            )
        return made


KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "mixed": ("bf16 compute, fp32 states", {"dtype": "bf16"}),
    "bf16": ("bf16 states", {"dtype": "bf16", "state_dtype": "bf16"}),
    "int8": ("int8 weights, adapters", {"dtype": "bf16", "quantize": "int8"}),
    "fp32": ("fp32", {"dtype": "fp32"}),  # slow, so it comes last
}


@dataclass(frozen=True)
class MemoryConfig(SettingsBench):
    """Measures the memory of whole training steps of a preset's decoder, from fp32 to int8 weights
    under adapters, with and without checkpointing, and the longest row that can be trained."""

    steps: int = 2
    """Timed steps of each, at most."""
    rank: int = 16
    """Of the adapters over int8 weights."""
    limits: tuple[float, ...] = (24.0, 48.0, 0.0)
    """Find the longest row that trains within these GiB; 0: the whole card."""
    longest: bool = True
    """Search for the longest rows (on a GPU)."""
    slowest: float = 25.0
    """Seconds of a step on the longest row that is tried, at most, going by those before it."""
    minutes: float = 8.0
    """The search ends after this time."""

    def rungs(self) -> list[Rung]:
        rungs = []
        for key, (label, changes) in KEPT.items():
            adapters = {"lora_rank": self.rank} if "quantize" in changes else {}
            rungs.append(Rung(key, label, label, None, EAGER | changes | adapters))
            rungs.append(Rung(f"{key}_checkpoint", f"{label}, checkpointing", label, key, ON))
        return rungs

    def check(self) -> None:
        super().check()
        check_counts(self, "rank")
        if not self.slowest > 0:
            raise UsageError(f"--slowest is in seconds, more than 0, not {self.slowest}")
        for limit in self.limits:
            if limit < 0:
                raise UsageError(f"--limits are GiB, 0 or more, not {limit}")

    def table(self) -> Steps:
        names = tuple(limit_name(limit) for limit in self.limits)
        return Steps(
            "memory",
            "Memory of a training step",
            ("kept as", "model GiB", "peak GiB", "tok/s", *names),
            "model: weights as they are kept and as they compute, adapters included. peak: the "
            "most that a training step holds, optimizer and its states included; steps are eager, "
            "whose peaks are those of compiled blocks within 1%. tok/s: of that step. longest row: "
            "one row, a whole step within so much memory; the next longer one tried, at most 1/16 "
            "more, did not fit; or more: longer ones were not asked for; at least: a step of "
            "longer ones would have taken too long.",
            "Each as flags of `python -m runners.train`, checkpointing on top:",
            f"{self.rows} rows of {self.length:,} tokens; adapters of rank {self.rank}",
            baseline="mixed",
        )

    def figures(self, trained: Trained, started: float) -> dict[str, Any]:
        held = {"model GiB": model_bytes(trained.learner) / 2**30}
        if not self.longest or trained.programs.device.type != "cuda":
            return held

        def allowed() -> float:
            left = 60 * self.minutes - (time.perf_counter() - started)
            return min(self.slowest, left)

        return held | longest_rows(trained, self.limits, self.most, allowed)


def model_bytes(learner: Learner) -> int:
    """Bytes of the weights as they are kept and as they compute, each storage counted once."""
    leaves = [*flatten(learner.params).values(), *flatten(learner.working).values()]
    storages = {leaf.untyped_storage().data_ptr(): leaf for leaf in leaves}
    return sum(leaf.untyped_storage().nbytes() for leaf in storages.values())


WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "every block": ON,
    "every 2nd block": ON | {"checkpoint_every": 2},
    "attention kept": ON | {"checkpoint_policy": "attention"},
    "dots kept": ON | {"checkpoint_policy": "dots"},
    "dots and attention kept": ON | {"checkpoint_policy": "dots+attention"},
    # half of the activations, at the least time
    "every 4th block but for attention; dots and attention between": ON
    | {"checkpoint_every": 4, "checkpoint_policy": "attention"}
    | {"checkpoint_between": "dots+attention"},
    "offload": ON | {"checkpoint_policy": "offload"},
}
COMPILERS: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "compiled blocks": {"compile": True, "cuda_graph": False},
    "compiled": {"compile": True, "cuda_graph": False, "compile_scope": "whole"},
}


@dataclass(frozen=True)
class CheckpointingConfig(SettingsBench):
    """Measures training steps of a preset's decoder (bf16 over fp32 weights) for every way to
    checkpoint: tokens a second, the peak, and the activations."""

    only: tuple[str, ...] = ()
    """Ways to measure, such as 'none,every block'. Default: all."""
    by: tuple[str, ...] = tuple(COMPILERS)
    """How: eager, 'compiled blocks', compiled."""
    rounds: int = 2
    """Rounds over all ways: a GPU's clock changes from minute to minute."""
    longest: tuple[float, ...] = ()
    """Find the longest row that trains within these GiB, with and without checkpointing, such as
    24,48,139."""
    minutes: float = 20.0
    """No way begins after this time."""

    def keys(self) -> Mapping[str, str]:
        return {way: way for way in WAYS}

    def check(self) -> None:
        super().check()
        check_known("by", self.by, list(COMPILERS))

    def rungs(self) -> list[Rung]:
        """All ways by all compilers, but that offloading is for eager autograd."""
        return [
            Rung(f"{way}, {by}", way, by, None, {"dtype": "bf16"} | COMPILERS[by] | WAYS[way])
            for by in self.by
            for way in self.only or WAYS
            if not (way == "offload" and by != "eager")
        ]

    def chosen(self) -> list[str]:
        return [rung.key for rung in self.rungs()]

    def table(self) -> Steps:
        limits = (limit_name(limit) for limit in self.longest)
        headers = ("checkpointing", "tok/s", "cost", "activations GiB", "peak GiB", "first step s")
        return Steps(
            "checkpointing",
            "Checkpointing",
            (*headers, "loss", *limits),
            "Whole steps, the optimizer included. cost: of throughput, against no checkpointing by "
            "the compiler that is measured first. activations: what a forward leaves for the "
            "backward, beside params and the gradient of the head. longest row: one row, an eager "
            "step within so much memory.",
            "Each as flags of `python -m runners.train`:",
            f"{self.rows} rows of {self.length:,} tokens",
            baseline=f"none, {self.by[0]}",
        )

    def figures(self, trained: Trained, started: float) -> dict[str, Any]:
        if trained.programs.device.type != "cuda":
            return {}
        rung, found = trained.plan.rung, {}
        searched = self.only or ("none", "every block")
        if self.longest and rung.label in searched and rung.phase == self.by[0]:
            found = longest_rows(trained, self.longest, self.most, lambda: float("inf"))
        return {"activations GiB": activations(trained, self.rows, self.length) / 2**30} | found


def activations(trained: Trained, rows: int, length: int) -> int:
    """Bytes that a forward leaves for the backward, less the gradients that the fused loss makes
    beforehand."""
    programs, vocab = trained.programs, trained.programs.model.text.vocab_size
    (batch,), _ = batches_of(draw_documents(rows, length, 0.0), vocab, rows, True)
    batch = {name: tensor.to(programs.device) for name, tensor in batch.items()}
    working = flatten(trained.learner.working)
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in working.items()}
    before = torch.cuda.memory_allocated()
    loss = trained.composed.loss_fn(unflatten(leaves), batch)
    kept = torch.cuda.memory_allocated() - before
    head = "text.lm_head.weight" if "text.lm_head.weight" in leaves else "text.embed.weight"
    del loss
    return kept - leaves[head].nbytes
