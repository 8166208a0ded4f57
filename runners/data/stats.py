"""Counts of a loader, and statistics of a source's answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from runners.data.types import (
    BadRecordError,
    Conversation,
    Document,
    Source,
    questions_and_answers,
    spread,
)
from runners.shell.errors import UserError

logger = logging.getLogger(__name__)
_REPORT_AT = 10_000  # documents
MAX_BAD = 0.01  # of the records; a larger share means damaged data


@dataclass
class Stats:
    """Counts of a loader, part of its state. `skipped` is by reason; `bad` and `good` are records
    of the current epoch."""

    documents: int = 0
    rows: int = 0
    tokens: int = 0
    room: int = 0  # tokens that the rows could hold
    truncated: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bad: int = 0
    good: int = 0

    @property
    def fill(self) -> float:
        """The share of the rows that holds tokens of documents."""
        return self.tokens / self.room if self.room else 0.0

    def line(self) -> str:
        """`Sequence packing: 10000 -> 5500 sequences (fill 98.7%)`"""
        return f"Sequence packing: {self.documents} -> {self.rows} sequences (fill {self.fill:.1%})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def add_row(self, row: list[Document], row_len: int) -> None:
        before = self.documents
        self.documents += len(row)
        self.rows += 1
        self.tokens += sum(len(document.tokens) for document in row)
        self.room += row_len
        if before < _REPORT_AT <= self.documents:
            self.report()

    def report(self) -> None:
        """Logs the packing line; loaders call it after 10,000 documents and after a full pass."""
        logger.info(self.line())

    def add_document(self, document: Document) -> None:
        if document.truncated:
            self.truncated += 1
            if _worth_saying(self.truncated):
                logger.warning(
                    "Truncated %d documents so far to the row length (now record %r, by %d "
                    "tokens): a longer row would keep them whole.",
                    self.truncated,
                    document.id,
                    document.truncated,
                )

    def skip(self, error: BadRecordError, records: int) -> None:
        """Counts an unusable record. Raises UserError if over 1% of `records`, and more than one,
        are bad."""
        count = self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
        if _worth_saying(count):
            logger.warning("Skipped %d records so far (%s): %s.", count, error.reason, error)
        self.bad += error.fatal
        if self.bad > max(1, MAX_BAD * records):
            raise UserError(
                f"{self.bad} of {records} records cannot be used, more than {MAX_BAD:.0%} "
                f"(the last: {error}): mend or remove them."
            )

    def check_epoch(self, records: int) -> None:
        """Raises UserError if a whole epoch gave no document: the loader would never end."""
        if not self.good:
            reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
            raise UserError(
                f"None of the {records} records can be used ({reasons or 'no documents'}): "
                "check the data and the row length."
            )

    def end_epoch(self, records: int) -> None:
        """Checks the epoch that ends, and resets the counts of the next."""
        self.check_epoch(records)
        self.bad = self.good = 0


def _worth_saying(count: int) -> bool:
    """1, 10, 100, ...: every problem is logged, and none floods the log."""
    return str(count).strip("0") == "1"


def readable(source: Source, limit: int | None = None) -> Iterator[Conversation]:
    """The readable items of a source, or of `limit` evenly spaced ones.

    The others are logged. Raises UserError if they are over 1%.
    """
    chosen = spread(len(source), limit or len(source))
    stats = Stats()
    for index in chosen:
        try:
            conversation = source[index]
        except BadRecordError as error:
            stats.skip(error, len(chosen))
        else:
            yield conversation


def answers_by_kind(source: Source, limit: int = 2000) -> dict[str, Counter[str]]:
    """How often each answer occurs, by kind of question, over up to `limit` evenly spaced items.

    The share of the most frequent answer is the score of a model that ignores the pictures.
    """
    counts: dict[str, Counter[str]] = {}
    for index in spread(len(source), limit):
        for _, answer in questions_and_answers(source.turns(index)):
            counts.setdefault(answer.kind, Counter())[answer.text] += 1
    return counts


def majority_accuracy(counts: dict[str, Counter[str]]) -> float:
    """Exact match of always giving each kind's most frequent answer (0 without answers)."""
    best = sum(max(answers.values()) for answers in counts.values())
    return best / max(1, sum(answers.total() for answers in counts.values()))
