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
from core.model.vision import encode, resample, segment_ids, shuffle_and_project
from core.sites import SiteInfo
from kernels.runtime import dispatch
from params.tree import Tree, map_leaves


@dataclass(frozen=True)
class Longest:
    """Upper bounds that batches will keep, in tokens a document and patches a picture.

    They change no number, only how much work a flash-attention kernel prepares for.
    equal_pictures: a picture has ``picture`` patches or none, so that attention may lay them side
    by side (64 of 256 patches, forward and backward on an H200: 205 TFLOP/s against 178).
    """

    document: int | None = None
    picture: int | None = None
    equal_pictures: bool = False

    def __post_init__(self) -> None:
        if self.equal_pictures and self.picture is None:
            raise ValueError("equal_pictures needs picture, how many patches each has")


ANY = Longest()


def vlm(config: VLMConfig, *, longest: Longest = ANY) -> Forward:
    """The forward of a config: ``forward(params, batch) -> logits [N, V]``.

    Pure and stateless: params come from ``init_params(config)`` or ``load_params``, batches from
    ``make_batch`` or the data loaders. A batch with pictures under a config without a vision tower
    raises ValueError; one without pictures is fine under either.
    """

    def build(site: Site) -> Callable[[Tree, Any], Any]:
        return partial(run, site, config, longest)

    return Forward(build, _sites(config))


def run(
    site: Site, config: VLMConfig, longest: Longest, params: Tree, batch: Batch
) -> Tensor | Logits:
    """One pass over a packed batch; see ``docs/guide.md`` for the batch's fields."""
    check_fields(batch)
    text = site.at("text")
    x = embed_tokens(text, params["text"], batch["tokens"])
    if "patches" in batch:
        features = look(site, config, params, batch, longest)
        x = place(x, features, batch["image_slots"])
    logits = decode(
        text, config.text, params["text"], x,
        batch["positions"], batch["cu_seqlens"], batch.get("seed"), longest.document,
    )  # fmt: skip
    return logits if site.lazy else logits.dense()


def look(
    site: Site, config: VLMConfig, params: Tree, batch: Batch, longest: Longest = ANY
) -> Tensor:
    """Pictures to image tokens ``[K, D]``."""
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
    x = encode(
        site.at("vision"), vision, params["vision"], patches, batch["patch_positions"],
        cu_seqlens, valid, longest.picture, longest.equal_pictures,
    )  # fmt: skip
    bridge, p = site.at("projector"), params["projector"]
    if projector.kind == "mlp":
        return shuffle_and_project(bridge, vision.merge, p, x)
    return resample(bridge, projector, vision.norm_eps, p, x, cu_seqlens, longest.picture)


def place(x: Tensor, features: Tensor, slots: Tensor) -> Tensor:
    """x ``[N, D]`` with ``features [K, D]`` at rows ``slots [K]``; unused slots (N) go nowhere."""
    spare = torch.cat([x, x.new_zeros(1, x.shape[1])])  # row N takes what is not used
    return spare.index_put((slots,), features.to(x.dtype))[:-1]


def _sites(config: VLMConfig) -> tuple[SiteInfo, ...]:
    """The sites of a config, found by running the narrowest model that has the same ones."""
    thin = _thin(config)
    params = map_leaves(lambda leaf: torch.zeros(leaf.shape, device="cpu"), thin.param_spec())
    # whatever backend the user asks for, plain torch runs anywhere
    with torch.no_grad(), kernels.override(**dispatch.plain()):
        return record_sites(lambda site: partial(run, site, thin, ANY), params, _example(thin))


def _thin(config: VLMConfig) -> VLMConfig:
    """The config with every size as small as can be. Sites depend on the number of layers and on
    what a layer is made of."""
    text = replace(
        config.text, vocab_size=2, dim=2, heads=1, kv_heads=1, head_dim=2, mlp_dim=1
    )  # fmt: skip
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
