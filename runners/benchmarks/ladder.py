"""The rungs of `bench train`: training configs, each one flag away from the one before; their data.

The first is what a plain PyTorch program does, the last of the ladder what `runners.train` does by
default; leaves branch off from there. Attention without a kernel holds a score for every pair of
tokens of a batch, whichever documents they are of. Rungs without flash attention therefore compute
one row at a time, so that nothing is computed for nothing; the step is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from core import Batch, Longest, VLMConfig, make_batch
from runners.benchmarks.pictures import MARK, Pictures
from runners.config import TrainConfig
from runners.data.collate import collate
from runners.data.packing import WINDOW, PackSpec, choose_row, plan_spec
from runners.data.types import NO_LABEL, Document
from runners.flops import Load
from runners.setup import bounds, whole_pictures

PAD = 0  # the token that fills rows up; documents have none of it
# The last rung of the ladder, from which leaves branch off: the first of these that there is.
TOPS = ("graph", "blocks")
MULTIPLE = 8  # padded rows are as long as the longest document, up to a multiple of this


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
        """As a command line has them; `packed` is no flag: the trainer always packs."""
        rows = {True: "(packed rows)", False: "(one document a row, padded)"}
        return " ".join(
            rows[value] if name == "packed" else f"--{name}={_word(value)}"
            for name, value in self.changes.items()
        )


@dataclass(frozen=True)
class Plan:
    """A rung with all that it inherits."""

    rung: Rung
    config: TrainConfig
    packed: bool


def ladder(rows: int, ragged: bool, graphs: bool = True) -> tuple[Rung, ...]:
    """Every rung. rows: of a step; ragged: documents have lengths of their own, so that packing
    them is a rung; graphs: there is a GPU that can record them."""
    climbed = [
        Rung(
            "baseline", "baseline: fp32, nothing fused", "baseline", None,
            {
                "dtype": "fp32", "compile": False, "compile_scope": "whole", "cuda_graph": False,
                "use_flash_attn": False, "use_fused_kernels": False, "use_fused_loss": False,
                "use_fused_adamw": False, "device_batch_size": 1, "packed": not ragged,
            },
        ),
        Rung("bf16", "+ bf16 compute", "phase 1", "baseline", {"dtype": "bf16"}),
        Rung("compile", "+ torch.compile", "phase 1", "bf16", {"compile": True}),
        Rung("adamw", "+ fused AdamW", "phase 1", "compile", {"use_fused_adamw": True}),
        *([Rung("packing", "+ packing", "phase 1", "adamw", {"packed": True})] if ragged else []),
        Rung(
            "flash", "+ flash attention", "phase 2", "packing" if ragged else "adamw",
            {"use_flash_attn": True},
        ),
        Rung("rows", "+ all rows at once", "phase 2", "flash", {"device_batch_size": rows}),
        Rung("kernels", "+ fused kernels", "phase 2", "rows", {"use_fused_kernels": True}),
        Rung("loss", "+ fused loss", "phase 3", "kernels", {"use_fused_loss": True}),
        Rung("blocks", "+ compile by blocks", "phase 3", "loss", {"compile_scope": "blocks"}),
    ]  # fmt: skip
    if graphs:
        instead = {"cuda_graph": True, "compile": False}
        label = "+ CUDA graph instead of compiling"
        climbed.append(Rung("graph", label, "phase 3", "blocks", instead))
    top = climbed[-1].key
    compiled = {"compile": True} if graphs else {}  # as the trainer chooses for them
    recompute = {"use_gradient_checkpointing": True, **compiled}
    half = {"checkpoint_every": 4, "checkpoint_policy": "attention"}
    padded = ("padded", "one document a row, padded", "phase 3", top, {"packed": False})
    leaves = [
        *([padded] if ragged else []),  # what packing gives where all else is as fast
        ("eager", "eager", "phase 3", top, {"cuda_graph" if graphs else "compile": False}),
        ("checkpoint", "checkpointing", "phase 3", top, recompute),
        ("checkpoint_attention", "checkpointing, attention kept", "phase 3", "checkpoint",
         {"checkpoint_policy": "attention"}),
        ("checkpoint_dots", "checkpointing, dots and attention kept", "phase 3", "checkpoint",
         {"checkpoint_policy": "dots+attention"}),
        ("checkpoint_half", "checkpointing, half of the activations", "phase 3", "checkpoint",
         half | {"checkpoint_between": "dots+attention"}),
        ("bf16_states", "bf16 states", "phase 3", top, {"state_dtype": "bf16"}),
        ("bf16_checkpoint", "bf16 states, checkpointing", "phase 3", "bf16_states", recompute),
        ("fp8", "fp8, compiled by blocks", "phase 3", top,
         {"use_fp8": True, **compiled}),
        ("fp8_bf16", "fp8, bf16 states", "phase 3", "fp8", {"state_dtype": "bf16"}),
        ("muon", "Muon", "beyond", top, {"optimizer": "muon"}),
        ("adamw8bit", "AdamW with moments of 8 bits", "beyond", top,
         {"optimizer": "adamw8bit"}),
    ]  # fmt: skip
    return (*climbed, *(Rung(*leaf) for leaf in leaves))  # type: ignore[arg-type]


def _word(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def plans(rungs: Sequence[Rung], start: TrainConfig) -> dict[str, Plan]:
    """Every rung's config, by its key; ``start``: what no rung changes."""
    made: dict[str, Plan] = {}
    for rung in rungs:
        before = made[rung.parent] if rung.parent is not None else Plan(rung, start, True)
        changes = dict(rung.changes)
        packed = changes.pop("packed", before.packed)
        made[rung.key] = Plan(rung, replace(before.config, **changes), packed)
    return made


