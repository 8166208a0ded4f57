"""The figures of a run and where they come from, as lines of JSON."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from runners.benchmarks.harness import SCALE, UNITS, Ceiling, Row
from runners.benchmarks.providers import PEERS, version
from runners.shell.cli import explained
from runners.shell.errors import UserError


@dataclass(frozen=True)
class Environment:
    """Where and how the figures came about."""

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
            f"Ceilings in this run: {before}.{later}",
        ]


CEILINGS: dict[Ceiling, str] = {
    "copy": "device copy (read + written)",
    "bf16": "bf16 matmul 8192^3",
    "int8": "int8 matmul 8192^3",
}


def environment(
    device: torch.device,
    command: str,
    ceilings: dict[Ceiling, float],
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
        ceilings=plain(ceilings),
        ceilings_after={},
    )


def plain(ceilings: Mapping[Ceiling, float]) -> dict[str, float]:
    return {str(name): value for name, value in ceilings.items()}


def _driver() -> str:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return answer.stdout.split("\n")[0].strip()


def as_json(row: Row, environment: Environment) -> str:
    """A line of JSON: everything known of a row, and where it was measured."""
    known: dict[str, Any] = asdict(row)
    known["unit"] = UNITS[row.ceiling]
    if row.samples:
        known |= {
            "ms": row.ms, "p20": row.quantile(0.2), "p80": row.quantile(0.8),
            "rate": row.rate, "share": row.share,
        }  # fmt: skip
    package = PEERS[row.peer][1] if row.peer else None
    known["version"] = version(package) if package else None
    known |= asdict(environment)
    finite = {k: _finite(v) for k, v in known.items()}
    return json.dumps(finite)


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: Sequence[Row], environment: Environment) -> None:
    path.write_text("".join(f"{as_json(row, environment)}\n" for row in rows))


def read_jsonl(path: Path) -> tuple[list[Row], Environment]:
    """What `write_jsonl` wrote. Raises UserError for a file that is not like that."""
    rows, environment = [], None
    with explained(str(path)):
        lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            known = json.loads(line)
            row = Row(**{f.name: known[f.name] for f in fields(Row)})
            environment = Environment(**{f.name: known[f.name] for f in fields(Environment)})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is not a benchmark's: {error!r}") from error
        if row.error is not None:
            row.error = float(row.error)  # NaN is a string in JSON
        rows.append(row)
    if environment is None:
        raise UserError(f"{path} is empty")
    return rows, environment


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, list[Row]]]]]:
    """Tables: a title (kernel, direction), and in it the rows of each shape; missing ones left
    out."""
    shown = [row for row in rows if row.status != "missing"]
    for title, table in groupby(
        sorted(shown, key=_order(shown)), key=lambda row: f"{row.kernel}, {row.mode}"
    ):
        yield title, [(shape, list(some)) for shape, some in groupby(table, key=lambda r: r.shape)]


def _order(rows: Sequence[Row]) -> Any:
    """Rows of one table together, in the order of their first appearance."""
    place: dict[tuple[str, str], int] = {}
    for row in rows:
        place.setdefault((row.kernel, row.mode), len(place))
    return lambda row: place[row.kernel, row.mode]
