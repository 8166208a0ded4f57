"""Damaged files of a run: whatever is wrong in them is one line that names the file."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from params import init_params
from runners import eval as evaluation
from runners import generate
from runners.data.encode.tokenizer import load_tokenizer
from runners.data.sources import digests
from runners.eval import open_evaluator
from runners.shell.cli import UsageError
from runners.shell.errors import UserError
from runners.training.checkpoints import load_weights, open_run
from runners.training.config import parse_config
from runners.training.metrics import read_metrics

ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    1e308,
    "",
    "x",
    "\x1b[31m",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    "none",
    2**31,
    "../..",
    "\x00",
)
CPU = torch.device("cpu")


def broken_bytes(data: bytes, rng: random.Random) -> bytes:
    """A file cut short, emptied, overwritten, with other bytes in it, or nested without end."""
    place = rng.randrange(len(data))
    other = bytes([rng.randrange(256)])
    return rng.choice(
        (
            b"",
            data[:place],
            data[:place] + other + data[place + 1 :],
            bytes(len(data)),
            data[:place] + b"\xff\xfe" + data[place:],
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"[]\n",
            b"null\n",
            b"NaN\n",
            b'{"step": 1e999}\n',
            b"\xef\xbb\xbf" + data,
            data + b"}",
            data * 2,
            data[place:],
            data.decode(errors="replace").encode("utf-16"),
        )
    )


def broken_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced, removed, renamed or repeated."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        keys = list(part) if isinstance(part, dict) else range(min(len(part), 20))
        for key in keys:
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(value)
    part, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[f"{key}_"] = part.pop(key)
    else:
        part[key] = rng.choice(ODD)
    return value


def broken(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return broken_bytes(data, rng)
    return json.dumps(broken_json(json.loads(data), rng)).encode()


def broken_lines(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        return broken_bytes(data, rng)
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(broken_json(json.loads(lines[place]), rng)).encode()
    return b"\n".join(lines) + b"\n"


def broken_header(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.3:
        return broken_bytes(data, rng)
    header = broken(header, rng)
    size = rng.choice((len(header), len(header), len(header), 2**63, 0, len(header) - 1))
    return struct.pack("<Q", max(size, 0)) + header + rest


def read_weights(folder: Path) -> None:
    load_weights(folder, init_params(open_run(folder).model, device="meta"), CPU)


def compare_data(folder: Path) -> None:
    digests.check(folder, [], allowed=True)


READERS: dict[str, tuple[Callable[[Path], object], Callable[[bytes, random.Random], bytes]]] = {
    "config.json": (open_run, broken),
    "metrics.jsonl": (read_metrics, broken_lines),
    "tokenizer.json": (lambda folder: open_evaluator(open_run(folder), CPU), broken),
    "model.safetensors": (read_weights, broken_header),
    "data.json": (compare_data, broken),
}


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def told(reader: Callable[[], object]) -> str | None:
    """What a reader says of a damaged file, or None where it reads it."""
    try:
        reader()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_file_is_named_in_one_line(name: str, copied: Path) -> None:
    path, (reader, damage), rng = copied / name, READERS[name], random.Random(0)
    whole = path.read_bytes()
    assert told(lambda: reader(copied)) is None
    said = []
    for _ in range(12 if name == "model.safetensors" else 40):
        path.write_bytes(damage(whole, rng))
        if (problem := told(lambda: reader(copied))) is not None:
            assert "\n" not in problem, problem
            assert len(problem) < 700, problem
            said.append(problem)
    assert len(said) >= 5
    named = [problem for problem in said if name in problem or "tokenizer" in problem.lower()]
    assert named == said


def main_lines() -> Iterator[tuple[str, Callable[[Path], int]]]:
    yield "eval", lambda folder: evaluation.main(["--run", str(folder), "--examples=2"])
    asked = ["--prompt", "What colour?", "--max_tokens=2"]
    yield "generate", lambda folder: generate.main(["--run", str(folder), *asked])


@pytest.mark.parametrize(("command", "main"), list(main_lines()))
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_commands_end_in_a_line(
    command: str,
    main: Callable[[Path], int],
    name: str,
    copied: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (copied / name).write_bytes(b'{"a":' * 5000)
    assert main(copied) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(copied / name) in err


def test_saved_flags_of_a_wrong_kind_are_named(copied: Path) -> None:
    path = copied / "config.json"
    record = json.loads(path.read_text())
    for name, value, said in (
        ("lr", "high", "lr must be a number, not 'high'"),
        ("steps", 2.0, "steps must be a whole number, not 2.0"),
        ("kinds", "colour", "kinds must be a list, not 'colour'"),
        ("kinds", [1], "kinds must be text, not 1"),
        ("preset", ["tiny"], "preset must be text, not"),
    ):
        path.write_text(json.dumps(record | {"train": record["train"] | {name: value}}))
        for read in (open_run, lambda folder: parse_config(["--resume", str(folder)])):
            with pytest.raises(UserError) as caught:
                read(copied)
            assert f"{path} is damaged: {said}" in str(caught.value)
            assert not isinstance(caught.value, UsageError)


def test_tokens_beyond_the_model_are_refused(copied: Path) -> None:
    path = copied / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"]["far"] = 10**6
    path.write_text(json.dumps(record))
    load_tokenizer(path)
    with pytest.raises(UserError, match=r"1000001 tokens but the model's vocabulary only"):
        open_evaluator(open_run(copied), CPU)
