"""Command lines: every spelling that is meant to parse, and one sentence for those that are not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from runners import eval as evaluation
from runners import generate, train
from runners.cli import UsageError, guarded, parse
from runners.config import (
    FREE_FIELDS,
    TrainConfig,
    as_dict,
    differing_fields,
    from_dict,
    model_config,
    parse_config,
)
from runners.errors import UserError


def test_nothing_gives_the_defaults() -> None:
    assert parse_config([]) == TrainConfig()


def test_the_flags_of_the_mission_parse() -> None:
    line = (
        "--sequence_len=4096 --use_gradient_checkpointing=1 --device_batch_size=8 "
        "--use_fused_loss=1 --use_flash_attn=1 --use_fused_kernels=1"
    )
    config = parse_config(line.split())
    expected = TrainConfig(sequence_len=4096, use_gradient_checkpointing=True, device_batch_size=8)
    assert config == expected
    assert parse_config(line.replace("_", "-").split()) == expected
    off = parse_config(line.replace("=1", "=0").split())
    names = ("gradient_checkpointing", "fused_loss", "flash_attn", "fused_kernels")
    assert [getattr(off, f"use_{name}") for name in names] == [False] * 4


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("--compile=1", True), ("--compile=true", True), ("--compile=Yes", True),
        ("--compile", True), ("--compile 1", True), ("--compile=0", False),
        ("--compile=no", False), ("--compile false", False), ("--no_compile", False),
        ("--no-compile", False), ("--compile=1 --compile=0", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["compile", "use_fused_loss", "wandb"])
def test_booleans_take_every_spelling(spelling: str, value: bool, name: str) -> None:
    argv = spelling.replace("compile", name).split()
    assert getattr(parse_config(argv), name) is value


def test_values_of_other_types() -> None:
    argv = "--lr 3e-4 --trainable projector text.blocks.-1 --kinds=colour,count --stop_at 7"
    config = parse_config(argv.split())
    assert config.lr == 3e-4
    assert config.trainable == ("projector", "text.blocks.-1")
    assert config.kinds == ("colour", "count")
    assert config.stop_at == 7
    assert config.workers is None


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
        ("--lr=-1", "--lr must be a positive number, not -1.0"),
        ("--lr=nan", "--lr must be a positive number, not nan"),
        ("--beta2=1", "--beta2 must lie in [0, 1), not 1.0"),
        ("--name=a/b", "--name is the name of a folder, not a path"),
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
        (generate.main, "--run x --prompt y --top_p 2", "--top_p lies in (0, 1]"),
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


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    missing = [f.name for f in dataclasses.fields(TrainConfig) if f"--{f.name}" not in shown]
    assert not missing


def test_every_field_has_help() -> None:
    source = Path(train.__file__).with_name("config.py").read_text()
    body = source[source.index("class TrainConfig") : source.index("def chat")]
    documented = re.findall(r'^    (\w+): .*\n    """', body, flags=re.MULTILINE)
    assert documented == [f.name for f in dataclasses.fields(TrainConfig)]


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


def test_guarded_gives_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> int:
        raise error

    assert guarded(lambda: None) == 0
    assert guarded(lambda: 130) == 130
    assert guarded(lambda: fail(UserError("the disk is full"))) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        guarded(lambda: 1 // 0)


def test_overrides_change_the_model() -> None:
    config = TrainConfig(override=("text.layers=6", "projector.kind=resampler", "text.softcap=30"))
    model = model_config(config)
    assert model.text.layers == 6
    assert model.projector is not None
    assert model.projector.kind == "resampler"
    assert model.text.softcap == 30
    assert model_config(TrainConfig(override=("vision=none",))).vision is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text.layer=6", "did you mean text.layers?"),
        ("text.layers", "names no field"),
        ("text.heads=3", "heads \\(3\\) must be a multiple of kv_heads"),
        ("projector.kind=magic", "'mlp' or 'resampler'"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        model_config(TrainConfig(override=(override,)))


def test_configs_survive_json() -> None:
    config = TrainConfig(trainable=("vision",), compile=False, lr=1e-4)
    assert from_dict(as_dict(config)) == config
    assert from_dict(as_dict(config) | {"of_the_future": 1}) == config


def test_what_counts_as_another_config() -> None:
    old = as_dict(TrainConfig())
    assert differing_fields(old, TrainConfig(log_every=3, name="other", stop_at=9)) == []
    assert differing_fields(old, TrainConfig(lr=1.0)) == ["--lr 0.0012 -> 1.0"]
    assert {f.name for f in dataclasses.fields(TrainConfig)} >= FREE_FIELDS
