"""Types and ranges of a config's fields, declared beside them and checked in one place."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

C = TypeVar("C")
SHOWN = 60  # characters of a wrong value that a message repeats


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes, as its annotation says: ``Annotated[int, Range(1, 4096)]``.

    ``low`` and ``high`` are included, ``above`` and ``below`` are not.

    >>> Range(0, below=1).broken_by(1.5)
    'less than 1'
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def broken_by(self, value: float) -> str | None:
        """The bound that a value does not keep, in words, or None."""
        if self.low is not None and value < self.low:
            return f"{self.low} or more"
        if self.above is not None and value <= self.above:
            return f"more than {self.above}"
        if self.high is not None and value > self.high:
            return f"at most {self.high}"
        if self.below is not None and value >= self.below:
            return f"less than {self.below}"
        return None


@dataclass(frozen=True)
class Field:
    """What a field takes: values of one kind, or None where it is optional."""

    kind: type  # int, float, bool, str or tuple; any other class: its instances
    items: Field | None = None  # of a tuple
    options: tuple[Any, ...] = ()  # of a Literal
    range: Range = Range()
    optional: bool = False

    def problem(self, value: object) -> str | None:
        """What is wrong with a value: a sentence without its subject, the field's name."""
        if value is None and self.optional:
            return None
        if self.options:
            known = ", ".join(map(str, self.options))
            return None if value in self.options else f"must be one of {known}, not {shown(value)}"
        if self.items is not None:
            if not isinstance(value, tuple):
                return f"must be a list, not {shown(value)}"
            return next(filter(None, map(self.items.problem, value)), None)
        if not self._of_kind(value):
            return f"must be {describe(self)}, not {shown(value)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, not {value}"
        if isinstance(value, int | float) and (bound := self.range.broken_by(value)):
            return f"must be {bound}, not {shown(value)}"
        return None

    def _of_kind(self, value: object) -> bool:
        if self.kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        if self.kind is int:
            return isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, self.kind)


def describe(field: Field) -> str:
    """The kind of value that a field takes, in words."""
    words: dict[type, str] = {int: "a whole number", float: "a number"}
    words |= {bool: "true or false", str: "text"}
    return words.get(field.kind, f"a value of type {field.kind.__name__}")


def shown(value: object) -> str:
    """A value as a message repeats it: not longer than a line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a dataclass by name, in their order; of parts that are dataclasses, theirs."""
    hints, found = typing.get_type_hints(cls, include_extras=True), dict[str, Field]()
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= fields_of(hint) if part else {f.name: _field(hint)}
    return found


def values_of(config: Any) -> dict[str, Any]:
    """The values of :func:`fields_of` in an instance."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found |= values_of(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return found


def with_fields(config: C, values: Mapping[str, Any]) -> C:
    """An instance with other values of some of :func:`fields_of`. Raises TypeError for a name that
    is none of them."""
    changes: dict[str, Any] = {}
    left = dict(values)
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            inner = {name: left.pop(name) for name in fields_of(type(value)) if name in left}
            changes |= {f.name: with_fields(value, inner)} if inner else {}
        elif f.name in left:
            changes[f.name] = left.pop(f.name)
    if left:
        raise TypeError(f"{type(config).__name__} has no field {next(iter(left))!r}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def problems(config: Any) -> Iterator[tuple[str, str]]:
    """``(field, what is wrong with its value)`` of a dataclass's instance.

    >>> @dataclass
    ... class Sizes:
    ...     rows: typing.Annotated[int, Range(1)] = 0
    >>> list(problems(Sizes()))
    [('rows', 'must be 1 or more, not 0')]
    """
    values = values_of(config)
    for name, field in fields_of(type(config)).items():
        if problem := field.problem(values[name]):
            yield name, problem


def check_fields(config: Any, name: str) -> None:
    """Raises ValueError naming the first field, below ``name``, of a wrong value."""
    for field, problem in problems(config):
        raise ValueError(f"{name}.{field} {problem}")


def _field(hint: Any) -> Field:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = next((a for a in args[1:] if isinstance(a, Range)), Range())
        return dataclasses.replace(_field(args[0]), range=bounds)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) != 1:
            raise TypeError(f"a field takes values of one kind, or None: {hint}")
        return dataclasses.replace(_field(kinds[0]), optional=len(kinds) < len(args))
    if origin is typing.Literal:
        return Field(type(args[0]), options=args)
    if origin is tuple:
        return Field(tuple, items=_field(args[0]))
    return Field(hint)
