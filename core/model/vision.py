"""The eye and the bridge: a vision transformer over packed patches, and its two projectors.

Shape legend: P patches of all pictures of a batch, M pictures, K image tokens, D width of the
tower, H heads, Dh head size, Q resampler queries a picture, p patch size in pixels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import kernels
from core.config import ProjectorConfig, VisionConfig
from core.forward import Site
from core.model.layers import embed, layer_norm, linear
from params.tree import Tree


def attend(
    p: Tree,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    longest: int | None,
    equal: bool = False,
) -> Tensor:
    """Every patch sees every patch of its own picture: q, k, v ``[P, H, Dh]``.

    equal: all pictures that have patches have ``longest`` of them.
    """
    length = longest if equal else None
    return kernels.attention(q, k, v, cu_seqlens, causal=False, max_seqlen=longest, length=length)


def segment_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """Which segment each of ``length`` positions lies in ``[length]``, empty segments skipped."""
    starts = torch.zeros(length + 1, dtype=torch.int64, device=cu_seqlens.device)
    inner = cu_seqlens[1:-1].long()
    return starts.index_add(0, inner, torch.ones_like(inner)).cumsum(0)[:length]


def grid_coordinates(positions: Tensor, cu_seqlens: Tensor, grid: int) -> Tensor:
    """Each patch's place ``[P, 2]`` fp32 (row, col), stretched to a nominal grid x grid picture.

    positions ``[P, 2]``; the last patch of a picture, in merge order, is its bottom right corner,
    which gives the picture's own grid. Pixel-centre convention (align_corners=False).
    """
    last = (cu_seqlens[1:].long() - 1).clamp_min(0)
    size = (positions[last] + 1)[segment_ids(cu_seqlens, positions.shape[0])]  # [P, 2]
    return (positions + 0.5) * (grid / size) - 0.5


def learned_positions(site: Site, p: Tree, where: Tensor, grid: int) -> Tensor:
    """The table's four nearest rows mixed bilinearly: where ``[P, 2]`` -> ``[P, D]``."""
    where = where.clamp(0, grid - 1)
    low = where.floor().clamp_max(max(grid - 2, 0))
    high = (low + 1).clamp_max(grid - 1)
    part = where - low  # [P, 2]
    corners = [(low, low), (low, high), (high, low), (high, high)]
    ids = torch.stack([(r[:, 0] * grid + c[:, 1]).long() for r, c in corners], dim=1)  # [P, 4]
    row, col = part[:, 0], part[:, 1]
    shares = [(1 - row) * (1 - col), (1 - row) * col, row * (1 - col), row * col]
    rows = site("embed", embed, p, ids, at="positions")  # [P, 4, D]
    return torch.einsum("pc,pcd->pd", torch.stack(shares, dim=1).to(rows.dtype), rows)


