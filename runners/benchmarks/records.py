"""The environment of a benchmark, and lines of JSON with it and the figures."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from runners.benchmarks.clock import Ceiling
from runners.benchmarks.providers import PEERS, version

UNITS = {"copy": "GB/s", "bf16": "TFLOP/s", "int8": "TOP/s"}
SCALE = {"copy": 1e9, "bf16": 1e12, "int8": 1e12}
CEILINGS = {
    "copy": "device copy (read + written)",
    "bf16": "bf16 matmul 8192^3",
    "int8": "int8 matmul 8192^3",
}


@dataclass(frozen=True)
class Environment:
    """The machine, the versions and the command of a benchmark."""

    date: str
    command: str
    device: str
    memory_gib: float | None
    driver: str
    python: str
    versions: Mapping[str, str | None]  # of torch, triton, cuda, cudnn, and of the peers
    ceilings: Mapping[str, float]  # bytes or operations a second
    ceilings_after: Mapping[str, float]  # the same at the end of the run, if it came to it

    def lines(self) -> list[str]:
        memory = f" ({self.memory_gib:.0f} GiB)" if self.memory_gib else ""
        known = ", ".join(f"{name} {v}" for name, v in self.versions.items() if v)
        before, after = (
            ", ".join(
                f"{label} {measured[name] / SCALE[name]:,.0f} {UNITS[name]}"
                for name, label in CEILINGS.items()
                if name in measured
            )
            for measured in (self.ceilings, self.ceilings_after)
        )
        later = f" At its end: {after}." if after else ""
        return [
            f"{self.device}{memory}, driver {self.driver}, Python {self.python}, {known}.",
            *([f"Ceilings in this run: {before}.{later}"] if before else []),
        ]


def environment(
    device: torch.device, command: str, ceilings: Mapping[Ceiling, float]
) -> Environment:
    cuda = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if cuda else None
    versions = {
        "torch": torch.__version__,
        "triton": version("triton"),
        "CUDA": torch.version.cuda,
        "cuDNN": str(cudnn) if cudnn else None,
    }
    return Environment(
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=command,
        device=torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU",
        memory_gib=torch.cuda.get_device_properties(device).total_memory / 2**30 if cuda else None,
        driver=_driver() if cuda else "none",
        python=platform.python_version(),
        versions=versions | {package: version(package) for _, package in PEERS.values()},
        ceilings={str(name): value for name, value in ceilings.items()},
        ceilings_after={},
    )


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return answer.stdout.split("\n")[0].strip()


def write_lines(path: Path, records: Iterable[Mapping[str, Any]], where: Environment) -> None:
    """Writes a line of JSON per record, with its environment."""
    lines = (
        json.dumps({key: _finite(value) for key, value in (dict(record) | vars(where)).items()})
        for record in records
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def _finite(value: Any) -> Any:
    """NaN and infinity as strings: JSON has neither."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
