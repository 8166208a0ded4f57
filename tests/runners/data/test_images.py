from __future__ import annotations

import io
import itertools
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import core
from runners.data.encode import images
from runners.data.encode.images import Augment, ImageSpec, decode, fit, patchify
from runners.data.types import NO_LABEL, BadRecordError


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
    # workers do without torch, so there are two of each
    theirs = core.patchify(torch.from_numpy(image).permute(2, 0, 1), p, m)
    assert all(
        np.array_equal(a, b.numpy()) for a, b in zip((patches, positions), theirs, strict=True)
    )
    assert NO_LABEL == core.batch.IGNORE


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
    assert np.array_equal(decode(tmp_path / "palette.gif"), expected)


def chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png_of(
    width: int, height: int, rows: bytes = b"", more: bytes = b"", bits: int = 8, colour: int = 2
) -> bytes:
    """A PNG of given rows, each after a byte 0; without them one that claims a size. more: chunks
    between head and rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


RAMP = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 16 bits, of each level of 8 one


@pytest.mark.parametrize(
    ("levels", "name", "expected"),
    [
        (RAMP, "a.png", RAMP / 257),
        (RAMP, "a.tif", RAMP / 257),
        (RAMP.astype(">u2"), "a.tif", RAMP / 257),
        (RAMP, "a.pgm", RAMP / 257),
        (RAMP // 16, "a.png", RAMP // 16 / 4095 * 255),  # 12 bits in 16
        (RAMP // 16, "a.tif", RAMP // 16 / 4095 * 255),
        (RAMP // 257, "a.png", RAMP // 257),  # 8 bits in 16
        (RAMP * 0, "a.png", RAMP * 0),
        (RAMP.astype(np.int32), "a.tif", RAMP / 257),
        (RAMP.astype(np.int32) // 16, "a.tif", RAMP // 16 / 4095 * 255),
        ((RAMP / 65535).astype(np.float32), "a.tif", RAMP / 257),
        (RAMP.astype(np.int32) * 2, "a.tif", None),
        (RAMP.astype(np.int32) - 1, "a.tif", None),
        (RAMP.astype(np.float32), "a.tif", None),
        (np.full((2, 2), np.nan, np.float32), "a.tif", None),
    ],
)
def test_deep_grey_is_scaled_or_refused_by_name(
    tmp_path: Path, levels: np.ndarray, name: str, expected: np.ndarray | None
):
    Image.fromarray(levels).save(tmp_path / name)
    if expected is None:
        with pytest.raises(BadRecordError, match=r"a\.tif: its values go from .* 8 or 16 bits"):
            decode(tmp_path / name)
        return
    grey = np.rint(expected).astype(np.uint8)
    assert np.abs(decode(tmp_path / name)[:, :, 0].astype(int) - grey).max() == 0


def test_grey_with_a_sign_has_its_own_white(tmp_path: Path):
    Image.fromarray(RAMP // 2).save(tmp_path / "a.tif", tiffinfo={339: 2})
    expected = np.rint(RAMP // 2 / 32767 * 255)
    assert np.array_equal(decode(tmp_path / "a.tif")[..., 0], expected)


def test_deep_colours_are_never_black(tmp_path: Path):
    """12 or 8 bits of colour in 16, of which Pillow takes the upper 8; black itself stays."""
    wide = np.stack([RAMP, RAMP[::-1], RAMP.T], -1)
    opaque = np.full((16, 16, 1), 65535, np.uint16)
    for levels, clear, white in (
        (wide, None, 65535),
        (wide // 16, None, 4095),
        (wide // 257, None, 255),
        (wide // 16, opaque, 4095),
        (wide // 16, opaque // 16, 4095),
        (wide * 0, opaque, 65535),
    ):
        pixels = levels if clear is None else np.concatenate([levels, clear], -1)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        (tmp_path / "a.png").write_bytes(png_of(16, 16, rows, b"", 16, 2 if clear is None else 6))
        error = np.abs(decode(tmp_path / "a.png") - levels / white * 255)
        assert error.max() < (1 if white == 65535 else 0.51), (white, clear is None)
    rows = np.array([[100, 200, 4000], [4000, 100, 0]], ">u2").tobytes()
    more = chunk(b"tRNS", struct.pack(">HHH", 100, 200, 4000))
    (tmp_path / "a.png").write_bytes(png_of(2, 1, b"\0" + rows, more, 16, 2))
    assert decode(tmp_path / "a.png")[0].tolist() == [[255] * 3, [249, 6, 0]]
    rows = np.array([0, 65535, 4000, 65535], ">u2").tobytes()  # grey with transparency
    (tmp_path / "a.png").write_bytes(png_of(2, 1, b"\0" + rows, b"", 16, 4))
    with pytest.raises(BadRecordError, match=r"a\.png: its 16 bits end below 4,096"):
        decode(tmp_path / "a.png")


def test_transparent_levels_of_any_depth_are_white(tmp_path: Path):
    for bits, level in ((1, 1), (1, 0), (2, 2), (4, 9), (8, 200), (16, 40_000)):
        largest = 2**bits - 1
        other = largest // 3 if bits > 1 else 1 - level
        both = np.array([level, other])
        if bits == 16:
            row = both.astype(">u2").tobytes()
        else:
            row = bytes([level << (8 - bits) | (other << (8 - 2 * bits) if bits < 8 else 0)])
            row += bytes([other]) * (bits == 8)
        more = chunk(b"tRNS", struct.pack(">H", level))
        (tmp_path / "a.png").write_bytes(png_of(2, 1, b"\0" + row, more, bits, 0))
        found = decode(tmp_path / "a.png")[0, :, 0].tolist()
        assert found == [255, round(other / largest * 255)], bits
    rows = np.array([[1000, 2000, 60_000], [60_000, 1000, 0]], ">u2").tobytes()
    more = chunk(b"tRNS", struct.pack(">HHH", 1000, 2000, 60_000))
    (tmp_path / "a.png").write_bytes(png_of(2, 1, b"\0" + rows, more, 16, 2))
    assert decode(tmp_path / "a.png")[0].tolist() == [[255] * 3, [234, 3, 0]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_that_a_tiff_can_hold_is_seen(tmp_path: Path, mode: str):
    white = Image.new("RGB", (4, 4), "white").convert(mode if mode != "PA" else "P").convert(mode)
    white.save(tmp_path / "a.tif")
    assert (decode(tmp_path / "a.tif") >= 254).all()


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert decode(tmp_path / name)[0, 0].tolist() == [255, 0, 0], name


TAGS = (*range(0x100, 0x120), 0x11A, 0x11B, 0x128, 0x131, 0x132, 0x13B, 0x8769, 0x8825, 0xA005)
SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)  # bytes of a value, by type


def odd_exif(rng: random.Random) -> bytes:
    """A block of EXIF that says a quarter turn, among entries of any type, size and place."""
    order = rng.choice("<>")
    entries = [(0x112, 3, 1, struct.pack(order + "HH", 6, 0))]
    for _ in range(rng.randrange(1, 9)):
        tag = rng.choice((*TAGS, rng.randrange(1 << 16)))
        if tag != 0x112:
            count = rng.choice((0, 1, 1, 1, 2, 3, 4, 100, 2**31))
            value = rng.choice((rng.randbytes(4), struct.pack(order + "I", rng.randrange(200))))
            entries.append((tag, rng.randrange(16), count, value))
    rng.shuffle(entries)
    exif = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    exif += struct.pack(order + "H", len(entries))
    exif += b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return exif + rng.randbytes(rng.choice((0, 4, 60)))


def look_at_odd_exif(folder: Path, seeds: range) -> None:
    plain = Image.fromarray(picture(16, 32))
    for seed in seeds:
        rng = random.Random(seed)
        exif = odd_exif(rng)
        kind = rng.choice(("JPEG", "PNG", "WEBP"))
        path = folder / f"a.{kind.lower()}"
        plain.save(path, kind)
        data = path.read_bytes()
        if kind == "JPEG":
            segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
            path.write_bytes(data[:2] + segment + data[2:])
        elif kind == "PNG":
            path.write_bytes(data[:33] + chunk(b"eXIf", exif[6:]) + data[33:])
        else:
            plain.save(path, kind, exif=exif)
        assert decode(path).shape == (32, 16, 3), (seed, kind)


def test_no_exif_stops_a_picture_or_its_turn(tmp_path: Path):
    look_at_odd_exif(tmp_path, range(60))


def test_all_turns_are_undone(tmp_path: Path):
    image = Image.fromarray(picture(16, 32))
    for orientation in (*range(10), 65535):
        image.save(tmp_path / "a.png", exif=(exif := image.getexif()))
        exif[0x112] = orientation
        image.save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as saved:
            expected = ImageOps.exif_transpose(saved) if 1 <= orientation <= 8 else image
        assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(expected)), orientation
    for orientation, (mode, levels) in itertools.product(
        range(2, 9), (("L", RAMP[:5] >> 8), ("I;16", RAMP[:5]), ("RGB", picture(5, 16)))
    ):
        image = Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.uint8))
        image.save(tmp_path / "a.tif", tiffinfo={274: orientation})
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes())))
        expected = np.asarray(upright) // (257 if mode == "I;16" else 1)
        found = decode(tmp_path / "a.tif")
        assert np.array_equal(found if mode == "RGB" else found[..., 0], expected), orientation


def test_broken_metadata_does_not_drop_a_picture(tmp_path: Path):
    rows = b"".join(b"\0" + row.tobytes() for row in picture(4, 4))
    bomb = b"a\0\0" + zlib.compress(b"x" * 2_000_000)
    wrong_sum = chunk(b"tEXt", b"a\0b")[:-1] + b"?"
    for more in (chunk(b"zTXt", bomb), wrong_sum, chunk(b"iCCP", bomb), chunk(b"pHYs", b"")):
        (tmp_path / "a.png").write_bytes(png_of(4, 4, rows, more))
        assert np.array_equal(decode(tmp_path / "a.png"), picture(4, 4))
    Image.fromarray(picture(4, 4)).save(tmp_path / "a.tif", tiffinfo={305: "made by", 700: b"xmp"})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(struct.pack("<HH", 305, 2))
    data[at + 2 : at + 12] = struct.pack("<HII", 5, 2**30, 2**31)
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(decode(tmp_path / "a.tif"), picture(4, 4))


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])  # ours; Pillow's warning; its error
def test_decompression_bombs_are_refused_unopened(tmp_path: Path, side: int):
    (tmp_path / "bomb.png").write_bytes(png_of(side, side))
    with pytest.raises(BadRecordError, match=r"bomb\.png") as caught:
        decode(tmp_path / "bomb.png")
    assert caught.value.reason == "picture too large"


def test_damaged_files_are_bad_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
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
    for error in (TypeError("odd"), AttributeError(), RecursionError(), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(images, "to_rgb", lambda image, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(BadRecordError, match=f"{type(error).__name__}|odd"):
                decode(tmp_path / "cut.jpg")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadRecordError, match=r"pipe\.png: it is not a file"):
        decode(tmp_path / "pipe.png")
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
