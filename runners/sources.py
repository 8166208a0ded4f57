"""Which data a run trains on, and what is held out of it."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import VLMConfig
from runners.config import TrainConfig
from runners.data.llava import Llava
from runners.data.shapes import COLOURS, SHAPES, Shapes
from runners.data.text import TextFiles
from runners.data.types import Source
from runners.errors import UserError


@dataclass(frozen=True)
class Sources:
    """The data of a run. held_out: by name; ``val`` measures training, others only its end."""

    train: Source
    held_out: Mapping[str, Source]
    ordered: bool = False  # the train items come in an order of their own: do not shuffle them


def open_sources(config: TrainConfig, model: VLMConfig) -> Sources:
    """The data that ``--data`` names. Raises UserError where it cannot be read."""
    if config.data == "shapes":
        return _shapes(config, model)
    if config.chat:
        pictures = partial(
            Llava, config.data,
            images=config.image_root, fraction=config.val_fraction, turns=config.turns,
        )  # fmt: skip
        if not config.val_fraction:
            return Sources(pictures(split="all", fraction=0.5), {})
        held_out = {"val": pictures(split="val")}
        return Sources(pictures(split="train"), held_out)
    paths = [config.data] if Path(config.data).exists() else sorted(glob.glob(config.data))
    if not paths:
        raise UserError(
            f"--data {config.data} is neither 'shapes' nor a file, a folder or a glob that exists"
        )
    text = partial(TextFiles, paths, documents=config.documents)
    if not config.val_fraction:
        return Sources(text(split="all"), {})
    train, val = (text(split=s, fraction=config.val_fraction) for s in ("train", "val"))
    return Sources(train, {"val": val})


def _shapes(config: TrainConfig, model: VLMConfig) -> Sources:
    if model.vision is None:
        raise UserError(
            f"--data shapes has pictures, but --preset {config.preset} has no vision part: "
            "choose another preset, or text"
        )
    shapes = partial(
        Shapes, config.seed,
        size=model.vision.image_size, kinds=config.kinds,
        max_objects=config.max_objects, questions=config.questions, ramp=config.ramp,
        colours=tuple(COLOURS)[: config.colours], shapes=SHAPES[: config.shapes],
    )  # fmt: skip
    held_out: dict[str, Source] = {name: shapes(split=name) for name in ("val", "unseen")}
    return Sources(shapes(split="train"), held_out, ordered=True)
