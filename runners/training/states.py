"""The states of a run: all that a resume needs, as ``state/STEP/`` of the run's folder.

A state holds params and optimizer moments (state.safetensors) and the rest (state.json), each with
a checksum. It is written as ``STEP.part``, flushed to the disk and renamed, so that a half-written
one is never taken for whole; older ones go afterwards. Nothing else in ``state/`` is ever touched:
a state is a real folder of at least eight digits with a state.json in it, links are not followed.
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
    """Everything that the rest of a run depends on, after ``step`` steps."""

    step: int
    params: Tree
    moments: dict[str, Tensor]  # optim.optimizer_state
    loader: dict[str, Any]  # Loader.state_dict(), JSON
    best: float | None  # lowest validation loss so far
    rng: dict[str, Tensor]  # step.rng_state()
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # that the run has taken so far, all its commands together


# -- which there are --------------------------------------------------------------------------


def is_state(path: Path) -> bool:
    """Whether this is a state's folder, whole or damaged."""
    named = path.parent.name == STATES and _NAME.fullmatch(path.name)
    return bool(named) and not path.is_symlink() and (path / RECORD).is_file()


def run_folder(path: Path) -> Path:
    """The folder of the run that a state belongs to; other paths as they are."""
    return path.parent.parent if path.parent.name == STATES else path


def find_states(folder: Path) -> list[Path]:
    """The states in a run's folder, of the fewest steps first."""
    found = [p for p in (folder / STATES).glob("*") if is_state(p)]
    return sorted(found, key=lambda p: int(p.name))


def newest_state(folder: Path) -> Path | None:
    """The newest state that is whole, or None if there is no state.

    Damaged ones are named by a warning and passed over. Raises UserError if all are damaged.
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
    """Raises UserError naming the file in which a state is damaged."""
    read_record(path)
    with explained(), ExitStack() as stack:
        open_leaves(locate(path / TENSORS), stack, verify=True)


# -- writing and removing ---------------------------------------------------------------------


def save_state(folder: Path, state: TrainState, config: TrainConfig) -> Path:
    """Writes ``state/STEP`` whole or not at all. Raises UserError."""
    target = folder / STATES / f"{state.step:08d}"
    part = target.with_name(target.name + PART)
    with explained(f"cannot write {target}"):
        make_folder(target.parent)
        if is_state(target):  # damaged, or of another continuation: the run began at one before it
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
            record = json.loads(json.dumps(record))  # its keys as they will be read
            write_text(part / RECORD, json.dumps(record | {CHECKSUM: _checksum(record)}))
            rename(part, target)
        except BaseException:
            _remove(part)
            raise
    return target


def keep_states(folder: Path, steps: Collection[int]) -> None:
    """Removes all states but those of some steps."""
    for path in find_states(folder):
        if int(path.name) not in steps:
            drop_state(path)


def drop_state(path: Path) -> None:
    """Removes a state: first its name, so that a half-removed one is never taken for whole."""
    part = path.with_name(path.name + PART)
    with explained(f"cannot remove {path}"):
        _remove(part)
        if not part.exists():
            path = path.rename(part)
        _remove(path)


def sweep_states(folder: Path) -> None:
    """Removes what killed processes left of states half written or half removed."""
    for path in (folder / STATES).glob(f"*{PART}"):
        if _NAME.fullmatch(path.name.removesuffix(PART)):
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a state's own files, and its folder if nothing else is in it."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        for file in path.iterdir():
            if _FILES.fullmatch(file.name):
                file.unlink()
        with contextlib.suppress(OSError):  # somebody has put something there
            path.rmdir()


# -- reading ----------------------------------------------------------------------------------


def load_state(path: Path, like: Tree, config: TrainConfig, device: torch.device) -> TrainState:
    """Reads a state. Raises UserError if it is damaged, or of a run with another config."""
    record, step, old = read_record(path)
    continued(old, config, step, path)
    with explained():
        tree = load_params(path / TENSORS, device=device)
        same_shapes(tree["params"], like, path)
    moments = flatten(tree.get("moments", {}))
    rng = {name: leaf.cpu() for name, leaf in tree["rng"].items()}
    return TrainState(
        step, tree["params"], moments, record.get("loader", dict), record.find("best", float), rng,
        record.find("tokens", int) or 0, record.find("seconds", float) or 0.0,
    )  # fmt: skip


def load_weights_of(path: Path, like: Tree, device: torch.device) -> Tree:
    """The params of a state. Raises UserError if it is damaged, ValueError if they differ."""
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
    """A state's state.json, the step it stands for and the flags it was made under. Raises
    UserError naming what is damaged."""
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
