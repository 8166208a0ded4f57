"""Command lines from dataclasses, and errors as one sentence instead of a traceback."""

from __future__ import annotations

import dataclasses
import difflib
import io
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, TypeVar

import tyro

from runners.errors import UserError

T = TypeVar("T")
OPTIONS = (tyro.conf.FlagConversionOff,)
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class UsageError(UserError):
    """A command line that does not parse: exit code 2, as is the custom."""


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    defaults: T | None = None,
) -> T:
    """``cls``, a dataclass whose fields all have defaults or are given in ``argv``.

    Flags take dashes or underscores, ``--flag value`` or ``--flag=value``. Booleans also take
    ``=1/0/true/false/yes/no`` and stand alone as ``--flag`` and ``--no_flag``; tuples take several
    values, or one with commas. Raises UsageError, one sentence with the nearest suggestion, for an
    unknown flag or a value of the wrong type. ``defaults``: an instance to start from instead of
    the fields' own defaults. ``--help`` prints the fields' docstrings and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if _asks_for_help(argv):
        _tyro(cls, ["--help"], defaults, prog=prog)
    values = given(cls, argv)
    needed = {f.name for f in dataclasses.fields(cls) if _required(f)}  # type: ignore[arg-type]
    if missing := sorted(needed - set(values)):
        raise UsageError(f"--{missing[0]} is needed: see --help")
    try:
        return _quietly(cls, _spell(values), defaults)
    except SystemExit:
        raise UsageError(_culprit(cls, values, needed)) from None


def given(cls: type, argv: Sequence[str] | None = None) -> dict[str, list[str]]:
    """What the command line says of each field, as it stands there: a look before parsing, which
    takes tyro 0.08 s (on a slow core). Nothing where it asks for help. Raises UsageError."""
    argv = sys.argv[1:] if argv is None else argv
    return {} if _asks_for_help(argv) else _group(argv, typing.get_type_hints(cls))


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def guarded(run: Callable[[], int | None]) -> int:
    """The exit code of a command: its own; 1 (2 for its command line) after one sentence on stderr
    for a mistake of the user's; 130 after Ctrl-C."""
    try:
        return run() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def explained(what: str = "") -> Iterator[None]:
    """What the libraries say about bad input (ValueError, OSError), said as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


def nearest(name: str, known: Sequence[str]) -> str:
    """``did you mean ...?`` or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _group(argv: Sequence[str], hints: dict[str, Any]) -> dict[str, list[str]]:
    """The values given for each field, booleans as True and False; the last mention counts."""
    given: dict[str, list[str]] = {}
    current: str | None = None
    for token in argv:
        if token.startswith("--"):
            flag, has_value, value = token[2:].partition("=")
            name = flag.replace("-", "_")
            negated = name.removeprefix("no_")
            if name not in hints and name != negated and _takes(hints.get(negated), bool):
                name, has_value, value = negated, "=", "false"
            if name not in hints:
                known = [f"--{field}" for field in hints]
                raise UsageError(f"unknown flag --{flag}{nearest(f'--{name}', known)} (see --help)")
            given[name] = [value] if has_value else []
            current = None if has_value and not _takes(hints[name], tuple) else name
        elif current is None or (given[current] and not _takes(hints[current], tuple)):
            raise UsageError(f"unexpected argument {token!r}: values follow a --flag (see --help)")
        else:
            given[current].append(token)
    return {name: _values(name, hints[name], values) for name, values in given.items()}


def _values(name: str, hint: Any, values: list[str]) -> list[str]:
    if _takes(hint, tuple):
        return [part for value in values for part in value.split(",") if part]
    if not _takes(hint, bool):
        if not values:
            raise UsageError(f"--{name} needs a value (see --help)")
        return values
    word = values[0].lower() if values else "true"
    if word not in TRUE + FALSE:
        raise UsageError(f"--{name} is 1 or 0 (true, false, yes, no), not {values[0]!r}")
    return [str(word in TRUE)]


def _takes(hint: Any, kind: type) -> bool:
    """Whether a field is of this type, or optionally so."""
    options = (hint, typing.get_origin(hint), *typing.get_args(hint))
    return kind in options


def _spell(given: dict[str, list[str]]) -> list[str]:
    spelled = []
    for name, values in given.items():
        one = len(values) == 1
        spelled += [f"--{name}={values[0]}"] if one else [f"--{name}", *values]
    return spelled


def _culprit(cls: type, given: dict[str, list[str]], needed: set[str]) -> str:
    """Which of the flags does not parse, found by trying each alone beside the required ones."""
    hints = typing.get_type_hints(cls)
    for name, values in given.items():
        kept = {k: v for k, v in given.items() if k in needed or k == name}
        try:
            _quietly(cls, _spell(kept), None)
        except SystemExit:
            wanted = _describe(hints[name])
            return f"--{name} takes {wanted}, not {' '.join(values)!r}"
    return f"these flags do not parse together: {' '.join(_spell(given))}"


def _describe(hint: Any) -> str:
    options = [a for a in typing.get_args(hint) if a is not type(None)] or [hint]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, options))}"
    return {"int": "a whole number", "float": "a number"}.get(
        options[0].__name__, f"a value of type {options[0].__name__}"
    )


def _tyro(cls: type[T], args: list[str], defaults: T | None, prog: str | None = None) -> T:
    default = tyro.MISSING_NONPROP if defaults is None else defaults
    return tyro.cli(
        cls, args=args, prog=prog, config=OPTIONS, use_underscores=True, default=default
    )


def _quietly(cls: type[T], args: list[str], defaults: T | None) -> T:
    """Raises SystemExit without a word: tyro's framed messages are for --help."""
    with redirect_stderr(io.StringIO()):
        return _tyro(cls, args, defaults)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
