"""Whole runs of a micro model: determinism, resuming, interruption, stages, what is on disk."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from params import flatten, init_params, load_metadata, load_params
from runners import train as train_module
from runners.data.types import Conversation
from runners.eval import Evaluator
from runners.shell.errors import UserError
from runners.train import train
from runners.training.checkpoints import open_run
from runners.training.config import TrainConfig
from runners.training.figures import Sample, draw_samples
from runners.training.loop import DelayedReader, Read, Step
from runners.training.metrics import Display, read_metrics
from runners.training.states import find_states, newest_state

Micro = Callable[..., TrainConfig]
Quiet = Callable[[], Display]


def run(config: TrainConfig, display: Display) -> Path:
    folder = train(config, display)
    assert folder is not None
    return folder


def losses(folder: Path) -> list[Any]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return flatten(load_params(folder / "model.safetensors"))


def test_the_same_seed_gives_the_same_losses_bit_for_bit(micro: Micro, quiet: Quiet) -> None:
    a = run(micro(name="a"), quiet())
    b = run(micro(name="b", workers=1), quiet())
    c = run(micro(name="c", seed=1), quiet())
    assert len(losses(a)) == 6
    assert losses(a) == losses(b)
    assert losses(a)[-1] < losses(a)[0]
    assert losses(a) != losses(c)
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[path], two[path]) for path in one)


@pytest.mark.parametrize("extra", [{}, {"grad_accum_steps": 2, "override_dropout": 0.2}])
def test_resuming_equals_never_having_stopped(
    micro: Micro, quiet: Quiet, extra: dict[str, Any]
) -> None:
    dropout = extra.pop("override_dropout", 0.0)
    override = (*micro().model.override, f"text.dropout={dropout}")
    whole = run(micro(name="whole", override=override, **extra), quiet())
    for stop in (2, 5):
        assert (
            train(micro(override=override, stop_at=stop, resume="auto", **extra), quiet()) is None
        )
    folder = run(micro(override=override, resume="auto", **extra), quiet())
    assert losses(folder) == losses(whole)
    one, two = weights(whole), weights(folder)
    assert all(torch.equal(one[path], two[path]) for path in one)
    # By now it is complete: resuming trains no further, and says the same.
    assert losses(run(micro(override=override, resume=str(folder), **extra), quiet())) == losses(
        whole
    )


def test_rows_after_the_state_are_written_once(micro: Micro, quiet: Quiet) -> None:
    assert train(micro(stop_at=3), quiet()) is None
    folder = Path(micro().run.runs_dir) / "micro"
    with (folder / "metrics.jsonl").open("a") as file:  # as left by a crash after the state
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    run(micro(resume="auto"), quiet())
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert 9.0 not in losses(folder)


def test_ctrl_c_saves_a_state_and_exits_cleanly(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(self: Display, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Display, "advance", press)
        assert train(micro(), quiet()) is None
    assert signal.getsignal(signal.SIGINT) is before
    state = newest_state(Path(micro().run.runs_dir) / "micro")
    assert state is not None
    assert json.loads((state / "state.json").read_text())["step"] == 2
    assert losses(run(micro(resume="auto"), quiet())) == losses(run(micro(name="b"), quiet()))


def test_the_line_of_an_interrupted_step_is_of_that_step(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is read right after the one before, when the run is settled."""

    class Behind(DelayedReader):
        def push(self, step: Step, values: torch.Tensor) -> Iterator[Read]:
            self._waiting.append((step, values, self._now()))
            yield from self.flush(keep=1)

    monkeypatch.setattr("runners.training.loop.DelayedReader", Behind)
    before = time.perf_counter()
    assert train(micro(stop_at=4), quiet()) is None
    spent = time.perf_counter() - before
    rows = read_metrics(Path(micro().run.runs_dir) / "micro")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    steps: list[Any] = [row["s_per_step"] for row in rows]
    assert 0 < sum(steps) < spent
    assert steps[3] > steps[2] / 20  # the time between two reads is a ten-thousandth of a step


def test_an_interrupted_command_says_how_to_go_on(
    micro: Micro, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = str(Path(micro().run.runs_dir) / "it's mine")
    monkeypatch.setattr(
        train_module, "parse_config", lambda argv, gpu: micro(stop_at=1, runs_dir=runs)
    )
    assert train_module.main([]) == 130
    said = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert said[-4:] == ["-m", "runners.train", "--resume", str(Path(runs) / "micro")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e30}, r"the loss of batch 3 is not finite \(step 2\)"),
        ({"lr": 1e38}, r"after its last update, is not finite \(step 1\)"),
    ],
)
def test_a_state_that_leads_nowhere_is_not_kept(
    micro: Micro, quiet: Quiet, changes: dict[str, Any], said: str
) -> None:
    """And what the message says to do works."""
    config = micro(warmup_steps=0, save_every=1, grad_accum_steps=2, **changes)
    with pytest.raises(UserError, match=said) as caught:
        train(config, quiet())
    assert "no state was kept: start again with a lower --lr" in str(caught.value)
    assert str(caught.value).endswith("and --resume=auto")
    folder = Path(config.run.runs_dir) / "micro"
    assert find_states(folder) == []
    assert not (folder / "model.safetensors").exists()
    assert len(losses(run(micro(steps=2, resume="auto"), quiet()))) == 2


