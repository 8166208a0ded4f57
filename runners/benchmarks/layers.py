"""Cases: the two halves of a decoder's layer with their linears, at the sizes of `vlm_1.5b`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from runners.benchmarks.elementwise import plain_rms_norm, rotate_half
from runners.benchmarks.harness import Case
from runners.benchmarks.providers import Forward, Inputs, simple, torch_and_compiled

ROWS, LENGTH, DIM, HEADS, KEY_HEADS, SIZE, MLP = 8, 2048, 1536, 12, 2, 128, 8960
EPS = 1e-6


def cases() -> list[Case]:
    return [attention_layer(), mlp_layer()]


def attention_layer(rows: int = ROWS, length: int = LENGTH, dim: int = DIM) -> Case:
    """The linears of q, k and v, RoPE, causal attention within rows, and the linear of o."""
    heads, size = dim // SIZE if dim >= SIZE else 2, min(SIZE, dim // 2)
    key_heads = min(KEY_HEADS, heads)
    shapes = {
        "q": (heads * size, dim),
        "k": (key_heads * size, dim),
        "v": (key_heads * size, dim),
        "o": (dim, heads * size),
    }

    def tables(device: torch.device) -> Inputs:
        frequency = 1e6 ** (-torch.arange(0, size, 2, device=device) / size)
        positions = torch.arange(length, device=device).repeat(rows)
        angles = positions[:, None] * frequency
        return {
            "cos": angles.cos(),
            "sin": angles.sin(),
            "rows": torch.arange(rows * length, device=device),
            "cu": torch.arange(rows + 1, device=device, dtype=torch.int32) * length,
        }

    def plain(i: Inputs) -> Tensor:
        q, k, v = (F.linear(i["x"], i[n]).unflatten(-1, (-1, size)) for n in "qkv")
        c, s = (torch.cat((i[n],) * 2, -1)[:, None] for n in ("cos", "sin"))
        q, k = ((x * c + rotate_half(x) * s).to(x.dtype) for x in (q, k))
        q, k, v = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.linear(o.transpose(1, 2).reshape(rows * length, -1), i["o"])

    def ours(i: Inputs) -> Tensor:
        q, k, v = (kernels.linear(i["x"], i[n]).unflatten(-1, (-1, size)) for n in "qkv")
        q, k = kernels.rope(q, k, i["cos"], i["sin"], i["rows"])
        o = kernels.attention(q, k, v, i["cu"], max_seqlen=length)
        return kernels.linear(o.flatten(1), i["o"])

    scores = 7.0 * rows * length * (length + 1) * heads * size
    return _case("attention_layer", rows * length, dim, shapes, scores, plain, ours, tables)


def mlp_layer(tokens: int = ROWS * LENGTH, dim: int = DIM, width: int = MLP) -> Case:
    """x + residual, RMSNorm, SwiGLU between three linears, and their sum."""
    shapes = {"norm": (dim,), "gate": (width, dim), "up": (width, dim), "down": (dim, width)}

    def plain(i: Inputs) -> Tensor:
        total = i["x"] + i["residual"]
        h = plain_rms_norm(total, i["norm"])
        return total + F.linear(F.silu(F.linear(h, i["gate"])) * F.linear(h, i["up"]), i["down"])

    def ours(i: Inputs) -> Tensor:
        weights = (i["gate"], i["up"], i["down"])
        y, total = kernels.add_norm_gated_mlp(i["x"], i["residual"], i["norm"], *weights, EPS)
        return total + y

    return _case("mlp_layer", tokens, dim, shapes, 0.0, plain, ours, lambda device: {})


def _case(
    kernel: str,
    tokens: int,
    dim: int,
    shapes: Mapping[str, tuple[int, ...]],
    operations: float,
    plain: Forward,
    ours: Forward,
    others: Callable[[torch.device], Inputs],
) -> Case:
    """operations: beside those of the linears, which are 6 for each weight and token."""

    def inputs(device: torch.device, generator: torch.Generator) -> Inputs:
        def normal(*shape: int) -> Tensor:
            kind: Any = {"generator": generator, "device": device, "dtype": torch.bfloat16}
            return torch.randn(*shape, **kind) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)

        made = {name: normal(*shape).requires_grad_() for name, shape in shapes.items()}
        rows = {name: dim**0.5 * normal(tokens, dim) for name in ("x", "residual", "dy")}
        rows = {name: x.requires_grad_(name != "dy") for name, x in rows.items()}
        return made | rows | others(device)

    count = sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) > 1)
    streams: Sequence[str] = ("x", "residual") if "norm" in shapes else ("x",)
    return Case(
        kernel,
        f"N={tokens} D={dim}",
        6.0 * count * tokens + operations,
        "bf16",
        inputs,
        (
            *torch_and_compiled(plain),
            simple("ours", ours),
            simple("ours, compiled", ours, compiled=True),
        ),
        wrt=(*streams, *shapes),
        seeds=("dy",),
        sets=1,
    )
