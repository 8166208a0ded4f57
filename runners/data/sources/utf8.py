"""Decodes files as UTF-8, with one-sentence errors."""

from __future__ import annotations

import codecs
from pathlib import Path

from runners.shell.errors import UserError

BOM = codecs.BOM_UTF8
# Of UTF-32 first: its little-endian mark begins with that of UTF-16.
_OTHERS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decoded(path: Path, data: bytes, start: int = 0) -> str:
    """The text of a file's bytes from `start` on. Raises UserError unless it is UTF-8 without NUL
    bytes, of which UTF-16 has many."""
    if not start:
        for mark, name in _OTHERS.items():
            if data.startswith(mark):
                raise UserError(f"{path} is {name} and not UTF-8 text: convert it.")
        start = len(BOM) if data.startswith(BOM) else 0
        data = data[start:]
    if (place := data.find(0)) >= 0:
        raise UserError(
            f"{path} is not UTF-8 text: byte {start + place} is NUL, as in UTF-16 without a mark "
            "and in files that hold no text. Convert it, or leave it out."
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {start + error.start}): convert it."
        ) from error
