"""Where flash-attn 4 keeps compiled kernels, so that only the first run on a machine waits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"  # read when flash_attn.cute is imported
FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
QUACK_FOLDER = "QUACK_CACHE_DIR"  # read when quack is imported


def keep_compiled(device: torch.device) -> None:
    """Tells flash-attn 4 and quack to keep compiled kernels on disk, if the environment does not
    say otherwise: 10 s of a start beside an H200. By default flash-attn 4 keeps nothing.

    The folder is the user's own, because what lies there is executed, and one for each kind of
    device, because the files' names do not say what they were compiled for.
    """
    if device.type != "cuda":
        return
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).lower()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nanovision"
    os.environ.setdefault(ENABLED, "1")
    os.environ.setdefault(FOLDER, str(base / "flash-attn-4" / name))
    os.environ.setdefault(QUACK_FOLDER, str(base / "quack" / name))
