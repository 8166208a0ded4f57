"""Documents that show pictures, for `bench train --pictures`: random pixels, then text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core import VLMConfig
from runners.data.encode.images import ImageSpec, patchify
from runners.data.types import NO_LABEL, Document
from runners.training.setup import image_spec

MARK = 1  # the token that stands where a picture's go: its row of the embedding is replaced


@dataclass(frozen=True)
class Pictures:
    """The pictures at the head of every document, of the model's nominal size."""

    images: ImageSpec
    count: int

    @property
    def patches(self) -> int:
        """Of a document."""
        return self.count * self.images.square_patches

    @property
    def tokens(self) -> int:
        """That a document's pictures take."""
        return self.count * self.images.tokens(self.images.square_patches)

    def bare(self, length: int) -> Document:
        """A document of ``length`` tokens, pictures included, of which only the cost is used."""
        nothing = np.zeros(0, np.int64)
        pixels = np.broadcast_to(np.uint8(0), (self.patches, self.images.patch_dim))
        counts = (self.images.square_patches,) * self.count
        tokens = np.zeros(length, np.int64)
        return Document("", tokens, tokens, nothing, pixels, np.zeros((0, 2), np.int64), counts)

    def document(self, text: np.ndarray, generator: np.random.Generator) -> Document:
        """Random pictures, and after them a text to learn whole."""
        images, side = self.images, self.images.image_size
        drawn = (
            generator.integers(0, 256, (side, side, 3), np.uint8, endpoint=False)
            for _ in range(self.count)
        )
        cut = [patchify(picture, images.patch_size, images.merge) for picture in drawn]
        tokens = np.concatenate([np.full(self.tokens, MARK, np.int64), text])
        labels = np.append(tokens[1:], NO_LABEL)
        labels[: self.tokens - 1] = NO_LABEL  # what follows is a picture's token
        return Document(
            "",
            tokens,
            labels,
            np.arange(self.tokens),
            np.concatenate([patches for patches, _ in cut]),
            np.concatenate([positions for _, positions in cut]),
            tuple(len(patches) for patches, _ in cut),
        )


def pictures_of(model: VLMConfig, count: int) -> Pictures | None:
    """So many pictures of the size that the model is made for; None for 0. Raises ValueError for a
    model without a vision tower."""
    if not count:
        return None
    images = image_spec(model)
    if images is None:
        raise ValueError("this model has no vision tower")
    return Pictures(images, count)
