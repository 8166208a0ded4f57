"""The folder of a run, and the states from which it can be resumed.

``runs/NAME/``: config.json, tokenizer.json, model.safetensors (the best weights so far),
metrics.jsonl, TensorBoard events, loss.png, samples.png, and ``state/STEP/`` with all that a
resume needs: params and optimizer moments (state.safetensors) and the rest (state.json). A state
is written beside its final name and renamed, so that a half-written one is never taken for whole;
nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import VLMConfig, config_from_dict
from params import flatten, load_params, num_bytes, save_params, unflatten
from params.tree import Tree
from runners.cli import explained
from runners.config import CONFIG, TrainConfig, as_dict, saved_flags
from runners.data.tokenizer import ChatTokenizer
from runners.errors import UserError
from runners.jsonfile import Fields, read_object
from runners.resume import continued

MODEL, TOKENIZER, STATES = "model.safetensors", "tokenizer.json", "state"
VERSION = 1  # of the state's format


@dataclass(frozen=True)
class State:
    """Everything that the rest of a run depends on, after ``step`` steps."""

    step: int
    params: Tree
    moments: dict[str, Tensor]  # optim.optimizer_state
    loader: dict[str, Any]  # Loader.state_dict(), JSON
    best: float | None  # lowest validation loss so far
    rng: dict[str, Tensor]  # step.rng_state()
    tokens: int = 0  # trained on so far
    seconds: float = 0.0  # that the run has taken so far, all its commands together


# -- names ------------------------------------------------------------------------------------


def choose_folder(config: TrainConfig) -> tuple[Path, Path | None]:
    """``(the run's folder, the state to resume or None)``; touches nothing.

    Raises UserError if ``--name`` is taken and not resumed, or ``--resume`` leads nowhere.
    """
    runs = Path(config.runs_dir)
    base = config.name or f"{Path(config.data).stem or 'data'}-{config.preset}"
    if config.resume == "auto":
        taken = [runs / base] if config.name else _numbered(runs, base)
        states = [(folder, newest_state(folder)) for folder in taken]
        for folder, state in reversed(states):
            if state is not None:
                return folder, state
        return _fresh(runs, base, config.name is not None), None
    if config.resume is not None:
        path = Path(config.resume)
        folder = path.parent.parent if path.parent.name == STATES else path
        state = newest_state(folder) if folder == path else path
        if state is None or not (state / "state.json").is_file():
            raise UserError(f"--resume {config.resume}: there is no resumable state in it")
        return folder, state
    return _fresh(runs, base, config.name is not None), None


def newest_state(folder: Path) -> Path | None:
    """The state of the most steps in a run's folder."""
    found = [p for p in (folder / STATES).glob("*") if p.name.isdigit()]
    return max(found, key=lambda p: int(p.name), default=None)


def _numbered(runs: Path, base: str) -> list[Path]:
    """``base``, ``base-2``, ...: the ones that exist, oldest first."""
    found: list[Path] = []
    while (folder := runs / (f"{base}-{len(found) + 1}" if found else base)).exists():
        found.append(folder)
    return found


def _fresh(runs: Path, base: str, named: bool) -> Path:
    taken = _numbered(runs, base)
    if not taken or (named and not any((runs / base).iterdir())):
        return runs / base
    if named:
        raise UserError(
            f"{runs / base} exists: continue it with --resume=auto, or choose another --name"
        )
    return runs / f"{base}-{len(taken) + 1}"


# -- before the start -------------------------------------------------------------------------


def check_room(folder: Path, params: Tree, learning: Tree) -> None:
    """Raises UserError if a run of these params cannot be written there, for room or rights.

    At the worst two states (params and two moments of what learns) and two copies of the best
    weights lie on the disk at once.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there} is not writable: choose another place with --runs_dir")
    needed = 4 * num_bytes(params) + 4 * num_bytes(learning) + 2**24
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
) -> None:
    """Makes the folder of a new run: the first thing that a run writes. origin: what it comes from
    (:func:`runners.provenance.origin`)."""
    with explained(f"cannot create {folder} (choose another place with --runs_dir)"):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER)
        record = {
            "id": secrets.token_hex(8),
            "train": as_dict(config), "model": model.to_dict(), "starts": [dict(origin or {})],
        }  # fmt: skip
        write_text(folder / CONFIG, json.dumps(record, indent=1))


def record_start(folder: Path, config: TrainConfig, origin: Mapping[str, Any]) -> None:
    """Adds to a run's config.json that it was continued, and the flags that it goes on under."""
    record = read_object(folder / CONFIG)
    starts = [*(record.find("starts", list) or []), origin]
    values = record.values | {"train": as_dict(config), "starts": starts}
    with explained(f"cannot write {folder / CONFIG}"):
        write_text(folder / CONFIG, json.dumps(values, indent=1))


# -- a run that exists ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

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
    """The best weights of a run's folder, or a safetensors file. Raises UserError."""
    path = Path(path)
    with explained():
        return load_params(path / MODEL if path.is_dir() else path, device=device, like=like)


def save_best(folder: Path, params: Tree, step: int) -> None:
    """Replaces the run's ``model.safetensors``."""
    with explained(f"cannot write {folder / MODEL}"):
        save_params(params, folder / MODEL, metadata={"step": str(step)})


# -- states -----------------------------------------------------------------------------------


def save_state(folder: Path, state: State, config: TrainConfig) -> Path:
    """Writes ``state/STEP`` whole or not at all, then drops older ones."""
    target = folder / STATES / f"{state.step:08d}"
    part = target.with_name(f"{target.name}.part")
    with explained(f"cannot write {target}"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tree: Tree = {"params": state.params, "rng": state.rng}
        if state.moments:
            tree["moments"] = unflatten(state.moments)
        save_params(tree, part / "state.safetensors")
        record = {
            "version": VERSION,
            "step": state.step,
            "best": state.best,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "loader": state.loader,
            "config": as_dict(config),
        }
        write_text(part / "state.json", json.dumps(record))
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in (folder / STATES).iterdir():
            if old != target:
                shutil.rmtree(old)
    return target


def load_state(path: Path, like: Tree, config: TrainConfig, device: torch.device) -> State:
    """Reads a state. Raises UserError if it is damaged, or of a run with another config."""
    record, step, old = read_record(path)
    continued(old, config, step, path)
    with explained():
        tree = load_params(path / "state.safetensors", device=device)
        same_shapes(tree["params"], like, path)
    moments = flatten(tree.get("moments", {}))
    rng = {name: leaf.cpu() for name, leaf in tree["rng"].items()}
    return State(
        step, tree["params"], moments, record.get("loader", dict), record.find("best", float), rng,
        record.find("tokens", int) or 0, record.find("seconds", float) or 0.0,
    )  # fmt: skip


def read_record(path: Path) -> tuple[Fields, int, TrainConfig]:
    """A state's state.json, the step it stands for and the flags it was made under. Raises
    UserError naming what is damaged."""
    record = read_object(path / "state.json")
    version = record.get("version", int)
    if version != VERSION:
        raise UserError(f"{path} has format {version}, this program reads {VERSION}")
    if (step := record.get("step", int)) < 0:
        record.fail(f"the field 'step' must be 0 or more, not {step}")
    return record, step, saved_flags(record.object("config"))


def same_shapes(params: Tree, like: Tree, path: Path) -> None:
    """Raises ValueError naming the first leaf in which two trees differ."""
    have, want = flatten(params), flatten(like)
    for name in sorted(set(have) | set(want)):
        here = list(have[name].shape) if name in have else "missing"
        there = list(want[name].shape) if name in want else "absent from the model"
        if here != there:
            raise ValueError(f"{name} is {here} in {path}, {there} in the config")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)
