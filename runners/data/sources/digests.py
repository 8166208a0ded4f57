"""Digests of a run's data (data.json in its folder), and whether the data has changed."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from params.disk import write_text
from runners.data.sources.split import digest_of, file_digest
from runners.shell.cli import explained
from runners.shell.errors import UserError

logger = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
DATA = "data.json"
SPLIT = 1  # version of the rule for holding records out


@dataclass(frozen=True)
class Digest:
    """The digest of one source: of a file, of its pictures, or of the seed of drawn scenes.

    each: of pictures, four bytes in hexadecimal for each of ``names``, so that the first changed
    one can be named.
    """

    flag: str
    path: str
    digest: str
    each: str = ""
    names: tuple[str, ...] = ()

    def record(self) -> dict[str, str]:
        fields = {"flag": self.flag, "path": self.path, "digest": self.digest}
        return fields | ({"each": self.each} if self.each else {})

    def difference(self, old: dict[str, str]) -> str:
        """How the source differs, in words; empty if it does not."""
        if old["digest"] == self.digest:
            return ""
        if not self.each:
            return f"{self.path} ({self.flag}) holds other data"
        before, now = _eights(old.get("each", "")), _eights(self.each)
        pairs = enumerate(zip_longest(before, now, fillvalue=""))
        first = next((i for i, (one, other) in pairs if one != other), 0)
        count = f"{len(before):,} pictures, now {len(now):,}"
        name = f", the first {self.names[first]}" if first < len(self.names) else ""
        return f"pictures of {self.path} ({self.flag}) are others ({count}{name})"


def save(folder: Path, sources: Sequence[Digest]) -> None:
    """Writes ``data.json`` into a run's folder, which has its tokenizer already."""
    records = [source.record() for source in [*sources, _tokenizer(folder)]]
    with explained(f"cannot write {folder / DATA}"):
        write_text(folder / DATA, json.dumps({"split": SPLIT, "sources": records}, indent=1))


def together(flag: str, sources: Sequence[Digest]) -> str:
    """One digest of everything that a flag names, pictures included."""
    return digest_of(*(s.digest for s in sources if s.flag.startswith(flag))).hex()


def check(folder: Path, sources: Sequence[Digest], *, allowed: bool) -> None:
    """Raises UserError, naming the data that has changed since the run began; with
    ``--data_changed=1`` (allowed) it warns."""
    if not (changes := _changes(folder, [*sources, _tokenizer(folder)])):
        return
    said = f"The data of {folder} is not what it was: {'; '.join(changes)}."
    if not allowed:
        again = shlex.join(["--init_from", str(folder)])
        raise UserError(
            f"{said} Put it back, go on with what there is now by --data_changed=1, or start a new "
            f"run from the weights with {again}"
        )
    logger.warning("%s", said)


def _changes(folder: Path, now: Sequence[Digest]) -> list[str]:
    path = folder / DATA
    if not path.is_file():
        if all(source.flag == "--tokenizer" or source.path == "shapes" for source in now):
            return []  # scenes are drawn as before
        return [
            f"it has no {DATA}, so it is of a version that held records out by their first answer, "
            "and what it held out is not known"
        ]
    record = _read(path)
    old = {(source["flag"], source["path"]): source for source in record["sources"]}
    changes = [] if record["split"] == SPLIT else ["records are held out by another rule"]
    for source in now:
        before = old.pop((source.flag, source.path), None)
        if before is None:
            changes.append(f"{source.path} ({source.flag}) is new")
        elif difference := source.difference(before):
            changes.append(difference)
    return changes + [f"{path} ({flag}) is gone" for flag, path in old]


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        sources = [{str(k): str(v) for k, v in source.items()} for source in record["sources"]]
        if any({"flag", "path", "digest"} - source.keys() for source in sources):
            raise ValueError("a source lacks its flag, path or digest")
        return {"split": record["split"], "sources": sources}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}): copy it again, or remove it and give --data_changed=1"
        ) from error


def _tokenizer(folder: Path) -> Digest:
    with explained(f"cannot read {folder / TOKENIZER}"):
        return Digest("--tokenizer", TOKENIZER, file_digest(folder / TOKENIZER).hex())


def _eights(digits: str) -> list[str]:
    return [digits[i : i + 8] for i in range(0, len(digits), 8)]
