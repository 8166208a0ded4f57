"""The types of the data packages: sources give conversations, encoders turn them to documents."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

IMAGE = "<image>"  # stands in a user's text where a picture goes; \<image> is the word itself
CONTINUED = "continued"  # the kind of plain text whose document goes on in the next item
NO_LABEL = -100  # PyTorch's ignore_index
_PICTURE = re.compile(rf"(?<!\\){IMAGE}")
_PICTURE_LINE = re.compile(rf"\n?{_PICTURE.pattern}\n?")


class Turn(NamedTuple):
    """One turn. role: "user", "assistant" or "text" (plain text, learnt whole)."""

    role: str
    text: str
    kind: str = ""  # on answers: the kind of question, for reports by kind


@dataclass(frozen=True, eq=False)
class Conversation:
    """Turns over some pictures (uint8 [H, W, 3]), one for each `<image>` in the user's turns."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[np.ndarray, ...] = ()


class Cost(NamedTuple):
    """A document's share of a row's budget."""

    tokens: int
    images: int
    patches: int


@dataclass(frozen=True, eq=False)
class Document:
    """A conversation as the model takes it, in numpy arrays: the unit of packing.

    tokens, labels: int64 [L]; labels are shifted already (labels[i] follows tokens[i]).
    slots: int64 [k], where among the tokens each image token lies.
    patches: uint8 [p, 3 * patch_size**2] in merge order; patch_positions: int64 [p, 2].
    patch_counts: patches of each picture.
    """

    id: str
    tokens: np.ndarray
    labels: np.ndarray
    slots: np.ndarray
    patches: np.ndarray
    patch_positions: np.ndarray
    patch_counts: tuple[int, ...] = ()
    truncated: int = 0  # tokens cut off to fit the row

    @cached_property  # read for each row that is chosen while the document waits
    def cost(self) -> Cost:
        return Cost(len(self.tokens), len(self.patch_counts), len(self.patches))


class Source(Protocol):
    """A deterministic, indexable collection. Item i never depends on what was read before."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The item's turns, without reading its pictures."""
        ...


class BadRecordError(Exception):
    """An unusable record. The loader skips it and counts it under `reason`.

    fatal: more than 1% of such records end the run (damaged data); others are only counted.
    """

    def __init__(self, reason: str, message: str, *, fatal: bool = True) -> None:
        super().__init__(reason, message, fatal)
        self.reason, self.message, self.fatal = reason, message, fatal

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:  # workers send it to the loader
        return _bad_record, (self.reason, self.message, self.fatal)


def _bad_record(reason: str, message: str, fatal: bool) -> BadRecordError:
    return BadRecordError(reason, message, fatal=fatal)


Encode = Callable[[Conversation, int | None], list[Document]]
Request = tuple[int, int]  # epoch, item
Result = list[Document] | BadRecordError


class Together:
    """The concatenation of several sources."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._ends = list(itertools.accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        source, place = self._find(index)
        return source[place]

    def turns(self, index: int) -> tuple[Turn, ...]:
        source, place = self._find(index)
        return source.turns(place)

    def _find(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)


def num_pictures(text: str) -> int:
    """The number of `<image>` marks in a user's text; after a backslash it is a word."""
    return len(_PICTURE.findall(text))


def without_pictures(text: str) -> str:
    r"""A user's text without its marks. `\<image>` stays as it is: see `literal`."""
    return _PICTURE.sub("", text)


def between_pictures(text: str) -> list[str]:
    r"""The words around the marks of a user's text, without the newline beside each.

    >>> between_pictures("<image>\nWhat does \\<image> mean?")
    ['', 'What does <image> mean?']
    """
    return [literal(words) for words in _PICTURE_LINE.split(text)]


def literal(text: str) -> str:
    r"""A user's text with `\<image>` written as the model reads it."""
    return text.replace("\\" + IMAGE, IMAGE)


def questions_and_answers(turns: tuple[Turn, ...]) -> Iterator[tuple[Turn, Turn]]:
    """The pairs (user turn, assistant turn) of a conversation, without their `<image>` marks."""
    for question, answer in itertools.pairwise(turns):
        if question.role == "user" and answer.role == "assistant":
            yield question._replace(text=without_pictures(question.text).strip()), answer


def prompts(conversation: Conversation) -> list[Conversation]:
    """The prompt of each answer: the turns up to its question, with their pictures."""
    found, shown = [], 0
    for number, turn in enumerate(conversation.turns):
        shown += num_pictures(turn.text) if turn.role == "user" else 0
        if turn.role == "assistant":
            before = conversation.turns[:number]
            found.append(Conversation(conversation.id, before, conversation.images[:shown]))
    return found


def alone(conversation: Conversation) -> list[Conversation]:
    """Each question of a conversation by itself, without other questions and answers. Pictures of
    earlier turns come before it."""
    singles = []
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    for number, (before, answer) in enumerate(zip(prompts(conversation), answers, strict=True)):
        question = before.turns[-1]
        marks = IMAGE * (len(before.images) - num_pictures(question.text))
        turns = (question._replace(text=marks + question.text), answer)
        singles.append(Conversation(f"{conversation.id}/{number}", turns, before.images))
    return singles


def spread(length: int, limit: int) -> range:
    """At most `limit` evenly spaced numbers below `length`."""
    return range(0, length, max(1, -(-length // limit)))
