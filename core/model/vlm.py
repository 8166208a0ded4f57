"""The model in one page: pictures to tokens, tokens and image tokens to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from core.batch import Batch, check_fields, make_batch
from core.config import VLMConfig
from core.forward import Forward, Site, record_sites
from core.model.layers import Logits
from core.model.text import decode, embed_tokens
from core.model.vision import resample, segment_ids, shuffle_and_project, vision_tower
from core.sites import SiteInfo
from kernels.runtime import dispatch
from params.tree import Tree, map_leaves


@dataclass(frozen=True)
class Bounds:
    """Upper bounds on what batches hold. They change no number, only which kernels attention takes.

    Args:
        max_seqlen: tokens of a document.
        max_patches: patches of a picture.
        equal_pictures: each picture has exactly ``max_patches`` or none, so that attention may
            take them as a dense batch, which is faster.

    Raises:
        ValueError: ``equal_pictures`` without ``max_patches``.
    """

    max_seqlen: int | None = None
    max_patches: int | None = None
    equal_pictures: bool = False

    def __post_init__(self) -> None:
        if self.equal_pictures and self.max_patches is None:
            raise ValueError("equal_pictures needs max_patches: how many each picture has")


ANY = Bounds()


def vlm(config: VLMConfig, *, bounds: Bounds = ANY) -> Forward:
    """The forward of a config: ``forward(params, batch) -> logits [N, V]``.

    It is pure and stateless. Params come from ``init_params(config)`` or ``load_params``, batches
    from ``make_batch`` or a data loader. A config with a vision tower takes batches without
    pictures too; one without a vision tower raises ValueError for a batch that has some.

    Args:
        config: the model.
        bounds: what every batch keeps to.

    >>> from core import make_batch, preset, vlm
    >>> from params import init_params
    >>> config = preset("tiny")
    >>> batch = make_batch(torch.tensor([[1, 2, 3]]))
    >>> vlm(config)(init_params(config, seed=0), batch).shape[0]
    3
    """

    def build(site: Site) -> Callable[[Tree, Any], Any]:
        return partial(run, site, config, bounds)

    return Forward(build, _sites(config))


def run(
    site: Site, config: VLMConfig, bounds: Bounds, params: Tree, batch: Batch
) -> Tensor | Logits:
    """One pass over a packed batch (``core.batch`` lists its fields): logits ``[N, V]``."""
    check_fields(batch)
    text = site.at("text")
    x = embed_tokens(text, params["text"], batch["tokens"])
    if "patches" in batch:
        features = encode_images(site, config, params, batch, bounds)
        x = scatter_image_tokens(x, features, batch["image_slots"])
    logits = decode(
        text,
        config.text,
        params["text"],
        x,
        batch["positions"],
        batch["cu_seqlens"],
        batch.get("seed"),
        bounds.max_seqlen,
    )
    return logits if site.lazy else logits.dense()


def encode_images(
    site: Site, config: VLMConfig, params: Tree, batch: Batch, bounds: Bounds = ANY
) -> Tensor:
    """The vision tower and the projector: a batch's pictures to image tokens ``[K, D]``."""
    vision, projector = config.vision, config.projector
    if vision is None or projector is None:
        raise ValueError(
            "the batch has pictures but the config has no vision tower: "
            "drop the image fields, or choose a config with vision and projector"
        )
    patches, cu_seqlens = batch["patches"], batch["image_cu_seqlens"]
    used = batch["image_slots"] < batch["tokens"].shape[0]  # [K]
    if projector.kind == "mlp":
        valid = used.repeat_interleave(vision.merge**2)  # [P]
    else:
        valid = used[:: projector.queries][segment_ids(cu_seqlens, patches.shape[0])]
    x = vision_tower(
        site.at("vision"),
        vision,
        params["vision"],
        patches,
        batch["patch_positions"],
        cu_seqlens,
        valid,
        bounds.max_patches,
        bounds.equal_pictures,
    )
    at, p = site.at("projector"), params["projector"]
    if projector.kind == "mlp":
        return shuffle_and_project(at, vision.merge, p, x)
    return resample(at, projector, vision.norm_eps, p, x, cu_seqlens, bounds.max_patches)


def scatter_image_tokens(x: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """Puts ``features [K, D]`` into rows ``slots [K]`` of ``x [N, D]``. A slot of N is unused."""
    spare = torch.cat([x, x.new_zeros(1, x.shape[1])])  # row N takes the unused ones
    return spare.index_put((slots,), features.to(x.dtype))[:-1]


def _sites(config: VLMConfig) -> tuple[SiteInfo, ...]:
    """The sites of a config, recorded on a model that has the same ones and the smallest sizes."""
    thin = _thin(config)
    params = map_leaves(lambda leaf: torch.zeros(leaf.shape, device="cpu"), thin.param_spec())
    # plain torch, whatever backend the user asks for: the recording runs on a CPU
    with torch.no_grad(), kernels.override(**dispatch.plain()):
        return record_sites(lambda site: partial(run, site, thin, ANY), params, _example(thin))


def _thin(config: VLMConfig) -> VLMConfig:
    """The config with the smallest sizes. Sites depend on layers and their parts alone."""
    text = replace(config.text, vocab_size=2, dim=2, heads=1, kv_heads=1, head_dim=2, mlp_dim=1)
    if config.vision is None or config.projector is None:
        return VLMConfig(text)
    merge = config.vision.merge
    vision = replace(config.vision, dim=4, heads=1, mlp_dim=1, patch_size=1, image_size=merge)
    projector = replace(config.projector, hidden=1, queries=1, heads=1)
    return VLMConfig(text, vision, projector)


def _example(config: VLMConfig) -> Batch:
    """The smallest batch that reaches every site."""
    if config.vision is None or config.projector is None:
        batch = make_batch(torch.zeros(1, 2, dtype=torch.int64))
    else:
        side = config.vision.patch_size * config.vision.merge
        tokens = torch.ones(1, config.image_tokens(config.vision.merge**2), dtype=torch.int64)
        images = [torch.zeros(3, side, side, dtype=torch.uint8)]
        batch = make_batch(tokens, config=config, images=images, image_token=1)
    return {name: tensor.to("cpu") for name, tensor in batch.items()}