@dataclass(frozen=True)
class Documents:
    """The documents of a step by their lengths, in the rows where they lie when packed.

    pictures: what each begins with, its tokens counted in the lengths; spec: what packed rows then
    have room for.
    """

    rows: tuple[tuple[int, ...], ...]
    row_len: int
    pictures: Pictures | None = None
    spec: PackSpec | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(length for row in self.rows for length in row)

    @property
    def tokens(self) -> int:
        """Real ones: padding is none."""
        return sum(self.lengths)

    @property
    def full(self) -> bool:
        """Every document is text and fills a row."""
        return self.pictures is None and all(row == (self.row_len,) for row in self.rows)

    @property
    def load(self) -> Load:
        patches = 0 if self.pictures is None else self.pictures.images.square_patches
        return Load(torch.tensor(self.lengths), torch.full((self.shown,), patches))

    @property
    def shown(self) -> int:
        """Pictures of the step."""
        return len(self.lengths) * (0 if self.pictures is None else self.pictures.count)

    def padded_len(self) -> int:
        """Of a row when each has one document: the longest, rounded up."""
        return min(self.row_len, -(-max(self.lengths) // MULTIPLE) * MULTIPLE)


def draw_documents(
    rows: int, row_len: int, sigma: float, seed: int = 0, pictures: Pictures | None = None
) -> Documents:
    """Documents for so many rows. sigma 0: each fills a row; else their lengths are log-normal of
    mean a quarter of a row and this sigma (of the logarithm), at most a row; they are packed as the
    loader packs: from a window of those that wait. With pictures it is the text behind them whose
    length is drawn, in the mean as many tokens as the pictures take, and rows have room for as many
    pictures as the trainer would plan for such documents."""
    if sigma == 0 and pictures is None:
        return Documents(((row_len,),) * rows, row_len)
    if pictures is None:
        bare, spec = _bare, PackSpec(row_len, rows, max_docs=row_len)
        stream = _lengths(row_len / 4, 2, row_len, sigma, seed)
    else:
        bare, shown = pictures.bare, pictures.tokens
        texts = partial(_lengths, shown, 1, row_len - shown, sigma, seed)
        stream = (shown + length for length in texts())
        sample = [bare(shown + length) for length in islice(texts(), WINDOW)]
        spec = whole_pictures(
            plan_spec(sample, row_len=row_len, rows=rows, images=pictures.images, pad_token=PAD)
        )
    waiting: list[Document] = [bare(length) for length in islice(stream, WINDOW)]
    packed: list[list[Document]] = []
    for _ in range(rows):
        chosen = choose_row([document.cost for document in waiting], spec.budget(packed))
        packed.append([waiting[i] for i in chosen])
        for i in reversed(chosen):
            del waiting[i]
        waiting += [bare(length) for length in islice(stream, WINDOW - len(waiting))]
    lengths = tuple(tuple(len(document.tokens) for document in row) for row in packed)
    return Documents(lengths, row_len, pictures, None if pictures is None else spec)


def _lengths(mean: float, least: int, most: int, sigma: float, seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    middle = math.log(mean) - sigma**2 / 2  # so that it is the mean
    while True:
        yield min(most, max(least, round(generator.lognormal(middle, sigma))))


def _bare(length: int) -> Document:
    return document_of(np.zeros(length, np.int64))


def document_of(tokens: np.ndarray) -> Document:
    """Text to learn whole."""
    labels = np.append(tokens[1:], NO_LABEL)
    nothing = np.zeros(0, np.int64)
    return Document(
        "", tokens, labels, nothing, np.zeros((0, 0), np.uint8), np.zeros((0, 2), np.int64)
    )


def batches_of(
    documents: Documents, vocab: int, at_once: int, packed: bool, seed: int = 0
) -> tuple[list[Batch], Longest]:
    """The step's batches of ``at_once`` rows, on the CPU, and what the model may rely on. The same
    random tokens and pictures, packed or padded: one document a row, filled up to the longest of
    the step."""
    generator = np.random.default_rng(seed)
    if documents.full:
        size = (len(documents.rows), documents.row_len)
        tokens = torch.from_numpy(generator.integers(1, vocab, size))
        return [make_batch(some) for some in tokens.split(at_once)], Longest(documents.row_len)
    pictures = documents.pictures

    def drawn(length: int) -> Document:
        if pictures is None:
            return document_of(generator.integers(1, vocab, length))
        return pictures.document(
            generator.integers(MARK + 1, vocab, length - pictures.tokens), generator
        )

    rows = [[drawn(length) for length in row] for row in documents.rows]
    length = documents.row_len
    if not packed:
        rows, length = [[document] for row in rows for document in row], documents.padded_len()
    spec = PackSpec(length, at_once, max_docs=max(map(len, rows)), pad_token=PAD)
    some = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
    if pictures is not None and documents.spec is not None:
        most = max(sum(document.cost.images for row in group for document in row) for group in some)
        room = documents.spec.max_images if packed and len(some) == 1 else most
        spec = whole_pictures(
            replace(
                spec, images=pictures.images, max_images=room, max_patches=pictures.images.merge**2
            )
        )
    return [collate(group, spec) for group in some], bounds(spec)


def text_only(model: VLMConfig) -> VLMConfig:
    """The decoder alone."""
    return VLMConfig(model.text)
