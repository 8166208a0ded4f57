"""The params of a run: initial ones, saved ones, and the base weights of adapters.

A run with adapters saves only them. Its base is what ``--init_from`` names; config.json holds the
base's digest, so that adapters are never combined with other weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from core import Forward, VLMConfig, vlm
from params import flatten, init_params, load_params, save_params
from params.disk import make_folder, write_text
from params.files import locate
from params.formats import is_adapter
from params.tree import Tree, map_with_path, merge
from runners.data.sources import digests
from runners.data.sources.split import digest_of, file_digest
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.shell.jsonfile import read_object
from runners.training.checkpoints import MODEL, Run, find_weights, load_weights, open_run
from runners.training.compose import adapted, compute_dtype, matrix_dtype
from runners.training.config import CONFIG, TrainConfig, as_dict
from runners.training.settings import ModelSettings
from runners.training.states import TENSORS, TrainState, is_state, load_state, run_folder
from transforms import cast_matrices, merge_lora, trainable

MERGED = "merged"  # a folder inside of a run's


def build_params(
    config: TrainConfig, model: VLMConfig, device: torch.device, state_path: Path | None
) -> tuple[Tree, TrainState | None]:
    """The params to start from, and the state that holds them, if any."""
    if state_path is None:
        return start_params(config, model, device), None
    if not config.model.lora_rank:
        like, frozen = init_params(model, device="meta"), Tree()
    else:
        check_base(run_folder(state_path), config.model)
        like, frozen = trainable(start_params(config, model, device))
    state = load_state(state_path, like, config, device)
    return merge(state.params, frozen), state


def start_params(config: TrainConfig, model: VLMConfig, device: torch.device) -> Tree:
    """The params before the first step, for the forward of :func:`compose.adapted`.

    Trained params are fp32 or of --state_dtype. Frozen matrices beside adapters have the dtype that
    the forward takes: no update is ever added to them.
    """
    dtype, _ = compute_dtype(config.speed, device)
    forward = adapted(config, model, dtype)
    if config.model.init_from:
        # A base is quantised on the CPU, so that the device never holds its floats.
        there = torch.device("cpu") if config.model.quantize else device
        params = forward.prepare(load_base(config.model.init_from, model, there), config.run.seed)
        params = map_with_path(lambda path, leaf: leaf.to(device), params)
    else:
        params = forward.prepare(
            init_params(model, config.run.seed, device=device), config.run.seed
        )
    if config.model.lora_rank:
        learning, frozen = trainable(params)
        params = merge(learning, cast_matrices(frozen, matrix_dtype(config, dtype)))
    return cast_matrices(params, torch.bfloat16) if config.speed.state_dtype == "bf16" else params


def load_base(path: str, model: VLMConfig, device: torch.device) -> Tree:
    """The weights that ``--init_from`` names, as fp32. Raises UserError, also for a run that holds
    only adapters."""
    folder = run_folder(Path(path))
    if (folder / CONFIG).is_file() and open_run(folder).config.model.lora_rank:
        raise UserError(
            f"{folder} holds adapters: python -m runners.train --resume {folder} --merge 1 writes "
            f"{folder / MERGED}, which can be started from"
        )
    params = load_weights(path, init_params(model, device="meta"), device)
    return map_with_path(lambda _, leaf: leaf.float(), params)


def split_params(params: Tree) -> tuple[Tree, Tree]:
    """The params that a run saves, and the others: its adapters and their base, or all and none."""
    return trainable(params) if any(map(is_adapter, flatten(params))) else (params, Tree())


def trained_params(path: Path, whole: Tree, device: torch.device) -> Tree:
    """The best weights of a run, or those of a state, with the frozen ones of ``whole``."""
    kept, frozen = split_params(whole)
    return merge(load_weights(path, kept, device), frozen)


def open_params(run: Run, dtype: torch.dtype, device: torch.device) -> tuple[Forward, Tree]:
    """A run's forward to logits and its best weights, with matrices of the dtype that the forward
    takes. Raises UserError naming what is missing or does not fit."""
    forward = adapted(run.config, run.model, dtype)
    matrices = matrix_dtype(run.config, dtype)
    if run.config.model.lora_rank:
        check_base(run.folder, run.config.model)
        whole = start_params(run.config, run.model, device)
    else:
        whole = init_params(run.model, device="meta")
    return forward, cast_matrices(trained_params(run.folder, whole, device), matrices)


# -- the base of adapters ---------------------------------------------------------------------


def base_digest(config: ModelSettings) -> str | None:
    """The digest of the base weights of a run with adapters; None for other runs. Raises
    UserError."""
    if not config.lora_rank or config.init_from is None:
        return None
    found = find_weights(Path(config.init_from))
    with explained("--init_from"):
        file = locate(found / TENSORS if is_state(found) else found)
        if file.suffix == ".safetensors":
            return file_digest(file).hex()
        shards = read_object(file).object("weight_map").values.values()
        return digest_of(*(file_digest(file.with_name(name)) for name in sorted({*shards}))).hex()


def check_base(folder: Path, config: ModelSettings) -> None:
    """Raises UserError if the base of a run's adapters is missing or has other weights."""
    if read_object(folder / CONFIG).get("base", str) != base_digest(config):
        raise UserError(
            f"{config.init_from} holds other weights than the ones that the adapters of "
            f"{folder} were trained beside: restore it from a copy, or train the adapters again"
        )


def save_merged(folder: Path, config: TrainConfig, model: VLMConfig) -> Path:
    """Writes ``RUN/merged``: a run's folder of fp32 weights with the best adapters added. Adapters
    trained beside int8 weights are added to the original floats."""
    cpu = torch.device("cpu")
    base = load_base(str(config.model.init_from), model, cpu)
    best = load_params(find_weights(folder))
    adapters = best["params"] if is_state(find_weights(folder)) else best
    whole = merge_lora(vlm(model), merge(base, adapters), alpha=config.model.lora_alpha)
    target = folder / MERGED
    plain = config.changed(
        lora_rank=0, lora_alpha=None, quantize=None, merge=False, name=None, resume=None
    )
    values = read_object(folder / CONFIG).values
    record = {"id": values["id"], "train": as_dict(plain), "model": model.to_dict()}
    with explained(f"cannot write {target}"):
        make_folder(target)
        for name in (digests.TOKENIZER, digests.DATA):
            shutil.copyfile(folder / name, target / name)
        save_params(whole, target / MODEL)
        write_text(target / CONFIG, json.dumps(record, indent=1))
    return target
