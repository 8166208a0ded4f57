"""The rungs of `bench train`: training configs, each one flag away from the one before.

The first is a plain PyTorch program, the last of the ladder the default of `runners.train`; leaves
branch off from there. Attention without a kernel computes a score for every pair of tokens of a
batch, so rungs without flash attention compute one row at a time. The step is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runners.training.config import TrainConfig

# The last rung of the ladder, from which leaves branch off: the first of these that there is.
TOPS = ("graph", "blocks")


@dataclass(frozen=True)
class Rung:
    """A training config as a change to another rung's.

    changes: fields of TrainConfig, and ``packed``: whether documents share rows.
    parent: the key of the rung that is changed; None: the first.
    """

    key: str
    label: str
    phase: str
    parent: str | None
    changes: Mapping[str, Any]

    def flags(self) -> str:
        """The changes as flags; `packed` is not one, since the trainer always packs."""
        rows = {True: "(packed rows)", False: "(one document a row, padded)"}
        return " ".join(
            rows[value] if name == "packed" else f"--{name}={_word(value)}"
            for name, value in self.changes.items()
        )


@dataclass(frozen=True)
class RungConfig:
    """A rung's config, with everything it inherits."""

    rung: Rung
    config: TrainConfig
    packed: bool


def ladder(rows: int, ragged: bool, graphs: bool = True) -> tuple[Rung, ...]:
    """Every rung. rows: of a step; ragged: documents have lengths of their own, so that packing
    them is a rung; graphs: there is a GPU that can record them."""
    climbed = climb(rows, graphs)
    rungs = (*climbed, *leaves(climbed[-1].key, graphs))
    return rungs if ragged else without_packing(rungs)


def climb(rows: int, graphs: bool) -> list[Rung]:
    """The rungs of the ladder, each on the one before."""
    baseline = {
        "dtype": "fp32",
        "compile": False,
        "compile_scope": "whole",
        "cuda_graph": False,
        "use_flash_attn": False,
        "use_fused_kernels": False,
        "use_fused_loss": False,
        "use_fused_adamw": False,
        "device_batch_size": 1,
        "packed": False,
    }
    steps: list[tuple[str, str, str, dict[str, Any]]] = [
        ("baseline", "baseline: fp32, nothing fused", "baseline", baseline),
        ("bf16", "+ bf16 compute", "phase 1", {"dtype": "bf16"}),
        ("compile", "+ torch.compile", "phase 1", {"compile": True}),
        ("adamw", "+ fused AdamW", "phase 1", {"use_fused_adamw": True}),
        ("packing", "+ packing", "phase 1", {"packed": True}),
        ("flash", "+ flash attention", "phase 2", {"use_flash_attn": True}),
        ("rows", "+ all rows at once", "phase 2", {"device_batch_size": rows}),
        ("kernels", "+ fused kernels", "phase 2", {"use_fused_kernels": True}),
        ("loss", "+ fused loss", "phase 3", {"use_fused_loss": True}),
        ("blocks", "+ compile by blocks", "phase 3", {"compile_scope": "blocks"}),
        (
            "graph",
            "+ CUDA graph instead of compiling",
            "phase 3",
            {"cuda_graph": True, "compile": False},
        ),
    ]
    if not graphs:
        steps.pop()
    below = [None, *(key for key, *_ in steps[:-1])]
    return [
        Rung(key, label, phase, parent, changes)
        for (key, label, phase, changes), parent in zip(steps, below, strict=True)
    ]


def leaves(top: str, graphs: bool) -> list[Rung]:
    """The rungs that branch off from the last one."""
    compiled = {"compile": True} if graphs else {}  # as the trainer chooses for them
    recompute = {"use_gradient_checkpointing": True, **compiled}
    half = {
        "checkpoint_every": 4,
        "checkpoint_policy": "attention",
        "checkpoint_between": "dots+attention",
    }
    return [
        # what packing gives where all else is as fast
        Rung("padded", "one document a row, padded", "phase 3", top, {"packed": False}),
        Rung("eager", "eager", "phase 3", top, {"cuda_graph" if graphs else "compile": False}),
        Rung("checkpoint", "checkpointing", "phase 3", top, recompute),
        Rung(
            "checkpoint_attention",
            "checkpointing, attention kept",
            "phase 3",
            "checkpoint",
            {"checkpoint_policy": "attention"},
        ),
        Rung(
            "checkpoint_dots",
            "checkpointing, dots and attention kept",
            "phase 3",
            "checkpoint",
            {"checkpoint_policy": "dots+attention"},
        ),
        Rung(
            "checkpoint_half",
            "checkpointing, half of the activations",
            "phase 3",
            "checkpoint",
            half,
        ),
        Rung("bf16_states", "bf16 states", "phase 3", top, {"state_dtype": "bf16"}),
        Rung("bf16_checkpoint", "bf16 states, checkpointing", "phase 3", "bf16_states", recompute),
        Rung("fp8", "fp8, compiled by blocks", "phase 3", top, {"use_fp8": True, **compiled}),
        Rung("fp8_bf16", "fp8, bf16 states", "phase 3", "fp8", {"state_dtype": "bf16"}),
        Rung("muon", "Muon", "beyond", top, {"optimizer": "muon"}),
        Rung(
            "adamw8bit", "AdamW with moments of 8 bits", "beyond", top, {"optimizer": "adamw8bit"}
        ),
    ]


def without_packing(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs for documents that fill a row: rungs that only change packing are left out, and
    their children move to their parents."""
    kept: list[Rung] = []
    gone: dict[str | None, str | None] = {}
    for rung in rungs:
        changes = {name: value for name, value in rung.changes.items() if name != "packed"}
        parent = gone.get(rung.parent, rung.parent)
        if changes:
            kept.append(replace(rung, parent=parent, changes=changes))
        else:
            gone[rung.key] = parent
    return tuple(kept)


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def rung_configs(rungs: Sequence[Rung], start: TrainConfig) -> dict[str, RungConfig]:
    """Every rung's config, by its key; ``start``: what no rung changes."""
    made: dict[str, RungConfig] = {}
    for rung in rungs:
        before = made[rung.parent] if rung.parent is not None else RungConfig(rung, start, True)
        changes = dict(rung.changes)
        packed = changes.pop("packed", before.packed)
        made[rung.key] = RungConfig(rung, before.config.changed(**changes), packed)
    return made
