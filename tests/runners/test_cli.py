"""Command lines: every spelling that is meant to parse, and one sentence for those that are not."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from core import PRESETS
from core.ranges import fields_of
from runners import bench, generate, train
from runners import eval as evaluation
from runners.shell.cli import ALIASES, UsageError, guarded, help_text, parse
from runners.shell.errors import UserError
from runners.training.config import (
    FREE_FIELDS,
    MOST_USED,
    TrainConfig,
    as_dict,
    differing_fields,
    flags_of,
    from_dict,
    model_config,
    parse_config,
)

EXTRA = ("--kinds", "colour", "--override=text.dropout=0.5")


def test_nothing_gives_the_defaults() -> None:
    assert parse_config([]) == TrainConfig()


def test_the_flags_of_the_mission_parse() -> None:
    line = (
        "--sequence_len=4096 --use_gradient_checkpointing=1 --device_batch_size=8 "
        "--use_fused_loss=1 --use_flash_attn=1 --use_fused_kernels=1"
    )
    config = parse_config(line.split())
    expected = TrainConfig.of(
        sequence_len=4096, use_gradient_checkpointing=True, device_batch_size=8
    )
    assert config == expected
    assert parse_config(line.replace("_", "-").split()) == expected
    off = parse_config(line.replace("=1", "=0").split())
    names = ("gradient_checkpointing", "fused_loss", "flash_attn", "fused_kernels")
    assert list(flags_of(off, (f"use_{name}" for name in names)).values()) == [False] * 4


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("--compile=1", True),
        ("--compile=true", True),
        ("--compile=Yes", True),
        ("--compile", True),
        ("--compile 1", True),
        ("--compile=0", False),
        ("--compile=no", False),
        ("--compile false", False),
        ("--no_compile", False),
        ("--no-compile", False),
    ],
)
@pytest.mark.parametrize("name", ["compile", "use_fused_loss", "wandb"])
def test_booleans_take_every_spelling(spelling: str, value: bool, name: str) -> None:
    argv = spelling.replace("compile", name).split()
    assert flags_of(parse_config(argv))[name] is value


def test_values_of_other_types() -> None:
    argv = "--lr 3e-4 --trainable projector text.blocks.-1 --kinds=colour,count --stop_at 7"
    config = parse_config(argv.split())
    assert config.optim.lr == 3e-4
    assert config.model.trainable == ("projector", "text.blocks.-1")
    assert config.data.kinds == ("colour", "count")
    assert config.run.stop_at == 7
    assert config.data.workers is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--sequence_length 4", "unknown flag --sequence_length; did you mean --sequence_len?"),
        ("--zzz", "unknown flag --zzz (see --help)"),
        ("--preset tny", "no preset 'tny'; did you mean tiny?"),
        ("--steps abc", "--steps takes a whole number, not 'abc'"),
        ("--steps 1.5", "--steps takes a whole number, not '1.5'"),
        ("--lr high", "--lr takes a number, not 'high'"),
        ("--steps", "--steps needs a value"),
        ("--stage align2", "--stage takes one of pretrain, align, sft, not 'align2'"),
        ("--use_flash_attn=maybe", "--use_flash_attn is 1 or 0"),
        ("tiny", "unexpected argument 'tiny'"),
        ("--steps 3 4", "unexpected argument '4'"),
        ("--steps=0", "--steps must be 1 or more, not 0"),
        ("--lr=-1", "--lr must be more than 0, not -1.0"),
        ("--lr=nan", "--lr must be a finite number, not nan"),
        ("--beta2=1", "--beta2 must be less than 1, not 1.0"),
        ("--name=a/b", "--name must be the name of a folder, not a path"),
        ("--name=..", "--name must be the name of a folder, not a path"),
        ("--name=.", "--name must be the name of a folder, not a path"),
        ("--name=/tmp/x", "--name must be the name of a folder, not a path"),
        (f"--name={'a' * 300}", "--name must be at most 200 bytes without control characters"),
        ("--name=a\x1b[31m", r"without control characters: 'a\x1b[31m'"),
        ("--data a --data b", "--data is given twice"),
        ("--turns single", "--turns=single is for files"),
        ("--val_data a.json", "--val_data is for files"),
        ("--data a.json --val_data b.json --val_fraction=0.2", "instead of a --val_fraction"),
        ("--compile --no_compile", "--compile is given twice"),
        ("--learning_rate 1", "unknown flag --learning_rate; did you mean --lr?"),
        ("--batch-size 1", "did you mean --device_batch_size?"),
        ("--epochs 1", "did you mean --steps?"),
        ("--zz\x1b[31m", r"unknown flag --zz\x1b[31m"),
        (f"--seed={10**30}", "--seed must be at most 9223372036854775807"),
        ("--override vision.layers=x", "vision.layers must be a whole number, not 'x'"),
        ("--data=", "--data, --val_data or --runs_dir is empty"),
        ("--runs_dir=", "--runs_dir is empty"),
        ("--override text.layers=0", "text.layers must be 1 or more, not 0"),
    ],
)
def test_a_bad_command_line_is_one_sentence_and_code_2(
    argv: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train.main(argv.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert said in err


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (evaluation.main, "", "--run is needed"),
        (evaluation.main, "--rum x", "did you mean --run?"),
        (generate.main, "--run x", "--prompt is needed"),
        (generate.main, "--run x --prompt y --top_p 2", "--top_p must be at most 1, not 2.0"),
        (
            generate.main,
            "--run x --prompt y --max_tokens many",
            "--max_tokens takes a whole number",
        ),
    ],
)
def test_the_other_commands_too(
    main: object, argv: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert callable(main)
    assert main(argv.split()) == 2
    assert said in capfd.readouterr().err


def test_help_names_every_field_once_the_most_used_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    flags = re.findall(r"^  --(\w+) ", shown, flags=re.MULTILINE)
    assert sorted(flags) == sorted(fields_of(TrainConfig))
    assert tuple(flags[:10]) == MOST_USED
    titles = (
        "most used",
        "The model",
        "The data",
        "The optimizer and the loss",
        "Memory and speed",
    )
    assert all(f"\n{title}:\n" in shown for title in titles)
    assert "other flags" not in shown
    assert "from 0" not in shown
    assert re.search(r"--steps INT\n +Optimizer steps.*default: 3600", shown, flags=re.DOTALL)


def test_help_names_every_preset_by_size() -> None:
    sizes = [preset.num_params() for preset in PRESETS.values()]
    assert sizes == sorted(sizes)
    text = " ".join(help_text(TrainConfig, "train", None, MOST_USED).split())
    *most, last = PRESETS
    assert f"by size: {', '.join(most)} or {last}." in text


def test_lists_grow_where_a_flag_is_given_again() -> None:
    config = parse_config(["--override", "text.layers=6", "--kinds=count,shape", *EXTRA])
    assert config.model.override == ("text.layers=6", "text.dropout=0.5")
    assert config.data.kinds == ("count", "shape", "colour")
    assert parse_config(["--no_decay", "--lr_scale="]).optim.no_decay == ()


def test_none_is_a_value_where_a_field_may_be() -> None:
    assert parse_config(["--stop_at", "none", "--tokenizer=None"]) == TrainConfig()
    with pytest.raises(UsageError, match="--steps takes a whole number, not 'none'"):
        parse_config(["--steps=none"])


def test_hints_name_flags_that_there_are() -> None:
    fields = {
        name
        for cls in (TrainConfig, evaluation.EvalConfig, generate.GenerateConfig)
        for name in fields_of(cls)
    }
    assert set(ALIASES) <= fields
    assert not {"lr", "steps", "seed"} & set(" ".join(ALIASES.values()).split())


NUMBERS = [name for name, field in fields_of(TrainConfig).items() if field.kind in (int, float)]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range(name: str) -> None:
    for word in ("nan", "inf", "-inf", "-1", "1e999", "-0.5", str(-(10**30)), "1" * 5000, "", "x"):
        with pytest.raises(UsageError, match=f"^--{name} ") as caught:
            parse_config([f"--{name}={word}"])
        assert len(str(caught.value)) < 200
    if fields_of(TrainConfig)[name].kind is int:
        with pytest.raises(UsageError, match=f"--{name} must be at most"):
            parse_config([f"--{name}={10**25}"])


def test_every_field_has_help() -> None:
    source = (Path(train.__file__).with_name("training") / "settings.py").read_text()
    documented = re.findall(r'^    (\w+): .*\n    """', source, flags=re.MULTILINE)
    assert documented == list(fields_of(TrainConfig))


