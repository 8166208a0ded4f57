r"""The chat template: from a conversation to a document of tokens, labels and patches.

    <|user|>question<|assistant|>answer<|end|><|user|>...

Only answers and their `<|end|>` are learnt; plain text is learnt whole. Each `<image>` becomes as
many `<|image|>` tokens as the projector gives; the newline that LLaVA puts beside it goes.
`\<image>` is the word itself.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np

from runners.data.encode.images import Augment, ImageSpec, fit, patchify
from runners.data.encode.tokenizer import ChatTokenizer
from runners.data.types import (
    CONTINUED,
    IMAGE,
    NO_LABEL,
    BadRecordError,
    Conversation,
    Document,
    between_pictures,
    num_pictures,
)
from runners.shell.errors import UserError


class Encoder:
    """Callable: Conversation -> list of Documents of at most `max_tokens` tokens.

    Long plain text gives several documents. A long conversation is cut at the row's end
    (`Document.truncated` counts the lost tokens); a picture that does not fit goes as a whole.
    `augment` acts on pictures if the call gives a `seed`. Raises BadRecordError if no answer is
    left, or if the numbers of pictures and `<image>` marks or image tokens differ.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        images: ImageSpec | None = None,
        *,
        max_tokens: int,
        augment: Augment | None = None,
    ) -> None:
        self.tokenizer, self.images = tokenizer, images
        self.max_tokens, self.augment = max_tokens, augment

    def __call__(self, conversation: Conversation, seed: int | None = None) -> list[Document]:
        tokens, learnt, patches = self._tokens(conversation, seed)
        labels = np.full(len(tokens), NO_LABEL, np.int64)
        labels[:-1] = np.where(learnt[1:], tokens[1:], NO_LABEL)
        if len(tokens) <= self.max_tokens or conversation.turns[0].role != "text":
            return [self._document(conversation.id, tokens, labels, patches)]
        cuts = range(0, len(tokens) - 1, self.max_tokens)  # a last token alone has no label
        pieces = [slice(start, start + self.max_tokens) for start in cuts]
        return [self._document(conversation.id, tokens[s], labels[s], patches) for s in pieces]

    def prompt(self, conversation: Conversation) -> Document:
        """The document up to the model's answer, from which `generate` starts.

        The last turn is the user's. Raises BadRecordError if the turns do not fit `max_tokens`.
        """
        tokens, _, patches = self._tokens(conversation, None)
        tokens = np.append(tokens, self.tokenizer.assistant)
        if len(tokens) > self.max_tokens:
            raise BadRecordError(
                "prompt too long",
                f"the prompt takes {len(tokens)} tokens, more than {self.max_tokens}",
            )
        return self._document(conversation.id, tokens, np.full_like(tokens, NO_LABEL), patches)

    def _tokens(
        self, conversation: Conversation, seed: int | None
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Tokens [L], whether each is learnt [L], and (patches, positions) of each picture."""
        marks = sum(num_pictures(t.text) for t in conversation.turns if t.role == "user")
        if marks != len(conversation.images):
            raise BadRecordError(
                "pictures and marks",
                f"record {conversation.id!r} has {len(conversation.images)} pictures but {marks} "
                f"{IMAGE} marks in the user's turns: make the numbers equal",
            )
        if marks > self.max_tokens:
            raise BadRecordError(
                "too many pictures",
                f"record {conversation.id!r} has {marks} pictures, more than a row has tokens",
            )
        if marks and self.images is None:
            raise UserError(
                f"Record {conversation.id!r} has pictures but the model has no vision part: "
                "choose a preset with vision or data without pictures."
            )
        pictures = self._pictures(conversation, seed)
        tok, tokens, learnt, used = self.tokenizer, [], [], 0

        def add(new: list[int], learn: bool) -> None:
            tokens.extend(new)
            learnt.extend([learn] * len(new))

        for turn in conversation.turns:
            if turn.role == "user":
                add([tok.user], False)
                for i, text in enumerate(between_pictures(turn.text)):
                    if i:
                        assert self.images is not None
                        count = self.images.tokens(len(pictures[used][0]))
                        add([tok.image] * count, False)
                        used += 1
                    if text:
                        add(tok.encode(text), False)
            elif turn.role == "assistant":
                add([tok.assistant], False)
                add([*tok.encode(turn.text), tok.end], True)
            elif turn.role == "text":
                add(tok.encode(turn.text) + [tok.end] * (turn.kind != CONTINUED), True)
            else:
                raise UserError(f"Record {conversation.id!r} has a turn of role {turn.role!r}.")
        # one more would take the next document's image tokens
        given = sum(self.images.tokens(len(p)) for p, _ in pictures) if self.images else 0
        if tokens.count(tok.image) != given:
            raise BadRecordError(
                "image token in text",
                f"record {conversation.id!r} has {tokens.count(tok.image)} image tokens, but its "
                f"pictures give {given}: a text must not hold one",
            )
        return np.array(tokens, np.int64), np.array(learnt, bool), pictures

    def _pictures(
        self, conversation: Conversation, seed: int | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        key = f"{seed}/{conversation.id}".encode(errors="surrogatepass")
        rng = random.Random(key) if seed is not None else None
        pictures = []
        for image in conversation.images:
            assert self.images is not None
            if self.augment and rng:
                image = self.augment(image, rng)
            image = fit(image, self.images)
            pictures.append(patchify(image, self.images.patch_size, self.images.merge))
        return pictures

    def _document(
        self,
        name: str,
        tokens: np.ndarray,
        labels: np.ndarray,
        pictures: list[tuple[np.ndarray, np.ndarray]],
    ) -> Document:
        length, image = len(tokens), self.tokenizer.image
        kept = tokens[: self.max_tokens]
        if length > self.max_tokens and pictures:
            # a picture that is cut in two goes with everything behind it
            inside, whole = int((kept == image).sum()), 0
            assert self.images is not None
            for i, (patches, _) in enumerate(pictures):
                count = self.images.tokens(len(patches))
                if whole + count > inside:
                    first = np.flatnonzero(tokens == image)[whole]
                    kept, pictures = kept[:first], pictures[:i]
                    break
                whole += count
        labels = labels[: len(kept)]
        if len(kept) < length and not (labels != NO_LABEL).any():
            raise BadRecordError(
                "answer beyond the row",
                f"record {name!r} takes {length} tokens and its first answer begins after "
                f"{len(kept)}: raise the row length",
                fatal=False,
            )
        patch_dim = self.images.patch_dim if self.images else 0
        return Document(
            id=name,
            tokens=kept,
            labels=labels,
            slots=np.flatnonzero(kept == image),
            patches=np.concatenate([np.empty((0, patch_dim), np.uint8), *(p for p, _ in pictures)]),
            patch_positions=np.concatenate([np.empty((0, 2), np.int64), *(q for _, q in pictures)]),
            patch_counts=tuple(len(p) for p, _ in pictures),
            truncated=length - len(kept),
        )


def item_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one item's augmentation, whichever worker encodes it."""
    key = f"{seed}/{epoch}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
