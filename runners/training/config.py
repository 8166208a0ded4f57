"""The config of a training run: command lines, files and checks."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import PRESETS, VLMConfig, config_from_dict
from core.ranges import fields_of, shown, values_of, with_fields
from runners.shell import cli
from runners.shell.cli import UsageError, given, nearest, parse
from runners.shell.errors import UserError
from runners.shell.jsonfile import Fields, read_object
from runners.training.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunSettings,
    SpeedSettings,
)

LONGEST_NAME = 200  # bytes: file systems take 255, and suffixes are added


@dataclass(frozen=True)
class TrainConfig:
    """Trains a vision-language GPT. With no arguments: a tiny one on drawn shapes, in minutes.

    >>> config = TrainConfig.of(lr=1e-3, preset="mini")
    >>> config.optim.lr, config.changed(lr=0.1).optim.lr, config.model.preset
    (0.001, 0.1, 'mini')
    """

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)

    @classmethod
    def of(cls, **flags: Any) -> TrainConfig:
        """The config with some flags, by name; the others have their defaults."""
        return cls().changed(**flags)

    def changed(self, **flags: Any) -> TrainConfig:
        """This config with other values of some flags. Raises TypeError for unknown ones."""
        return with_fields(self, flags)


PARTS = {
    "run": fields_of(RunSettings),
    "model": fields_of(ModelSettings),
    "data": fields_of(DataSettings),
    "optim": fields_of(OptimSettings),
    "speed": fields_of(SpeedSettings),
}
# Flags that change no number of the training: a continuation may change them.
FREE_FIELDS = {f.name for f in dataclasses.fields(RunSettings)} - {"seed", "device", "keep"}
FREE_FIELDS |= {"init_from", "merge", "workers", "data_changed"}
# Flags that a continuation may change if no finished step would have had another rate (resume.py)
OF_THE_SCHEDULE = frozenset(("steps", "ends"))
# Flags of one command, never taken over from an earlier run
OF_ONE_COMMAND = ("name", "resume", "config", "stop_at", "max_minutes", "data_changed")
CONFIG = "config.json"  # of a run's folder

# Flags that --help shows first
MOST_USED = (
    "data",
    "preset",
    "name",
    "steps",
    "lr",
    "device_batch_size",
    "sequence_len",
    "resume",
    "init_from",
    "device",
)

# Defaults on a GPU: a 25M model, harder scenes, all kinds of questions
ON_GPU: dict[str, Any] = {
    "preset": "mini",
    "kinds": ("colour", "shape", "count", "where", "left_right", "caption"),
    "colours": 10,
    "shapes": 6,
    "max_objects": 4,
    "questions": 3,
    "ramp": 100_000,
    "sequence_len": 2048,
    "device_batch_size": 8,
    "steps": 2500,
    "lr": 1e-3,
    "beta2": 0.95,
    "warmup_steps": 200,
    "val_every": 500,
    "eval_examples": 2048,
}


def parse_config(argv: Sequence[str] | None = None, *, gpu: bool = False) -> TrainConfig:
    """The command line as a checked config. Raises UsageError.

    The defaults are the flags of the run that ``--resume`` or ``--config`` names. Otherwise they
    are ON_GPU's if ``gpu`` and not ``--device cpu``, updated by a ``--config`` file.
    """
    words = given(TrainConfig, argv)
    defaults = TrainConfig.of(**ON_GPU) if gpu and words.get("device") != ["cpu"] else TrainConfig()
    source = named_config(words)
    if source is not None and is_saved(source):
        defaults = read_config(source).changed(**flags_of(TrainConfig(), OF_ONE_COMMAND))
    elif source is not None:
        told = read_flags(source)
        if told.get("device") == "cpu":
            defaults = TrainConfig()
        defaults = defaults.changed(**told)
    config = parse(
        TrainConfig, argv, prog="python -m runners.train", defaults=defaults, first=MOST_USED
    )
    check(config)
    if config.run.resume not in (None, "auto"):
        was, now = flags_of(defaults), flags_of(config)
        for name in ("name", "config", "init_from", "runs_dir"):
            if now[name] != was[name]:
                raise UsageError(
                    f"--{name} does nothing beside --resume {config.run.resume}: leave it out"
                )
    return config


def named_config(words: Mapping[str, Sequence[str]]) -> Path | None:
    """The file with the defaults of a command line (:func:`cli.given`): the config.json of the run
    that ``--resume`` or ``--config`` names, or a .toml or .json file. Raises UsageError."""
    for flag in ("resume", "config"):
        for word in words.get(flag, ()):
            if word.lower() in (*cli.NONE, "auto"):
                continue
            path = Path(word)
            if flag == "resume" and path.parent.name == "state":
                path = path.parent.parent
            files = (".json",) if flag == "resume" else (".json", ".toml")
            path = path if path.suffix in files and not path.is_dir() else path / CONFIG
            if path.name == CONFIG and not path.exists():
                raise UsageError(f"--{flag} {word}: {path.parent} holds no run: no {path.name}")
            if not path.exists():
                raise UsageError(f"--{flag} {word}: there is no such file")
            return path
    return None


def is_saved(path: Path) -> bool:
    """Whether a config file is a run's own."""
    return path.suffix == ".json" and "train" in read_object(path).values


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a .toml or .json file, at its top or in a part's table (``[optim]``). Raises
    UsageError naming what is wrong."""
    if path.suffix == ".json":
        values = read_object(path).values
    else:
        try:
            values = tomllib.loads(path.read_bytes().decode())
        except (OSError, ValueError) as error:
            raise UsageError(f"--config {path}: {error}") from error
    known = fields_of(TrainConfig)
    for part, inner in values.items():
        for name in inner if part in PARTS and isinstance(inner, dict) else ():
            other = next((p for p, fields in PARTS.items() if name in fields), part)
            if other != part:
                raise UsageError(f"--config {path}: {name!r} belongs to {other}, not to {part}")
    flags = flattened(values)
    for name, value in flags.items():
        if name not in known:
            raise UsageError(
                f"--config {path}: unknown flag {shown(name)}{cli.hint(name, known)} (see --help)"
            )
        if name in ("resume", "config"):
            raise UsageError(f"--config {path}: --{name} is for a command line, not for a file")
        if problem := known[name].problem(value):
            raise UsageError(f"--config {path}: {name} {problem}")
    return flags


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flags by name, from a dict with or without parts; lists become tuples."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = value if name in PARTS and isinstance(value, dict) else {name: value}
        flat |= {k: tuple(v) if isinstance(v, list) else v for k, v in inner.items()}
    return flat


def read_config(path: Path) -> TrainConfig:
    """The flags in a run's config.json. Raises UserError naming what is damaged."""
    return saved_flags(read_object(path).object("train"))


