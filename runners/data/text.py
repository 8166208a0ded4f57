"""Plain text files for language pretraining."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runners.data.types import CONTINUED, Conversation, Turn
from runners.errors import UserError

_BLANK_LINE = re.compile(rb"\r?\n[ \t]*\r?\n\s*")
_BOM = b"\xef\xbb\xbf"
MAX_BYTES = 1 << 16  # of a part: what is tokenised at once


class Part(NamedTuple):
    """Bytes [start, end) of a file. `last`: the document ends here."""

    file: int
    start: int
    end: int
    last: bool


class TextFiles:
    """Documents of UTF-8 text files.

    Args:
        paths: files, or folders searched for `*.txt` and `*.md`.
        documents: "file" (each file is one) or "paragraph" (blank lines part them).
        split, fraction: "train" and "val" part the documents by a hash of file and place.
    Only places are kept in memory. Documents over 64 KiB are items of several parts; the
    encoder cuts parts into rows. Nothing is lost.
    Raises UserError for missing, empty or undecodable files.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        documents: str = "file",
        split: str = "all",
        fraction: float = 0.05,
    ) -> None:
        if documents not in ("file", "paragraph") or split not in ("all", "train", "val"):
            raise UserError(
                f"documents={documents} and split={split} are not known: documents is file or "
                "paragraph, split is all, train or val."
            )
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} of the text is not between 0 and 1.")
        self.files = _find(paths)
        self._parts: list[Part] = []
        for number, file in enumerate(self.files):
            for start, end, text in _documents(file, documents):
                held_out = _hash(file, start) < fraction * 2**64
                if split == "all" or held_out == (split == "val"):
                    self._parts += _parts(number, start, end, text)
        if not self._parts:
            raise UserError(
                f"The {split} part of {', '.join(map(str, paths))} holds no text: give other "
                "files, or documents=paragraph for more and smaller documents."
            )

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Conversation:
        part = self._parts[index]
        return Conversation(f"{self.files[part.file]}:{part.start}", self.turns(index))

    def turns(self, index: int) -> tuple[Turn, ...]:
        part = self._parts[index]
        with self.files[part.file].open("rb") as file:
            file.seek(part.start)
            text = file.read(part.end - part.start).decode()
        return (Turn("text", text, "" if part.last else CONTINUED),)


def _find(paths: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(
                p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file()
            )
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"The text file {path} does not exist: check the path.")
    if not files:
        raise UserError(f"No *.txt or *.md files in {', '.join(map(str, paths))}: give some.")
    return files


def _documents(path: Path, documents: str) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, bytes) of each document that is not empty."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
        gaps = _BLANK_LINE.finditer(data, start) if documents == "paragraph" else iter(())
        spans = []
        for gap in gaps:
            spans.append((start, gap.start()))
            start = gap.end()
        spans.append((start, len(data)))
        for start, end in spans:
            text = data[start:end]
            try:
                text.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8 text (byte {start + error.start}): convert it."
                ) from error
            if text.strip():
                yield start, end, text


def _parts(file: int, start: int, end: int, text: bytes) -> Iterator[Part]:
    """Cut a document where it is too long: after a line or word, else between two characters."""
    at = 0
    while len(text) - at > MAX_BYTES:
        limit = at + MAX_BYTES
        cut = max(text.rfind(b"\n", at, limit), text.rfind(b" ", at + MAX_BYTES // 2, limit))
        if cut <= at:
            cut = limit
            while text[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
        yield Part(file, start + at, start + cut, False)
        at = cut
    yield Part(file, start + at, end, True)


def _hash(path: Path, start: int) -> int:
    key = f"{path.name}:{start}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