def test_the_last_usable_state_is_kept_and_named(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([1e-3, 1e-3, 1e30, 1e30, 1e30])
    monkeypatch.setattr("runners.training.step.learning_rate", lambda config, step: next(rates))
    config = micro(save_every=1, runs_dir=str(Path(micro().run.runs_dir) / "of mine"))
    with pytest.raises(UserError, match=r"loss of batch 4 is not finite \(step 4\)") as caught:
        train(config, quiet())
    monkeypatch.undo()
    folder = Path(config.run.runs_dir) / "micro"
    state = folder / "state" / "00000002"
    assert find_states(folder) == [state]
    assert newest_state(folder) == state
    assert "the state of step 2 is kept" in str(caught.value)
    flag = next(word for word in shlex.split(str(caught.value)) if word.startswith("--init_from="))
    second = run(micro(name="second", steps=2, init_from=flag.partition("=")[2]), quiet())
    assert losses(second)[0] < losses(run(micro(name="fresh", steps=2), quiet()))[0]
    assert (second / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_a_state_without_room_ends_the_run_in_a_line(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = iter([True, True, False])

    def check(target: Path, needed: int) -> None:
        if not next(room):
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr("params.io.check_room", check)
    with pytest.raises(UserError, match="No space left on device; the state of step 2") as caught:
        train(micro(save_every=1), quiet())
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    flag = shlex.split(str(caught.value))[-1]
    folder = Path(micro().run.runs_dir) / "micro"
    assert flag == f"--resume={folder}"
    assert {path.name for path in (folder / "state").iterdir()} == {"00000001", "00000002"}
    resumed = run(micro(name=None, resume=str(folder)), quiet())
    assert losses(resumed) == losses(run(micro(name="whole"), quiet()))


def test_the_newest_states_are_kept(micro: Micro, quiet: Quiet) -> None:
    folder = run(micro(save_every=2, keep_states=3), quiet())
    assert [int(path.name) for path in find_states(folder)] == [2, 4, 6]
    folder = run(micro(name="one", save_every=1, keep_states=1), quiet())
    # the last one is unproven: no step has been made from it
    assert [int(path.name) for path in find_states(folder)] == [5, 6]


def test_a_damaged_state_costs_the_steps_since_the_one_before(
    micro: Micro, quiet: Quiet, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(micro(name="whole"), quiet())
    assert train(micro(save_every=2, stop_at=4), quiet()) is None
    folder = Path(micro().run.runs_dir) / "micro"
    newest = folder / "state" / "00000004"
    tensors = newest / "state.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-7] ^= 4
    tensors.write_bytes(content)
    assert train(micro(resume="auto", stop_at=5), quiet()) is None
    assert f"{tensors} is damaged" in caplog.text
    assert [int(path.name) for path in find_states(folder)] == [2, 5]
    assert losses(run(micro(resume="auto"), quiet())) == losses(whole)


def test_the_first_state_comes_early(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few seconds after the first step, and before any weights are kept."""
    stepped: list[list[Path]] = []
    folder = Path(micro().run.runs_dir) / "micro"
    monkeypatch.setattr(Display, "advance", lambda self, step: stepped.append(find_states(folder)))
    run(micro(steps=3), quiet())
    assert [[p.name for p in found] for found in stepped] == [[], [], ["00000002"]]
    monkeypatch.setattr("runners.training.loop.FIRST", -1e9)
    stepped.clear()
    folder = Path(micro().run.runs_dir) / "early"
    run(micro(name="early", steps=3), quiet())
    assert [[p.name for p in found] for found in stepped] == [["00000000"]] * 3


def test_the_best_weights_are_kept_not_the_last(
    micro: Micro, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = iter([5.0, 2.0, 3.0, 2.5])
    monkeypatch.setattr("runners.training.loop.mean_loss", lambda *args: next(curve))
    folder = run(micro(steps=4, val_every=1), quiet())
    assert [r["val_loss"] for r in read_metrics(folder) if "val_loss" in r] == [5.0, 2.0, 3.0, 2.5]
    assert load_metadata(folder / "model.safetensors")["step"] == "2"
    state = newest_state(folder)
    assert state is not None
    last = load_params(state / "state.safetensors")["params"]
    assert not torch.equal(weights(folder)["text.norm.weight"], last["text"]["norm"]["weight"])
    assert json.loads((state / "state.json").read_text())["best"] == 2.0


@pytest.mark.parametrize(
    ("changes", "moving"),
    [
        ({"stage": "align"}, "projector."),
        ({"trainable": ("text.blocks.-1.mlp",)}, "text.blocks.1.mlp."),
    ],
)
def test_only_what_is_meant_to_learn_moves(
    micro: Micro, quiet: Quiet, changes: dict[str, Any], moving: str
) -> None:
    folder = run(micro(steps=2, lr=0.01, **changes), quiet())
    start, end = flatten(init_params(open_run(folder).model, seed=0)), weights(folder)
    moved = {path for path in start if not torch.equal(start[path], end[path])}
    assert moved
    assert all(path.startswith(moving) for path in moved)


def test_text_leaves_the_eye_alone_and_is_measured_in_perplexity(
    micro: Micro, quiet: Quiet, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"The {i}th line says that {i} follows {i - 1}." for i in range(200))
    )
    config = micro(
        data=str(text),
        documents="paragraph",
        stage="pretrain",
        weight_decay=0.5,
        steps=20,
        lr=0.01,
        eval_examples=20,
    )
    folder = run(config, quiet())
    end = weights(folder)
    assert torch.equal(end["vision.norm.weight"], torch.ones(32))
    assert losses(folder)[-1] < losses(folder)[0] - 0.5
    (report,) = json.loads((folder / "eval.json").read_text())
    assert 0 < report["loss"] < losses(folder)[0]


def test_a_run_starts_from_the_weights_of_another(micro: Micro, quiet: Quiet) -> None:
    first = run(micro(name="first", steps=8, lr=0.01), quiet())
    second = run(micro(name="second", init_from=str(first), lr=1e-30), quiet())
    fresh = run(micro(name="fresh", lr=1e-30), quiet())
    assert losses(second)[0] < losses(fresh)[0] - 0.3
    assert (second / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    moved = weights(second)
    assert all(torch.equal(leaf, moved[path]) for path, leaf in weights(first).items())


@pytest.mark.parametrize("ask", ["trained", "alone"])
def test_a_finished_run_has_all_its_files(
    micro: Micro, quiet: Quiet, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Sample] = []
    monkeypatch.setattr(train_module, "draw_samples", lambda path, samples: drawn.extend(samples))
    config = micro(
        steps=2,
        eval_examples=6,
        samples=3,
        tensorboard=True,
        val_every=1,
        questions=3,
        max_objects=4,
        sequence_len=128,
        ask=ask,
    )
    shown: list[int] = []
    kept = train_module.answer

    def listen(evaluator: Evaluator, conversation: Conversation, **options: Any) -> Any:
        shown.append(len(conversation.turns))
        return kept(evaluator, conversation, **options)

    monkeypatch.setattr(train_module, "answer", listen)
    folder = run(config, quiet())
    assert max(shown) == (1 if ask == "alone" else 5)
    assert all(len(sample.images) == 1 and sample.question for sample in drawn)
    draw_samples(folder / "samples.png", drawn)
    names = {path.name for path in folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert events
    assert names - events == {
        "config.json",
        "data.json",
        "tokenizer.json",
        "model.safetensors",
        "metrics.jsonl",
        "eval.json",
        "loss.png",
        "samples.png",
        "state",
    }
    found = open_run(folder)
    assert found.config == config
    assert found.model.text.dim == 32
    row = read_metrics(folder)[0]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu"} <= row.keys()
    splits = {report["split"]: report for report in json.loads((folder / "eval.json").read_text())}
    assert splits.keys() == {"val", "unseen"}
    assert splits["val"]["score"].keys() == {"questions", "exact", "blind", "majority"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "absent.json"}, "absent.json"),
        ({"data": "absent/*.txt"}, "neither 'shapes' nor a file"),
        ({"override": ("vision=none",)}, "has no vision part"),
        ({"trainable": ("nothing",)}, "--trainable: pattern 'nothing' matches nothing"),
        ({"resume": "nowhere"}, "no resumable state"),
        ({"init_from": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"tokenizer": "nowhere.json"}, "nowhere.json"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"device": "cuda"}, "sees no GPU"),
        ({"wandb": True}, "pip install wandb"),
        ({"kinds": ("smell",)}, "smell"),
    ],
)
def test_bad_input_leaves_no_run_behind(
    micro: Micro, quiet: Quiet, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        train(micro(**changes), quiet())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path(micro().run.runs_dir).exists()
