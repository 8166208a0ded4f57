"""The least that a device must do for parts of a step: operations and bytes, and the time of both.

Bytes are those that must pass between the chip and its memory if every operation that is one kernel
here reads its inputs once and writes its outputs once; what a matrix product reads and writes is
not counted, because products are bound by arithmetic at these sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core import VLMConfig
from params.spec import count_leaves
from runners.benchmarks.harness import Ceiling

HALF = 2  # bytes of a bf16 number


@dataclass(frozen=True)
class Work:
    """A part of a step. operations: of matrix products."""

    part: str
    operations: float = 0.0
    moved: float = 0.0  # bytes

    def floor(self, ceilings: Mapping[Ceiling, float]) -> float:
        """Milliseconds, the two after one another: what is one kernel or its neighbour."""
        return 1e3 * (self.operations / ceilings["bf16"] + self.moved / ceilings["copy"])


def pairs(lengths: Sequence[int]) -> int:
    """Queries times the keys that each sees, causal, in all documents.

    >>> pairs([3, 1])
    7
    """
    return sum(length * (length + 1) // 2 for length in lengths)


def attention_operations(model: VLMConfig, lengths: Sequence[int]) -> float:
    """Of one layer's scores and weighted sums: two products forward, five backward, as flash
    attention does it (https://arxiv.org/abs/2205.14135, algorithms 1 and 4)."""
    text = model.text
    return 7 * 2.0 * text.heads * text.head_size * pairs(lengths)


def linear_operations(weights: float, tokens: int) -> float:
    """Forward, and both gradients."""
    return 6.0 * weights * tokens


def norm_bytes(tokens: int, width: int, size: int = HALF) -> float:
    """Forward: read, written; backward: the gradient and the input read, a gradient written."""
    return 5.0 * tokens * width * size


def glu_bytes(tokens: int, width: int, size: int = HALF) -> float:
    """Forward: two read, one written; backward: three read, two written."""
    return 8.0 * tokens * width * size


def rope_bytes(model: VLMConfig, tokens: int, size: int = HALF) -> float:
    """q and k read and written, forward and backward."""
    text = model.text
    return 4.0 * tokens * (text.heads + text.kv_heads) * text.head_size * size


def residual_bytes(tokens: int, width: int, size: int = HALF) -> float:
    """Of a layer's two additions, beside its norms, which read and write most of it in any case.

    Attention's is made by the norm that follows: one more read, one more written; the MLP's, at the
    end of a block, alone: two read, one written. Backward: each norm reads one gradient more.
    """
    return 7.0 * tokens * width * size


def addition_bytes(tokens: int, width: int, size: int = HALF) -> float:
    """One that is a kernel of its own, forward and backward: two read, one written each."""
    return 6.0 * tokens * width * size


def loss_bytes(tokens: int, vocab: int, size: int = HALF) -> float:
    """Logits read twice (their sum of exponentials first), their gradient written once."""
    return 3.0 * tokens * vocab * size


def gelu_bytes(tokens: int, width: int, size: int = HALF) -> float:
    """Forward: read, written; backward: the gradient and the input read, a gradient written."""
    return 5.0 * tokens * width * size


def optimizer_bytes(params: int, *, bf16_states: bool) -> float:
    """AdamW: param and two moments read and written, a bf16 gradient read for its norm and again;
    fp32 params are written once more as the copies that compute."""
    state = 6 * (HALF if bf16_states else 4) + 2 * HALF
    return float(params) * (state if bf16_states else state + HALF)


def training_step(
    model: VLMConfig,
    lengths: Sequence[int],
    pictures: Sequence[int] = (),
    *,
    bf16_states: bool = False,
) -> tuple[Work, ...]:
    """The parts of one step in bf16 on documents of these lengths and pictures of so many patches,
    without recomputation."""
    text, tokens = model.text, sum(lengths)
    products = model.flops_per_token(0) * tokens
    layer = (
        2 * norm_bytes(tokens, text.dim)
        + residual_bytes(tokens, text.dim)
        + glu_bytes(tokens, text.mlp_dim)
        + rope_bytes(model, tokens)
    )
    elementwise = text.layers * layer + norm_bytes(tokens, text.dim)
    # rows of the table read and written; its gradient is added to that of the head
    embedding = 4.0 * tokens * text.dim * HALF
    return (
        Work("matrix products", operations=products),
        Work("attention", operations=text.layers * attention_operations(model, lengths)),
        Work("norms, SwiGLU, RoPE, residuals", moved=elementwise + embedding),
        Work("cross-entropy", moved=loss_bytes(tokens, text.vocab_size)),
        *(vision_step(model, pictures) if pictures else ()),
        Work(
            "optimizer",
            moved=optimizer_bytes(count_leaves(model.param_spec()), bf16_states=bf16_states),
        ),
    )


def vision_step(model: VLMConfig, pictures: Sequence[int]) -> tuple[Work, ...]:
    """The vision tower's and an MLP projector's parts, each patch seeing all of its picture. Biases
    are left out, as parts of the products before them, and so are positions: they are added once.
    Raises ValueError for a model without the two."""
    vision, projector = model.vision, model.projector
    if vision is None or projector is None or projector.kind != "mlp":
        raise ValueError("the work of a vision tower is counted with an MLP projector")
    patches, hidden = sum(pictures), projector.hidden or model.text.dim
    seen = sum(count**2 for count in pictures)
    layer = (
        2 * norm_bytes(patches, vision.dim)
        + 2 * addition_bytes(patches, vision.dim)
        + gelu_bytes(patches, vision.mlp_dim)
    )
    bridge = gelu_bytes(patches // vision.merge**2, hidden)
    return (
        Work("vision: matrix products", operations=model.flops_per_patch(0) * patches),
        Work("vision: attention", operations=vision.layers * 7 * 2.0 * vision.dim * seen),
        Work(
            "vision: norms, GELU, residuals",
            moved=vision.layers * layer + norm_bytes(patches, vision.dim) + bridge,
        ),
    )
