"""The folder of a run.

``runs/NAME/`` holds config.json, tokenizer.json, model.safetensors (the best weights so far),
metrics.jsonl, TensorBoard events, loss.png, samples.png, and states to resume from
(``state/STEP/``, see `states`). One process owns it at a time (`shell.lock`). Files are written
atomically, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import VLMConfig, config_from_dict
from params import load_params, num_bytes, save_params
from params.disk import make_folder, write_text
from params.tree import Tree
from runners.data.encode.tokenizer import ChatTokenizer
from runners.data.sources.digests import TOKENIZER
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.shell.jsonfile import read_object
from runners.shell.lock import LOCK, BusyError, Lock
from runners.training.config import (
    CONFIG,
    TrainConfig,
    as_dict,
    differing_fields,
    folder_name,
    saved_flags,
)
from runners.training.states import (
    check_state,
    find_states,
    is_state,
    load_weights_of,
    newest_state,
    run_folder,
    sweep_states,
)

MODEL = "model.safetensors"
# Temporary files, ours and safetensors', that a process killed during a write leaves
_LEFTOVER = re.compile(
    r"(config|tokenizer|data|eval)\.json\.(part|tmp)|metrics\.jsonl\.part|(loss|samples)\.png\.part"
    r"|model\.safetensors(\.index\.json)?\.part|\.tmp[0-9A-Za-z]{6}"
)
_EARLY = re.compile(rf"\.lock|tokenizer\.json|{_LEFTOVER.pattern}")  # written before config.json


# -- names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A run's folder that this process owns until its release, and a state to resume from."""

    folder: Path
    state: Path | None
    release: Callable[[], None]


def claim_folder(config: TrainConfig) -> Claim:
    """The folder for a run, locked and without temporary files of killed processes.

    If it is released before anything is written, nothing remains. Raises UserError if another
    process owns it, ``--name`` is taken and not resumed, or ``--resume`` names no state.
    """
    runs = Path(config.run.runs_dir)
    if config.run.resume not in (None, "auto"):
        return _claim_path(Path(config.run.resume), config)
    if config.run.name is not None:
        return _claim_named(runs / config.run.name, config)
    base = f"{folder_name(Path(config.data.data).stem)}-{config.model.preset}"
    if config.run.resume == "auto":
        for folder in reversed(_numbered(runs, base)):
            if find_states(folder) or (_can_restart(folder) and _has_flags(folder, config)):
                return _claim_named(folder, config)
    for folder in (runs / (f"{base}-{i}" if i > 1 else base) for i in itertools.count(1)):
        if not _taken(folder):
            with contextlib.suppress(BusyError):
                lock = Lock(folder)
                if not _taken(folder):  # by a run that has just ended
                    return _claimed(lock, None)
                lock.release()
    raise AssertionError("the numbers do not end")


def _claim_path(path: Path, config: TrainConfig) -> Claim:
    """For ``--resume PATH``, of a run or of one of its states."""
    folder = run_folder(path)
    begun = folder == path and (folder / CONFIG).is_file() and _can_restart(folder)
    if not (begun or (is_state(path) if folder != path else find_states(folder))):
        raise UserError(f"--resume {config.run.resume}: there is no resumable state in it")
    lock = Lock(folder)
    try:
        if folder == path:
            return _claimed(lock, newest_state(folder))
        try:
            check_state(path)
        except UserError as error:
            raise UserError(f"{error}; {resume_flag(folder)} takes the newest whole one") from error
        return _claimed(lock, path)
    except BaseException:
        lock.release()
        raise


def _claim_named(folder: Path, config: TrainConfig) -> Claim:
    """For a new run of this name, or one that resumes from its last state."""
    resumed = config.run.resume == "auto"
    if not (folder / LOCK).exists():  # otherwise the lock reports its owner first
        _check_place(folder, resumed)
    lock = Lock(folder)
    try:
        _check_place(folder, resumed)  # again, now that no other process changes it
        return _claimed(lock, newest_state(folder) if resumed else None)
    except BaseException:
        lock.release()
        raise


def _claimed(lock: Lock, state: Path | None) -> Claim:
    with explained(f"cannot clean up {lock.folder}"):
        for path in lock.folder.iterdir():
            if path.is_file() and not path.is_symlink() and _LEFTOVER.fullmatch(path.name):
                path.unlink()
        sweep_states(lock.folder)
    return Claim(lock.folder, state, lock.release)


