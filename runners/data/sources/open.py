"""The data of a run, and the part that is held out."""

from __future__ import annotations

import glob
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import VLMConfig
from runners.data.sources.digests import Digest
from runners.data.sources.llava import Llava
from runners.data.sources.shapes import COLOURS, SHAPES, VERSION, Shapes
from runners.data.sources.split import digest_of, file_digest
from runners.data.sources.text import TextFiles, num_bytes
from runners.data.types import Source, Together, questions_and_answers
from runners.shell.errors import UserError
from runners.training.config import TrainConfig
from runners.training.settings import DataSettings, is_chat

NOTHING = "Held out: nothing (--val_fraction=0)"


@dataclass(frozen=True)
class Sources:
    """The data of a run. held_out: by name; ``val`` measures training, others only its end."""

    train: Source
    held_out: Mapping[str, Source]
    ordered: bool = False  # the items' order matters: the loader does not shuffle them
    summary: str = NOTHING  # what is held out, in a line
    digests: tuple[Digest, ...] = ()  # of each file, for the run's data.json


def open_sources(config: TrainConfig, model: VLMConfig) -> Sources:
    """The data of ``--data`` and ``--val_data``. Raises UserError if it cannot be read."""
    data = config.data
    if data.chat:
        asked = _how_asked(data, config.run.ask)
        if data.data == "shapes":
            return _shapes(data, model, config.run.seed, asked)
        return _conversations(data, asked)
    return _texts(data)


def open_files(data: DataSettings) -> Source:
    """The data of ``--val_data`` alone. Raises UserError if it cannot be read."""
    return _together(_apart(data)) if data.chat else _texts_apart(data)


def _how_asked(data: DataSettings, ask: str) -> str:
    if data.turns == "single":
        return "each is asked alone (--turns=single)"
    if ask == "alone":
        return "each is asked alone (--ask=alone), which is not how it is trained"
    return "each is asked after the true turns before it"


def _check_kind(data: DataSettings) -> None:
    for path in data.val_data:
        if is_chat(path) != data.chat or path == "shapes":
            kind = "conversations (.json, .jsonl)" if data.chat else "plain text"
            raise UserError(f"--val_data {path}: --data {data.data} is {kind}, and so must it be")


# -- conversations ----------------------------------------------------------------------------


def _conversations(data: DataSettings, asked: str) -> Sources:
    whole = _llava(data, data.data)
    digests = _digests("--data", whole)
    if data.val_data:
        held_out = _apart(data)
        pictures = {held for source in held_out for held in source.pictures.values()}
        names = [name for source in held_out for name in source.names()]
        records = _with_shared(len(names), "records", set(names).intersection(whole.names()))
        shared = pictures.intersection(whole.pictures.values())
        what = f"{', '.join(data.val_data)}: {records}"
        train = whole
        digests += [digest for source in held_out for digest in _digests("--val_data", source)]
    elif data.val_fraction:
        train, part = whole.parted(data.val_fraction, data.val_seed)
        held_out, shared = [part], set()
        shown = {name for record in part.records for name in record.files}
        pictures = {whole.pictures[name] for name in shown}
        what = f"{len(part.records):,} of {len(whole.records):,} records"
    else:
        return Sources(whole, {}, digests=tuple(digests))
    known = set(_answers(train))
    answers = [answer for source in held_out for answer in _answers(source)]
    occur = sum(answer in known for answer in answers)
    summary = (
        f"Held out: {what}, {_with_shared(len(pictures), 'pictures', shared)}; {occur:,} of "
        f"{len(answers):,} held-out answers occur in training; {asked}"
    )
    return Sources(train, {"val": _together(held_out)}, summary=summary, digests=tuple(digests))


def _digests(flag: str, source: Llava) -> list[Digest]:
    """Of a file of records, and of its pictures."""
    path, held = str(source.path), list(source.pictures.values())
    found = [Digest(flag, path, file_digest(source.path).hex())]
    if held:
        names = tuple(source.pictures)
        whole = digest_of(*names, *held).hex()
        each = "".join(digest[:4].hex() for digest in held)
        found.append(Digest(f"{flag}, pictures", path, whole, each, names))
    return found


