"""Whether a run may be continued with other flags, and for how many steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runners.shell.errors import UserError
from runners.training.config import TrainConfig, differing_fields
from runners.training.optim import learning_rate
from runners.training.settings import OptimSettings


def continued(old: TrainConfig, new: TrainConfig, step: int, state: Path) -> TrainConfig:
    """The config by which a run of ``old`` continues after ``step`` steps with the flags ``new``.

    Flags that change no number of the training may differ. So may ``--steps`` if no finished step
    would have had another learning rate: with the constant schedule, and with wsd, whose rate rises
    again after an earlier end. Raises UserError naming every other flag.
    """
    if differ := differing_fields(old, new):
        raise UserError(
            f"{state} belongs to another config ({', '.join(differ)}): leave these flags out, or "
            "start a new run from its weights with --init_from"
        )
    if new.optim.steps < step:
        raise UserError(f"--steps {new.optim.steps} is less than the {step} that {state} has done")
    if not new.optim.ends:
        extended = old.optim.steps != new.optim.steps and _is_decaying(old.optim, step)
        new = new.changed(ends=(*old.optim.ends, *([old.optim.steps] if extended else [])))
    if (old.optim.steps, old.optim.ends) != (new.optim.steps, new.optim.ends) and any(
        learning_rate(old.optim, done) != learning_rate(new.optim, done) for done in range(step)
    ):
        raise UserError(
            f"--steps {old.optim.steps} -> {new.optim.steps}: steps that {state} has done would "
            f"have had another rate under --schedule {new.optim.schedule}, only constant and wsd "
            "can be extended; start a new run from its weights with --init_from"
        )
    return new


def _is_decaying(config: OptimSettings, step: int) -> bool:
    """Whether the rate has begun to fall towards the end by this step, or the run is over."""
    constant = replace(config, schedule="constant")
    return step >= config.steps or any(
        learning_rate(config, done) < learning_rate(constant, done)
        for done in range(max(config.ends, default=0), step)
    )
