"""A cell of the matrix: one column for one family, and what came out."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.foreign import chains, columns
from tests.foreign.bench import Bench, NothingThereError
from tests.foreign.families import Family
from tests.foreign.oracle import BareFailsError, Oracle, WrongError

OURS = ("core", "params", "transforms", "kernels")
ROOT = Path(__file__).resolve().parents[2]


COLUMNS: dict[str, tuple[Callable[[Bench], None], str]] = {
    "same": (columns.same, "the bare forward equals the module, which is unchanged"),
    "vg": (columns.gradients, "`value_and_grad` of the bare forward"),
    "train": (columns.train, "in training mode, also under `checkpoint`"),
    "pad": (columns.padded, "rows padded at the right and at the left, with `attention_mask`"),
    "pos": (columns.positions, "`position_ids` of two documents in a row"),
    "ask": (
        columns.caching,
        "`use_cache=True` and `output_hidden_states=True`, also under the chain",
    ),
    "part": (columns.partly, "every third parameter frozen"),
    "emb": (columns.embeds, "`inputs_embeds` instead of tokens"),
    "fuse": (columns.fused, "`fuse_loss`"),
    "ckpt": (columns.checkpointed, "`checkpoint`"),
    "kern": (columns.kernels, "`fuse_kernels`"),
    "chain": (columns.chain, "`fuse_loss(checkpoint(fuse_kernels(forward)))`"),
    "bf16": (columns.bf16, "`mixed_precision` over fp32 weights"),
    "cast": (columns.cast, "`cast_matrices` to bf16"),
    "fp64": (columns.fp64, "`mixed_precision` to fp64 over fp32 weights"),
    "half": (columns.half, "a bf16 and an fp16 model with `checkpoint(fuse_kernels(forward))`"),
    "int8": (columns.int8, "`quantize_int8`"),
    "int8b": (columns.int8_of_bf16, "`quantize_int8` of a bf16 model"),
    "fake": (columns.fake, "`fake_quant`"),
    "lora": (columns.low_rank, "`lora` with nonzero adapters"),
    "qlora": (columns.qlora, "`lora(quantize_int8(forward))`"),
    "fp8": (columns.float8, "`fp8` of all linears with sizes that are multiples of 16"),
    "acc": (columns.accumulated, "`accumulate` over batches with different numbers of labels"),
    "long": (chains.long, "kernels, checkpoint, fake_quant, lora and the fused loss at once"),
    "ord": (chains.orders, "the same in three other orders"),
    "eager": (chains.other_attention, "attention as plain arithmetic: bare, and the chain"),
    "grad": (chains.by_grad, "`torch.func.grad` over checkpoint, and over all at once"),
    "vmap": (chains.by_vmap, "`vmap(grad)` over checkpoint"),
    "hvp": (chains.by_hvp, "`jvp(grad)` over checkpoint"),
    "comp": (chains.by_compile, "`torch.compile(loss)` over checkpoint, for one of every kind"),
}
DRIVERS = {"grad": "grad", "vmap": "vmap", "hvp": "hvp", "comp": "compile"}


@dataclass(frozen=True)
class Cell:
    """glyph: R right, c a clear error, b the bare module fails too, - nothing to do there; W wrong,
    U an unclear error. said: the reason."""

    glyph: str
    said: str = ""

    @property
    def good(self) -> bool:
        return self.glyph in "Rcb-"


def cell(bench: Bench, column: str) -> Cell:
    """Runs one cell."""
    check, _ = COLUMNS[column]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                check(bench)
            finally:
                bench.said += [str(w.message) for w in caught]
    except NothingThereError:
        return Cell("-")
    except BareFailsError as theirs:
        return Cell("b", str(theirs))
    except WrongError as wrong:
        return Cell("W", str(wrong))
    except Exception as error:
        return _failed(bench, column, error)
    return Cell("R")


def _failed(bench: Bench, column: str, error: Exception) -> Cell:
    said = f"{type(error).__name__}: {error}"
    if is_clear(bench.family, error):
        return Cell("c", said)
    if column in DRIVERS and (theirs := bench.oracle.bare(DRIVERS[column])):
        return Cell("b", theirs)
    if column in BARE and (theirs := bare_in(bench, *BARE[column])):
        return Cell("b", theirs)
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if _ours(f.filename)), frames[-1])
    return Cell("U", f"{said} ({Path(at.filename).name}:{at.lineno})")


# where what the bare module cannot do in that dtype, or in that mode, excuses a cell
BARE: dict[str, tuple[torch.dtype, bool]] = {
    "int8b": (torch.bfloat16, False),
    "train": (torch.float64, True),
    "bf16": (torch.bfloat16, False),
    "cast": (torch.bfloat16, False),
}


def bare_in(bench: Bench, dtype: torch.dtype, train: bool) -> str:
    """What the bare module says in another dtype or in training mode; "" if it can."""
    try:
        if dtype == torch.bfloat16 and bench.oracle.autocast() is None:
            return "torch.autocast fails too"
        bench.oracle.result(dtype=dtype if dtype != torch.float64 else None, train=train)
    except Exception as error:  # whatever the module says
        return f"{type(error).__name__}: {error}"
    return ""


REMEDIES = {"head", "call", "skip", "blocks", "buffers", "policy", "select", "from_module"}


def is_clear(family: Family, error: Exception) -> bool:
    """An error of ours that names a module, a weight or the argument that remedies it.

    Ours: a ``raise`` of ours made it. What torch raises below a call of ours has that call as its
    last line of Python, and may happen to name a head.
    """
    if not isinstance(error, ValueError | TypeError | NotImplementedError | RuntimeError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not _ours(last.filename) or not (last.line or "").startswith("raise "):
        return False
    module = family.fresh()
    names = {n for n, _ in module.named_modules(remove_duplicate=False)}
    names |= {n for n, _ in module.named_parameters(remove_duplicate=False)}
    names |= {n for n, _ in module.named_buffers(remove_duplicate=False)}
    names |= {type(m).__name__ for m in module.modules()}
    words = set(re.split(r"[\s'\",:;()\[\]{}`=]+", str(error)))
    words |= {word.strip(".") for word in words}
    return bool(words & (names | REMEDIES) - {""}) and len(str(error)) > 30


def _ours(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS


def row(family: Family, columns: list[str] | None = None) -> dict[str, Cell]:
    """All cells of a family."""
    bench = Bench(family, Oracle(family))
    return {column: cell(bench, column) for column in columns or COLUMNS}
