"""Model configs: frozen dataclasses, and what follows from their numbers.

``param_spec`` derives the parameter tree; counts and initial values come from it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from core.ranges import Range, check_fields, shown
from params.spec import Leaf, Spec, count_leaves

# far above any model, and small enough that sizes can still be computed
Width = Annotated[int, Range(1, 2**24)]
Layers = Annotated[int, Range(1, 10_000)]
Epsilon = Annotated[float, Range(0, below=1)]


@dataclass(frozen=True)
class TextConfig:
    """A decoder-only transformer: GQA, RoPE, RMSNorm, SwiGLU."""

    vocab_size: Width
    dim: Width
    layers: Layers
    heads: Width
    kv_heads: Width
    mlp_dim: Width
    head_dim: Width | None = None  # None: dim // heads
    rope_theta: Annotated[float, Range(above=0)] = 10_000.0
    norm_eps: Epsilon = 1e-6
    tied: bool = True  # the unembedding is the embedding
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma-3: RMSNorm on each head of q and k
    softcap: Annotated[float, Range(above=0)] | None = None  # Gemma-2: cap * tanh(logits / cap)
    window: Annotated[int, Range(1)] | None = None  # sliding window, in keys seen, itself included
    global_every: Annotated[int, Range(0)] = 0  # with a window: every k-th layer sees everything
    dropout: Annotated[float, Range(0, below=1)] = 0.0  # on residuals; only if the batch has a seed

    def __post_init__(self) -> None:
        check_fields(self, "text")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if self.head_size % 2:
            raise ValueError(f"RoPE needs an even head size, not {self.head_size}")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.heads

    def window_of(self, layer: int) -> int | None:
        """The window of one layer, or None where it sees the whole document."""
        everything = self.global_every > 0 and (layer + 1) % self.global_every == 0
        return None if everything else self.window

    def param_spec(self) -> Spec:
        dim, hidden = self.dim, self.mlp_dim
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        residual = _residual(self.layers)
        attn: dict[str, Any] = {
            "q": _dense(q, dim, bias=self.qkv_bias),
            "k": _dense(kv, dim, bias=self.qkv_bias),
            "v": _dense(kv, dim, bias=self.qkv_bias),
            "o": _dense(dim, q, residual, bias=False),
        }
        if self.qk_norm:
            attn |= {name: _rms_norm(self.head_size) for name in ("q_norm", "k_norm")}
        block = {
            "attn_norm": _rms_norm(dim),
            "attn": attn,
            "mlp_norm": _rms_norm(dim),
            "mlp": {
                "gate": _dense(hidden, dim, bias=False),
                "up": _dense(hidden, dim, bias=False),
                "down": _dense(dim, hidden, residual, bias=False),
            },
        }
        spec: Spec = {
            "embed": _dense(self.vocab_size, dim, bias=False),
            "blocks": {str(i): block for i in range(self.layers)},
            "norm": _rms_norm(dim),
        }
        if not self.tied:
            spec["lm_head"] = _dense(self.vocab_size, dim, bias=False)
        return spec


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer over packed patches (SigLIP-like: LayerNorm, biases, tanh-GELU)."""

    dim: Width
    layers: Layers
    heads: Width
    mlp_dim: Width
    patch_size: Annotated[int, Range(1, 2**12)]  # pixels
    # pixels a side: nominal; other sizes and aspects interpolate the positions
    image_size: Annotated[int, Range(1, 2**14)]
    # pictures come as merge x merge cells of patches; the MLP projector fuses one
    merge: Annotated[int, Range(1, 2**8)] = 2
    positions: Literal["learned", "sincos2d"] = "learned"
    norm_eps: Epsilon = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, "vision")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"dim ({self.dim}) must be a multiple of heads ({self.heads}) and of 4"
            )
        if self.image_size % (self.patch_size * self.merge):
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size x merge "
                f"({self.patch_size} x {self.merge})"
            )

    @property
    def grid(self) -> int:
        """Patches a side of a nominal picture."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    def param_spec(self) -> Spec:
        dim, hidden = self.dim, self.mlp_dim
        residual = _residual(self.layers)
        block = {
            "attn_norm": _layer_norm(dim),
            "attn": {
                "q": _dense(dim, dim),
                "k": _dense(dim, dim),
                "v": _dense(dim, dim),
                "o": _dense(dim, dim, residual),
            },
            "mlp_norm": _layer_norm(dim),
            "mlp": {"up": _dense(hidden, dim), "down": _dense(dim, hidden, residual)},
        }
        spec: Spec = {
            "patch_embed": _dense(dim, self.patch_dim),
            "blocks": {str(i): block for i in range(self.layers)},
            "norm": _layer_norm(dim),
        }
        if self.positions == "learned":
            spec["positions"] = _dense(self.grid**2, dim, bias=False)
        return spec


@dataclass(frozen=True)
class ProjectorConfig:
    """From patch features to image tokens of the decoder.

    ``mlp``: pixel shuffle (each cell of merge x merge patches becomes one token) and two linears.
    ``resampler``: per picture a fixed number of learned queries attends to its patches (Flamingo's
    perceiver resampler, https://arxiv.org/abs/2204.14198).
    """

    kind: Literal["mlp", "resampler"] = "mlp"
    hidden: Width | None = None  # of the MLP; None: the decoder's dim
    queries: Width = 64  # resampler: image tokens a picture
    layers: Layers = 2  # resampler
    heads: Width = 8  # resampler

    def __post_init__(self) -> None:
        check_fields(self, "projector")

    def param_spec(self, vision: VisionConfig, text: TextConfig) -> Spec:
        hidden = self.hidden or text.dim
        if self.kind == "mlp":
            width = vision.dim * vision.merge**2
            return {"up": _dense(hidden, width), "down": _dense(text.dim, hidden)}
        dim = vision.dim
        if dim % self.heads:
            raise ValueError(f"resampler heads ({self.heads}) must divide vision.dim ({dim})")
        residual = _residual(self.layers)
        block = {
            "latent_norm": _layer_norm(dim),
            "patch_norm": _layer_norm(dim),
            "attn": {
                "q": _dense(dim, dim),
                "k": _dense(dim, dim),
                "v": _dense(dim, dim),
                "o": _dense(dim, dim, residual),
            },
            "mlp_norm": _layer_norm(dim),
            "mlp": {"up": _dense(4 * dim, dim), "down": _dense(dim, 4 * dim, residual)},
        }
        return {
            "queries": _dense(self.queries, dim, bias=False),
            "blocks": {str(i): block for i in range(self.layers)},
            "norm": _layer_norm(dim),
            "out": _dense(text.dim, dim),
        }


@dataclass(frozen=True)
class VLMConfig:
    """A decoder, and optionally a vision tower with its projector."""

    text: TextConfig
    vision: VisionConfig | None = None
    projector: ProjectorConfig | None = field(default=None)

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.projector is None):
            raise ValueError("vision and projector come together: give both, or neither")

    def param_spec(self) -> Spec:
        """Nested dict of Leaf: the shape and the initial distribution of every parameter."""
        spec: Spec = {"text": self.text.param_spec()}
        if self.vision is not None and self.projector is not None:
            spec["vision"] = self.vision.param_spec()
            spec["projector"] = self.projector.param_spec(self.vision, self.text)
        return spec

    def num_params(self) -> int:
        """The number of parameters.

        For a decoder with tied head, no biases and square attention that is
        ``V D + L (2 D^2 + 2 D D Hk / H + 3 D F + 2 D) + D``.
        """
        return count_leaves(self.param_spec())

    def image_tokens(self, patches: int) -> int:
        """The number of the decoder's tokens for a picture of ``patches`` patches."""
        if self.vision is None or self.projector is None:
            raise ValueError("this config has no vision tower")
        if self.projector.kind == "resampler":
            return self.projector.queries
        return patches // self.vision.merge**2

    def flops_per_token(self, context: int, *, training: bool = True) -> float:
        """Floating-point operations of the decoder per token, in documents of ``context`` tokens.

        A matmul with an ``[O, I]`` weight takes 2 O I operations per token. The unembedding counts,
        tied or not; biases, norms and the lookup of embeddings do not. Attention takes 4 H Dh
        operations per query and key; a causal query sees half of the context on average, with a
        window ``min(window, context / 2)``. Backward takes two matmuls for each of the forward's:
        training is three times the forward (PaLM, appendix B, https://arxiv.org/abs/2204.02311).
        Recomputation by checkpointing is not counted.
        """
        text, spec = self.text, self.text.param_spec()
        weights = _matmul_weights(spec["blocks"]) + text.vocab_size * text.dim
        keys = 0.0
        for layer in range(text.layers):
            window = text.window_of(layer)
            keys += context / 2 if window is None else min(float(window), context / 2)
        forward = 2.0 * weights + 4.0 * text.heads * text.head_size * keys
        return forward * (3 if training else 1)

    def flops_per_patch(self, patches_per_image: int, *, training: bool = True) -> float:
        """Floating-point operations of the vision tower and projector per patch.

        As :meth:`flops_per_token`, but attention is not causal: each patch sees all
        ``patches_per_image``.
        """
        if self.vision is None or self.projector is None:
            return 0.0
        vision, spec = self.vision, self.vision.param_spec()
        weights = _matmul_weights(spec["blocks"]) + vision.dim * vision.patch_dim
        forward = 2.0 * weights + 4.0 * vision.dim * patches_per_image * vision.layers
        bridge = self.projector.param_spec(vision, self.text)
        if self.projector.kind == "mlp":
            forward += 2.0 * _matmul_weights(bridge) / vision.merge**2
        else:
            queries, blocks = self.projector.queries, bridge["blocks"].values()
            on_patches = sum(_matmul_weights({k: b["attn"][k] for k in "kv"}) for b in blocks)
            per_query = _matmul_weights(bridge) + 2.0 * vision.dim * self.projector.layers * (
                patches_per_image + queries
            )
            forward += 2.0 * on_patches + 2.0 * per_query * queries / patches_per_image
        return forward * (3 if training else 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers. :func:`config_from_dict` is the inverse."""
        return dataclasses.asdict(self)


def config_from_dict(data: dict[str, Any]) -> VLMConfig:
    """The inverse of ``VLMConfig.to_dict``. Raises ValueError naming a wrong or missing field."""

    def make(cls: Any, values: dict[str, Any] | None, name: str) -> Any:
        if values is None:
            return None
        if not isinstance(values, dict):
            raise ValueError(f"{name} must be an object with fields, not {shown(values)}")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"{name} has no field {unknown[0]!r}; it has {', '.join(fields)}")
        needed = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := sorted(needed - set(values)):
            raise ValueError(f"{name} lacks the field {missing[0]!r}")
        return cls(**values)

    parts = {"text": TextConfig, "vision": VisionConfig, "projector": ProjectorConfig}
    if unknown := sorted(set(data) - set(parts)):
        raise ValueError(f"the model config has no part {unknown[0]!r}; it has {', '.join(parts)}")
    if data.get("text") is None:
        raise ValueError("the model config lacks the part 'text'")
    return VLMConfig(**{name: make(cls, data.get(name), name) for name, cls in parts.items()})


def _dense(out: int, inp: int, scale: float = 1.0, *, bias: bool = True) -> Spec:
    """A matrix with standard deviation ``scale / sqrt(fan-in)`` (LeCun 1998), and a zero bias.

    At GPT-2's width that is about its constant of 0.02, which is too small for narrow models.
    """
    weight = {"weight": Leaf((out, inp), std=scale / math.sqrt(inp))}
    return weight | ({"bias": Leaf((out,), "zeros")} if bias else {})


def _residual(layers: int) -> float:
    """The scale of layers that add to the residual stream (GPT-2, section 2.3)."""
    return 1 / math.sqrt(2 * layers)


def _rms_norm(dim: int) -> Spec:
    return {"weight": Leaf((dim,), "ones")}


def _layer_norm(dim: int) -> Spec:
    return {"weight": Leaf((dim,), "ones"), "bias": Leaf((dim,), "zeros")}


def _matmul_weights(spec: Any) -> int:
    """The number of weights in a spec that multiply every token."""
    if isinstance(spec, Leaf):
        return math.prod(spec.shape) if len(spec.shape) > 1 else 0
    return sum(_matmul_weights(v) for k, v in spec.items() if k != "queries")
