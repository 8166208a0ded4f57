"""Where the numbers of a run go: a file, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from runners.config import CONFIG, TrainConfig, as_dict
from runners.errors import UserError, printable
from runners.jsonfile import Fields, read_object, read_rows

FILE = "metrics.jsonl"
Row = Mapping[str, float | int | str | None]


def check_wandb(config: TrainConfig) -> None:
    """Raises UserError if ``--wandb`` was asked for and is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb was asked for but is not installed: pip install wandb")


class Metrics:
    """Rows of numbers, each with its ``step``, to ``metrics.jsonl`` and whatever else is on.

    folder: of the run; after: rows of later steps, left by an interrupted run, are dropped.
    """

    def __init__(self, folder: Path, config: TrainConfig, *, after: int = 0) -> None:
        path = folder / FILE
        kept = [row for row in read_metrics(folder) if _step(row) <= after] if after else []
        part = path.with_name(f"{FILE}.part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.replace(path)
        self._file = path.open("a", buffering=1)
        self._board: Any = None
        # Made for the first row, when the device has steps to work on: importing it takes 0.3 s
        self._make_board: Callable[[], Any] | None = None
        if config.tensorboard:
            self._make_board = partial(_board, folder, after)
        self._wandb: Any = None
        if config.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project, name=folder.name, id=run_id(folder), dir=str(folder),
                config=as_dict(config), resume="allow",
            )  # fmt: skip

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        step = _step(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        if self._make_board is not None:
            self._board, self._make_board = self._make_board(), None
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def run_id(folder: Path) -> str:
    """The name of a run that no other has, the same whenever it is continued. Runs of versions that
    gave none are known by their folder's."""
    return read_object(folder / CONFIG).find("id", str) or folder.name


def _board(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after + 1)


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``; a last line cut short by a crash is left out. Raises
    UserError naming the line or the row that is damaged."""
    path = folder / FILE
    if not path.exists():
        return []
    rows: list[Row] = [*read_rows(path)]
    for number, row in enumerate(rows, 1):
        fields = Fields(dict(row), path, f"row {number}: ")
        fields.get("step", int)
        for name in ("loss", "val_loss"):
            fields.find(name, float)
    return rows


class Display:
    """A run in the terminal: a live bar where there is one, plain lines elsewhere."""

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live: Progress | None = None
        if self.console.is_terminal:
            self._live = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=steps, completed=start)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(escape(printable(text)), highlight=False, soft_wrap=True)

    @contextmanager
    def logging(self, name: str) -> Iterator[None]:
        """What the modules below ``name`` log, from INFO on, goes here."""
        logger, handler = logging.getLogger(name), _Saying(self)
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def advance(self, step: int) -> None:
        if self._live is not None:
            self._live.update(self._task, completed=step)

    def show(self, row: Row, steps: int, eta: float) -> None:
        """The numbers of a log step; eta in seconds."""
        text = describe(row, eta)
        if self._live is not None:
            self._live.update(self._task, description=escape(printable(text)))
        else:
            self.say(f"step {row['step']}/{steps}  {text}")


class _Saying(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        self._display.say(prefix + record.getMessage())


def describe(row: Mapping[str, Any], eta: float) -> str:
    """One log line.

    >>> describe({"loss": 2.5, "lr": 1e-3, "grad_norm": 0.7, "tokens_per_s": 12345.6}, 61)
    'loss 2.5000  lr 1.00e-03  grad 0.70  12,346 tok/s  MFU -  ETA 0:01:01'
    """
    mfu, wait = row.get("mfu"), row.get("data_wait", 0.0)
    waiting = f"waiting for data {wait:.0%}  " if wait >= 0.01 else ""
    return (
        f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}  "
        f"{row['tokens_per_s']:,.0f} tok/s  MFU {'-' if mfu is None else f'{mfu:.1%}'}  "
        f"{waiting}ETA {timedelta(seconds=round(eta))}"
    )


def _step(row: Row) -> int:
    step = row["step"]
    assert isinstance(step, int)
    return step
