"""Runs that go on under the flags that they have, runs that are extended, runs that run again."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from params import flatten, load_params
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.train import train, within
from runners.training import provenance
from runners.training.config import TrainConfig, parse_config, read_config
from runners.training.metrics import Display, read_metrics, run_id
from runners.training.optim import learning_rate
from runners.training.resume import continued

Micro = Callable[..., TrainConfig]
Quiet = Callable[[], Display]


def run(config: TrainConfig, display: Display) -> Path:
    folder = train(config, display)
    assert folder is not None
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return flatten(load_params(folder / "model.safetensors"))


def equal(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[path], two[path]) for path in one)


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_run_goes_on_is_extended_and_runs_again_to_the_same_bits(
    micro: Micro, quiet: Quiet, schedule: str
) -> None:
    assert train(micro(schedule=schedule, decay_fraction=0.5, stop_at=2), quiet()) is None
    folder = Path(micro().run.runs_dir) / "micro"
    begun = json.loads((folder / "config.json").read_text())
    go_on = ["--resume", str(folder)]
    assert parse_config(go_on).run.stop_at is None
    run(parse_config(go_on), quiet())
    assert parse_config([*go_on, "--steps=9"], gpu=True) == micro(
        schedule=schedule, decay_fraction=0.5, steps=9, resume=str(folder), name=None
    )
    run(parse_config([*go_on, "--steps", "9", "--log_every=3"]), quiet())
    rows: list[dict[str, Any]] = [dict(row) for row in read_metrics(folder)]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6, 9]
    for name in ("tokens", "seconds"):
        series = [row[name] for row in rows]
        assert series == sorted(series), name
        assert len({row[name] for row in trained}) == len(trained)
    assert 6 * 50 < trained[-2]["tokens"] < trained[-1]["tokens"] <= 9 * 2 * 96
    record = json.loads((folder / "config.json").read_text())
    assert record["id"] == begun["id"] == run_id(folder)
    assert [start["after"] for start in record["starts"]] == [0, 2, 6]
    assert (record["train"]["optim"]["steps"], record["train"]["optim"]["ends"]) == (9, [6])

    source = str(folder / "config.json")
    again = parse_config(["--config", source, "--name=again"])
    assert again == read_config(Path(source)).changed(resume=None, config=source, name="again")
    assert equal(folder, run(again, quiet()))
    assert run_id(Path(again.run.runs_dir) / "again") != record["id"]


def test_the_rates_of_an_extended_run_rise_again() -> None:
    config = TrainConfig.of(
        schedule="wsd", steps=30, ends=(10,), warmup_steps=2, decay_fraction=0.3, lr=1.0
    )
    rates = [learning_rate(config.optim, step) for step in range(30)]
    before = config.changed(steps=10, ends=())
    assert rates[:10] == [learning_rate(before.optim, step) for step in range(10)]
    assert rates[7] < 1
    assert rates[9] < rates[8] < rates[7]
    assert rates[10:24] == [1.0] * 14
    assert all(a > b for a, b in itertools.pairwise(rates[23:]))


@pytest.mark.parametrize(
    ("schedule", "step", "steps", "ends"),
    [
        ("constant", 4, 20, ()),  # stopped before its end: as if it had been longer from the start
        ("constant", 10, 20, (10,)),
        ("wsd", 5, 20, ()),
        ("wsd", 9, 20, (10,)),  # its rate falls already
        ("wsd", 10, 20, (10,)),
        ("wsd", 4, 6, ()),
        ("cosine", 1, 20, ()),  # in its warm-up
        ("cosine", 5, 10, ()),
    ],
)
def test_what_can_be_extended(schedule: Any, step: int, steps: int, ends: tuple[int, ...]) -> None:
    old = TrainConfig.of(schedule=schedule, steps=10, warmup_steps=2, decay_fraction=0.3)
    found = continued(old, old.changed(steps=steps, log_every=3), step, Path("state"))
    assert found == old.changed(steps=steps, ends=ends, log_every=3)
    same = [learning_rate(old.optim, s) == learning_rate(found.optim, s) for s in range(step)]
    assert all(same)


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ({"steps": 20}, 5, "--steps 10 -> 20.*only constant and wsd can be extended"),
        ({"steps": 4}, 5, "--steps 4 is less than the 5"),
        ({"schedule": "wsd"}, 5, "--schedule cosine -> wsd"),
        ({"lr": 1.0, "seed": 3}, 5, "--seed 0 -> 3, --lr 0.0012 -> 1.0.*--init_from"),
        ({"ends": (3,), "schedule": "wsd"}, 5, "--schedule"),
    ],
)
def test_what_cannot_be_changed_is_named(changes: dict[str, Any], step: int, said: str) -> None:
    old = TrainConfig.of(steps=10, warmup_steps=2)
    with pytest.raises(UserError, match=said):
        continued(old, old.changed(**changes), step, Path("state"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--resume nowhere", "--resume nowhere: nowhere holds no run"),
        ("--config nowhere", "--config nowhere: nowhere holds no run"),
        ("--resume FOLDER --name=b", "--name does nothing beside --resume"),
        ("--resume FOLDER --init_from=b", "--init_from does nothing beside --resume"),
        ("--resume FOLDER --config=FOLDER", "--config does nothing beside --resume"),
        ("--resume FOLDER --lr=nan", "--lr must be a finite number"),
        ("--ends 3 2", "--ends must rise and lie below --steps"),
        ("--ends 4000", "--ends must rise and lie below --steps"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, said: str, trained: Path) -> None:
    with pytest.raises(UsageError, match=said):
        parse_config([word.replace("FOLDER", str(trained)) for word in flags.split()])


def test_a_run_stops_when_its_time_is_over(micro: Micro, quiet: Quiet) -> None:
    assert not within(None, 0.0, lambda: False)()
    assert not within(1e9, 0.0, lambda: False)()
    assert within(1e9, 0.0, lambda: True)()
    assert train(micro(max_minutes=1e-9), quiet()) is None
    folder = Path(micro().run.runs_dir) / "micro"
    assert [row["step"] for row in read_metrics(folder)] == [1]
    assert (
        len([row for row in read_metrics(run(micro(resume="auto"), quiet())) if "loss" in row]) == 6
    )


def test_a_run_says_what_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = provenance.origin("python -m x 'a b'", 3, torch.device("cpu"))
    assert json.loads(json.dumps(record)) == record
    assert (record["after"], record["command"]) == (3, "python -m x 'a b'")
    assert shlex.split(record["command"])[-1] == "a b"
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "cuda", "driver", "numpy"} <= record["versions"].keys()
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert provenance.revision(tmp_path) == ("unknown", None)  # not a checkout
    (tmp_path / ".git").mkdir()
    assert provenance.revision(tmp_path / ".") == ("unknown", None)

    said = {"rev-parse": "abc\n", "status": ""}
    monkeypatch.setattr(provenance, "_git", lambda root, *args: said[args[0]])
    ask = provenance.revision.__wrapped__
    assert ask(tmp_path) == ("abc", False)
    said["status"] = " M core/model/vlm.py\n"
    assert ask(tmp_path) == ("abc", True)
