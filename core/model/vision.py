"""The vision tower, a transformer over packed patches, and its two projectors.

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
    max_seqlen: int | None,
    equal: bool = False,
) -> Tensor:
    """Each patch attends to its whole picture: q, k, v ``[P, H, Dh]``.

    equal: every picture has ``max_seqlen`` patches, or none.
    """
    length = max_seqlen if equal else None
    return kernels.attention(
        q, k, v, cu_seqlens, causal=False, max_seqlen=max_seqlen, length=length
    )


def segment_ids(cu_seqlens: Tensor, length: int) -> Tensor:
    """The segment that each of ``length`` positions lies in: ``[length]`` int64."""
    starts = torch.zeros(length + 1, dtype=torch.int64, device=cu_seqlens.device)
    inner = cu_seqlens[1:-1].long()
    return starts.index_add(0, inner, torch.ones_like(inner)).cumsum(0)[:length]


def grid_coordinates(positions: Tensor, cu_seqlens: Tensor, grid: int) -> Tensor:
    """Each patch's (row, col) ``[P, 2]`` fp32, scaled to a grid x grid picture.

    The last of a picture's ``positions [P, 2]``, in merge order, is its bottom right corner and so
    gives its size. Pixel centres are at half numbers (align_corners=False).
    """
    last = (cu_seqlens[1:].long() - 1).clamp_min(0)
    size = (positions[last] + 1)[segment_ids(cu_seqlens, positions.shape[0])]  # [P, 2]
    return (positions + 0.5) * (grid / size) - 0.5


def learned_positions(site: Site, p: Tree, where: Tensor, grid: int) -> Tensor:
    """Bilinear interpolation of the learned table: where ``[P, 2]`` -> ``[P, D]``."""
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
    max_seqlen: int | None,
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
    attention = partial(attend, max_seqlen=max_seqlen, equal=equal)
    o = site("attention", attention, {}, q, k, v, cu_seqlens, at="attn")
    o = rearrange(o, "p h d -> p (h d)")
    x = x + site("linear", linear, attn["o"], o, at="attn.o")
    h = site("norm", norm, p["mlp_norm"], x, at="mlp_norm")
    return x + mlp(site.at("mlp"), p["mlp"], h, "")


def vision_tower(
    site: Site,
    config: VisionConfig,
    p: Tree,
    patches: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    valid: Tensor,
    max_seqlen: int | None = None,
    equal: bool = False,
) -> Tensor:
    """Patches ``[P, 3 p p]`` to features ``[P, D]``.

    patches: uint8 pixels, or floats scaled to [-1, 1]; positions ``[P, 2]`` (row, col); valid
    ``[P]`` bool: patches that belong to no picture become zeros, whatever they hold.
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
        run = partial(block, site.at(name), config, max_seqlen, equal)
        x = site("block", run, p["blocks"][str(layer)], x, cu_seqlens, at=name, key="vision")
    return site("norm", partial(layer_norm, eps=config.norm_eps), p["norm"], x, at="norm")


def shuffle_and_project(site: Site, merge: int, p: Tree, x: Tensor) -> Tensor:
    """Pixel shuffle and MLP: patch features ``[P, D]`` -> image tokens ``[P / merge^2, D_text]``.

    Patches are stored cell by cell, so that the shuffle is a reshape.
    """
    return mlp(site, p, rearrange(x, "(k c) d -> k (c d)", c=merge**2), "")


def resampler_block(
    site: Site,
    config: ProjectorConfig,
    eps: float,
    max_seqlen: int | None,
    p: Tree,
    latents: Tensor,
    x: Tensor,
    at_latents: Tensor,
    at_patches: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Queries attend to the patches and queries of their picture: latents ``[M Q, D]`` -> same.

    One packed row holds each picture's patches and then its queries, P + M Q positions, so that
    packed attention serves. The outputs at patches are not used.
    """
    norm, attn = partial(layer_norm, eps=eps), p["attn"]
    attention = partial(attend, max_seqlen=max_seqlen)
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
    max_seqlen: int | None = None,
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
    joint_max = None if max_seqlen is None else max_seqlen + queries
    joint = cu_seqlens + torch.arange(pictures + 1, device=device, dtype=torch.int32) * queries
    for layer in range(config.layers):
        name = f"blocks.{layer}"
        run = partial(resampler_block, site.at(name), config, eps, joint_max)
        args = (latents, x, at_latents, at_patches, joint)
        latents = site("block", run, p["blocks"][str(layer)], *args, at=name, key="resampler")
    latents = site("norm", partial(layer_norm, eps=eps), p["norm"], latents, at="norm")
    return site("linear", linear, p["out"], latents, at="out")
