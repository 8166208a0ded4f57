"""Pixels of any kind to 8 bits of red, green and blue; and files without their metadata."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from runners.data.types import BadRecordError

_PNG = b"\x89PNG\r\n\x1a\n"
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO, _ORIENTATION = 258, 262, 0, 274  # tags of TIFF
_FORMAT, _SIGNED = 339, 2
_WHOLE = {1: "B", 3: "H", 4: "I"}  # types of TIFF
# All that a TIFF's pixels depend on: sizes, strips, tiles, colours, compression, orientation.
_NEEDED = {*range(254, 280), 284, 317, *range(320, 326), *range(330, 340), 347, *range(512, 522)}
_NEEDED |= {*range(529, 533)}


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as "RGB", transparency on white. Raises BadRecordError where its
    numbers have no white."""
    # PNG says which level is transparent in the file's bits, not in those of the decoded picture.
    raw, file = _raw_mode(image), getattr(image, "fp", None)
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey(image)).convert("RGB")
    if ";16" in raw and (highest := _colours(image).max()) < 16:
        image = _brightened(image, file, raw, highest)
    clear = image.info.get("transparency")
    if isinstance(clear, int) and raw in ("L;2", "L;4"):
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    elif isinstance(clear, tuple) and raw == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in clear)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or clear is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of a PNG or a TIFF lie in its file, in Pillow's words: "RGB;16B"."""
    tiles = getattr(image, "tile", None)
    if not tiles or image.format not in ("PNG", "TIFF"):
        return ""
    args = tiles[0][3]
    return args if isinstance(args, str) else args[0]


def _colours(image: Image.Image) -> np.ndarray:
    """Without transparency."""
    pixels = np.asarray(image)
    return pixels[..., :3] if pixels.ndim == 3 else pixels


def _brightened(image: Image.Image, file: BinaryIO | None, raw: str, highest: int) -> Image.Image:
    """Colours of 16 bits that hold 12 or 8, of which Pillow gives the high bytes: almost black."""
    name, _, order = raw.partition(";16")
    native = "L" if sys.byteorder == "little" else "B"
    low_bytes = f"{name};16{'B' if (native if order == 'N' else order) == 'L' else 'L'}"
    try:
        assert file is not None
        file.seek(0)
        with Image.open(file, formats=[image.format or ""]) as low:
            tiles: Any = low
            tiles.tile = [
                (codec, *where, low_bytes if isinstance(args, str) else (low_bytes, *args[1:]))
                for codec, *where, args in tiles.tile
            ]
            levels = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    except (ValueError, KeyError) as error:  # Pillow cannot read these the other way round
        if not highest:
            return image
        raise BadRecordError(
            "picture depth", "its 16 bits end below 4,096, which is almost black: save it with 8"
        ) from error
    white = 255 if levels[..., :3].max() < 256 else 4095
    whites = np.where(levels.max((0, 1)) <= white, white, 65535)
    bright = Image.fromarray(np.rint(levels * (255 / whites)).astype(np.uint8), image.mode)
    if isinstance(clear := image.info.get("transparency"), tuple):
        bright.putalpha(Image.fromarray(np.where((levels == clear).all(-1), 0, 255).astype("u1")))
    return bright


def _grey(image: Image.Image) -> np.ndarray:
    """Deep grey to uint8 [H, W]; convert() would clip it to white."""
    levels = np.asarray(image)
    least, most = levels.min(), levels.max()
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        white, largest = 1, 1
    elif tags.get(_BITS) == (12,):
        white = largest = 4095
    elif tags.get(_BITS) == (16,) and tags.get(_FORMAT) == (_SIGNED,):
        white = next((white for white in (255, 4095) if most <= white), 32767)
        largest = 32767
    else:
        # Some write 12 or 8 bits into 16. PPM names its white, and Pillow scales after it.
        fits = [white for white in (255, 4095, 65535) if most <= white]
        white, largest = 65535 if image.format == "PPM" else next(iter(fits), 65535), 65535
    if not (least >= 0 and most <= largest):  # NaN neither
        raise BadRecordError(
            "picture depth",
            f"its values go from {least} to {most}, which of them is white nothing says: save it "
            "with 8 or 16 bits",
        )
    grey = np.rint(levels * np.float32(255 / white)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[levels == clear] = 255
    return grey


def without_metadata(data: bytes) -> tuple[bytes | None, bytes]:
    """A file of a picture without all that its pixels do not depend on, and its EXIF. None for
    formats whose metadata nobody reads."""
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    if data.startswith(_PNG):
        return _bare_png(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _bare_tiff(data), b""
    return None, b""


def _bare_jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [data[:2]], b"", 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:  # up to the scan
        if data[at + 1] == 0xFF:  # a byte that fills
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        marker, segment = data[at + 1], data[at:end]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[4:]
        # Of applications' segments only Adobe's, which says what colours are; no comments.
        if (not 0xE0 <= marker <= 0xEF and marker != 0xFE) or (
            marker == 0xEE and len(segment) >= 16
        ):
            kept.append(segment)
        at = end
    return b"".join(kept) + data[at:], exif


def _bare_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, at = [_PNG], b"", len(_PNG)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        if kind[:1].isupper() or kind == b"tRNS":  # without those there is no picture
            kept.append(data[at:end])
        at = end
    return b"".join(kept), exif


def _bare_tiff(data: bytes) -> bytes:
    """The first picture's directory with every other entry made a byte that means nothing."""
    bare = bytearray(data)
    for at, order in _entries(data):
        if struct.unpack_from(order + "H", data, at)[0] not in _NEEDED:
            struct.pack_into(order + "HHII", bare, at, 65000, 1, 1, 0)
    return bytes(bare)


def orientation_of(exif: bytes) -> int | None:
    """The orientation that a block of EXIF gives as a whole number, whatever else it holds."""
    tiff = exif.removeprefix(b"Exif\0\0")
    for at, order in _entries(tiff):
        tag, kind, count = struct.unpack_from(order + "HHI", tiff, at)
        if tag == _ORIENTATION and count == 1 and kind in _WHOLE:
            return struct.unpack_from(order + _WHOLE[kind], tiff, at + 8)[0]
    return None


def _entries(tiff: bytes) -> Iterator[tuple[int, str]]:
    """Where each entry of a TIFF's first directory lies, as far as there are bytes, and the order
    of bytes as `struct` writes it."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return
    start = struct.unpack_from(order + "I", tiff, 4)[0]
    if start + 2 <= len(tiff):
        count = struct.unpack_from(order + "H", tiff, start)[0]
        for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
            yield at, order
