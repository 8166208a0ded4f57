"""Where flash-attn 4 and quack keep compiled kernels, so that only the first run waits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"  # read when flash_attn.cute is imported
FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
QUACK_FOLDER = "QUACK_CACHE_DIR"  # read when quack is imported


def keep_compiled(device: torch.device) -> None:
    """Makes flash-attn 4 and quack keep compiled kernels on disk, unless the environment says
    otherwise. By default flash-attn 4 keeps none, which costs 10 s per start on an H200.

    The folder belongs to the user, because its files are executed. Each kind of device has its own,
    because the files' names do not name the device.
    """
    if device.type != "cuda":
        return
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device)).lower()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "nanovision"
    os.environ.setdefault(ENABLED, "1")
    os.environ.setdefault(FOLDER, str(base / "flash-attn-4" / name))
    os.environ.setdefault(QUACK_FOLDER, str(base / "quack" / name))
