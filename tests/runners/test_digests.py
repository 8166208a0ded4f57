"""Data that changes under a run is noticed and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runners import eval as evaluation
from runners.data.sources import digests
from runners.data.sources.open import open_sources
from runners.shell.errors import UserError
from runners.train import train
from runners.training.config import TrainConfig, model_config
from runners.training.metrics import Display
from runners.training.setup import prepare

Micro = Callable[..., TrainConfig]
Quiet = Callable[[], Display]


def write_records(path: Path, answer: str, pictures: bool = False) -> Path:
    records = []
    for i in range(24):
        turns = [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"{answer}{i:02}"}]
        records.append({"id": str(i), "conversations": turns})
        if pictures:
            records[-1]["image"] = f"{path.stem}{i}.png"
            turns[0]["value"] = "<image>" + turns[0]["value"]
            picture = np.full((16, 16, 3), i, np.uint8)
            Image.fromarray(picture).save(path.parent / f"{path.stem}{i}.png")
    path.write_text(json.dumps(records))
    return path


def test_a_run_does_not_go_on_with_other_data(
    micro: Micro,
    quiet: Quiet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = write_records(tmp_path / "train.json", "a")
    config = micro(data=str(data), override=("vision=none", *micro().model.override[:5]))
    assert train(config.changed(stop_at=3), quiet()) is None
    size = data.stat().st_size
    write_records(data, "b")
    assert data.stat().st_size == size
    folder = Path(config.run.runs_dir) / "micro"
    before = (folder / "data.json").read_text()
    with pytest.raises(UserError, match=r"train\.json \(--data\) holds other data") as caught:
        train(config.changed(resume="auto"), quiet())
    assert "--data_changed=1" in str(caught.value)
    assert "--init_from" in str(caught.value)
    assert (folder / "data.json").read_text() == before
    write_records(data, "a")  # put back
    assert train(config.changed(resume="auto", stop_at=4), quiet()) is None
    write_records(data, "b")
    assert train(config.changed(resume="auto", stop_at=5, data_changed=True), quiet()) is None
    assert train(config.changed(resume="auto"), quiet()) == folder  # that permission was for good
    assert evaluation.main(["--run", str(folder), "--examples=2"]) == 0
    write_records(data, "c")
    assert evaluation.main(["--run", str(folder), "--examples=2"]) == 1
    assert "train.json (--data) holds other data" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds other data"):  # not for data to come
        train(config.changed(resume="auto"), quiet())
    caplog.clear()
    anew = prepare(config.changed(name="anew", config=str(folder)))  # a run of its own: a warning
    assert "holds other data" in caplog.text
    assert len(anew.data.sources.train) == 23


def test_changed_data_is_read_from_its_start(micro: Micro, quiet: Quiet, tmp_path: Path) -> None:
    """What is trained after a change does not depend on what was read before it."""
    data = tmp_path / "train.json"
    override = ("vision=none", *micro().model.override[:5])
    found = []
    for name, first in (("one", "a"), ("two", "c")):
        config = micro(name=name, data=str(data), override=override, vocab_size=261, lr=1e-30)
        write_records(data, first)
        assert train(config.changed(stop_at=3 if name == "one" else 1), quiet()) is None
        write_records(data, "b")
        folder = train(config.changed(resume="auto", data_changed=True), quiet())
        assert folder is not None
        rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        found.append([row["loss"] for row in rows if "loss" in row])
    assert found[0][3:] == found[1][1:4]


def change_a_picture(folder: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(folder / "train7.png")


def remove_a_picture(folder: Path) -> None:
    records = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(records[:-1]))


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return rewrite


@pytest.mark.parametrize(
    ("names", "edit", "said"),
    [
        (("train.json",), lambda folder: None, ""),
        (("train.json",), change("train.json", "a03", "b03"), "train.json (--data) holds other"),
        (
            ("train.json",),
            change_a_picture,
            "train.json (--data, pictures) are others (24 pictures, now 24, the first train7.png)",
        ),
        (("train.json",), remove_a_picture, "are others (24 pictures, now 23"),
        (
            ("train.json", "val.json"),
            change("val.json", "v01", "v99"),
            "val.json (--val_data) holds other data",
        ),
        (("words.txt",), change("words.txt", "three", "3"), "words.txt (--data) holds other data"),
        (("shapes",), lambda folder: None, ""),
        (
            ("shapes",),
            change("run/tokenizer.json", "x", "y"),
            "tokenizer.json (--tokenizer) holds other data",
        ),
        (("train.json",), change("run/data.json", '"split": 1', '"split": 0'), "by another rule"),
        (("train.json",), lambda f: (f / "run/data.json").unlink(), "no data.json, so it is of a"),
        (("shapes",), lambda f: (f / "run/data.json").unlink(), ""),
        (("train.json",), lambda f: (f / "run/data.json").write_text("[]"), "data.json is damaged"),
        (("shapes",), lambda f: (f / "run/data.json").write_text("{"), "data.json is damaged"),
    ],
)
def test_what_changed_is_named(
    micro: Micro,
    tmp_path: Path,
    names: tuple[str, ...],
    edit: Callable[[Path], None],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_records(tmp_path / "train.json", "a", pictures=True)
    write_records(tmp_path / "val.json", "v", pictures=True)
    (tmp_path / "words.txt").write_text("one\n\ntwo\n\nthree\n\nfour")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tokenizer.json").write_text('{"x": 1}')
    data, *val = (name if name == "shapes" else str(tmp_path / name) for name in names)
    config = micro(data=data, val_data=tuple(val), documents="paragraph", val_fraction=0.05)
    model = model_config(config.model)
    digests.save(tmp_path / "run", open_sources(config, model).digests)
    edit(tmp_path)
    now = open_sources(config, model).digests
    if not said:
        digests.check(tmp_path / "run", now, allowed=False)
        return
    with pytest.raises(UserError) as caught:
        digests.check(tmp_path / "run", now, allowed=False)
    assert said in str(caught.value)
    if "damaged" not in said:
        digests.check(tmp_path / "run", now, allowed=True)
        assert said in caplog.text
