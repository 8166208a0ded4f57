from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runners.data.images import Augment, ImageSpec, decode, fit, patchify
from runners.data.types import BadRecordError


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("p", "m", "rows", "columns"), [(4, 1, 2, 3), (3, 2, 4, 2), (2, 3, 3, 6)])
def test_patches_come_in_merge_order(p: int, m: int, rows: int, columns: int):
    image = picture(rows * p, columns * p)
    patches, positions = patchify(image, p, m)
    expected = [
        (cell_row * m + i, cell_column * m + j)
        for cell_row in range(rows // m)
        for cell_column in range(columns // m)
        for i in range(m)
        for j in range(m)
    ]
    assert [tuple(position) for position in positions] == expected
    assert positions.dtype == np.int64
    assert patches.dtype == np.uint8
    for patch, (row, column) in zip(patches, expected, strict=True):
        part = image[row * p : (row + 1) * p, column * p : (column + 1) * p]
        assert np.array_equal(patch.reshape(3, p, p), part.transpose(2, 0, 1))


def test_square_fit_takes_every_size_and_keeps_the_right_one():
    spec = ImageSpec(patch_size=8, image_size=32, merge=2)
    image = picture(32, 32)
    assert fit(image, spec) is image
    assert fit(picture(7, 100), spec).shape == (32, 32, 3)


def test_aspect_fit_keeps_the_shape_within_the_budget():
    spec = ImageSpec(patch_size=4, image_size=64, merge=2, fit="aspect")
    rng = random.Random(0)
    for _ in range(500):
        height, width = (round(10 ** rng.uniform(0, 4)) for _ in range(2))
        h, w = spec.target(height, width)
        assert h % 8 == w % 8 == 0
        assert 0 < h * w <= 64 * 64
    assert spec.target(100, 100) == (64, 64)
    assert spec.target(100, 400) == (32, 128)
    assert spec.target(1, 10_000) == (8, 512)


def test_augmentation_is_seeded_and_does_what_it_says():
    image = picture(40, 30)
    augment = Augment(flip=0.5, crop=0.3, colour=0.2)
    one, same = (augment(image, random.Random(5)) for _ in range(2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, augment(image, random.Random(6)))
    assert np.array_equal(Augment(flip=1)(image, random.Random(0)), image[:, ::-1])
    assert np.array_equal(Augment()(image, random.Random(0)), image)
    for seed in range(20):
        height, width, _ = Augment(crop=0.3)(image, random.Random(seed)).shape
        assert 28 <= height <= 40
        assert 21 <= width <= 30
    grey = Augment(colour=0.2)(np.full((2, 2, 3), 128, np.uint8), random.Random(1))
    assert abs(int(grey[0, 0, 0]) - 128) <= 26


def test_decoding_gives_upright_rgb_on_white(tmp_path: Path):
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:, :3] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    Image.fromarray(clear).convert("P").save(tmp_path / "palette.gif", transparency=0)
    expected = np.full((4, 6, 3), 255, np.uint8)
    expected[:, :3] = (255, 0, 0)
    assert np.array_equal(decode(tmp_path / "alpha.png"), expected)
    deep = np.full((3, 3), 32768, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert abs(int(decode(tmp_path / "deep.png")[0, 0, 0]) - 127) <= 1
    turned = Image.fromarray(picture(4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / "turned.png", exif=exif)
    assert decode(tmp_path / "turned.png").shape == (8, 4, 3)
    for name in ("palette.gif", "alpha.png"):
        assert decode(tmp_path / name).dtype == np.uint8


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])  # ours; Pillow's warning; its error
def test_decompression_bombs_are_refused_unopened(tmp_path: Path, side: int):
    (tmp_path / "bomb.png").write_bytes(png_of(side, side))
    with pytest.raises(BadRecordError, match=r"bomb\.png") as caught:
        decode(tmp_path / "bomb.png")
    assert caught.value.reason == "picture too large"


def test_damaged_files_are_bad_records(tmp_path: Path):
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 64)).save(buffer, "JPEG")
    whole = buffer.getvalue()
    damaged = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "text.jpg": b"not a picture",
        "hollow.png": png_of(10, 10),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadRecordError, match=name) as caught:
            decode(tmp_path / name)
        assert caught.value.reason == "picture unreadable"
    with pytest.raises(BadRecordError, match="does not exist"):
        decode(tmp_path / "absent.png")


def test_impossible_specs_are_refused():
    with pytest.raises(ValueError, match=r"multiple of patch_size x merge \(8 x 2\)"):
        ImageSpec(patch_size=8, image_size=40, merge=2)
    with pytest.raises(ValueError, match="fit is"):
        ImageSpec(8, 32, fit="crop")
    with pytest.raises(ValueError, match="queries"):
        ImageSpec(8, 32, projector="resampler")
    with pytest.raises(ValueError, match="projector is"):
        ImageSpec(8, 32, projector="linear")
