"""The training loop: gradients of a few batches, one step, and what is written down about it."""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor

from core import Batch
from params import num_bytes
from runners.shell.errors import UserError
from runners.training.checkpoints import resume_flag, save_best
from runners.training.flops import measure_load, peak_flops, training_flops
from runners.training.metrics import Display, Metrics, warned
from runners.training.optim import learning_rate
from runners.training.profiling import Profiler
from runners.training.setup import Job
from runners.training.states import STATES, drop_state, find_states, keep_states, save_state
from runners.training.step import Learner, mean_loss

FIRST, FIRST_RATE = 5.0, 1e8  # seconds before the first state, and bytes a second beyond them
Read = tuple["Step", list[float], float]  # a step, its values, and the seconds that it took


class DelayedReader:
    """Reads a step's values off the device one step later, so that neither side waits.

    A step's seconds run from the end of the step before to its own end by the device's clock, since
    the host may read two steps in quick succession.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waiting: list[tuple[Step, Tensor, float | torch.cuda.Event]] = []
        self._before = self._now()

    def push(self, step: Step, values: Tensor) -> Iterator[Read]:
        """Takes a step's values and yields the ready ones (on a CPU, the same)."""
        if self._cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
        self._waiting.append((step, values, self._now()))
        yield from self.flush(keep=1 if self._cuda else 0)

    def flush(self, keep: int = 0) -> Iterator[Read]:
        while len(self._waiting) > keep:
            step, values, end = self._waiting.pop(0)
            if not isinstance(end, float):
                end.synchronize()
            seconds, self._before = _seconds(self._before, end), end
            yield step, values.tolist(), seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside counts for no step. Everything pushed must have been read."""
        yield
        self._before = self._now()

    def _now(self) -> float | torch.cuda.Event:
        """The end of all work that the device has been given so far."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Step:
    """What is known of a step before its values are read."""

    number: int  # counted from 1
    lr: float
    tokens: int
    flops: float
    waited: float = 0.0  # seconds for its batches; the device may have been busy meanwhile


