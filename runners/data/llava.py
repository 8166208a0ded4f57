"""Picture files and what is said about them: LLaVA-format JSON as a source."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from runners.data.images import decode
from runners.data.paths import DataFolder
from runners.data.records import Record, load_json, parse_record
from runners.data.stats import MAX_BAD
from runners.data.types import (
    BadRecordError,
    Conversation,
    Turn,
    alone,
    questions_and_answers,
    spread,
)
from runners.errors import UserError

logger = logging.getLogger(__name__)


class Llava:
    """Conversations about picture files.

    Args:
        path: the JSON file (or .jsonl: one record a line).
        images: the folder that pictures are in; by default that of the file.
        split, fraction: "train" and "val" part the records by a hash of the first answer (the
            title, where there is one), about `fraction` going to "val"; "all" takes every one.
        turns: "single" makes each question and answer a conversation of its own.
        cache: keep decoded pictures in memory (each data worker keeps its own).
        check: how many records, evenly spread, have their pictures decoded at once, so that
            damaged data shows before the training and not during it.
    Answers carry as `kind` the question itself where at least 1% of the records ask it.
    Raises UserError for what is not LLaVA's form, for paths that leave the folder, and where
    over 1% of the records have a picture that is missing or cannot be decoded; up to that
    they are left out, with a warning.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        split: str = "all",
        fraction: float = 0.1,
        turns: str = "all",
        cache: bool = False,
        check: int = 1000,
    ) -> None:
        self.path = Path(path)
        if split not in ("all", "train", "val") or turns not in ("all", "single"):
            raise UserError(
                f"split={split} and turns={turns} of {path} are not known: split is all, train or "
                "val, turns is all or single."
            )
        self.folder = DataFolder(images or self.path.parent)
        self.records = self._part(self._read(), split, fraction)
        self._cache: dict[str, np.ndarray] | None = {} if cache else None
        self._leave_out_damaged(check)
        # (record, question) of each item; question None: the whole conversation.
        self._items: list[tuple[int, int | None]] = [(r, None) for r in range(len(self.records))]
        if turns == "single":
            self._items = [
                (r, k)
                for r, record in enumerate(self.records)
                for k in range(len(list(questions_and_answers(record.turns))))
            ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadRecordError where a picture cannot be read."""
        record, question = self._items[index]
        pictures = tuple(self._picture(name) for name in self.records[record].files)
        conversation = Conversation(self.records[record].id, self.records[record].turns, pictures)
        return conversation if question is None else alone(conversation)[question]

    def turns(self, index: int) -> tuple[Turn, ...]:
        record, question = self._items[index]
        turns = self.records[record].turns
        return turns if question is None else list(questions_and_answers(turns))[question]

    def __getstate__(self) -> dict[str, Any]:
        cached = self._cache is not None
        return self.__dict__ | {"_cache": {} if cached else None}  # pictures stay here

    def _picture(self, name: str) -> np.ndarray:
        if self._cache is not None and name in self._cache:
            return self._cache[name]
        picture = decode(self.folder.file(name))
        if self._cache is not None:
            self._cache[name] = picture
        return picture

    def _read(self) -> list[Record]:
        raw = load_json(self.path)
        records = [parse_record(self.path, number, record) for number, record in enumerate(raw)]
        if not records:
            raise UserError(f"{self.path} holds no records: give a file with at least one.")
        asked = Counter(
            q.text for record in records for q, _ in questions_and_answers(record.turns)
        )
        common = {text for text, count in asked.items() if count >= len(records) / 100}
        return [
            Record(record.id, _with_kinds(record.turns, common), record.files) for record in records
        ]

    def _part(self, records: list[Record], split: str, fraction: float) -> list[Record]:
        if split == "all":
            return records
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} of {self.path} is not between 0 and 1.")
        part = [r for r in records if _held_out(r, fraction) == (split == "val")]
        if not part:
            raise UserError(
                f"The {split} part of {self.path} is empty ({len(records)} records, fraction "
                f"{fraction}): change the fraction or give more data."
            )
        return part

    def _leave_out_damaged(self, check: int) -> None:
        """Drop records whose pictures are missing, or among those checked cannot be decoded."""
        bad: dict[int, BadRecordError] = {}
        total = len(self.records)
        checked = set(spread(total, check)) if check else set()
        for number, record in enumerate(self.records):
            try:
                for name in record.files:
                    file = self.folder.file(name)
                    if number in checked:
                        decode(file)
            except BadRecordError as error:
                bad[number] = error
        if not bad:
            return
        message = (
            f"{len(bad)} of the {total} records of {self.path} ({len(checked)} decoded) have a "
            f"picture that is missing or damaged (the first: {next(iter(bad.values()))})"
        )
        damaged = sum(number in checked for number in bad)
        if len(bad) > MAX_BAD * total or damaged > MAX_BAD * max(len(checked), 1):
            raise UserError(f"{message}: more than {MAX_BAD:.0%}; mend or remove them.")
        logger.warning("%s: left out.", message)
        self.records = [r for number, r in enumerate(self.records) if number not in bad]


def _with_kinds(turns: tuple[Turn, ...], common: set[str]) -> tuple[Turn, ...]:
    """Answers marked by their question, rare questions together as "other"."""
    marked = list(turns)
    for k, (question, answer) in enumerate(questions_and_answers(turns)):
        kind = question.text if question.text in common else "other"
        marked[2 * k + 1] = answer._replace(kind=kind)
    return tuple(marked)


def _held_out(record: Record, fraction: float) -> bool:
    first = record.turns[1].text.strip().casefold()
    digest = hashlib.blake2b(first.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64
