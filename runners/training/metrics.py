"""Where the numbers of a run go: a file, TensorBoard, Weights & Biases, and the terminal."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from params.disk import write_text
from runners.shell.cli import explained
from runners.shell.errors import UserError, printable
from runners.shell.jsonfile import Fields, read_object, read_rows
from runners.training.config import CONFIG
from runners.training.settings import RunSettings

FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)
Row = Mapping[str, float | int | str | None]


def check_wandb(config: RunSettings) -> None:
    """Raises UserError if ``--wandb`` was asked for and is not installed."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb was asked for but is not installed: pip install wandb")


class Metrics:
    """Writes rows of numbers, each with its ``step``, to ``metrics.jsonl``, TensorBoard and Weights
    & Biases.

    folder: of the run, with its config.json. after: rows of later steps, which an interrupted run
    left, are dropped.
    """

    def __init__(self, folder: Path, config: RunSettings, *, after: int = 0) -> None:
        path = folder / FILE
        kept = [row for row in read_metrics(folder) if _step(row) <= after] if after else []
        with explained(f"cannot write {path}"):
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("ab", buffering=0)
        self._waiting = b""  # rows for which the disk had no room
        self._board: Any = None
        # Made for the first row, while the device computes: the import takes 0.3 s
        self._make_board: Callable[[], Any] | None = None
        if config.tensorboard:
            self._make_board = partial(_board, folder, after)
        self._wandb: Any = None
        if config.wandb:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=folder.name,
                id=run_id(folder),
                dir=str(folder),
                config=read_object(folder / CONFIG).find("train", dict),
                resume="allow",
            )

    def write(self, row: Row) -> None:
        """Writes a row. Rows that cannot be written are kept for the next call, with a warning: a
        full disk does not end a run here."""
        self._append(json.dumps(row).encode() + b"\n")
        step = _step(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        try:
            if self._make_board is not None:
                make, self._make_board = self._make_board, None
                self._board = make()
            if self._board is not None:
                for name, value in numbers.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            _log.warning("TensorBoard's events cannot be written any more: %s", error)
            self._board = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def sync(self) -> None:
        """Flushes the rows to the disk, before a state that relies on them."""
        with warned(self._file.name):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._append(b"")
        self.sync()
        self._file.close()
        if self._board is not None:
            with warned("TensorBoard's events"):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, line: bytes) -> None:
        """Appends whole lines or nothing."""
        told, end = bool(self._waiting), os.fstat(self._file.fileno()).st_size
        self._waiting += line
        try:
            if self._file.write(self._waiting) == len(self._waiting):
                self._waiting = b""
                return
            reason = os.strerror(errno.ENOSPC)
        except OSError as error:
            reason = error.strerror or str(error)
        os.ftruncate(self._file.fileno(), end)
        if not told:
            _log.warning("%s: rows wait until they can be written: %s", self._file.name, reason)
        elif not line:
            _log.warning("%s lacks its last rows: %s", self._file.name, reason)


@contextmanager
def warned(what: str) -> Iterator[None]:
    """Turns an OSError into a warning, for files that a run can do without."""
    try:
        yield
    except OSError as error:
        _log.warning("%s: cannot be written: %s", what, error.strerror or error)


def run_id(folder: Path) -> str:
    """A run's unique id, which it keeps when it is continued. Runs of versions without ids have
    their folder's name."""
    return read_object(folder / CONFIG).find("id", str) or folder.name


def _board(folder: Path, after: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    _silence_writers()
    return SummaryWriter(str(folder), purge_step=after + 1)


@functools.cache
def _silence_writers() -> None:
    """Hides tracebacks of TensorBoard's writing thread: the next call raises the error again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        mine = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (mine and issubclass(args.exc_type, OSError)):
            before(args)

    threading.excepthook = hook


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run's ``metrics.jsonl``, without a last line cut short by a crash. Raises
    UserError naming the damaged line or row."""
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
    """A run's output: a live progress bar in a terminal, plain lines elsewhere."""

    def __init__(self, steps: int, start: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self._heard = True
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
        """Prints a line. If the output cannot be written any more, the run goes on silently."""
        if not self._heard:
            return
        try:
            self.console.print(escape(printable(text)), highlight=False, soft_wrap=True)
        except (OSError, SystemExit) as error:  # rich raises SystemExit for a closed pipe
            self._heard = False
            self._fall_silent(error)

    def _fall_silent(self, error: BaseException) -> None:
        if self._live is not None:
            with suppress(OSError, SystemExit):
                self._live.stop()
            self._live = None
        reason = (error.strerror if isinstance(error, OSError) else None) or "its reader has left"
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.console.file.fileno())  # buffered output goes there, too
            os.close(nowhere)
        with suppress(OSError):
            text = f"the output cannot be written any more ({reason}): the run goes on"
            print(f"warning: {text}, its numbers are in {FILE}", file=sys.stderr, flush=True)

    @contextmanager
    def logging(self, name: str) -> Iterator[None]:
        """Shows what modules below ``name`` log, from INFO on."""
        logger, handler = logging.getLogger(name), _DisplayHandler(self)
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
        """Shows the numbers of a log step; eta: seconds."""
        text = describe(row, eta)
        if self._live is not None:
            self._live.update(self._task, description=escape(printable(text)))
        else:
            self.say(f"step {row['step']}/{steps}  {text}")


class _DisplayHandler(logging.Handler):
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