def saved_flags(fields: Fields) -> TrainConfig:
    """The flags in a file of a run. Raises UserError naming the file and the field."""
    try:
        config = from_dict(fields.values)
        check(config)
    except UserError as error:
        fields.fail(str(error).removeprefix("--"))
    return config


def check(config: TrainConfig) -> None:
    """Raises UsageError naming a flag whose value makes no sense, alone or beside others."""
    cli.check(config)
    if "" in (
        config.data.data,
        config.run.runs_dir,
        *config.data.val_data,
    ):  # unset in a shell
        raise UsageError("--data, --val_data or --runs_dir is empty: leave it out, or name one")
    if config.data.data == "shapes" and (config.data.val_data or config.data.turns == "single"):
        flag = "--val_data" if config.data.val_data else "--turns=single"
        raise UsageError(
            f"{flag} is for files: --data shapes draws held-out scenes of its own, and asks "
            "--questions of each"
        )
    if config.data.val_data and config.data.val_fraction not in (0, DataSettings.val_fraction):
        raise UsageError("--val_data is held out instead of a --val_fraction of --data: give one")
    check_preset(config.model.preset)
    model_config(config.model)
    check_adapters(config)
    lr_scales(config.optim)
    fused = config.optim.optimizer == "adamw" and config.optim.use_fused_adamw
    if config.speed.state_dtype == "bf16" and not fused:
        # the others round to the nearest and would silently lose small steps
        raise UsageError("--state_dtype bf16 needs --optimizer adamw with --use_fused_adamw=1")
    ends, steps = config.optim.ends, config.optim.steps
    if list(ends) != sorted({end for end in ends if end < steps}):
        raise UsageError(f"--ends must rise and lie below --steps, not {shown(ends)}")
    if config.run.name is not None:
        check_name(config.run.name)


