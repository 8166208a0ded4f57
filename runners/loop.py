"""The training loop: gradients of a few batches, one step, and what is written down about it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from core import Batch
from kernels import attention_flash
from runners.checkpoints import save_best, save_state
from runners.errors import UserError
from runners.flops import measure_load, peak_flops, training_flops
from runners.metrics import Display, Metrics
from runners.optim import learning_rate
from runners.profiling import Profiler
from runners.rehearsal import rehearse
from runners.setup import Job
from runners.step import Learner, mean_loss

Read = tuple["Step", list[float], float]  # a step, its values, and the seconds that it took


class Late:
    """Reads values off a device one step behind, so that neither waits for the other.

    A step's seconds are those from the end of the one before to its own, by the device's clock: the
    moments at which the host reads two steps can lie next to each other, whatever the steps took.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._waiting: list[tuple[Step, Tensor, float | torch.cuda.Event]] = []
        self._before = self._now()

    def push(self, step: Step, values: Tensor) -> Iterator[Read]:
        """Takes a step's values; gives those that are ready (on a CPU: the same)."""
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
        """What is done inside belongs to no step. Everything pushed was read before."""
        yield
        self._before = self._now()

    def _now(self) -> float | torch.cuda.Event:
        """When all work given to the device so far ends."""
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
    """What is known of a step before its values are."""

    number: int  # counted from 1
    lr: float
    tokens: int
    flops: float
    waited: float = 0.0  # seconds for its batches: the device may have had work left meanwhile


@dataclass
class Pace:
    """Steps since the last line of the log, what they computed and how long they took."""

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
        """begun: when the command was started, by ``time.monotonic``."""
        self.job, self.learner, self.folder = job, learner, folder
        self.metrics, self.display, self.config = metrics, display, job.config
        self.grad_fn = job.composed.gradients(job.select)
        self.late, self.pace = Late(job.device), Pace()
        self.peak = peak_flops(job.device, job.composed.dtype)
        self.saved = learner.step
        self.begun = begun - learner.seconds  # as if all commands of the run were one
        self.profiler = Profiler(folder, job.device) if self.config.profile else None

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """True if it came to the end; False if ``stop()`` or ``--stop_at`` ended it, resumably."""
        config, learner = self.config, self.learner
        batches, rehearsed = iter(self.job.loader), False
        while learner.step < config.steps:
            group, waited = self._next(batches)
            step = self._describe(group, waited)
            if attention_flash.waiting() and not rehearsed:
                rehearsed = True  # once: a frozen tower's backward is waited for by nobody
                rehearse(self.job, learner.working, group[0])
            values = learner.train_step(self.grad_fn, group)
            if self.profiler is not None and (written := self.profiler.after_step()):
                self.display.say(written)
            self.display.advance(learner.step)
            for read in self.late.push(step, values):
                self._log(*read)
            last, stopping = learner.step == config.steps, stop() or learner.step == config.stop_at
            if last or self._due(config.val_every) or learner.step in config.ends:
                self._validate()
            if last or stopping or self._due(config.save_every or config.val_every):
                self._save()
            if stopping and not last:
                return False
        return True

    def _next(self, batches: Iterator[Batch]) -> tuple[list[Batch], float]:
        """The batches of a step, and the seconds they were waited for."""
        start = time.perf_counter()
        group = [next(batches) for _ in range(self.config.grad_accum_steps)]
        return group, time.perf_counter() - start

    def _due(self, every: int) -> bool:
        return every > 0 and self.learner.step % every == 0

    def _describe(self, group: Sequence[Batch], waited: float) -> Step:
        loads = [measure_load(self.job.model, batch, self.job.pad) for batch in group]
        flops = sum(training_flops(self.job.model, load, self.job.learns) for load in loads)
        step = self.learner.step
        lr = learning_rate(self.config, step)
        return Step(step + 1, lr, sum(load.tokens for load in loads), flops, waited)

    def _log(self, step: Step, numbers: list[float], seconds: float) -> None:
        loss, norm, *losses = numbers
        if not all(map(math.isfinite, numbers)):
            self._refuse(step, losses)
        self.pace.add(step, seconds)
        self.learner.tokens += step.tokens
        if step.number % self.config.log_every and step.number != self.config.steps:
            return
        pace, self.pace = self.pace, Pace()
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
        left = self.config.steps - step.number
        self.display.show(row, self.config.steps, left * pace.seconds / pace.steps)

    def _refuse(self, step: Step, losses: list[float]) -> None:
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        number = (step.number - 1) * len(losses) + (0 if bad is None else bad) + 1
        what = (
            f"the gradient after batch {number}" if bad is None else f"the loss of batch {number}"
        )
        kept = f"the state of step {self.saved} is kept" if self.saved else "nothing was saved yet"
        raise UserError(
            f"{what} is not finite (step {step.number}); {kept}: "
            "try a lower --lr, a longer --warmup_steps or --dtype fp32"
        )

    def _settle(self) -> None:
        """Waits for all values of the steps made, so that nothing bad is ever written."""
        for read in self.late.flush():
            self._log(*read)

    def _validate(self) -> None:
        """Measures the validation loss; keeps these weights if they are the best so far."""
        self._settle()
        learner = self.learner
        with self.late.paused():
            loss = mean_loss(self.job.composed.eval_loss, learner.working, self.job.validation)
            if loss is not None and not math.isfinite(loss):
                raise UserError(f"the validation loss is not finite at step {learner.step}")
            if better := loss is None or learner.best is None or loss < learner.best:
                learner.best = loss
            if better or self.config.keep == "last":
                save_best(self.folder, learner.params, learner.step)
            if loss is not None:
                seconds = time.monotonic() - self.begun
                row = {"step": learner.step, "val_loss": loss, "tokens": learner.tokens}
                self.metrics.write(row | {"seconds": seconds})
                star = " (the best so far)" if better else ""
                self.display.say(f"step {learner.step}: validation loss {loss:.4f}{star}")

    def _save(self) -> None:
        self._settle()
        with self.late.paused():
            self.learner.seconds = time.monotonic() - self.begun
            save_state(self.folder, self.learner.state(self.job.loader.state_dict()), self.config)
            self.saved = self.learner.step


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives ``stop()``: whether Ctrl-C or SIGTERM came. A second one ends the program at once.

    Outside the main thread, where Python takes no signals, it never has.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for one in old:
            signal.signal(one, old[one])

    old = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in old:
        signal.signal(one, ask)
    try:
        yield lambda: asked
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