@dataclasses.dataclass(frozen=True)
class Needy:
    """Needs something."""

    run: str
    """A run."""
    count: int = 1
    """A count."""


def test_required_fields_do_not_hide_the_culprit() -> None:
    assert parse(Needy, ["--run", "x"]) == Needy("x")
    with pytest.raises(UsageError, match="--count takes a whole number, not 'y'"):
        parse(Needy, ["--run", "x", "--count", "y"])


def test_several_processes_of_a_launcher_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main in (train.main, evaluation.main, generate.main, bench.main):
        assert main([]) == 1
        assert "a launcher started 2 processes of this program" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert guarded(lambda: None) == 0


def test_guarded_gives_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        raise error

    assert guarded(lambda: None) == 0
    assert guarded(lambda: 130) == 130
    assert guarded(lambda: fail(UserError("the disk is full"))) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert guarded(lambda: fail(UserError("no \x1b[2J\u202e\ud800\x9b"))) == 1
    assert capsys.readouterr().err == "error: no \\x1b[2J\\u202e\\ud800\\x9b\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        guarded(lambda: 1 // 0)


def test_a_reader_may_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``| head``: no traceback, and what is left in the buffer goes nowhere."""
    with (tmp_path / "out").open("w") as out:

        def write() -> None:
            raise BrokenPipeError

        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            assert guarded(write) == 1
        out.write("left")
    assert (tmp_path / "out").read_text() == ""


def test_overrides_change_the_model() -> None:
    config = TrainConfig.of(
        override=("text.layers=6", "projector.kind=resampler", "text.softcap=30")
    )
    model = model_config(config.model)
    assert model.text.layers == 6
    assert model.projector is not None
    assert model.projector.kind == "resampler"
    assert model.text.softcap == 30
    assert model_config(TrainConfig.of(override=("vision=none",)).model).vision is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text.layer=6", "did you mean text.layers?"),
        ("text.layers", "names no field"),
        ("text.heads=3", "heads \\(3\\) must be a multiple of kv_heads"),
        ("projector.kind=magic", "projector.kind must be one of mlp, resampler"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        model_config(TrainConfig.of(override=(override,)).model)


def test_configs_survive_json() -> None:
    config = TrainConfig.of(trainable=("vision",), compile=False, lr=1e-4)
    assert from_dict(as_dict(config)) == config
    assert from_dict(as_dict(config) | {"of_the_future": 1}) == config
    flat = {n: list(v) if isinstance(v, tuple) else v for n, v in flags_of(config).items()}
    assert from_dict(flat) == config  # of versions that had no parts


FILES = {
    "flat.toml": 'data = "x.json"\nlr = 1\ntrainable = ["vision"]\nuse_fp8 = true',
    "parts.toml": (
        '[data]\ndata = "x.json"\n[optim]\nlr = 1\n[model]\ntrainable = ["vision"]\n'
        "[speed]\nuse_fp8 = true"
    ),
    "flat.json": '{"data": "x.json", "lr": 1, "trainable": ["vision"], "use_fp8": true}',
    "parts.json": (
        '{"data": {"data": "x.json"}, "optim": {"lr": 1}, "model": {"trainable": ["vision"]}, '
        '"speed": {"use_fp8": true}}'
    ),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("gpu", [False, True])
def test_a_file_says_flags_that_a_command_line_overrides(
    tmp_path: Path, name: str, gpu: bool
) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    told = {"data": "x.json", "lr": 1, "trainable": ("vision",), "use_fp8": True}
    config = parse_config(["--config", str(path)], gpu=gpu)
    assert config == parse_config([], gpu=gpu).changed(**told, config=str(path))
    again = parse_config(["--config", str(path), "--lr=2", "--trainable=text"], gpu=gpu)
    assert again == config.changed(lr=2.0, trainable=("text",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr =", "Invalid value"),
        ('lr = "high"', "lr must be a number, not 'high'"),
        ("steps = 1.5", "steps must be a whole number, not 1.5"),
        ("learning = 1", "unknown flag 'learning'"),
        ("[optim]\nlt = 1", "unknown flag 'lt'; did you mean --lr?"),
        ("[speed]\nlr = 1", "'lr' belongs to optim, not to speed"),
        ("[optimizer]\nlr = 1", "optimizer must be one of"),
        ("learning_rate = 1", "did you mean --lr?"),
        ('resume = "x"', "--resume is for a command line"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        parse_config(["--config", str(path)])
    assert str(caught.value).startswith(f"--config {path}: ")
    assert said in str(caught.value)
    with pytest.raises(UsageError, match="there is no such file"):
        parse_config(["--config", str(tmp_path / "none.toml")])


def test_what_counts_as_another_config() -> None:
    old = TrainConfig()
    assert differing_fields(old, TrainConfig.of(log_every=3, name="other", stop_at=9)) == []
    assert differing_fields(old, TrainConfig.of(lr=1.0)) == ["--lr 0.0012 -> 1.0"]
    assert {*fields_of(TrainConfig)} >= FREE_FIELDS
