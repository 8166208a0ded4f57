"""Picture files and what is said about them: LLaVA-format JSON as a source."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runners.data.encode.images import check_pixels, decode
from runners.data.sources.paths import DataFolder
from runners.data.sources.records import Record, load_json, parse_record
from runners.data.sources.split import (
    digest_of,
    fingerprints,
    groups_of,
    hold_out,
    shuffled,
    unique,
)
from runners.data.stats import MAX_BAD
from runners.data.types import (
    BadRecordError,
    Conversation,
    Turn,
    alone,
    questions_and_answers,
    spread,
)
from runners.shell.errors import UserError

logger = logging.getLogger(__name__)


class Llava:
    """Conversations about picture files.

    Args:
        path: the JSON file (or .jsonl: one record a line).
        images: the folder that pictures are in; by default that of the file.
        split, fraction, seed: "val" holds out `fraction` of the records, drawn at random from
            `seed`, and "train" has the others; records that share a picture, by its path or its
            file's content, are on one side. "all" takes every one.
        turns: "single" makes each question and answer a conversation of its own.
        cache: keep decoded pictures in memory (each data worker keeps its own).
        check: how many records, evenly spread, have their pictures decoded at once, so that
            damaged data shows before the training and not during it.
    Answers carry as `kind` the question itself where at least 1% of the records ask it.
    Records that are not of LLaVA's form, or whose pictures are missing, outside the folder or
    damaged, are left out, with one warning that counts them by reason. Raises UserError for a file
    that holds no list, and where no record is left, or over 1% (and more than one) of those checked
    have a picture that cannot be decoded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        images: str | Path | None = None,
        split: str = "all",
        fraction: float = 0.1,
        seed: int = 0,
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
        self._turns = turns
        self._cache: dict[str, np.ndarray] | None = {} if cache else None
        raw = load_json(self.path)
        if not raw:
            raise UserError(f"{self.path} holds no records: give a file with at least one.")
        records, bad = _parse(raw)
        # What each picture's file holds, by the name that records give it; parts do without.
        self.pictures, wrong = self._look_at_pictures(records, check)
        self._leave_out(bad + list(wrong.values()), len(raw))
        self._keep(_with_kinds([r for i, r in enumerate(records) if i not in wrong]))
        if split != "all":
            train, val = self._parts(fraction, seed)
            self._keep(val if split == "val" else train)

    def parted(self, fraction: float, seed: int = 0) -> tuple[Llava, Llava]:
        """The splits "train" and "val" of a source that has all records, read only once."""
        train, val = self._parts(fraction, seed)
        return self._with(train), self._with(val)

    def shuffle(self, seed: int = 0) -> None:
        """Put the records into the order in which they would be held out."""
        self._keep([self.records[i] for i in shuffled(self.names(), seed)])

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Conversation:
        """Raises BadRecordError where a picture cannot be read, or all are too large together."""
        record, question = self._items[index]
        names = self.records[record].files
        if len(names) > 1:
            check_pixels([self.folder.file(name) for name in names])
        pictures = {name: self._picture(name) for name in dict.fromkeys(names)}
        conversation = Conversation(
            self.records[record].id,
            self.records[record].turns,
            tuple(pictures[name] for name in names),
        )
        return conversation if question is None else alone(conversation)[question]

    def turns(self, index: int) -> tuple[Turn, ...]:
        record, question = self._items[index]
        turns = self.records[record].turns
        return turns if question is None else list(questions_and_answers(turns))[question]

    def __getstate__(self) -> dict[str, Any]:
        cached = self._cache is not None
        # Pictures stay here, and what only the parting of the records needs.
        return self.__dict__ | {"_cache": {} if cached else None, "pictures": {}}

    def _keep(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        # (record, question) of each item; question None: the whole conversation.
        self._items: list[tuple[int, int | None]] = [(r, None) for r in range(len(self.records))]
        if self._turns == "single":
            self._items = [
                (r, k)
                for r, record in enumerate(self.records)
                for k in range(len(list(questions_and_answers(record.turns))))
            ]

    def _with(self, records: Sequence[Record]) -> Llava:
        other = copy.copy(self)
        other._keep(records)
        return other

    def _picture(self, name: str) -> np.ndarray:
        if self._cache is not None and name in self._cache:
            return self._cache[name]
        picture = decode(self.folder.file(name))
        if self._cache is not None:
            self._cache[name] = picture
        return picture

    def _leave_out(self, errors: Sequence[BadRecordError], total: int) -> None:
        """Logs why records are left out, with counts. Raises UserError if no record remains."""
        if not errors:
            return
        reasons: dict[str, list[BadRecordError]] = {}
        for error in errors:
            reasons.setdefault(error.reason, []).append(error)
        told = "; ".join(
            f"{len(same)} {reason} (the first: {same[0]})"
            for reason, same in sorted(reasons.items(), key=lambda item: -len(item[1]))
        )
        if len(errors) == total:
            raise UserError(f"None of the {total} records of {self.path} can be used: {told}.")
        logger.warning(
            "%d of the %d records of %s are left out: %s.", len(errors), total, self.path, told
        )

    def _shown(self) -> list[list[bytes]]:
        """What the pictures of each record hold."""
        return [[self.pictures[name] for name in record.files] for record in self.records]

    def names(self) -> list[bytes]:
        """A name for each record that follows from what it holds."""
        names = [
            digest_of(*shown, *(word for turn in record.turns for word in turn[:2]))
            for record, shown in zip(self.records, self._shown(), strict=True)
        ]
        return unique(names)

    def _parts(self, fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
        """What is trained on, and what is held out, that one in random order."""
        if not 0 < fraction < 1:
            raise UserError(f"fraction={fraction} of {self.path} is not between 0 and 1.")
        names, shown = self.names(), self._shown()
        groups = groups_of([of or [name] for name, of in zip(names, shown, strict=True)])
        if len(groups) < 2:
            why = "pictures join them all" if len(names) > 1 else "there is but one"
            raise UserError(
                f"None of the records of {self.path} can be held out ({why}): name other data with "
                "--val_data, or set --val_fraction=0."
            )
        # A group is named after a picture, so that it keeps its side when a record is added to it.
        group_names = [min(min(shown[i], default=names[i]) for i in group) for group in groups]
        chosen = hold_out(group_names, [len(group) for group in groups], fraction, seed)
        held_out = [i for group in chosen for i in groups[group]]
        kept = sorted(set(range(len(names))).difference(held_out))
        return [self.records[i] for i in kept], [self.records[i] for i in held_out]

    def _look_at_pictures(
        self, records: Sequence[Record], check: int
    ) -> tuple[dict[str, bytes], dict[int, BadRecordError]]:
        """What each picture's file holds, and what is wrong with the records that have a picture
        which is missing or, among those checked, cannot be decoded. Raises UserError where that is
        more than an accident."""
        total = len(records)
        checked = set(spread(total, check)) if check and total else set()
        files: dict[str, Path] = {}
        decoded: set[str] = set()
        wrong: dict[str, BadRecordError] = {}
        damaged: set[str] = set()
        for number, record in enumerate(records):
            for name in record.files:
                try:
                    if name not in files and name not in wrong:
                        files[name] = self.folder.file(name)
                except BadRecordError as error:
                    wrong[name] = error
                if number in checked and name in files and name not in decoded:
                    decoded.add(name)
                    try:
                        decode(files[name])
                    except BadRecordError as error:
                        wrong[name] = error
                        damaged.add(name)
        found: dict[str, bytes] = {}
        for name, held in zip(files, fingerprints(list(files.values())), strict=True):
            if isinstance(held, OSError):
                why = f"{files[name]} cannot be read ({held.strerror})"
                wrong.setdefault(name, BadRecordError("picture unreadable", why))
            else:
                found[name] = held
        bad = {
            number: next(wrong[name] for name in record.files if name in wrong)
            for number, record in enumerate(records)
            if not wrong.keys().isdisjoint(record.files)
        }
        worse = [i for i in bad if i in checked and not damaged.isdisjoint(records[i].files)]
        if len(worse) > max(1, MAX_BAD * len(checked)):
            raise UserError(
                f"Of {len(checked)} records of {self.path} whose pictures were decoded "
                f"{len(worse)} have a damaged one (the first: {bad[worse[0]]}), more than "
                f"{MAX_BAD:.0%}: mend or remove them."
            )
        return found, bad


def _parse(raw: Sequence[Any]) -> tuple[list[Record], list[BadRecordError]]:
    records, bad = [], []
    for number, record in enumerate(raw):
        try:
            records.append(parse_record(number, record))
        except BadRecordError as error:
            bad.append(error)
    return records, bad


def _with_kinds(records: Sequence[Record]) -> list[Record]:
    """The records, answers marked by their question, rare questions together as "other"."""
    asked = Counter(q.text for record in records for q, _ in questions_and_answers(record.turns))
    common = {text for text, count in asked.items() if count >= len(records) / 100}
    return [replace(record, turns=_marked(record.turns, common)) for record in records]


def _marked(turns: tuple[Turn, ...], common: set[str]) -> tuple[Turn, ...]:
    """Answers marked by their question, rare questions together as "other"."""
    marked = list(turns)
    for k, (question, answer) in enumerate(questions_and_answers(turns)):
        kind = question.text if question.text in common else "other"
        marked[2 * k + 1] = answer._replace(kind=kind)
    return tuple(marked)
