"""Command lines from dataclasses, and errors as one sentence instead of a traceback."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from core.ranges import Field, describe, fields_of, problems, shown, values_of, with_fields
from runners.shell.errors import UserError, printable

T = TypeVar("T")
INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
NONE = ("none", "null")

# Names of our flags in other programs, for hints at ours
ALIASES = {
    "lr": "learning_rate max_lr peak_lr",
    "device_batch_size": "batch_size batch bs micro_batch_size rows per_device_train_batch_size",
    "grad_accum_steps": "gradient_accumulation_steps accumulate accumulation_steps "
    "gradient_accumulation",
    "steps": "epochs num_epochs num_train_epochs max_steps iterations max_iters "
    "num_steps train_steps",
    "sequence_len": "seq_len max_length max_seq_len max_seq_length context_length block_size "
    "context model_max_length",
    "preset": "model model_name arch size model_name_or_path config_name",
    "data": "dataset train_data data_path train_file dataset_name train",
    "val_data": "eval_data validation_file val_file valid_data",
    "val_fraction": "val_split validation_split test_size",
    "image_root": "image_folder image_dir images",
    "runs_dir": "output_dir out_dir output save_dir out logdir",
    "name": "run_name run_id exp_name experiment",
    "run": "checkpoint model path name ckpt",
    "resume": "resume_from resume_from_checkpoint continue checkpoint ckpt",
    "init_from": "pretrained weights from_pretrained finetune_from",
    "workers": "num_workers dataloader_num_workers",
    "warmup_steps": "warmup warmup_ratio num_warmup_steps warmup_iters",
    "weight_decay": "wd decay",
    "grad_clip": "max_grad_norm clip clip_grad gradient_clipping",
    "schedule": "lr_scheduler_type scheduler lr_schedule",
    "optimizer": "optim",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "save_every": "save_steps save_interval checkpoint_interval",
    "log_every": "logging_steps log_interval print_every",
    "val_every": "eval_steps eval_interval val_interval eval_every",
    "dtype": "bf16 fp16 precision mixed_precision torch_dtype amp",
    "use_gradient_checkpointing": "gradient_checkpointing activation_checkpointing "
    "grad_checkpointing checkpointing",
    "use_fp8": "fp8",
    "seed": "random_seed random_state",
    "max_minutes": "max_time time_limit max_seconds max_hours",
    "compile": "torch_compile",
    "wandb_project": "project",
    "max_tokens": "max_new_tokens length num_tokens",
    "prompt": "question text input",
    "examples": "num_examples limit samples",
}


class UsageError(UserError):
    """A command line that does not parse: exit code 2."""


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    defaults: T | None = None,
    first: Sequence[str] = (),
) -> T:
    """The dataclass ``cls`` from a command line.

    Flags take dashes or underscores, ``--flag value`` or ``--flag=value``. Booleans take
    ``=1/0/true/false/yes/no``, or stand alone as ``--flag`` and ``--no_flag``. Tuples take several
    values, or one with commas, and may be repeated. ``none`` is None for an optional field. A field
    that is itself a dataclass is a group of flags. ``--help`` prints the fields' docstrings, group
    by group, and exits.

    Args:
        defaults: an instance that replaces the fields' own defaults.
        first: the fields that ``--help`` shows first.

    Raises UsageError, one sentence with a suggestion, for a flag that is unknown, repeated or
    missing, or for a value that its field does not take.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if _asks_for_help(argv):
        print(help_text(cls, prog or cls.__name__, defaults, first), flush=True)
        raise SystemExit(0)
    known = fields_of(cls)
    values = {name: _convert(name, known[name], words) for name, words in given(cls, argv).items()}
    needed = {f.name for f in dataclasses.fields(cls) if _required(f)}  # type: ignore[arg-type]
    if defaults is None and (missing := sorted(needed - set(values))):
        raise UsageError(f"--{missing[0]} is needed: see --help")
    config = cls(**values) if defaults is None else with_fields(defaults, values)
    check(config)
    return config


def check(config: Any) -> None:
    """Raises UsageError naming the first flag with a value that its field does not take."""
    for name, problem in problems(config):
        raise UsageError(f"--{name} {problem}")


def given(cls: type, argv: Sequence[str] | None = None) -> dict[str, list[str]]:
    """The words of each flag on the command line; empty if it asks for help. Raises UsageError."""
    argv = sys.argv[1:] if argv is None else argv
    return {} if _asks_for_help(argv) else _group(argv, fields_of(cls))


def _asks_for_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def guarded(run: Callable[[], int | None]) -> int:
    """Runs a command and returns its exit code.

    A UserError is printed as one sentence on stderr and gives 1 (2 for the command line), Ctrl-C
    gives 130, a closed output pipe 1.
    """
    try:
        check_single_process()
        status = run() or 0
        sys.stdout.flush()  # here, where an error is still caught
        return status
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for buffered output
        return 1


def check_single_process() -> None:
    """Raises UserError if a launcher started several processes: each would do the same work."""
    if (number := os.environ.get("WORLD_SIZE", "1")) not in ("", "0", "1"):
        raise UserError(
            f"a launcher started {number} processes of this program (WORLD_SIZE={number}), but it "
            "computes in one: start it with python -m, without torchrun"
        )


