"""The origin of a run: command, commit, versions and machine, so that it can be repeated."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# Distributions that may change a run's numbers
PACKAGES = (
    "torch triton numpy pillow tokenizers safetensors flash-attn flash-attn-4 quack-kernels "
    "nvidia-cutlass-dsl bitsandbytes"
)
UNKNOWN = "unknown"


def origin(command: str | None, after: int, device: torch.device) -> dict[str, Any]:
    """How one command began or continued a run, for its config.json.

    command: the quoted command line; None if training was called from Python. after: the steps
    done before.
    """
    commit, changed = revision(ROOT)
    return {
        "after": after,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit,
        "changed": changed,
        "versions": versions(),
        "machine": machine(device),
    }


@functools.cache
def revision(root: Path) -> tuple[str, bool | None]:
    """The commit of the code in ``root`` and whether its Python files differ from it; ``unknown``
    and None without git or a checkout."""
    if not (root / ".git").exists():  # installed, perhaps inside another checkout
        return UNKNOWN, None
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        return commit, bool(_git(root, "status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN, None


def _git(root: Path, *args: str) -> str:
    asked = ["git", "-C", str(root), *args]
    return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python, the driver, CUDA and the libraries in PACKAGES."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, such as +cpu
    driver = Path("/sys/module/nvidia/version")
    return found | {
        "cuda": torch.version.cuda,
        "driver": driver.read_text().strip() if driver.is_file() else None,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device. On a CPU sums depend on its instructions and the number of threads."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return {"device": name, "capability": f"{major}.{minor}"}
    return {
        "device": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
