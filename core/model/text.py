"""The decoder: RMSNorm, grouped-query attention with RoPE, SwiGLU, residual adds.

Shape legend: N tokens of a packed row, D model width, H query heads, Hk key/value heads, Dh head
size, F MLP width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor

import kernels
from core.config import TextConfig
from core.forward import Site
from core.model.groups import attention_in, norm_mlp
from core.model.layers import Logits, dropout, embed, head, linear, rms_norm, rope
from params.tree import Tree

# What every block takes beside x: cos, sin, rows, cu_seqlens, and with dropout seed and salt.
Context = dict[str, Tensor]


def rope_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin ``[N, Dh/2]`` fp32 of position times ``theta ** (-2 i / Dh)``.

    RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2.
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[:, None] * theta ** (-exponents / head_size)
    return angles.cos(), angles.sin()


def attend(
    p: Tree,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int | None,
    max_seqlen: int | None,
) -> Tensor:
    """Causal attention inside each document: q ``[N, H, Dh]``, k and v ``[N, Hk, Dh]``."""
    return kernels.attention(q, k, v, cu_seqlens, causal=True, window=window, max_seqlen=max_seqlen)


def block(
    site: Site,
    config: TextConfig,
    window: int | None,
    max_seqlen: int | None,
    p: Tree,
    x: Tensor,
    ctx: Context,
) -> Tensor:
    """One layer: x ``[N, D]`` -> ``[N, D]``. Params and tensors are arguments, never captured."""
    split = partial(rearrange, pattern="n (h d) -> n h d", d=config.head_size)
    drop = partial(dropout, rate=config.dropout, seed=ctx.get("seed"))
    salt = ctx.get("salt", 0)
    attn, mlp = p["attn"], p["mlp"]

    projections = {f"attn.{name}": attn[name] for name in "qkv"}
    (q, k, v), x = attention_in(
        site, "attn_norm", p["attn_norm"], projections, x, eps=config.norm_eps
    )
    q, k, v = split(q), split(k), split(v)  # [N, H, Dh], [N, Hk, Dh] twice
    turn = partial(rope, eps=config.norm_eps)
    qk_norms = {name: attn[name] for name in ("q_norm", "k_norm") if config.qk_norm}
    q, k = site("rope", turn, qk_norms, q, k, ctx["cos"], ctx["sin"], ctx["rows"], at="attn")
    attention = partial(attend, window=window, max_seqlen=max_seqlen)
    o = site("attention", attention, {}, q, k, v, ctx["cu_seqlens"], at="attn")
    o = site("linear", linear, attn["o"], rearrange(o, "n h d -> n (h d)"), at="attn.o")

    o = drop(o, salt=salt)
    h, x = norm_mlp(site, "mlp_norm", "mlp", p["mlp_norm"], mlp, x, o, eps=config.norm_eps)
    return x + drop(h, salt=salt + 1)


def embed_tokens(site: Site, p: Tree, tokens: Tensor) -> Tensor:
    """tokens ``[N]`` -> ``[N, D]``."""
    return site("embed", embed, p["embed"], tokens, at="embed")


def decode(
    site: Site,
    config: TextConfig,
    p: Tree,
    x: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Logits:
    """The decoder's body and head: embeddings x ``[N, D]`` -> lazy logits ``[N, V]``."""
    cos, sin = rope_angles(positions, config.head_size, config.rope_theta)
    rows = torch.arange(len(x), device=x.device)  # of cos and sin, which are in the order of x
    ctx = {"cos": cos, "sin": sin, "rows": rows, "cu_seqlens": cu_seqlens}
    if seed is not None:
        ctx["seed"] = seed
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        # what differs between layers is a tensor, so that one compiled block serves all
        if seed is not None and config.dropout:
            ctx = ctx | {"salt": torch.full((), 2 * layer, device=x.device)}
        window = config.window_of(layer)
        run = partial(block, site.at(name), config, window, max_seqlen)
        x = site("block", run, p["blocks"][str(layer)], x, ctx, at=name, key=("text", window))
    x = site("norm", partial(rms_norm, eps=config.norm_eps), p["norm"], x, at="norm")
    unembed = "embed" if config.tied else "lm_head"
    return site("head", partial(head, softcap=config.softcap), p[unembed], x, at=unembed)
