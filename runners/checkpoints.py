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
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import VLMConfig, config_from_dict
from params import flatten, load_params, num_bytes, save_params, unflatten
from params.tree import Tree
from runners.cli import explained
from runners.config import TrainConfig, as_dict, differing_fields, from_dict
from runners.data.tokenizer import ChatTokenizer
from runners.errors import UserError

CONFIG, MODEL, TOKENIZER, STATES = "config.json", "model.safetensors", "tokenizer.json", "state"
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
    folder: Path, config: TrainConfig, model: VLMConfig, tokenizer: ChatTokenizer
) -> None:
    """Makes the folder of a new run: the first thing that a run writes."""
    with explained(f"cannot create {folder} (choose another place with --runs_dir)"):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / TOKENIZER)
        record = {"train": as_dict(config), "model": model.to_dict(), "torch": torch.__version__}
        write_text(folder / CONFIG, json.dumps(record, indent=1))


# -- a run that exists ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run's folder says of it."""

    folder: Path
    config: TrainConfig
    model: VLMConfig
    tokenizer: Path
    train: dict[str, Any]  # the config as recorded


def open_run(folder: str | Path) -> Run:
    """Reads a run's folder. Raises UserError naming the file that is missing or broken."""
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}")
    try:
        record = json.loads(path.read_text())
        config, model = from_dict(record["train"]), config_from_dict(record["model"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return Run(folder, config, model, folder / TOKENIZER, record["train"])


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
    try:
        record = json.loads((path / "state.json").read_text())
        version, old = record["version"], record["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'state.json'} is damaged: {error}") from error
    if version != VERSION:
        raise UserError(f"{path} has format {version}, this program reads {VERSION}")
    if differ := differing_fields(old, config):
        raise UserError(
            f"{path} belongs to another config ({', '.join(differ)}): give the same flags, or "
            "start a new run from its weights with --init_from"
        )
    with explained():
        tree = load_params(path / "state.safetensors", device=device)
        same_shapes(tree["params"], like, path)
    moments = flatten(tree.get("moments", {}))
    rng = {name: leaf.cpu() for name, leaf in tree["rng"].items()}
    return State(record["step"], tree["params"], moments, record["loader"], record["best"], rng)


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