@dataclass
class Throughput:
    """Steps since the last log line, what they computed and how long they took."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, step: Step, seconds: float) -> None:
        self.steps += 1
        self.tokens += step.tokens
        self.flops += step.flops
        self.waited += step.waited
        self.seconds += seconds


class Training:
    """A run from its first (or resumed) step to its last."""

    def __init__(
        self,
        job: Job,
        learner: Learner,
        folder: Path,
        metrics: Metrics,
        display: Display,
        begun: float,
    ) -> None:
        """begun: ``time.monotonic()`` at the start of the command."""
        self.job, self.learner, self.folder = job, learner, folder
        self.metrics, self.display, self.config = metrics, display, job.config
        self.grad_fn = job.composed.gradients(job.select)
        self.late, self.pace = DelayedReader(job.device), Throughput()
        self.peak = peak_flops(job.device, job.composed.dtype)
        steps = _steps(folder)
        before = [step for step in steps if step <= learner.step]
        self.kept = before[-max(2, self.config.run.keep_states) :]
        # states after ours, abandoned by resuming an older one, go once ours has a successor
        keep_states(folder, [step for step in steps if step in self.kept or step > learner.step])
        # a first state soon, but late enough that writing it costs little beside what it saves
        self.first_save = time.monotonic() + FIRST + 3 * num_bytes(learner.kept) / FIRST_RATE
        self.unproven: int | None = None  # a state without a finite step after it
        self.begun = begun - learner.seconds  # as if all commands of the run were one
        self.profiler = Profiler(folder, job.device) if self.config.run.profile else None

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """True at the end of the run; False if ``stop()`` or ``--stop_at`` ended it, resumably."""
        config, learner = self.config, self.learner
        batches = iter(self.job.data.loader)
        started = time.monotonic()
        compiles = self.job.device.type == "cuda" or self.config.speed.compile
        if compiles:
            self.display.say(
                "Compiling kernels in the first step: 10 to 30 s on a new machine, then they are "
                "cached"
            )
        while learner.step < config.optim.steps:
            if not self.kept and self._is_time_for_the_first(learner.step + 1):
                self._save()
            group, waited = self._next(batches)
            step = self._describe(group, waited)
            values = learner.train_step(self.grad_fn, group)
            if self.profiler is not None:
                with warned("the profile"):
                    if written := self.profiler.after_step():
                        self.display.say(written)
            self.display.advance(learner.step)
            for read in self.late.push(step, values):
                self._log(*read)
            if compiles:
                compiles = False
                self.display.say(f"First step after {time.monotonic() - started:.1f} s")
            last, stopping = (
                learner.step == config.optim.steps,
                stop() or learner.step == config.run.stop_at,
            )
            if self._validates(learner.step):
                self._validate()
            if last or stopping or self._due(config.run.save_every or config.run.val_every):
                self._save()
            if stopping and not last:
                return False
        return True

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], float]:
        """The batches of a step, and the seconds of waiting for them."""
        start = time.perf_counter()
        group = [next(batches) for _ in range(self.config.optim.grad_accum_steps)]
        return group, time.perf_counter() - start

    def _validates(self, step: int) -> bool:
        every = self.config.run.val_every
        due = every > 0 and step % every == 0
        return step == self.config.optim.steps or due or step in self.config.optim.ends

    def _is_time_for_the_first(self, step: int) -> bool:
        """Before the first validation, which keeps weights, or once it is worth its time."""
        return self._validates(step) or time.monotonic() > self.first_save

    def _due(self, every: int) -> bool:
        return every > 0 and self.learner.step % every == 0

    def _describe(self, group: Sequence[Batch], waited: float) -> Step:
        loads = [measure_load(self.job.model, batch, self.job.data.pad) for batch in group]
        flops = sum(
            training_flops(
                self.job.model, load, self.job.learns, adapters=self.config.model.lora_rank > 0
            )
            for load in loads
        )
        step = self.learner.step
        lr = learning_rate(self.config.optim, step)
        return Step(step + 1, lr, sum(load.tokens for load in loads), flops, waited)

    def _log(self, step: Step, numbers: list[float], seconds: float) -> None:
        loss, norm, *losses = numbers
        if not all(map(math.isfinite, numbers)):
            self._refuse(_what_failed(step.number, losses), step.number)
        if self.unproven is not None and step.number > self.unproven:
            self.unproven = None
            self._prune()
        self.pace.add(step, seconds)
        self.learner.tokens += step.tokens
        if step.number % self.config.run.log_every and step.number != self.config.optim.steps:
            return
        pace, self.pace = self.pace, Throughput()
        row: dict[str, float | int | str | None] = {
            "step": step.number,
            "loss": loss,
            "lr": step.lr,
            "grad_norm": norm,
            "tokens_per_s": pace.tokens / pace.seconds,
            "mfu": pace.flops / pace.seconds / self.peak if self.peak else None,
            "s_per_step": pace.seconds / pace.steps,
            "data_wait": pace.waited / pace.seconds,
            "tokens": self.learner.tokens,
            "seconds": time.monotonic() - self.begun,
        }
        self.metrics.write(row)
        left = self.config.optim.steps - step.number
        self.display.show(row, self.config.optim.steps, left * pace.seconds / pace.steps)

    def _refuse(self, what: str, step: int) -> NoReturn:
        """Ends a run whose numbers are not finite. A state without a finite step after it is
        deleted."""
        if self.unproven is not None:
            drop_state(self.folder / STATES / f"{self.unproven:08d}")
            self.kept.remove(self.unproven)
        what = f"{what} is not finite (step {step})"
        mend = "a lower --lr, a longer --warmup_steps or --dtype fp32"
        kept = [path for path in find_states(self.folder) if int(path.name) in self.kept]
        if not kept:
            again = " and --resume=auto" if self.config.run.name else ""
            raise UserError(f"{what}; no state was kept: start again with {mend}{again}")
        start = shlex.quote(f"--init_from={kept[-1]}")
        raise UserError(
            f"{what}; the state of step {int(kept[-1].name)} is kept: start a new run, of another "
            f"--name, from its weights by {start} with {mend}"
        )

    def _settle(self) -> None:
        """Reads the values of all steps made, so that nothing that is not finite is written."""
        for read in self.late.flush():
            self._log(*read)

    def _validate(self) -> None:
        """Measures the validation loss, and keeps the weights if they are the best so far."""
        self._settle()
        self._check()
        learner = self.learner
        with self.late.paused():
            loss = mean_loss(self.job.composed.eval_loss, learner.working, self.job.data.validation)
            if loss is not None and not math.isfinite(loss):
                self._refuse("the validation loss", learner.step)
            if better := loss is None or learner.best is None or loss < learner.best:
                learner.best = loss
            if better or self.config.run.keep == "last":
                save_best(self.folder, learner.kept, learner.step)
            if loss is not None:
                seconds = time.monotonic() - self.begun
                row = {"step": learner.step, "val_loss": loss, "tokens": learner.tokens}
                self.metrics.write(row | {"seconds": seconds})
                star = " (the best so far)" if better else ""
                self.display.say(f"step {learner.step}: validation loss {loss:.4f}{star}")

    def _check(self) -> None:
        """Refuses weights that are not finite."""
        with self.late.paused():
            if bad := self.learner.not_finite():
                self._refuse(f"{bad}, after its last update,", self.learner.step)

    def _save(self) -> None:
        """Saves a state; older ones are deleted once it is on the disk."""
        self._settle()
        self._check()
        with self.late.paused():
            self.learner.seconds = time.monotonic() - self.begun
            state = self.learner.state(self.job.data.loader.state_dict())
            self.metrics.sync()
            try:
                save_state(self.folder, state, self.config)
            except UserError as error:
                last = f"the state of step {self.kept[-1]} is kept" if self.kept else "none is kept"
                again = resume_flag(self.folder)
                raise UserError(f"{error}; {last}: mend that, and go on by {again}") from error
            self.kept.append(state.step)
            self.unproven = state.step
            self._prune()

    def _prune(self) -> None:
        """Keeps the newest states, and an unproven one's predecessor: the next loss may be NaN."""
        self.kept = self.kept[
            -max(self.config.run.keep_states, 1 if self.unproven is None else 2) :
        ]
        keep_states(self.folder, self.kept)


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in find_states(folder)]


def _what_failed(step: int, losses: list[float]) -> str:
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    number = (step - 1) * len(losses) + (0 if bad is None else bad) + 1
    return f"the gradient after batch {number}" if bad is None else f"the loss of batch {number}"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives ``stop()``: whether Ctrl-C, SIGTERM or SIGHUP (unless ignored, as by nohup) has come. A
    second signal ends the program at once. Outside of the main thread Python takes no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for one in old:
            signal.signal(one, old[one])

    numbers = (
        signal.SIGINT,
        signal.SIGTERM,
        *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []),
    )
    old = {one: signal.getsignal(one) for one in numbers}
    old = {one: handler for one, handler in old.items() if handler is not signal.SIG_IGN}
    for one in old:
        signal.signal(one, ask)
    try:
        yield lambda: asked
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
