"""LLaVA's JSON: a list of records with `id`, `image` and `conversations`.

`conversations` alternates {"from": "human", "value": ...} and {"from": "gpt", "value": ...}, with
an `<image>` in the human's words for each picture. `image` is a path, a list of paths, or absent
(https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.data.types import IMAGE, Turn
from runners.errors import UserError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    turns: tuple[Turn, ...]
    files: tuple[str, ...]


def parse_record(path: Path, number: int, raw: Any) -> Record:
    """Check one record of `path`. Raises UserError, naming the record and the field."""
    name = str(raw.get("id", number)) if isinstance(raw, dict) else str(number)
    where = f"Record {number} (id {name!r}) of {path}"
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise UserError(f"{where} has no list `conversations`: give it one, or remove it.")
    files = raw.get("image") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise UserError(f"{where} has an `image` that is neither a path nor a list of paths.")
    turns = _turns(where, raw["conversations"])
    marks = sum(turn.text.count(IMAGE) for turn in turns if turn.role == "user")
    if marks != len(files):
        raise UserError(
            f"{where} has {len(files)} pictures in `image` but {marks} {IMAGE} marks in the "
            "human's turns: make the numbers equal."
        )
    return Record(name, turns, tuple(files))


def _turns(where: str, said: list[Any]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    system = ""
    for turn in said:
        if not isinstance(turn, dict):
            raise UserError(f"{where} has a turn that is no object with `from` and `value`.")
        speaker, text = turn.get("from"), turn.get("value")
        if not isinstance(text, str) or not isinstance(speaker, str):
            raise UserError(f"{where} has a turn without the texts `from` and `value`.")
        if not _is_unicode(text):
            raise UserError(f"{where} has half a character (a lone surrogate) in a text: mend it.")
        if speaker == "system" and not turns:
            system += text + "\n"  # belongs to the first question
            continue
        belongs = "gpt" if len(turns) % 2 else "human"
        if _ROLES.get(speaker) != _ROLES[belongs]:
            raise UserError(
                f"{where} has a turn from {speaker!r} where one from {belongs!r} belongs: "
                "they take turns, human first."
            )
        turns.append(Turn(_ROLES[belongs], system + text))
        system = ""
    if not turns or len(turns) % 2:
        raise UserError(f"{where} does not end with an answer from 'gpt': add it.")
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json(path: Path) -> list[Any]:
    """The records of a JSON list or a .jsonl file. Raises UserError, naming the place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it.") from error
    except OSError as error:
        raise UserError(
            f"The data file {path} cannot be read ({error.strerror}): give the path of a JSON file."
        ) from error
    try:
        if path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), 1)
            return [_loads(line, path, number) for number, line in lines if line.strip()]
        records = _loads(text, path, 1)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be LLaVA's form.") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds no list of records: LLaVA's form is [{{...}}, ...].")
    return records


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is broken JSON at line {first_line + error.lineno - 1}, column {error.colno} "
            f"({error.msg}): mend it there, or copy the file again."
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{path} holds a value that cannot be read: {error}.") from error
