from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runners.data.encode.images import check_pixels
from runners.data.sources.llava import Llava
from runners.data.stats import readable
from runners.data.types import BadRecordError, Turn, questions_and_answers
from runners.shell.errors import UserError

WriteLlava = Callable[..., Path]


def test_records_become_conversations(write_llava: WriteLlava):
    source = Llava(write_llava(3))
    assert len(source) == 3
    item = source[1]
    assert item.id == "r1"
    assert item.turns == (
        Turn("user", "<image>\nWhat is it?"),
        Turn("assistant", "title 0", "What is it?"),
        Turn("user", "Which category?"),
        Turn("assistant", "odd", "Which category?"),
    )
    assert item.images[0].shape == (20, 24, 3)
    assert source.turns(1) == item.turns


def test_single_turns_stand_alone(write_llava: WriteLlava):
    source = Llava(write_llava(3), turns="single")
    assert len(source) == 6
    assert [turn.text for turn in source[3].turns] == ["<image>Which category?", "odd"]
    assert source[3].id == "r1/1"
    assert len(source[3].images) == 1
    assert [turn.text for turn in source.turns(3)] == ["Which category?", "odd"]


def test_several_pictures_none_system_words_and_lines(write_llava: WriteLlava, tmp_path: Path):
    def change(records: list[Any]) -> None:
        records[0]["image"] = ["images/0.png", "images/1.png"]
        records[0]["conversations"][2]["value"] = "<image> and this?"
        del records[1]["image"], records[1]["id"]
        records[1]["conversations"][0]["value"] = "No picture?"
        records[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})

    path = write_llava(2, change)
    source = Llava(path)
    assert len(source[0].images) == 2
    assert source[1].images == ()
    assert source[1].id == "1"
    assert source[1].turns[0].text == "Be brief.\nNo picture?"
    lines = [json.dumps(record) for record in json.loads(path.read_text())]
    (tmp_path / "train.JSONL").write_text("\n".join(lines) + "\n\n")
    assert Llava(tmp_path / "train.JSONL").records == source.records


def test_rare_questions_share_a_kind(write_llava: WriteLlava):
    def change(records: list[Any]) -> None:
        records[7]["conversations"][2]["value"] = "Asked once?"

    source = Llava(write_llava(150, change))
    kinds = {
        answer.kind for i in range(150) for _, answer in questions_and_answers(source.turns(i))
    }
    assert kinds == {"What is it?", "Which category?", "other"}


def held_out(path: Path, fraction: float, **options: Any) -> tuple[list[str], list[str]]:
    """Ids of the records of both splits."""
    train, val = Llava(path, **options).parted(fraction)
    return [record.id for record in train.records], [record.id for record in val.records]


def test_records_are_held_out_whatever_they_answer(write_llava: WriteLlava):
    path = write_llava(200)
    train, val = held_out(path, 0.3)
    assert (len(train), len(val)) == (140, 60)
    assert {*train, *val} == {f"r{i}" for i in range(200)}
    for split, ids in (("train", train), ("val", val)):
        part = Llava(path, split=split, fraction=0.3)
        assert [record.id for record in part.records] == ids
        assert {record.turns[3].text for record in part.records} == {"odd", "even"}
    other = Llava(path).parted(0.3, seed=1)[1]
    assert {record.id for record in other.records} != set(val)
    assert val != sorted(val, key=lambda name: int(name[1:]))  # a sample wherever it is cut off


def test_records_keep_their_sides_where_the_file_is_reordered_or_grows(write_llava: WriteLlava):
    _, val = held_out(write_llava(200), 0.1)
    assert held_out(write_llava(200, lambda records: records[::-1]), 0.1)[1] == val
    assert len({*val, *held_out(write_llava(210), 0.1)[1]}) < len(val) + 5


def test_equal_pictures_are_on_one_side_by_path_and_by_content(
    write_llava: WriteLlava, tmp_path: Path
):
    def change(records: list[Any]) -> None:
        for i in range(40):  # 20 pictures, each under two names, and each name in two records
            name = f"images/{i}.png"
            (tmp_path / name).write_bytes((tmp_path / f"images/{i % 20}.png").read_bytes())
            records[40 + i]["image"] = name
        # and a record of two pictures joins what shows either
        records[7]["image"] = ["images/7.png", "images/8.png"]
        records[7]["conversations"][2]["value"] = "<image> and this?"

    path = write_llava(80, change)
    picture = {f"r{i}": 7 if i % 20 == 8 else i % 20 for i in range(80)}
    for seed in range(5):
        train, val = Llava(path).parted(0.2, seed)
        sides = [{picture[record.id] for record in side.records} for side in (train, val)]
        assert not sides[0] & sides[1]
        assert len(val) == 16


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(2, 1e-9, 1), (3, 0.999, 2), (7, 0.5, 4)]
)
def test_neither_side_is_empty(write_llava: WriteLlava, count: int, fraction: float, expected: int):
    train, val = held_out(write_llava(count), fraction)
    assert len(val) in (expected, count - expected)
    assert train
    assert val