@contextmanager
def explained(what: str = "") -> Iterator[None]:
    """Turns a library's ValueError or OSError into a UserError, with ``what`` in front."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error


def nearest(name: str, known: Sequence[str]) -> str:
    """``; did you mean ...?`` with the closest known name, or an empty string."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def hint(name: str, fields: Mapping[str, Field]) -> str:
    """A hint for an unknown flag: ours for another program's name, or the closest."""
    for field, others in ALIASES.items():
        if field in fields and name in others.split():
            return f"; did you mean --{field}?"
    return nearest(f"--{name}", [f"--{field}" for field in fields])


def _group(argv: Sequence[str], fields: Mapping[str, Field]) -> dict[str, list[str]]:
    """The words of each flag."""
    found: dict[str, list[str]] = {}
    current: str | None = None
    for token in argv:
        if token.startswith("--"):
            flag, has_value, value = token[2:].partition("=")
            name = flag.replace("-", "_")
            negated = name.removeprefix("no_")
            if name not in fields and name != negated and _is(fields.get(negated), bool):
                name, has_value, value = negated, "=", "false"
            if name not in fields:
                raise UsageError(f"unknown flag --{flag}{hint(name, fields)} (see --help)")
            several = _is(fields[name], tuple)
            if name in found and not several:
                raise UsageError(f"--{name} is given twice: give it once (see --help)")
            found.setdefault(name, []).extend([value] if has_value else [])
            current = None if has_value and not several else name
        elif current is None or (found[current] and not _is(fields[current], tuple)):
            raise UsageError(f"unexpected argument {token!r}: values follow a --flag (see --help)")
        else:
            found[current].append(token)
    return found


def _convert(name: str, field: Field, words: list[str]) -> Any:
    """The value of a flag from its words. Raises UsageError."""
    if field.items is not None:
        items = field.items
        parts = [part for word in words for part in word.split(",") if part]
        return tuple(_value(name, items, part) for part in parts)
    if field.kind is bool and not words:
        return True
    if not words:
        raise UsageError(f"--{name} needs a value (see --help)")
    return _value(name, field, words[0])


def _value(name: str, field: Field, word: str) -> Any:
    if field.optional and word.lower() in NONE:
        return None
    if field.kind is bool:
        if word.lower() not in TRUE + FALSE:
            raise UsageError(f"--{name} is 1 or 0 (true, false, yes, no), not {shown(word)}")
        return word.lower() in TRUE
    if field.options:
        by_word = {str(option): option for option in field.options}
        if word not in by_word:
            raise UsageError(f"--{name} takes one of {', '.join(by_word)}, not {shown(word)}")
        return by_word[word]
    try:
        return field.kind(word)
    except ValueError:
        raise UsageError(f"--{name} takes {describe(field)}, not {shown(word)}") from None


def _is(field: Field | None, kind: type) -> bool:
    return field is not None and field.kind is kind


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


# -- help ---------------------------------------------------------------------------------------


def help_text(cls: type, prog: str, defaults: object, first: Sequence[str] = ()) -> str:
    """Each flag's type, default and docstring, group by group."""
    width = min(100, shutil.get_terminal_size().columns)
    docs, known = _field_docs(cls), fields_of(cls)
    hints = typing.get_type_hints(cls)
    groups = [h for h in hints.values() if isinstance(h, type) and dataclasses.is_dataclass(h)]
    own = {f.name: f for group in groups or [cls] for f in dataclasses.fields(group)}
    sections = {"most used": list(first)} if first else {}
    for group in groups or [cls]:
        docs |= _field_docs(group)
        title = inspect.cleandoc(group.__doc__ or "").rstrip(".") if groups else "flags"
        sections[title] = [name for name in fields_of(group) if name not in first]
    values = None if defaults is None else values_of(defaults)
    lines = [f"usage: {prog} [--flag value | --flag=value | --no_flag] ...", ""]
    lines += textwrap.wrap(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0], width)
    for title, names in sections.items():
        lines += ["", f"{title}:"]
        for name in names:
            if values is not None:
                default = f"default: {_written(values[name])}"
            else:
                default = (
                    "needed" if _required(own[name]) else f"default: {_written(own[name].default)}"
                )
            facts = _range(known[name]) + ("" if "Default:" in docs.get(name, "") else default)
            text = f"{docs.get(name, '')} ({facts})" if facts else docs[name]
            lines.append(f"  --{name} {_takes(known[name])}")
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _takes(field: Field) -> str:
    if field.items is not None:
        return f"{_takes(field.items)} ..."
    if field.options:
        return "{" + ",".join(map(str, field.options)) + "}"
    return {int: "INT", float: "FLOAT", bool: "{1,0}"}.get(field.kind, "TEXT")


def _range(field: Field) -> str:
    """A field's bounds, without the upper ones that only guard against overflow."""
    bounds = field.range
    if bounds.high is not None and bounds.high > 2**20:
        bounds = dataclasses.replace(bounds, high=None)
    low, high = (bounds.broken_by(value) for value in (-math.inf, math.inf))
    return "".join(f"{bound}; " for bound in (low, high) if bound)


def _written(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(int(value))
    return "none" if value is None else str(value)


def _field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, which Python does not keep. A field that is
    redeclared without one has the base class's."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        docs |= _own_field_docs(base)
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(ast.literal_eval(after.value).split())
    return docs
