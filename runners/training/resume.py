"""Whether a run may go on under the flags given, and for how many steps."""

from __future__ import annotations

import dataclasses
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
    if new.steps < step:
        raise UserError(f"--steps {new.steps} is less than the {step} that {state} has done")
    if not new.ends:
        ends = old.ends if old.steps == new.steps or not _ending(old, step) else (
            *old.ends, old.steps
        )  # fmt: skip
        new = dataclasses.replace(new, ends=ends)
    if (old.steps, old.ends) != (new.steps, new.ends) and any(
        learning_rate(old, done) != learning_rate(new, done) for done in range(step)
    ):
        raise UserError(
            f"--steps {old.steps} -> {new.steps}: steps that {state} has done would have had "
            f"another rate under --schedule {new.schedule}, only constant and wsd can be extended; "
            "start a new run from its weights with --init_from"
        )
    return new


def _ending(config: TrainConfig, step: int) -> bool:
    """Whether a run after so many steps is over, or its rate falls towards its end."""
    level = dataclasses.replace(config, schedule="constant")
    since = max(config.ends, default=0)
    return step >= config.steps or any(
        learning_rate(config, done) < learning_rate(level, done) for done in range(since, step)
    )
