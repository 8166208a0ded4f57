"""The params of a run: where they begin, which of them it keeps, and how they come together again.

A run of adapters keeps those alone. Its base is what ``--init_from`` names; config.json holds its
digest, so that adapters are never put beside other weights than they were trained beside.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from core import Forward, VLMConfig, vlm
from params import init_params, load_params, save_params
from params.disk import make_folder, write_text
from params.files import locate
from params.tree import Tree, map_with_path, merge
from runners.data.sources import digests
from runners.data.sources.split import digest_of, file_digest
from runners.shell.cli import explained
from runners.shell.errors import UserError
from runners.shell.jsonfile import read_object
from runners.training.checkpoints import (
    MODEL,
    Run,
    find_weights,
    load_weights,
    open_run,
)
from runners.training.compose import adapted, compute_dtype, matrix_dtype
from runners.training.config import CONFIG, TrainConfig, as_dict
from runners.training.states import TENSORS, TrainState, is_state, load_state, run_folder
from transforms import cast_matrices, merge_lora, trainable

MERGED = "merged"  # a folder inside of a run's


def build_params(
    config: TrainConfig,
    model: VLMConfig,
    device: torch.device,
    state_path: Path | None,
) -> tuple[Tree, TrainState | None]:
    """Params to start from, and the state that they are of, if any."""
    if state_path is None:
        return start_params(config, model, device), None
    if not config.model.lora_rank:
        like, frozen = init_params(model, device="meta"), Tree()
    else:
        check_base(run_folder(state_path), config)
        like, frozen = trainable(start_params(config, model, device))
    state = load_state(state_path, like, config, device)
    return merge(state.params, frozen), state


def start_params(config: TrainConfig, model: VLMConfig, device: torch.device) -> Tree:
    """Params before the first step, as the forward of :func:`compose.adapted` wants them.

    What learns is fp32, or of --state_dtype. Frozen matrices beside adapters are in the dtype that
    the forward takes: nothing ever adds to them.
    """
    dtype, _ = compute_dtype(config.speed, device)
    forward = adapted(config, model, dtype)
    if config.model.init_from:
        # A base that is quantised is so on the CPU: the device never holds its floats.
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
    """The weights that ``--init_from`` names, fp32 whatever they were stored as. Raises UserError,
    also for a run of adapters, which are no model."""
    folder = run_folder(Path(path))
    if (folder / CONFIG).is_file() and open_run(folder).config.model.lora_rank:
        raise UserError(
            f"{folder} holds adapters: python -m runners.train --resume {folder} --merge 1 writes "
            f"{folder / MERGED}, which can be started from"
        )
    params = load_weights(path, init_params(model, device="meta"), device)
    return map_with_path(lambda _, leaf: leaf.float(), params)


def kept_params(config: TrainConfig, params: Tree) -> Tree:
    """The part of a run's params that it saves: all, or its adapters."""
    return trainable(params)[0] if config.model.lora_rank else params


def trained_params(path: Path, config: TrainConfig, whole: Tree, device: torch.device) -> Tree:
    """The best weights of a run (or those of a state), beside the frozen ones of ``whole``."""
    if not config.model.lora_rank:
        return load_weights(path, whole, device)
    learning, frozen = trainable(whole)
    return merge(load_weights(path, learning, device), frozen)


def open_params(run: Run, dtype: torch.dtype, device: torch.device) -> tuple[Forward, Tree]:
    """A run's forward to logits and its best weights, matrices as that forward takes them. Raises
    UserError naming what is missing or does not fit."""
    forward = adapted(run.config, run.model, dtype)
    matrices = matrix_dtype(run.config, dtype)
    if run.config.model.lora_rank:
        check_base(run.folder, run.config)
        whole = start_params(run.config, run.model, device)
    else:
        whole = init_params(run.model, device="meta")
    return forward, cast_matrices(trained_params(run.folder, run.config, whole, device), matrices)


# -- the base of adapters ---------------------------------------------------------------------


def base_digest(config: TrainConfig) -> str | None:
    """What stands for the base of a run of adapters; None for other runs. Raises UserError."""
    if not config.model.lora_rank or config.model.init_from is None:
        return None
    found = find_weights(Path(config.model.init_from))
    with explained("--init_from"):
        file = locate(found / TENSORS if is_state(found) else found)
        if file.suffix == ".safetensors":
            return file_digest(file).hex()
        shards = read_object(file).object("weight_map").values.values()
        return digest_of(*(file_digest(file.with_name(name)) for name in sorted({*shards}))).hex()


def check_base(folder: Path, config: TrainConfig) -> None:
    """Raises UserError where the base of a run's adapters is missing or holds other weights."""
    if read_object(folder / CONFIG).get("base", str) != base_digest(config):
        raise UserError(
            f"{config.model.init_from} holds other weights than those that the adapters of "
            f"{folder} were trained beside: restore it from a copy, or train the adapters again"
        )


def save_merged(folder: Path, config: TrainConfig, model: VLMConfig) -> Path:
    """Writes ``RUN/merged``: a folder like a run's, of whole weights with the best adapters added
    in, in fp32. Its base are the floats, also for adapters that were trained beside int8 ones."""
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
