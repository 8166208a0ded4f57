"""Splits a tokenizer.json into text tokens and control tokens, which no text is encoded to.

`tokenizers` encodes text to any entry of the vocabulary, and to added tokens that are not marked
`special`; it numbers new tokens by the size of the vocabulary, which collides with others if ids
have gaps. So control tokens get their ids here, and a copy without them encodes text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from runners.shell.errors import UserError

MAX_ID = 1 << 22  # the largest public vocabularies have about 2**20 tokens
# <s>, </s>, <|end|>, <|im start|>, <<SYS>>, [CLS], [/INST], [unused7]; full-width bars as well.
_MARK = re.compile(
    r"<+[^<>\s]+>+|<[|｜][^<>]*[|｜]>|\[/?(?=\w\w)(?:\w*[A-Z_]\w*|unused\d+)\]", re.DOTALL
)
# Of added tokens, all that punctuation encloses: >>fr<<, __en__, {user}, [eos].
_ENCLOSED = re.compile(r"[^\w\s].*\w.*[^\w\s]|__.+__", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Parted:
    """full: a tokenizer.json with all tokens, for others to read. text: what text may become.
    ids: of every token by name. control: names of control tokens by id.
    lacking: marks that the file did not have."""

    full: str
    text: Tokenizer
    ids: dict[str, int]
    control: dict[int, str]
    lacking: tuple[str, ...]


def part(given: str, marks: Sequence[str]) -> Parted:
    """Part the text of a tokenizer.json. Marks that it lacks are added behind its last id.

    Control tokens are `marks`, added tokens that are special, and all that look like one (`<s>`,
    `<|im_end|>`, `[CLS]`); not the token for unknown text, and not bytes (`<0x0A>`).
    Raises UserError where two tokens share an id, or an id cannot be kept; whatever `tokenizers`
    raises where it cannot read the text.
    """
    Tokenizer.from_str(given)  # after that its form is known
    tokenizer = json.loads(given)
    added = tokenizer.get("added_tokens") or []
    tokenizer |= {"truncation": None, "padding": None, "added_tokens": added}
    model = tokenizer["model"]
    plain = _ids(model)
    unknown = _unknown(model)
    if unknown in marks:
        raise UserError(f"the tokenizer writes {unknown} for text that it does not know")
    ids = dict(plain)
    for token in added:
        name = token["content"]
        if ids.setdefault(name, token["id"]) != token["id"]:
            raise UserError(f"the tokenizer gives {name!r} the ids {ids[name]} and {token['id']}")
    lacking = tuple(name for name in marks if name not in ids)
    for i, name in enumerate(lacking, max(ids.values(), default=-1) + 1):
        ids[name] = i
    known = {token["content"] for token in added}
    added += [_special(name, ids[name]) for name in marks if name not in known]
    added.sort(key=lambda token: token["id"])
    _check_ids(ids)
    later = sorted((i, name) for name, i in ids.items() if name not in plain)
    if isinstance(model["vocab"], list):  # its ids have no gaps, and added ones follow it
        if [i for i, _ in later] != [*range(len(model["vocab"]), len(model["vocab"]) + len(later))]:
            raise UserError(
                "the tokenizer's added tokens leave ids unused behind its Unigram model"
            )
    else:
        model["vocab"].update((name, i) for i, name in later)
    control = {
        ids[name]: name
        for name in {
            token["content"]
            for token in added
            if token["special"] or _ENCLOSED.fullmatch(token["content"])
        }.union(marks, filter(_MARK.fullmatch, ids))
        if name != unknown and not _BYTE.fullmatch(name)
    }
    full = json.dumps(tokenizer, ensure_ascii=False)
    return Parted(full, _text_only(tokenizer, control, later), ids, control, lacking)


def _text_only(
    tokenizer: dict[str, Any], control: dict[int, str], later: Sequence[tuple[int, str]]
) -> Tokenizer:
    """The tokenizer without its control tokens. later: what was added behind its vocabulary."""
    model, names = dict(tokenizer["model"]), set(control.values())
    if isinstance(model["vocab"], list):
        least = min((score for _, score in model["vocab"]), default=0.0)
        pieces = [*model["vocab"], *([name, least] for _, name in later)]
        # Entries cannot be left out of a list: they get names that are no text (noncharacters).
        model["vocab"] = [
            [f"\uffff{i}\ufffe" if i in control else piece, score]
            for i, (piece, score) in enumerate(pieces)
        ]
    else:
        model["vocab"] = {name: i for name, i in model["vocab"].items() if name not in names}
    if "merges" in model:
        model["dropout"] = None  # the same text gives the same tokens
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if names.isdisjoint((left, right, left + right[prefix:]))
        ]
    added = [token for token in tokenizer["added_tokens"] if token["content"] not in names]
    parts = {"model": model, "added_tokens": added, "post_processor": None}
    text = Tokenizer.from_str(json.dumps(tokenizer | parts))
    text.encode_special_tokens = True  # the unknown token's name in a text is letters, too
    return text


def _ids(model: dict[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {p: i for i, (p, _) in enumerate(vocab)}


def _unknown(model: dict[str, Any]) -> str | None:
    """The token for text that is not in the vocabulary, where the model has one."""
    if isinstance(model["vocab"], list):
        place = model.get("unk_id")
        return None if place is None else model["vocab"][place][0]
    return model.get("unk_token")


def _check_ids(ids: dict[str, int]) -> None:
    names: dict[int, str] = {}
    for name, i in ids.items():
        if names.setdefault(i, name) != name:
            raise UserError(f"the tokenizer gives {names[i]!r} and {name!r} one id, {i}")
        if i >= MAX_ID:
            raise UserError(f"the tokenizer's token {name!r} has id {i}, beyond {MAX_ID:,}")


def _special(name: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": True}
