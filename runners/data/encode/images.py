"""From pictures to patches: safe decoding, fitting to the grid, augmentation, merge order."""

from __future__ import annotations

import io
import os
import random
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from runners.data.encode.pixels import orientation_of, to_rgb, without_metadata
from runners.data.types import BadRecordError

# a closed list: some of Pillow's decoders start other programs (EPS)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # 150 MB decoded; more counts as a decompression bomb
MAX_TOGETHER = 100_000_000  # of all pictures of a record
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageSpec:
    """How the model takes pictures.

    patch_size: pixels. merge: pictures come as merge x merge cells of patches.
    image_size: pixels a side, nominal. fit: "square" scales every picture to image_size x
    image_size; "aspect" keeps its shape, with about as many patches at most.
    projector: "mlp" (a cell is a token) or "resampler" (`queries` tokens a picture).
    """

    patch_size: int
    image_size: int
    merge: int = 1
    fit: str = "square"
    projector: str = "mlp"
    queries: int = 0

    def __post_init__(self) -> None:
        if self.fit not in ("square", "aspect"):
            raise ValueError(f"fit is 'square' or 'aspect', not {self.fit!r}")
        if self.projector not in ("mlp", "resampler"):
            raise ValueError(f"projector is 'mlp' or 'resampler', not {self.projector!r}")
        if self.projector == "resampler" and self.queries < 1:
            raise ValueError(f"a resampler needs queries >= 1, not {self.queries}")
        if self.image_size < self.cell or self.image_size % self.cell:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of patch_size x merge "
                f"({self.patch_size} x {self.merge})"
            )

    @property
    def cell(self) -> int:
        """Pixels a side of a merge x merge cell."""
        return self.patch_size * self.merge

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def square_patches(self) -> int:
        """Patches of a picture of image_size x image_size."""
        return (self.image_size // self.patch_size) ** 2

    def tokens(self, num_patches: int) -> int:
        """Image tokens of a picture with that many patches."""
        return self.queries if self.projector == "resampler" else num_patches // self.merge**2

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that a picture is scaled to."""
        if self.fit == "square":
            return self.image_size, self.image_size
        cells = self.image_size // self.cell
        # Rows and columns of cells: rows * columns <= cells**2, rows / columns ~ height / width.
        rows = min(max(round(cells * (height / width) ** 0.5), 1), cells**2)
        columns = min(max(round(rows * width / height), 1), cells**2 // rows)
        return rows * self.cell, columns * self.cell


@dataclass(frozen=True)
class Augment:
    """Random changes for training. flip: chance of mirroring (it makes left right: not for
    questions that tell them apart); crop: largest part of a side cut off; colour: largest relative
    change of brightness and contrast."""

    flip: float = 0.0
    crop: float = 0.0
    colour: float = 0.0

    def __call__(self, image: np.ndarray, rng: random.Random) -> np.ndarray:
        """image: uint8 [H, W, 3] -> uint8 [H', W', 3]."""
        if self.crop:
            height, width = image.shape[:2]
            h = max(1, round(height * (1 - self.crop * rng.random())))
            w = max(1, round(width * (1 - self.crop * rng.random())))
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            image = image[top : top + h, left : left + w]
        if self.flip and rng.random() < self.flip:
            image = image[:, ::-1]
        if self.colour:
            brightness = 1 + self.colour * rng.uniform(-1, 1)
            contrast = 1 + self.colour * rng.uniform(-1, 1)
            levels = np.arange(256, dtype=np.float32)
            changed = ((levels - 128) * contrast + 128) * brightness
            image = changed.clip(0, 255).astype(np.uint8)[image]
        return image


def decode(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture file into uint8 [H, W, 3], upright, transparency on white.

    An animation gives its first picture. Values of 16 bits that are all below 4,096 count as 12
    bits, below 256 as 8. Unreadable metadata is ignored. Raises BadRecordError for a missing,
    damaged or too large file, a format not in `FORMATS`, and values without a white level (32 bits,
    or floats beyond 0 to 1).
    """
    with _guarded(path):
        _check_file(path)
        try:
            # As an open file: at a path, Pillow maps the pixels of grey TIFFs that lie on their
            # side into the wrong shape.
            with path.open("rb") as file:
                return _decoded(file, max_pixels)
        except (BadRecordError, Image.DecompressionBombError):
            raise
        except Exception:  # Pillow reads metadata on opening, and fails on some
            with path.open("rb") as file:
                bare, exif = without_metadata(file.read())
            if bare is None:
                raise
            return _decoded(io.BytesIO(bare), max_pixels, exif)


def decode_all(paths: Sequence[Path]) -> list[np.ndarray]:
    """`decode` of each picture, after `check_pixels`."""
    check_pixels(paths)
    return [decode(path) for path in paths]


def check_pixels(paths: Sequence[Path], max_pixels: int = MAX_TOGETHER) -> None:
    """Raises BadRecordError where pictures have over `max_pixels` together, by their files' heads.
    Files that cannot be opened are left to `decode`."""
    total = 0
    for path in paths:
        with suppress(BadRecordError), _guarded(path):
            _check_file(path)
            with Image.open(path, formats=FORMATS) as image:
                total += image.width * image.height
    if total > max_pixels:
        raise BadRecordError(
            "pictures too large together",
            f"{len(paths)} pictures ({paths[0]} the first) have {total:,} pixels together, more "
            f"than {max_pixels:,}",
        )


@contextmanager
def _guarded(path: Path) -> Iterator[None]:
    """Whatever Pillow raises at a file, as a BadRecordError that names it. Its warnings are about
    metadata, or said again by an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadRecordError as error:
        raise BadRecordError(error.reason, f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise BadRecordError("picture missing", f"{path} does not exist") from error
    except Image.DecompressionBombError as error:
        raise BadRecordError("picture too large", f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        why = f"it is no {', '.join(FORMATS)}, or of a kind with no reader, such as 64-bit floats"
        raise BadRecordError("picture unreadable", f"{path} cannot be decoded ({why})") from error
    except Exception as error:  # decoders raise anything at damaged files
        why = str(error) or type(error).__name__
        raise BadRecordError("picture unreadable", f"{path} cannot be decoded ({why})") from error


def _check_file(path: Path) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or a device might never end
        raise BadRecordError("picture missing", "it is not a file")


def _decoded(file: BinaryIO, max_pixels: int, exif: bytes = b"") -> np.ndarray:
    """exif: of the file, where it holds none itself."""
    with Image.open(file, formats=FORMATS) as image:
        if image.width * image.height > max_pixels:  # known before anything is unpacked
            raise BadRecordError(
                "picture too large",
                f"it has {image.width} x {image.height} pixels, more than {max_pixels:,}",
            )
        rgb = to_rgb(image)
        turn = _TURNS.get(_orientation(image, exif))
        return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _orientation(image: Image.Image, exif: bytes) -> int:
    """1 to 8 as EXIF counts; 1, upright, where the metadata does not say or cannot be read."""
    try:
        if exif:
            image.info["exif"] = exif
        # Pillow stops at the first broken entry, also before the one that is looked for.
        if found := orientation_of(image.info.get("exif", b"")):
            return found
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            return int(image.tag_v2.get(_ORIENTATION, 1))
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parsers raise anything at odd metadata; the picture is whole
        return 1


def fit(image: np.ndarray, spec: ImageSpec) -> np.ndarray:
    """Scale uint8 [H, W, 3] to the model's grid (bicubic, antialiased)."""
    height, width = spec.target(*image.shape[:2])
    if image.shape[:2] == (height, width):
        return image
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled)


def patchify(image: np.ndarray, patch_size: int, merge: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Cut uint8 [H, W, 3] into patches in merge order: cells row-major, patches row-major inside.

    Returns patches uint8 [H*W / p**2, 3*p*p], each flattened from (colour, y, x), and their
    positions int64 [H*W / p**2, 2] (row, column of the patch in the picture's grid).
    H and W are multiples of patch_size * merge.
    """
    height, width, _ = image.shape
    p, m = patch_size, merge
    rows, columns = height // (p * m), width // (p * m)
    cut = image.reshape(rows, m, p, columns, m, p, 3)  # R mr py C mc px c
    patches = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * p * p)
    return patches, grid_positions(rows, columns, m)


@lru_cache(maxsize=1024)
def grid_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """(row, column) of each patch of a grid of rows x columns cells, in merge order: int64."""
    grid = np.indices((rows * merge, columns * merge), np.int64).transpose(1, 2, 0)
    cells = grid.reshape(rows, merge, columns, merge, 2).transpose(0, 2, 1, 3, 4)
    positions = np.ascontiguousarray(cells.reshape(-1, 2))
    positions.flags.writeable = False  # shared by all pictures of this size
    return positions