def check_adapters(config: TrainConfig) -> None:
    """Raises UsageError for contradictory flags of adapters and quantisation."""
    if config.model.quantize is not None and config.model.fake_quant:
        raise UsageError("--fake_quant trains the weights that --quantize freezes: give one")
    if config.model.lora_rank and config.model.init_from is None:
        raise UsageError("--lora_rank adapts weights that are there: name them with --init_from")
    if config.model.quantize is not None and not config.model.lora_rank:
        raise UsageError(
            "--quantize freezes the weights: --lora_rank=16 puts adapters beside them that learn; "
            "--fake_quant=1 trains weights that are to be quantised afterwards"
        )
    if not config.model.lora_rank and (config.model.merge or config.model.lora_alpha is not None):
        flag = "--merge" if config.model.merge else "--lora_alpha"
        raise UsageError(f"{flag} is of adapters, and --lora_rank=0 makes none")


def check_name(name: str) -> None:
    """Raises UsageError unless ``name`` can be the name of a folder."""
    if not name or name in (".", "..") or set(name) & set("/\\") or name.startswith("-"):
        problem = "must be the name of a folder, not a path or a flag"
    elif not name.isprintable() or len(os.fsencode(name)) > LONGEST_NAME:
        problem = f"must be at most {LONGEST_NAME} bytes without control characters"
    else:
        return
    raise UsageError(f"--name {problem}: {shown(name)}")


def folder_name(text: str) -> str:
    """A file's name with the characters that a folder's name may have.

    >>> folder_name("*"), folder_name("../my data"), folder_name("")
    ('data', 'my-data', 'data')
    """
    return re.sub(r"[^\w.-]+", "-", text)[:60].strip("-.") or "data"


def check_preset(name: str) -> None:
    """Raises UsageError with the closest name for an unknown preset."""
    if name not in PRESETS:
        hint = nearest(name, list(PRESETS))
        raise UsageError(f"no preset {name!r}{hint} (presets: {', '.join(PRESETS)})")


def lr_scales(config: OptimSettings) -> dict[str, float]:
    """``--lr_scale`` as path pattern -> factor. Raises UsageError for a malformed one."""
    scales = {}
    for entry in config.lr_scale:
        pattern, equals, word = entry.rpartition("=")
        factor = _number(word)
        number = not isinstance(factor, bool | str | None) and 0 <= factor < math.inf
        if not equals or not pattern or not number:
            raise UsageError(f"--lr_scale {entry}: wanted is PATTERN=FACTOR, such as vision=0.1")
        scales[pattern] = float(word)
    return scales


def model_config(config: ModelSettings) -> VLMConfig:
    """The preset with the overrides. Raises UsageError naming the override that does not fit."""
    data = PRESETS[config.preset].to_dict()
    for change in config.override:
        path, equals, word = change.partition("=")
        part, _, name = path.partition(".")
        if path == "vision" and word.lower() == "none":
            data["vision"] = data["projector"] = None
            continue
        fields = data.get(part)
        known = [f"{p}.{f}" for p, values in data.items() if values for f in values]
        if not equals or not isinstance(fields, dict) or name not in fields:
            hint = nearest(path, known)
            raise UsageError(f"--override {change} names no field of the model{hint}")
        fields[name] = _number(word)
    try:
        return config_from_dict(data)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--override {' '.join(config.override)}: {error}") from error


def differing_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Flags in which a continuation must not differ but does, as ``--flag old -> new``."""
    then, now = flags_of(old), flags_of(new)
    names = [name for name in now if name not in FREE_FIELDS | OF_THE_SCHEDULE]
    return [f"--{n} {_plain(then[n])} -> {_plain(now[n])}" for n in names if then[n] != now[n]]


def flags_of(config: TrainConfig, names: Iterable[str] | None = None) -> dict[str, Any]:
    """Every flag, or some, with its value."""
    values = values_of(config)
    return values if names is None else {name: values[name] for name in names}


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """A dict of each part for JSON, with tuples as lists."""
    return {
        part: {name: _plain(value) for name, value in values.items()}
        for part, values in dataclasses.asdict(config).items()
    }


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of :func:`as_dict`; also reads the flat dict of older runs. Unknown fields, of
    other versions, are ignored."""
    known = fields_of(TrainConfig)
    flags = {name: value for name, value in flattened(values).items() if name in known}
    return TrainConfig.of(**flags)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(word.lower(), word)
