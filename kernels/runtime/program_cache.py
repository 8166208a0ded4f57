"""Where flash-attn 4 and quack-kernels keep what they have compiled."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

ENABLED = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"  # read when flash_attn.cute is imported
FOLDER = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
QUACK_FOLDER = "QUACK_CACHE_DIR"  # read when quack is imported, by either


def keep() -> None:
    """Lets flash-attn 4 keep compiled kernels on disk, which it does only where it is told to, and
    quack beside it, which otherwise keeps them in the folder for temporary files.

    A forward and a backward of attention take 5.5 s to compile, in every process, and 0.01 s from
    disk (4.0.0b36 for an H100, on two slow cores); a product with its activation 3.3 s. A user's
    cache, because what lies there is executed; a folder for each kind of device, because not every
    name in it says what it was compiled for. What the environment says already holds:
    `FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=0` keeps nothing of flash-attn 4.
    """
    if not torch.cuda.is_available():
        return
    if QUACK_FOLDER not in os.environ and (folder := _folder("quack")) is not None:
        os.environ[QUACK_FOLDER] = str(folder)
    if ENABLED in os.environ:
        return
    if FOLDER not in os.environ:
        folder = _folder("flash-attn-4")
        if folder is None:
            return
        os.environ[FOLDER] = str(folder)
    os.environ[ENABLED] = "1"


def _folder(library: str) -> Path | None:
    """A library's folder for the current device, made; None where it cannot be written."""
    device = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "nanovision" / library / device
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None
