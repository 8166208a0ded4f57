"""Whether a run may go on under the flags given, and for how many steps."""

from __future__ import annotations

from pathlib import Path

from runners.shell.errors import UserError
from runners.training.config import TrainConfig, differing_fields
from runners.training.optim import learning_rate


def continued(old: TrainConfig, new: TrainConfig, step: int, state: Path) -> TrainConfig:
    """The config by which a run of ``old`` goes on under ``new`` after so many steps.

    Flags that change no number of the training may differ, and ``--steps`` as far as no step that
    is done would have had another learning rate: under the constant schedule, and under wsd, whose
    rate rises again after what was the end. Raises UserError naming every other flag.
    """
    if differ := differing_fields(old, new):
        raise UserError(
            f"{state} belongs to another config ({', '.join(differ)}): leave these flags out, or "
            "start a new run from its weights with --init_from"
        )
    if new.optim.steps < step:
        raise UserError(f"--steps {new.optim.steps} is less than the {step} that {state} has done")
    if not new.optim.ends:
        ends = old.optim.ends if old.optim.steps == new.optim.steps or not _ending(old, step) else (
            *old.optim.ends, old.optim.steps
        )  # fmt: skip
        new = new.changed(ends=ends)
    if (old.optim.steps, old.optim.ends) != (new.optim.steps, new.optim.ends) and any(
        learning_rate(old.optim, done) != learning_rate(new.optim, done) for done in range(step)
    ):
        raise UserError(
            f"--steps {old.optim.steps} -> {new.optim.steps}: steps that {state} has done would "
            f"have had another rate under --schedule {new.optim.schedule}, only constant and wsd "
            "can be extended; start a new run from its weights with --init_from"
        )
    return new


def _ending(config: TrainConfig, step: int) -> bool:
    """Whether a run after so many steps is over, or its rate falls towards its end."""
    level = config.changed(schedule="constant")
    since = max(config.optim.ends, default=0)
    return step >= config.optim.steps or any(
        learning_rate(config.optim, done) < learning_rate(level.optim, done)
        for done in range(since, step)
    )
