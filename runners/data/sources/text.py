"""Plain text files for language pretraining."""

from __future__ import annotations

import copy
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from runners.data.sources.split import digest_of, groups_of, hold_out, shuffled, unique
from runners.data.sources.utf8 import BOM, decoded
from runners.data.types import CONTINUED, Conversation, Turn
from runners.shell.errors import UserError

_BLANK_LINE = re.compile(rb"\r?\n[ \t]*\r?\n\s*")
MAX_BYTES = 1 << 16  # of a part, which is tokenised at once


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
        split, fraction, seed: "val" holds out documents with `fraction` of the bytes, drawn at
            random from `seed`, and "train" has the others; equal documents are on one side.
    Only offsets are kept in memory. Documents over 64 KiB are several items; the encoder cuts items
    into rows. Nothing is lost.
    Raises UserError for missing, empty or undecodable files.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        documents: str = "file",
        split: str = "all",
        fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        if documents not in ("file", "paragraph") or split not in ("all", "train", "val"):
            raise UserError(
                f"documents={documents} and split={split} are not known: documents is file or "
                "paragraph, split is all, train or val."
            )
        self.files = _find(paths)
        self._named = ", ".join(map(str, paths))
        found: list[tuple[Part, ...]] = []
        digests: list[bytes] = []
        for number, file in enumerate(self.files):
            for start, end, text in _documents(file, documents):
                found.append(tuple(_parts(number, start, end, text)))
                digests.append(digest_of(text))
        if not found:
            raise UserError(f"{self._named} holds no text: give other files.")
        self._keep(found, digests)
        if split != "all":
            train, val = self._sides(fraction, seed)
            self._choose(self, val if split == "val" else train)

    def parted(self, fraction: float, seed: int = 0) -> tuple[TextFiles, TextFiles]:
        """The splits "train" and "val" of a source with all documents, without reading it again."""
        train, val = self._sides(fraction, seed)
        return self._choose(copy.copy(self), train), self._choose(copy.copy(self), val)

    def shuffle(self, seed: int = 0) -> None:
        """Puts the documents into the order in which they are held out."""
        self._choose(self, shuffled(unique(self.digests), seed))

    def contents(self) -> dict[str, bytes]:
        """A digest of each file's text."""
        found: dict[str, list[bytes | int]] = {}
        for document, digest in zip(self.documents, self.digests, strict=True):
            name = str(self.files[document[0].file])
            found.setdefault(name, []).extend((document[0].start, digest))
        return {name: digest_of(*parts) for name, parts in found.items()}

    def __getstate__(self) -> dict[str, Any]:  # workers need only the parts
        return self.__dict__ | {"documents": [], "digests": []}

    def _keep(self, documents: Sequence[tuple[Part, ...]], digests: Sequence[bytes]) -> None:
        self.documents, self.digests = list(documents), list(digests)
        self._parts = [part for document in documents for part in document]

    def _choose(self, other: TextFiles, chosen: Sequence[int]) -> TextFiles:
        other._keep([self.documents[i] for i in chosen], [self.digests[i] for i in chosen])
        return other

    def _sides(self, fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Indices of the training documents, and of the held-out ones, these in random order."""
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} of the text is not between 0 and 1.")
        groups = groups_of([[digest] for digest in self.digests])
        if len(groups) < 2:
            raise UserError(
                f"Nothing of {self._named} can be held out: it is one document. Make smaller ones "
                "with --documents=paragraph, name other text with --val_data, or set "
                "--val_fraction=0."
            )
        sizes = [sum(num_bytes(self.documents[i]) for i in group) for group in groups]
        chosen = hold_out([self.digests[group[0]] for group in groups], sizes, fraction, seed)
        held_out = [i for group in chosen for i in groups[group]]
        return sorted(set(range(len(self.documents))).difference(held_out)), held_out

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


def num_bytes(document: Sequence[Part]) -> int:
    """The length of a document in its file."""
    return document[-1].end - document[0].start


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
            why = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"The text file {path} {why}: check the path.")
    if not files:
        raise UserError(f"No *.txt or *.md files in {', '.join(map(str, paths))}: give some.")
    return files


def _documents(path: Path, documents: str) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, bytes) of each document that is not empty."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(BOM) if data[: len(BOM)] == BOM else 0
        gaps = _BLANK_LINE.finditer(data, start) if documents == "paragraph" else iter(())
        spans = []
        for gap in gaps:
            spans.append((start, gap.start()))
            start = gap.end()
        spans.append((start, len(data)))
        for start, end in spans:
            text = data[start:end]
            decoded(path, text, start)
            if text.strip():
                yield start, end, text


def _parts(file: int, start: int, end: int, text: bytes) -> Iterator[Part]:
    """Cuts a long document: after a line or word, else between two characters."""
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
