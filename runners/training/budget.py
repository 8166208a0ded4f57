"""Whether a run can fit into memory, estimated before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from core import VLMConfig
from runners.shell.errors import UserError
from runners.training.config import TrainConfig

# Bytes of the optimizer's moments for each trained element
MOMENTS = {"adamw": 8, "adamw8bit": 2, "muon": 4}
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(config: TrainConfig, model: VLMConfig, device: torch.device) -> None:
    """Raises UserError naming the flags if a run needs more memory than there is.

    This is a lower bound: weights, gradients and moments if all params are trained, and the input
    of each block. A run that passes may still be too large.
    """
    weight = 2 if config.speed.state_dtype == "bf16" else 4  # bytes
    beside = weight + (4 if weight == 2 else MOMENTS[config.optim.optimizer])
    params = model.num_params()
    if config.model.lora_rank:
        weight, beside = 1 if config.model.quantize else 2, 0
    if config.model.trainable or config.model.stage == "align":
        beside = 0
    held = params * (weight + beside)
    tokens = config.data.device_batch_size * config.data.sequence_len
    if tokens >= 2**31:
        raise UserError(
            f"--device_batch_size {config.data.device_batch_size} rows of --sequence_len "
            f"{config.data.sequence_len} are {tokens:,} tokens, more than can be counted in 32 bits"
        )
    speed, passed = config.speed, 2 * tokens * model.text.dim
    if not (speed.use_gradient_checkpointing and speed.checkpoint_policy == "offload"):
        passed *= model.text.layers  # checkpointed or not, each block's input is kept
    if config.data.data == "shapes" and model.vision is not None:
        picture = model.image_tokens(model.vision.grid**2)
        if picture > config.data.sequence_len:
            raise UserError(
                f"a picture of vision.image_size {model.vision.image_size} takes {picture:,} "
                f"tokens, more than --sequence_len {config.data.sequence_len}"
            )
    have = memory_of(device)
    if have is None or held + passed <= have:
        return
    most, flags = max(
        (held, f"{params:,} parameters (--preset, --override)"),
        (passed, f"{tokens:,} tokens at once (--device_batch_size, --sequence_len)"),
    )
    place = "GPU" if device.type == "cuda" else "machine"
    raise UserError(
        f"{flags} take at least {_gib(most)} GiB, and this {place} has {_gib(have)} GiB: "
        "choose a smaller run"
    )


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory, or of this machine's within its control group; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [_number(Path(path)) for path in LIMITS]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((size for size in found if size), default=None)


def _number(path: Path) -> int | None:
    """A control group's limit; None for ``max``."""
    try:
        word = path.read_text().strip()
    except OSError:  # missing or not readable
        return None
    return int(word) if word.isdigit() else None


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"
