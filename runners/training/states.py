"""The states of a run, which it resumes from: ``state/STEP/`` in the run's folder.

A state holds params and optimizer moments (state.safetensors) and the rest (state.json), each with
a checksum. It is written as ``STEP.part``, flushed to the disk and renamed, so that a partial state
is never taken for a whole one; then older ones are removed. A state is a real folder named by at
least eight digits, with a state.json: nothing else in ``state/`` is touched, and no link followed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from params import flatten, load_params, save_params, unflatten
from params.disk import PART, make_folder, rename, write_text
from params.files import locate, open_leaves
from params.tree import Tree
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.shell.jsonfile import Fields, read_object
from runners.training.config import TrainConfig, as_dict, saved_flags
from runners.training.resume import continued

STATES, TENSORS, RECORD = "state", "state.safetensors", "state.json"
VERSION = 2  # of the format
CHECKSUM = "crc32"  # field of state.json: of its other fields
_NAME = re.compile(r"[0-9]{8,}")
_FILES = re.compile(
    r"state\.(json|safetensors|safetensors\.index\.json)(\.part)?"
    r"|stateb?-\d{5}-of-\d{5}\.safetensors"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Everything that a run needs to continue after ``step`` steps."""

    step: int
    params: Tree
    moments: dict[str, Tensor]  # optim.optimizer_state
    loader: dict[str, Any]  # Loader.state_dict(), JSON
    best: float | None  # lowest validation loss so far
    rng: dict[str, Tensor]  # step.rng_state()
    tokens: int = 0  # trained on by all commands of the run
    seconds: float = 0.0  # of all commands of the run


# -- finding ----------------------------------------------------------------------------------


def is_state(path: Path) -> bool:
    """Whether ``path`` is a state's folder, whole or damaged."""
    named = path.parent.name == STATES and _NAME.fullmatch(path.name)
    return bool(named) and not path.is_symlink() and (path / RECORD).is_file()


def run_folder(path: Path) -> Path:
    """The folder of the run that a state belongs to; other paths unchanged."""
    return path.parent.parent if path.parent.name == STATES else path


def find_states(folder: Path) -> list[Path]:
    """The states in a run's folder, oldest first."""
    found = [p for p in (folder / STATES).glob("*") if is_state(p)]
    return sorted(found, key=lambda p: int(p.name))


def newest_state(folder: Path) -> Path | None:
    """The newest undamaged state, or None if there is no state.

    A warning names each damaged one. Raises UserError if all are damaged.
    """
    found = find_states(folder)
    for path in reversed(found):
        try:
            check_state(path)
        except UserError as error:
            _log.warning("%s; the state before it is tried", error)
        else:
            return path
    if found:
        raise UserError(
            f"every state in {folder / STATES} is damaged: restore one from a copy, or remove them "
            "and begin again"
        )
    return None


def check_state(path: Path) -> None:
    """Raises UserError naming the damaged file of a state."""
    read_record(path)
    with explained(), ExitStack() as stack:
        open_leaves(locate(path / TENSORS), stack, verify=True)


# -- writing and removing ---------------------------------------------------------------------


def save_state(folder: Path, state: TrainState, config: TrainConfig) -> Path:
    """Writes ``state/STEP`` atomically. Raises UserError."""
    target = folder / STATES / f"{state.step:08d}"
    part = target.with_name(target.name + PART)
    with explained(f"cannot write {target}"):
        make_folder(target.parent)
        if is_state(target):  # damaged, or of an abandoned continuation
            drop_state(target)
        _remove(part)
        part.mkdir()
        try:
            tree: Tree = {"params": state.params, "rng": state.rng}
            if state.moments:
                tree["moments"] = unflatten(state.moments)
            save_params(tree, part / TENSORS)
            record = {
                "version": VERSION,
                "step": state.step,
                "best": state.best,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "loader": state.loader,
                "config": as_dict(config),
            }
            record = json.loads(json.dumps(record))  # keys become strings, as they will be read
            write_text(part / RECORD, json.dumps(record | {CHECKSUM: _checksum(record)}))
            rename(part, target)
        except BaseException:
            _remove(part)
            raise
    return target


def keep_states(folder: Path, steps: Collection[int]) -> None:
    """Removes all states except those of ``steps``."""
    for path in find_states(folder):
        if int(path.name) not in steps:
            drop_state(path)


def drop_state(path: Path) -> None:
    """Removes a state. Renames it first, so that a partial state is never taken for a whole one."""
    part = path.with_name(path.name + PART)
    with explained(f"cannot remove {path}"):
        _remove(part)
        if not part.exists():
            path = path.rename(part)
        _remove(path)


def sweep_states(folder: Path) -> None:
    """Removes partial states that killed processes left."""
    for path in (folder / STATES).glob(f"*{PART}"):
        if _NAME.fullmatch(path.name.removesuffix(PART)):
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a state's own files, and its folder if it is then empty."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        for file in path.iterdir():
            if _FILES.fullmatch(file.name):
                file.unlink()
        with contextlib.suppress(OSError):  # it holds other files
            path.rmdir()


# -- reading ----------------------------------------------------------------------------------


def load_state(path: Path, like: Tree, config: TrainConfig, device: torch.device) -> TrainState:
    """Reads a state. Raises UserError if it is damaged or belongs to another config."""
    record, step, old = read_record(path)
    continued(old, config, step, path)
    with explained():
        tree = load_params(path / TENSORS, device=device)
        same_shapes(tree["params"], like, path)
    moments = flatten(tree.get("moments", {}))
    rng = {name: leaf.cpu() for name, leaf in tree["rng"].items()}
    return TrainState(
        step=step,
        params=tree["params"],
        moments=moments,
        loader=record.get("loader", dict),
        best=record.find("best", float),
        rng=rng,
        tokens=record.find("tokens", int) or 0,
        seconds=record.find("seconds", float) or 0.0,
    )


def load_weights_of(path: Path, like: Tree, device: torch.device) -> Tree:
    """The params of a state. Raises UserError if it is damaged, ValueError if shapes differ."""
    read_record(path)
    params: Tree = load_params(path / TENSORS, device=device)["params"]
    same_shapes(params, like, path)
    return params


def same_shapes(params: Tree, like: Tree, path: Path) -> None:
    """Raises ValueError naming the first leaf in which two trees differ."""
    have, want = flatten(params), flatten(like)
    for name in sorted(set(have) | set(want)):
        here = list(have[name].shape) if name in have else "missing"
        there = list(want[name].shape) if name in want else "absent from the model"
        if here != there:
            raise ValueError(f"{name} is {here} in {path}, {there} in the config")


def read_record(path: Path) -> tuple[Fields, int, TrainConfig]:
    """A state's state.json, its step and its config. Raises UserError naming what is damaged."""
    record = read_object(path / RECORD)
    version = record.get("version", int)
    if version != VERSION:
        raise UserError(f"{path} has format {version}, this program reads {VERSION}")
    checksum = record.values.pop(CHECKSUM, None)
    if checksum != _checksum(record.values):
        record.fail("its content does not match its checksum")
    if (step := record.get("step", int)) < 0:
        record.fail(f"the field 'step' must be 0 or more, not {step}")
    return record, step, saved_flags(record.object("config"))


def _checksum(record: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"
