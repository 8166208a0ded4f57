"""Words to tokens: a Hugging Face tokenizer with our special tokens, or one trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from runners.data.types import IMAGE, Source, spread
from runners.errors import UserError

PAD, USER, ASSISTANT, END, IMAGE_TOKEN = SPECIALS = (
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|image|>",
)
_REMEMBERED = 1 << 16  # texts whose tokens are kept
_SHORT = 256  # characters: longer texts hardly come twice


class ChatTokenizer:
    """A `tokenizers.Tokenizer` that knows the chat's special tokens.

    Special tokens missing from a foreign tokenizer are added at its end. What a user writes never
    becomes a special token: "<|end|>" in a text is encoded as its letters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in SPECIALS if tokenizer.token_to_id(name) is None]
        tokenizer.add_special_tokens(
            [AddedToken(n, special=True, normalized=False) for n in missing]
        )
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1  # ids may have gaps
        self.pad, self.user, self.assistant, self.end, self.image = (vocab[n] for n in SPECIALS)
        self.specials = frozenset(vocab[name] for name in SPECIALS)

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text; nothing is put before or after it."""
        if (tokens := self._known.get(text)) is None:
            # Templates of foreign tokenizers would add their own marks.
            # The fast one leaves out where tokens lie in the text: 12 ms a 60 KB instead of 24.
            encode = self._tokenizer.encode_batch_fast
            tokens = encode([text], add_special_tokens=False)[0].ids
            if len(text) <= _SHORT and len(self._known) < _REMEMBERED:
                self._known[text] = tokens
        return list(tokens)

    def decode(self, tokens: Iterable[int], *, specials: bool = False) -> str:
        """The text of tokens, special ones left out unless asked for."""
        if specials:
            return self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return self._tokenizer.decode([int(t) for t in tokens if int(t) not in self.specials])

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that Hugging Face loads too; whole or not at all."""
        from params.disk import write_text  # here, as workers do without torch

        write_text(Path(path), self._tokenizer.to_str(pretty=True))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless every token fits an embedding of `vocab_size` rows."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"The tokenizer has {self.vocab_size} tokens but the model's vocabulary only "
                f"{vocab_size}: raise the model's vocab_size or take the model's own tokenizer."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Tokenizer.from_str(state["tokenizer"]))  # type: ignore[misc]


def load_tokenizer(path: str | Path) -> ChatTokenizer:
    """Read a `tokenizer.json`. Raises UserError where there is none or it cannot be read."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"There is no tokenizer file {path}: give the path of a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for whatever it cannot parse
        raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}.") from error
    return ChatTokenizer(tokenizer)


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
    tokenizer.train_from_iterator(texts, trainer)
    return ChatTokenizer(tokenizer)


def sample_texts(source: Source, limit: int = 2000, max_chars: int = 4_000_000) -> Iterator[str]:
    """Texts of up to `limit` items spread evenly over a source; no picture is drawn or decoded."""
    for index in spread(len(source), limit):
        for turn in source.turns(index):
            text = turn.text if turn.role == "text" else turn.text.replace(IMAGE, "").strip()
            yield text[:max_chars]
            max_chars -= len(text)
            if max_chars <= 0:
                return
