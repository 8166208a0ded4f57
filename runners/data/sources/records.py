r"""LLaVA's JSON: a list of records with `id`, `image` and `conversations`.

`conversations` alternates {"from": "human", "value": ...} and {"from": "gpt", "value": ...}, with
an `<image>` in the human's words for each picture; `\<image>` is the word itself. `image` is a
path, a list of paths, or absent
(https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md).
"""

from __future__ import annotations

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.data.sources.utf8 import decoded
from runners.data.types import IMAGE, BadRecordError, Turn, num_pictures
from runners.shell.errors import UserError, printable

MAX_TEXT = 1 << 22  # characters of a record: encoding them takes seconds
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    turns: tuple[Turn, ...]
    files: tuple[str, ...]


def parse_record(number: int, raw: Any) -> Record:
    """Check one record. Raises BadRecordError, naming the record and the field."""
    if isinstance(raw, BadRecordError):
        raise raw
    name = str(raw.get("id", number))[:200] if isinstance(raw, dict) else str(number)
    name = printable(name)
    where = f"record {number} (id {name!r})"
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise BadRecordError("no conversations", f"{where} has no list `conversations`")
    files = raw.get("image") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise BadRecordError(
            "no picture path", f"{where} has an `image` that is neither a path nor a list of paths"
        )
    turns = _turns(where, raw["conversations"])
    marks = sum(num_pictures(turn.text) for turn in turns if turn.role == "user")
    if marks != len(files):
        raise BadRecordError(
            "pictures and marks",
            f"{where} has {len(files)} pictures in `image` but {marks} {IMAGE} marks in the "
            "human's turns",
        )
    return Record(name, turns, tuple(files))


def _turns(where: str, said: list[Any]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    system = ""
    for turn in said:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (0, 0)
        if not isinstance(text, str) or not isinstance(speaker, str):
            raise BadRecordError(
                "turns without text", f"{where} has a turn without the texts `from` and `value`"
            )
        if not _is_unicode(text):
            raise BadRecordError(
                "half a character", f"{where} has half a character (a lone surrogate) in a text"
            )
        if speaker == "system" and not turns:
            system += text + "\n"  # belongs to the first question
            continue
        belongs = "gpt" if len(turns) % 2 else "human"
        if _ROLES.get(speaker) != _ROLES[belongs]:
            raise BadRecordError(
                "turns out of order",
                f"{where} has a turn from {speaker[:40]!r} where one from {belongs!r} belongs: "
                "they take turns, human first",
            )
        turns.append(Turn(_ROLES[belongs], system + text))
        system = ""
    if not turns or len(turns) % 2:
        raise BadRecordError("no answer", f"{where} does not end with an answer from 'gpt'")
    if not all(turn.text.strip() for turn in turns):
        raise BadRecordError("empty turn", f"{where} has a turn that says nothing")
    if (length := sum(len(turn.text) for turn in turns)) > MAX_TEXT:
        raise BadRecordError(
            "text too long", f"{where} has {length:,} characters, more than {MAX_TEXT:,}"
        )
    return tuple(turns)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json(path: Path) -> list[Any]:
    """The records of a JSON list or a .jsonl file. Raises UserError, naming the place; a broken
    line of a .jsonl file is a BadRecordError in its record's place."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"The data file {path} cannot be read: it is not a file.")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"The data file {path} cannot be read ({error.strerror}): give the path of a JSON file."
        ) from error
    text = decoded(path, data)
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [_line(line, number) for number, line in lines if line.strip()]
    try:
        records = json.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be LLaVA's form.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is broken JSON at line {error.lineno}, column {error.colno} "
            f"({error.msg}): mend it there, or copy the file again."
        ) from error
    except ValueError as error:  # a number with thousands of digits
        raise UserError(f"{path} holds a value that cannot be read: {error}.") from error
    if not isinstance(records, list):
        raise UserError(f"{path} holds no list of records: LLaVA's form is [{{...}}, ...].")
    return records


def _line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return BadRecordError("broken JSON", f"line {number} is broken JSON ({why})")