def test_what_cannot_be_parted_is_said(write_llava: WriteLlava):
    for count, why in ((1, "there is but one"), (3, "pictures join them all")):

        def one_picture(records: list[Any]) -> None:
            for record in records:
                record["image"] = "images/0.png"

        with pytest.raises(UserError, match=rf"{why}\): name other data with --val_data"):
            Llava(write_llava(count, one_picture), split="val")


def test_cached_pictures_are_decoded_once_and_stay_here(write_llava: WriteLlava):
    source = Llava(write_llava(2), cache=True)
    first = source[0].images[0]
    assert source[0].images[0] is first
    sent = pickle.loads(pickle.dumps(source))
    assert sent._cache == {}
    assert np.array_equal(sent[0].images[0], first)


def damage(tmp_path: Path, *numbers: int) -> None:
    for number in numbers:
        (tmp_path / f"images/{number}.png").write_bytes(b"\x89PNG broken")


def test_few_bad_pictures_are_left_out_with_a_warning(
    write_llava: WriteLlava, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = write_llava(200)
    damage(tmp_path, 3)
    (tmp_path / "images/7.png").unlink()
    source = Llava(path)
    assert len(source) == 198
    assert "2 of the 200 records" in caplog.text
    assert "3.png cannot be decoded" in caplog.text
    assert not {"r3", "r7"} & {record.id for record in source.records}
    caplog.clear()
    unchecked = Llava(path, check=0)
    assert len(unchecked) == 199
    with pytest.raises(BadRecordError, match=r"3\.png"):
        unchecked[3]
    assert len(list(readable(unchecked))) == 198
    assert "Skipped 1 records so far (picture unreadable)" in caplog.text


def test_many_bad_pictures_end_the_run(write_llava: WriteLlava, tmp_path: Path):
    path = write_llava(200)
    damage(tmp_path, 3, 50, 120)
    with pytest.raises(UserError, match=r"Of 200 records .* 3 have a damaged one .* than 1%"):
        Llava(path)
    with pytest.raises(UserError, match="3 of 200 records cannot be used"):
        list(readable(Llava(path, check=0)))


def rewrite(field: str, value: Any) -> Callable[[list[Any]], None]:
    def change(records: list[Any]) -> None:
        records[1][field] = value

    return change


def speak(*said: Any) -> Callable[[list[Any]], None]:
    return rewrite(
        "conversations",
        [{"from": s, "value": v} if isinstance(s, str) else s for s, v in said],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records.__setitem__(1, 7), r"record 1 \(id '1'\) has no list"),
        (rewrite("conversations", "hi"), r"record 1 \(id 'r1'\) has no list `conversations`"),
        (rewrite("conversations", []), "does not end with an answer"),
        (rewrite("conversations", ["hi"]), "without the texts `from` and `value`"),
        (rewrite("conversations", [{"from": "human"}]), "without the texts `from` and `value`"),
        (rewrite("image", 5), "neither a path nor a list"),
        (rewrite("image", ["images/1.png"] * 2), "2 pictures in `image` but 1 <image>"),
        (rewrite("image", None), "0 pictures in `image` but 1 <image>"),
        (speak(("gpt", "x"), ("human", "y")), "'gpt' where one from 'human' belongs"),
        (speak(("human", "<image>"), ("human", "y")), "'human' where one from 'gpt' belongs"),
        (speak(("human", "<image>"), ("robot", "y")), "'robot'"),
        (speak(("human", "<image>")), "does not end with an answer"),
        (speak(("human", "<image>"), ("gpt", "\ud800")), "lone surrogate"),
        (speak(("human", "<image>"), ("gpt", " ")), "a turn that says nothing"),
        (speak(("human", "<image>" + "x" * 2**22), ("gpt", "y")), "has 4,194,312 characters"),
        (speak(("human", "\\<image>"), ("gpt", "y")), "1 pictures in `image` but 0 <image>"),
        (rewrite("image", "\ud800.png"), "lone surrogate"),
        (rewrite("image", "/etc/hostname"), "leaves the data folder"),
        (rewrite("image", "../secret.png"), "leaves the data folder"),
        (rewrite("image", "images/../../x.png"), "leaves the data folder"),
        (rewrite("image", "..\\x.png"), "leaves the data folder"),
        (rewrite("image", "C:\\x.png"), "leaves the data folder"),
        (rewrite("image", "a\0b.png"), "leaves the data folder"),
        (rewrite("image", "images"), "is not a file"),
        (rewrite("image", "https://example.org/x.png"), "does not exist"),
    ],
)
def test_malformed_records_are_left_out_and_named(
    write_llava: WriteLlava, caplog: pytest.LogCaptureFixture, change: Any, message: str
):
    source = Llava(write_llava(3, change))
    assert [record.id for record in source.records] == ["r0", "r2"]
    assert "1 of the 3 records of" in caplog.text
    assert re.search(message, caplog.text)
    assert source[1].images[0].shape == (20, 24, 3)