def sincos_positions(where: Tensor, dim: int) -> Tensor:
    """Fixed 2-D sines and cosines: where ``[P, 2]`` -> ``[P, D]`` fp32.

    Half of the features for the row, half for the column, as in MAE
    (https://arxiv.org/abs/2111.06377) after Vaswani et al. 2017, section 3.5.
    """
    scale = 10_000.0 ** (-torch.arange(dim // 4, device=where.device) / (dim // 4))
    angles = where[:, :, None] * scale  # [P, 2, D/4]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


def mlp(site: Site, p: Tree, x: Tensor, at: str) -> Tensor:
    """``down(gelu(up(x)))``, tanh-GELU (https://arxiv.org/abs/1606.08415)."""
    h = F.gelu(site("linear", linear, p["up"], x, at=f"{at}up"), approximate="tanh")
    return site("linear", linear, p["down"], h, at=f"{at}down")


def block(
    site: Site,
    config: VisionConfig,
    longest: int | None,
    equal: bool,
    p: Tree,
    x: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """One layer: x ``[P, D]`` -> ``[P, D]``."""
    norm = partial(layer_norm, eps=config.norm_eps)
    heads = partial(rearrange, pattern="p (h d) -> p h d", h=config.heads)
    attn = p["attn"]
    h = site("norm", norm, p["attn_norm"], x, at="attn_norm")
    q, k, v = (heads(site("linear", linear, attn[n], h, at=f"attn.{n}")) for n in "qkv")
    attention = partial(attend, longest=longest, equal=equal)
    o = site("attention", attention, {}, q, k, v, cu_seqlens, at="attn")
    o = rearrange(o, "p h d -> p (h d)")
    x = x + site("linear", linear, attn["o"], o, at="attn.o")
    h = site("norm", norm, p["mlp_norm"], x, at="mlp_norm")
    return x + mlp(site.at("mlp"), p["mlp"], h, "")


def encode(
    site: Site,
    config: VisionConfig,
    p: Tree,
    patches: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    valid: Tensor,
    longest: int | None = None,
    equal: bool = False,
) -> Tensor:
    """Pictures to features: patches ``[P, 3 p p]`` -> ``[P, D]``.

    patches: uint8 pixels, or floats scaled to [-1, 1]; positions ``[P, 2]`` (row, col); valid
    ``[P]`` bool: what is not a picture's patch is replaced by zeros here, whatever it holds.
    """
    pixels = patches.float() / 127.5 - 1 if patches.dtype == torch.uint8 else patches
    pixels = torch.where(valid[:, None], pixels, 0.0)
    x = site("linear", linear, p["patch_embed"], pixels, at="patch_embed")
    where = grid_coordinates(positions.where(valid[:, None], 0), cu_seqlens, config.grid)
    if config.positions == "learned":
        x = x + learned_positions(site, p["positions"], where, config.grid)
    else:
        x = x + sincos_positions(where, config.dim).to(x.dtype)
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        run = partial(block, site.at(name), config, longest, equal)
        x = site("block", run, p["blocks"][str(layer)], x, cu_seqlens, at=name, key="vision")
    return site("norm", partial(layer_norm, eps=config.norm_eps), p["norm"], x, at="norm")


def shuffle_and_project(site: Site, merge: int, p: Tree, x: Tensor) -> Tensor:
    """Pixel shuffle and MLP: patch features ``[P, D]`` -> image tokens ``[P / merge^2, D_text]``.

    Patches come cell by cell, so the shuffle is a reshape.
    """
    return mlp(site, p, rearrange(x, "(k c) d -> k (c d)", c=merge**2), "")


def resampler_block(
    site: Site, config: ProjectorConfig, eps: float, longest: int | None, p: Tree,
    latents: Tensor, x: Tensor, at_latents: Tensor, at_patches: Tensor, cu_seqlens: Tensor,
) -> Tensor:  # fmt: skip
    """Queries look at [patches; queries] of their picture: latents ``[M Q, D]`` -> the same shape.

    Patches and queries are interleaved picture by picture into one packed row of P + M Q
    positions, so that the model's one varlen attention serves; only the queries' rows ask.
    """
    norm, attn = partial(layer_norm, eps=eps), p["attn"]
    attention = partial(attend, longest=longest)
    heads = partial(rearrange, pattern="p (h d) -> p h d", h=config.heads)
    h = site("norm", norm, p["latent_norm"], latents, at="latent_norm")
    x = site("norm", norm, p["patch_norm"], x, at="patch_norm")
    both = x.new_zeros(x.shape[0] + h.shape[0], x.shape[1])
    both = both.index_put((at_patches,), x).index_put((at_latents,), h)
    asked = site("linear", linear, attn["q"], h, at="attn.q")
    q = heads(torch.zeros_like(both, dtype=asked.dtype).index_put((at_latents,), asked))
    k = heads(site("linear", linear, attn["k"], both, at="attn.k"))
    v = heads(site("linear", linear, attn["v"], both, at="attn.v"))
    o = site("attention", attention, {}, q, k, v, cu_seqlens, at="attn")[at_latents]
    latents = latents + site(
        "linear", linear, attn["o"], rearrange(o, "p h d -> p (h d)"), at="attn.o"
    )
    h = site("norm", norm, p["mlp_norm"], latents, at="mlp_norm")
    return latents + mlp(site.at("mlp"), p["mlp"], h, "")


def resample(
    site: Site,
    config: ProjectorConfig,
    eps: float,
    p: Tree,
    x: Tensor,
    cu_seqlens: Tensor,
    longest: int | None = None,
) -> Tensor:
    """Perceiver resampler: patch features ``[P, D]`` -> image tokens ``[M Q, D_text]``."""
    pictures, queries = cu_seqlens.shape[0] - 1, config.queries
    device = x.device
    rows = site("embed", embed, p["queries"], torch.arange(queries, device=device), at="queries")
    latents = rows.repeat(pictures, 1)  # [M Q, D]
    picture = torch.arange(pictures, device=device)
    at_patches = torch.arange(x.shape[0], device=device)
    at_patches = at_patches + segment_ids(cu_seqlens, x.shape[0]) * queries
    ends = cu_seqlens[1:].long()[:, None] + picture[:, None] * queries
    at_latents = (ends + torch.arange(queries, device=device)).flatten()
    joint_longest = None if longest is None else longest + queries
    joint = cu_seqlens + torch.arange(pictures + 1, device=device, dtype=torch.int32) * queries
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        run = partial(resampler_block, site.at(name), config, eps, joint_longest)
        args = (latents, x, at_latents, at_patches, joint)
        latents = site("block", run, p["blocks"][str(layer)], *args, at=name, key="resampler")
    latents = site("norm", partial(layer_norm, eps=eps), p["norm"], latents, at="norm")
    return site("linear", linear, p["out"], latents, at="out")