def _check_place(folder: Path, resumed: bool) -> None:
    """Raises UserError unless a run may begin or continue there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: choose another --name")
    if not resumed and _taken(folder):
        raise UserError(
            f"{folder} exists: continue it with --resume=auto, or choose another --name"
        )
    if resumed and not find_states(folder) and not _can_restart(folder):
        what = "has weights but no state" if _has_weights(folder) else "is not the folder of a run"
        raise UserError(f"--resume auto: {folder} {what}: choose another --name")


def _taken(folder: Path) -> bool:
    """Whether the folder holds more than a killed start leaves."""
    left = (p.name for p in folder.iterdir()) if folder.is_dir() else ()
    return folder.exists() and not (folder.is_dir() and all(map(_EARLY.fullmatch, left)))


def _can_restart(folder: Path) -> bool:
    """Whether a run there has neither state nor weights, so that nothing is lost."""
    return (not _taken(folder) or (folder / CONFIG).is_file()) and not _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in (MODEL, f"{MODEL}.index.json"))


def _has_flags(folder: Path, config: TrainConfig) -> bool:
    """Whether a run there has the same flags."""
    try:
        return not differing_fields(open_run(folder).config, config)
    except UserError:
        return False


def _numbered(runs: Path, base: str) -> list[Path]:
    """The existing folders ``base``, ``base-2``, ..., oldest first."""
    found: list[Path] = []
    while (folder := runs / (f"{base}-{len(found) + 1}" if found else base)).exists():
        found.append(folder)
    return found


def resume_flag(folder: Path) -> str:
    """``--resume=FOLDER``, quoted for a shell."""
    return f"--resume={shlex.quote(str(folder))}"


# -- before the start -------------------------------------------------------------------------


def check_disk(folder: Path, params: Tree, learning: Tree, kept: int = 2) -> None:
    """Raises UserError if a run of these params cannot be written there: no space or permission.

    At most ``kept + 1`` states (params, and two moments of trained ones) and two copies of the best
    weights are on the disk at once.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} is not writable: choose another place with --runs_dir")
    missing = max(1, max(2, kept) + 1 - len(find_states(folder)))
    needed = missing * (num_bytes(params) + 2 * num_bytes(learning))
    needed += (1 if _has_weights(folder) else 2) * num_bytes(params) + 2**24
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{there} has {free / 1e9:.1f} GB free, but this run needs {needed / 1e9:.1f} GB: "
            "make room, or choose another place with --runs_dir"
        )


def create_folder(
    folder: Path,
    config: TrainConfig,
    model: VLMConfig,
    tokenizer: ChatTokenizer,
    origin: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> None:
    """Makes the folder of a new run, its first write. origin: of the run (``provenance.origin``);
    base: the digest of the base weights of adapters."""
    with explained(f"cannot create {folder} (choose another place with --runs_dir)"):
        make_folder(folder)
        tokenizer.save(folder / TOKENIZER)
        record = {
            "id": secrets.token_hex(8),
            "train": as_dict(config),
            "model": model.to_dict(),
            "starts": [dict(origin or {})],
        }
        if base is not None:
            record["base"] = base
        write_text(folder / CONFIG, json.dumps(record, indent=1))


def record_start(folder: Path, config: TrainConfig, origin: Mapping[str, Any]) -> None:
    """Adds the origin and the flags of a continuation to a run's config.json."""
    record = read_object(folder / CONFIG)
    starts = [*(record.find("starts", list) or []), origin]
    values = record.values | {"train": as_dict(config), "starts": starts}
    with explained(f"cannot write {folder / CONFIG}"):
        write_text(folder / CONFIG, json.dumps(values, indent=1))


# -- a run that exists ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run, as its folder describes it."""

    folder: Path
    config: TrainConfig
    model: VLMConfig
    tokenizer: Path


def open_run(folder: str | Path) -> Run:
    """Reads a run's folder. Raises UserError naming the file that is missing or broken."""
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    record = read_object(path)
    config = saved_flags(record.object("train"))
    try:
        model = config_from_dict(record.get("model", dict))
    except (ValueError, TypeError) as error:
        record.fail(str(error))
    return Run(folder, config, model, folder / TOKENIZER)


def load_weights(path: str | Path, like: Tree, device: torch.device) -> Tree:
    """The weights of a run's folder, a state or a safetensors file. Of a run these are the best, or
    before the first validation those of its newest state. Raises UserError."""
    path = find_weights(Path(path))
    with explained():
        if is_state(path):
            return load_weights_of(path, like, device)
        return load_params(path, device=device, like=like)


def find_weights(path: Path) -> Path:
    """The safetensors file or the state that :func:`load_weights` reads for a path."""
    if is_state(path) or not path.is_dir():
        return path
    if _has_weights(path):
        return path / MODEL
    return newest_state(path) or path / MODEL


def save_best(folder: Path, params: Tree, step: int) -> None:
    """Replaces the run's ``model.safetensors``."""
    with explained(f"cannot write {folder / MODEL}"):
        save_params(params, folder / MODEL, metadata={"step": str(step)})
