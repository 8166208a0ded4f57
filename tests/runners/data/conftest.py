from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runners.data.encode.encoder import Encoder
from runners.data.encode.images import ImageSpec
from runners.data.encode.tokenizer import ChatTokenizer, sample_texts, train_tokenizer
from runners.data.sources.shapes import Shapes

WriteLlava = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return train_tokenizer(sample_texts(Shapes(), 300))


@pytest.fixture(scope="session")
def images() -> ImageSpec:
    return ImageSpec(patch_size=8, image_size=32, merge=2)


@pytest.fixture
def encoder(tokenizer: ChatTokenizer, images: ImageSpec) -> Encoder:
    return Encoder(tokenizer, images, max_tokens=256)


@pytest.fixture
def write_llava(tmp_path: Path) -> WriteLlava:
    """Writes `count` records with pictures; `change` edits the list before it is written."""

    def write(count: int = 4, change: Callable[[list[Any]], Any] | None = None) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        records: list[Any] = []
        for i in range(count):
            picture = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"images/{i}.png")
            records.append(
                {
                    "id": f"r{i}",
                    "image": f"images/{i}.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nWhat is it?"},
                        {"from": "gpt", "value": f"title {i // 2}"},
                        {"from": "human", "value": "Which category?"},
                        {"from": "gpt", "value": "odd" if i % 2 else "even"},
                    ],
                }
            )
        if change is not None:
            records = change(records) or records
        path = tmp_path / "train.json"
        path.write_text(json.dumps(records))
        return path

    return write