def _apart(data: DataSettings) -> list[Llava]:
    """The files of ``--val_data``, each in random order."""
    _check_kind(data)
    sources = [_llava(data, path) for path in data.val_data]
    for source in sources:
        source.shuffle(data.val_seed)
    return sources


def _together(sources: Sequence[Llava]) -> Source:
    return sources[0] if len(sources) == 1 else Together(sources)


def _llava(data: DataSettings, path: str) -> Llava:
    return Llava(path, images=data.image_root, turns=data.turns)


def _with_shared(count: int, kind: str, shared: Collection[bytes]) -> str:
    also = f" ({len(shared):,} of them in --data too)" if shared else ""
    return f"{count:,} {kind}{also}"


def _answers(source: Llava) -> list[str]:
    return [
        answer.text
        for record in source.records
        for _, answer in questions_and_answers(record.turns)
    ]


# -- plain text -------------------------------------------------------------------------------


def _texts(data: DataSettings) -> Sources:
    whole = TextFiles(_found("--data", data.data), documents=data.documents)
    digests = _text_digests("--data", whole)
    if data.val_data:
        val = _texts_apart(data)
        shared = set(whole.digests).intersection(val.digests)
        what = _with_shared(len(val.documents), "documents", shared)
        summary = f"Held out: {', '.join(data.val_data)}: {what}"
        digests += _text_digests("--val_data", val)
        return Sources(whole, {"val": val}, summary=summary, digests=tuple(digests))
    if not data.val_fraction:
        return Sources(whole, {}, digests=tuple(digests))
    train, val = whole.parted(data.val_fraction, data.val_seed)
    size, all_of_it = (sum(map(num_bytes, source.documents)) for source in (val, whole))
    summary = (
        f"Held out: {len(val.documents):,} of {len(whole.documents):,} documents, "
        f"{size / all_of_it:.1%} of the text"
    )
    return Sources(train, {"val": val}, summary=summary, digests=tuple(digests))


def _text_digests(flag: str, source: TextFiles) -> list[Digest]:
    return [Digest(flag, path, digest.hex()) for path, digest in source.contents().items()]


def _texts_apart(data: DataSettings) -> TextFiles:
    _check_kind(data)
    paths = [path for name in data.val_data for path in _found("--val_data", name)]
    source = TextFiles(paths, documents=data.documents)
    source.shuffle(data.val_seed)
    return source


def _found(flag: str, name: str) -> Sequence[str]:
    paths = [name] if Path(name).exists() else sorted(glob.glob(name))
    if not paths:
        raise UserError(
            f"{flag} {name} is neither 'shapes' nor a file, a folder or a glob that exists"
        )
    return paths


# -- drawn scenes -----------------------------------------------------------------------------


def _shapes(data: DataSettings, model: VLMConfig, seed: int, asked: str) -> Sources:
    if model.vision is None:
        raise UserError(
            "--data shapes has pictures, but this --preset has no vision part: choose another "
            "preset, or text"
        )
    shapes = partial(
        Shapes,
        seed,
        size=model.vision.image_size,
        kinds=data.kinds,
        max_objects=data.max_objects,
        questions=data.questions,
        ramp=data.ramp,
        colours=tuple(COLOURS)[: data.colours],
        shapes=SHAPES[: data.shapes],
    )
    held_out: dict[str, Source] = {name: shapes(split=name) for name in ("val", "unseen")}
    summary = (
        f"Held out: {len(held_out['val'])} new scenes (val), and {len(held_out['unseen'])} with "
        f"pairs of colour and shape that training never shows (unseen); {asked}"
    )
    scenes = Digest("--data", "shapes", f"scenes {VERSION} of seed {seed}")
    return Sources(
        shapes(split="train"), held_out, ordered=True, summary=summary, digests=(scenes,)
    )
