"""Tokenizers: a Hugging Face one with the chat's special tokens, or one trained on the data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from runners.data.encode.vocabulary import part
from runners.data.types import BadRecordError, Source, literal, spread, without_pictures
from runners.shell.errors import UserError

PAD, USER, ASSISTANT, END, IMAGE_TOKEN = SPECIALS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|image|>",
)
_REMEMBERED = 1 << 16  # texts whose tokens are cached
_SHORT = 256  # characters; longer texts rarely repeat
_LONG_WORD = re.compile(r"\S{256}|\s{256}")


class ChatTokenizer:
    """A Hugging Face tokenizer that knows the chat's special tokens.

    tokenizer: a `tokenizers.Tokenizer`, or the text of a tokenizer.json. Special tokens missing
    from it are added at its end. What a user writes never becomes a special token, be it the
    chat's or one of the tokenizer's own: "<|end|>" in a text is encoded as its letters.
    Raises UserError where tokens share an id, or where some text cannot be encoded.
    """

    def __init__(self, tokenizer: Tokenizer | str) -> None:
        given = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
        parted = part(given, SPECIALS)
        self._json, self._text, self._control = parted.full, parted.text, parted.control
        self.added = parted.lacking  # special tokens that it did not have
        self._known: dict[str, list[int]] = {}
        self.vocab_size = max(parted.ids.values()) + 1  # ids may have gaps
        self.pad, self.user, self.assistant, self.end, self.image = (
            parted.ids[name] for name in SPECIALS
        )
        self.specials = frozenset(parted.ids[name] for name in SPECIALS)
        try:
            self.encode("Any text: a 1\n漢🙂\0\u0378")
        except BadRecordError as error:
            raise UserError(f"the tokenizer has no token for unknown text ({error})") from error

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text, without special tokens around it.

        Raises BadRecordError for a text that the tokenizer refuses.
        """
        if (tokens := self._known.get(text)) is None:
            # the fast one leaves out offsets, in half of the time
            encode = self._text.encode_batch_fast
            try:
                tokens = encode([text], add_special_tokens=False)[0].ids
            except Exception as error:  # tokenizers raises bare Exception
                raise BadRecordError("text not encoded", f"{error}, text {text[:40]!r}") from error
            if not self._control.keys().isdisjoint(tokens):
                raise BadRecordError("control token in text", f"text {text[:40]!r} holds one")
            if len(text) <= _SHORT and len(self._known) < _REMEMBERED:
                self._known[text] = tokens
        return list(tokens)

    def decode(self, tokens: Iterable[int], *, specials: bool = False) -> str:
        """The text of tokens. specials: special ones too."""
        if not specials:
            return self._text.decode([int(t) for t in tokens if int(t) not in self._control])
        runs = itertools.groupby(map(int, tokens), self._control.get)
        return "".join(
            self._text.decode(list(run)) if name is None else name * len(list(run))
            for name, run in runs
        )

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that Hugging Face loads too; whole or not at all."""
        from params.disk import write_text  # here, as workers do without torch

        write_text(Path(path), self._json)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless every token fits an embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"The tokenizer has {self.vocab_size} tokens but the model's vocabulary only "
                f"{vocab_size}: raise the model's vocab_size or take the model's own tokenizer."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._json}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]


def load_tokenizer(path: str | Path, *, complete: bool = False) -> ChatTokenizer:
    """Read a `tokenizer.json`. complete: it must have the chat's special tokens, as that of a run
    has. Raises UserError where there is none or it cannot be used."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"There is no tokenizer file {path}: give the path of a tokenizer.json.")
    try:
        tokenizer = ChatTokenizer(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}. Take another tokenizer.") from error
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}.") from error
    if complete and tokenizer.added:
        raise UserError(
            f"{path} lacks the token {tokenizer.added[0]}: it is not the tokenizer that the model "
            "was trained with."
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> ChatTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2). The same texts give the
    same tokenizer. Raises UserError where `vocab_size` has no room for bytes and special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise UserError(
            f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIALS)} special tokens "
            f"need {len(alphabet) + len(SPECIALS)} or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((p for text in texts for p in _without_long_words(text)), trainer)
    return ChatTokenizer(tokenizer)


def _without_long_words(text: str) -> Iterator[str]:
    """The text, cut inside words over 256 letters: training is quadratic in their length."""
    start = 0
    for found in _LONG_WORD.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def sample_texts(source: Source, limit: int = 2000, max_chars: int = 4_000_000) -> Iterator[str]:
    """Texts of up to `limit` items spread evenly over a source; no picture is drawn or decoded."""
    for index in spread(len(source), limit):
        for turn in source.turns(index):
            text = turn.text
            if turn.role == "user":
                text = literal(without_pictures(text)).strip()
            yield text[:max_chars]
            max_chars -= len(text)
            if max_chars <= 0:
                return
