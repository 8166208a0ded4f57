"""JSON files of a run, read with typed checks: one sentence names the file and the field."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from core.ranges import shown
from runners.shell.errors import UserError

T = TypeVar("T")
WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


@dataclass(frozen=True)
class Fields:
    """A JSON object, its file and its place in that file."""

    values: dict[str, Any]
    path: Path
    at: str = ""  # of the object inside the file, such as "loader.stats."

    def get(self, name: str, kind: type[T]) -> T:
        """A field's value. Raises UserError if it is missing or of another type.

        kind: int, float (whole numbers too), str, bool, dict or list. Numbers are finite.
        """
        if name not in self.values:
            self.fail(f"the field {self.at + name!r} is missing")
        value = self.values[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            self.fail(f"the field {self.at + name!r} must be {WORDS[kind]}, not {shown(value)}")
        return value

    def find(self, name: str, kind: type[T]) -> T | None:
        """Like :meth:`get`, but None for a field that is missing or null."""
        return None if self.values.get(name) is None else self.get(name, kind)

    def object(self, name: str) -> Fields:
        """A field that is an object."""
        return Fields(self.get(name, dict), self.path, f"{self.at}{name}.")

    def fail(self, problem: str) -> NoReturn:
        """Raises UserError: how the file is damaged."""
        raise damaged(self.path, problem)


def damaged(path: Path, problem: object) -> UserError:
    """The error for a file that this program cannot have written."""
    return UserError(f"{path} is damaged: {problem}; restore it from a copy, or start a new run")


def read_object(path: Path) -> Fields:
    """The JSON object in a file. Raises UserError if the file cannot be read or holds another."""
    return Fields(_object(_text(path), path), path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one per line, without a last line that a crash cut short. Raises
    UserError naming the damaged line."""
    *lines, _ = _text(path).split("\n")
    return [_object(line, path, f"line {number}: ") for number, line in enumerate(lines, 1) if line]


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a file: remove it, or start a new run")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise damaged(path, f"byte {error.start} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _object(text: str, path: Path, at: str = "") -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets within brackets
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise damaged(path, f"{at}{problem}") from error
    if not isinstance(value, dict):
        raise damaged(path, f"{at}it must be an object, not {shown(value)}")
    return value


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


def _finite(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise ValueError(f"{word} is too large a number")
    return number
