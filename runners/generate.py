"""Generates a trained model's answer to a prompt.

python -m runners.generate --run runs/NAME --image picture.png --prompt "What is this?"
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from core import Batch
from core.ranges import Range
from runners.data.encode.encoder import Encoder
from runners.data.encode.images import decode_all
from runners.data.packing.collate import collate
from runners.data.packing.plan import PackSpec
from runners.data.types import (
    CONTINUED,
    IMAGE,
    BadRecordError,
    Conversation,
    Document,
    Turn,
    num_pictures,
)
from runners.engine.decoding import Sampler, decode
from runners.eval import Evaluator, open_evaluator
from runners.shell.cli import UsageError, guarded, parse
from runners.shell.errors import UserError, printable
from runners.training.checkpoints import open_run
from runners.training.compose import choose_device
from transforms.accumulate import to_device


@dataclass(frozen=True)
class GenerateConfig:
    """Streams a trained model's answer to a prompt, with or without pictures."""

    run: str
    """Folder of the run, such as runs/shapes-tiny."""
    prompt: str
    """What to ask, as the first turn of a conversation; or to continue (text models)."""
    image: tuple[str, ...] = ()
    """Picture files, placed before the prompt, or at each <image> in it."""
    max_tokens: Annotated[int, Range(1, 2**24)] = 128
    """Most tokens in the answer."""
    temperature: Annotated[float, Range(0)] = 0.0
    """0: always the most likely token; 1: the model's own distribution."""
    top_k: Annotated[int, Range(0, 2**24)] = 0
    """Sample from the k most likely tokens; 0: all."""
    top_p: Annotated[float, Range(high=1, above=0)] = 1.0
    """Sample from the fewest tokens with this much probability."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    """Seed of the sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def prompt_batch(encoder: Encoder, conversation: Conversation, chat: bool = True) -> Batch:
    """A CPU batch of one document, which ends where the model continues.

    chat: the prompt is a user's turn, and the assistant's is next; otherwise it is plain text.
    Raises UserError if it is too long or its pictures do not fit the model.
    """
    try:
        document = encoder.prompt(conversation) if chat else _plain(encoder, conversation)
    except BadRecordError as error:
        raise UserError(str(error)) from error
    images = encoder.images if document.patch_counts else None
    spec = PackSpec(
        row_len=len(document.tokens),
        rows=1,
        max_docs=1,
        images=images,
        max_images=len(document.patch_counts),
        max_patches=len(document.patches),
    )
    return collate([[document]], spec)


def answer(
    evaluator: Evaluator,
    conversation: Conversation,
    *,
    chat: bool = True,
    max_tokens: int = 128,
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """The tokens of the answer to a conversation that ends with a user's turn."""
    tokenizer = evaluator.encoder.tokenizer
    return decode(
        evaluator.forward,
        evaluator.model,
        evaluator.params,
        to_device(prompt_batch(evaluator.encoder, conversation, chat), evaluator.device),
        max_tokens=max_tokens,
        stop=tokenizer.specials,
        sampler=sampler,
    )


def pieces(tokens: Iterable[int], to_text: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of tokens, piece by piece.

    A character of several bytes may need several tokens. Until it is complete it decodes to U+FFFD
    and is held back.
    """
    so_far: list[int] = []
    said = ""
    for token in tokens:
        so_far.append(token)
        text = to_text(so_far)
        if not text.endswith("�") and len(text) > len(said):
            yield text[len(said) :]
            said = text
    if (text := to_text(so_far)) != said:
        yield text[len(said) :]


def run(argv: Sequence[str] | None = None) -> None:
    config = parse(GenerateConfig, argv, prog="python -m runners.generate")
    if not config.prompt:
        raise UsageError("--prompt is empty: say what to ask")
    found = open_run(config.run)
    device = choose_device(found.config.changed(device=config.device).run)
    evaluator = open_evaluator(found, device)
    try:
        images = decode_all([Path(name) for name in config.image])
    except BadRecordError as error:
        raise UserError(f"--image: {error}") from error
    text = config.prompt
    if not num_pictures(text):
        text = IMAGE * len(images) + text
    conversation = Conversation("the prompt", (Turn("user", text),), tuple(images))
    sampler = Sampler(config.temperature, config.top_k, config.top_p, config.seed)
    chat, limit = found.config.data.chat, config.max_tokens
    tokens = answer(evaluator, conversation, chat=chat, max_tokens=limit, sampler=sampler)
    for piece in pieces(tokens, evaluator.encoder.tokenizer.decode):
        sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    print()


def _plain(encoder: Encoder, conversation: Conversation) -> Document:
    """The prompt without a template or an end mark, for models of plain text."""
    if conversation.images:
        raise UserError("--image: this run was trained on text alone")
    turn = Turn("text", conversation.turns[0].text, CONTINUED)
    first, *rest = encoder(dataclasses.replace(conversation, turns=(turn,)))
    if rest:
        raise UserError(f"the prompt is longer than the {encoder.max_tokens} tokens of a row")
    return first


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(argv))


if __name__ == "__main__":
    raise SystemExit(main())