def test_reasons_are_counted_and_no_record_left_is_an_error(
    write_llava: WriteLlava, caplog: pytest.LogCaptureFixture
):
    def change(records: list[Any]) -> None:
        for i in (1, 4, 5):
            records[i]["conversations"].pop(0)
        records[2]["image"] = "gone.png"

    assert len(Llava(write_llava(6, change))) == 2
    assert "4 of the 6 records of" in caplog.text
    assert (
        "3 turns out of order (the first: record 1 (id 'r1') has a turn from 'gpt'" in caplog.text
    )
    assert "; 1 picture missing (the first: " in caplog.text
    with pytest.raises(UserError, match=r"None of the 1 records .* 1 no conversations \(the first"):
        Llava(write_llava(1, lambda records: [[]]))
    with pytest.raises(UserError, match="holds no list of records"):
        Llava(write_llava(1, lambda records: {"records": records}))


def test_pictures_of_a_record_are_counted_before_they_are_decoded(
    write_llava: WriteLlava, monkeypatch: pytest.MonkeyPatch
):
    def change(records: list[Any]) -> None:
        records[1]["image"] = ["images/0.png"] * 24
        records[1]["conversations"][0]["value"] = "<image>" * 24

    source = Llava(write_llava(2, change))
    first, *others = source[1].images
    assert len(others) == 23
    assert all(picture is first for picture in others)  # decoded once
    monkeypatch.setattr(source, "_picture", lambda name: pytest.fail("decoded"))
    monkeypatch.setattr(check_pixels, "__defaults__", (24 * 480 - 1,))
    with pytest.raises(BadRecordError, match=r"24 pictures .* have 11,520 pixels together"):
        source[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"broken JSON at line 1, column 1"),
        (b'[\n{"id": "a",}\n]', r"data\.json is broken JSON at line 2, column 1"),
        (b"[]", "holds no records"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1" + b"0" * 5000 + b"]", "cannot be read"),
        (b'["\xff"]', "is not UTF-8"),
        ("[]".encode("utf-16"), "is UTF-16 and not UTF-8"),
        ("[]".encode("utf-16-be"), r"byte 0 is NUL, as in UTF-16 without a mark"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Llava(path)


def test_missing_files_folders_and_options(tmp_path: Path, write_llava: WriteLlava):
    with pytest.raises(UserError, match=r"absent\.json cannot be read \(No such file"):
        Llava(tmp_path / "absent.json")
    with pytest.raises(UserError, match="it is not a file"):
        Llava(tmp_path)
    path = write_llava()
    with pytest.raises(UserError, match=r"image folder .*nowhere does not exist"):
        Llava(path, images=tmp_path / "nowhere")
    with pytest.raises(UserError, match="split=test"):
        Llava(path, split="test")
    with pytest.raises(UserError, match="fraction=2"):
        Llava(path, split="val", fraction=2)
    (tmp_path / "lines.jsonl").write_text('{"id": 1}\n\n{"id": \n')
    with pytest.raises(UserError, match=r"2 records .* 1 broken JSON \(the first: line 3"):
        Llava(tmp_path / "lines.jsonl")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UserError, match=r"pipe\.json cannot be read: it is not a file"):
        Llava(tmp_path / "pipe.json")


def test_links_may_not_lead_out_and_pipes_are_not_read(
    write_llava: WriteLlava, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    inside = tmp_path / "data"
    inside.mkdir()
    os.rename(write_llava(3), inside / "train.json")
    os.rename(tmp_path / "images", inside / "images")
    picture = inside / "images/1.png"
    os.rename(picture, tmp_path / "outside.png")
    picture.symlink_to(tmp_path / "outside.png")
    assert len(Llava(inside / "train.json")) == 2
    assert re.search(r"'images/1\.png' leads to .*outside the data folder", caplog.text)
    picture.unlink()
    picture.symlink_to("0.png")  # within the folder: fine
    assert len(Llava(inside / "train.json")) == 3
    os.replace(tmp_path / "outside.png", picture)  # ordinary files again, in a linked folder
    os.rename(inside / "images", tmp_path / "elsewhere")
    (inside / "images").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside the data folder"):
        Llava(inside / "train.json")
    (inside / "images").unlink()
    (tmp_path / "linked").symlink_to(inside)  # the folder itself may be a link
    os.rename(tmp_path / "elsewhere", inside / "images")
    assert len(Llava(tmp_path / "linked/train.json")) == 3
    picture.unlink()
    os.mkfifo(picture)
    assert len(Llava(inside / "train.json")) == 2
    assert "1.png is not a file" in caplog.text
