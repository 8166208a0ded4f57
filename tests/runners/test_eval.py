"""Exact match against real decoding, and the figures beside it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import Rule
from params.tree import Tree
from runners import eval as evaluation
from runners.data.encode.encoder import Encoder
from runners.data.encode.images import ImageSpec
from runners.data.encode.tokenizer import train_tokenizer
from runners.data.feeding.loader import Loader
from runners.data.packing.collate import batch_documents
from runners.data.packing.plan import plan_spec
from runners.data.sources.open import open_sources
from runners.data.types import Conversation, Document, Turn, alone
from runners.eval import Evaluator, Question, _score, open_evaluator, questions
from runners.generate import answer
from runners.training.checkpoints import open_run


@pytest.mark.parametrize("per_picture", [1, 3])
def test_exact_match_is_what_greedy_decoding_gives(trained: Path, per_picture: int) -> None:
    found = open_run(trained)
    evaluator = open_evaluator(found, torch.device("cpu"))
    config = found.config.changed(questions=per_picture, max_objects=3)
    val = open_sources(config, found.model).held_out["val"]
    asked = questions(val, evaluator.encoder, 40)
    assert len(asked) == 40
    assert max(len(question.prompt.turns) for question in asked) == 2 * per_picture - 1
    decoded = []
    for question in asked:
        tokens = list(answer(evaluator, question.prompt, max_tokens=20))
        decoded.append(evaluator.encoder.tokenizer.decode(tokens) == question.answer.text)
    exact = evaluator.exact(asked)
    assert exact == decoded
    assert any(exact)
    assert not all(exact)


def conversations() -> list[Conversation]:
    """Pictures in front, amid the words, behind them, several, none, and in a later turn."""
    said = [
        ("<image>\nWhat is it?", "a cat", "And where?", "left"),
        ("Left: <image> Right: <image> Which is red?", "left"),
        ("What is this?\n<image>", "", "And this? <image>", "a dog", "Both?", "yes"),
        ("Hi", "Hello", "Now <image> what?", "a dog"),
        ("Say a", "a"),
        ("Long <image>", "short", "Again", "word " * 60, "Never asked", "it does not fit"),
    ]
    rng, made = np.random.default_rng(0), []
    for number, texts in enumerate(said):
        turns = [Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
        marks = sum(text.count("<image>") for text in texts)
        pictures = rng.integers(0, 256, (marks, 16, 16, 3), np.uint8)
        made.append(Conversation(str(number), tuple(turns), tuple(pictures)))
    return made


class Listed:
    """Conversations as a source."""

    def __init__(self, items: list[Conversation]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Conversation:
        return self.items[index]

    def turns(self, index: int) -> tuple[Turn, ...]:
        return self.items[index].turns


def rows_of(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document of a batch, its padding too."""
    bounds = batch["cu_seqlens"].tolist()
    return [
        (batch["tokens"][a:b].tolist(), batch["labels"][a:b].tolist())
        for a, b in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("at_once", [1, 6])  # conversations in a row
def test_questions_are_the_tokens_of_the_training_rows(
    at_once: int, caplog: pytest.LogCaptureFixture
) -> None:
    items = conversations()
    tokenizer = train_tokenizer([turn.text for item in items for turn in item.turns], 261)
    encoder = Encoder(tokenizer, ImageSpec(8, 16, 2), max_tokens=256)
    documents = [document for item in items for document in encoder(item)]
    spec = plan_spec(documents, row_len=256, rows=2, images=encoder.images, pad_token=tokenizer.pad)
    spec = replace(spec, max_docs=at_once)
    loader = Loader(Listed(items), encoder, spec, repeat=False, seed=1)
    trained_on = [row for batch in loader for row in rows_of(batch)]
    asked = questions(Listed(items), encoder, 99)
    examined = [row for b in batch_documents(documents, spec)[0] for row in rows_of(b)]
    texts = [turn.text for item in items for turn in item.turns[1::2]]
    assert [question.answer.text for question in asked] == texts[:-2]
    assert "2 answers do not fit a row of 256 tokens" in caplog.text
    for question in asked:
        prompt = encoder.prompt(question.prompt)
        row = (question.document.tokens.tolist(), question.document.labels.tolist())
        assert row in trained_on
        assert row in examined
        tokens, labels = row
        assert prompt.tokens.tolist() == tokens[: question.start + 1]
        assert tokenizer.decode(labels[question.start : question.end - 1]) == question.answer.text
        assert labels[question.end - 1] == tokenizer.end
        shown = len(prompt.patches)
        assert np.array_equal(prompt.patches, question.document.patches[:shown])


def test_questions_asked_alone_keep_their_pictures(caplog: pytest.LogCaptureFixture) -> None:
    items = conversations()
    texts = [[single.turns[0].text for single in alone(item)] for item in items]
    assert texts[:4] == [
        ["<image>\nWhat is it?", "<image>And where?"],
        ["Left: <image> Right: <image> Which is red?"],
        ["What is this?\n<image>", "<image>And this? <image>", "<image><image>Both?"],
        ["Hi", "Now <image> what?"],
    ]
    for single in (single for item in items for single in alone(item)):
        assert len(single.images) == single.turns[0].text.count("<image>")
    encoder = Encoder(train_tokenizer(["a b"]), ImageSpec(8, 16, 2), max_tokens=512)
    found = questions(Listed(items), encoder, 99, ask="alone")
    assert len(found) == sum(map(len, texts))
    assert all(len(question.prompt.turns) == 1 for question in found)
    assert "measured on what it was not trained for" in caplog.text
    caplog.clear()
    questions(Listed(items[1:2]), encoder, 99, ask="alone")
    assert not caplog.text


def test_the_blind_figure_is_blind(trained: Path) -> None:
    found = open_run(trained)
    evaluator = open_evaluator(found, torch.device("cpu"))
    val = open_sources(found.config, found.model).held_out["val"]
    asked = questions(val, evaluator.encoder, 24)
    pixels: list[torch.Tensor] = []

    def spy(f: Callable[..., torch.Tensor], path: str) -> Callable[..., torch.Tensor]:
        def run(p: Tree, x: torch.Tensor) -> torch.Tensor:
            pixels.append(x)
            return f(p, x)

        return run

    rule = Rule("linear", spy, ("vision.patch_embed",))
    spied = replace(evaluator, forward=evaluator.forward.with_rule(rule))
    spied.exact(asked)
    assert len(torch.cat(pixels).unique()) > 20
    pixels.clear()
    blind = spied.exact(asked, blind=True)
    grey = torch.cat(pixels).unique()  # and 0 where there is no picture
    assert grey.tolist() == pytest.approx([0, 128 / 127.5 - 1], abs=2**-23)
    score = evaluator.report("val", val, 24).score
    assert score is not None
    assert score.blind == sum(blind) / 24


def test_scores_and_the_majority() -> None:
    def asked(kind: str, text: str) -> Question:
        document: Document = None  # type: ignore[assignment]
        prompt = Conversation("x", (Turn("user", "?"),))
        return Question(prompt, Turn("assistant", text, kind), document, 0, 1)

    results = [
        (asked("colour", "red"), True, False),
        (asked("colour", "red"), True, True),
        (asked("colour", "blue"), False, False),
        (asked("count", "1"), True, False),
    ]
    score = _score(results)
    assert (score.questions, score.exact, score.blind) == (4, 0.75, 0.25)
    assert score.majority == 0.75  # red twice, and 1
    assert str(score) == "exact  75.0%  blind  25.0%  majority  75.0%  (4 questions)"


def test_the_command_prints_a_line_for_each_split(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main(["--run", str(trained), "--examples", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == ["val", "colour", "count", "unseen", "colour", "count"]
    assert all("blind" in line and "majority" in line for line in lines)
    assert (
        evaluation.main(["--run", str(trained), "--examples=12", "--split=unseen", "--json"]) == 0
    )
    (report,) = json.loads(capsys.readouterr().out)
    assert report["split"] == "unseen"
    assert report["score"]["questions"] == 12
    for argv, said in (
        (["--run", str(trained), "--split", "tets"], "this run has val, unseen"),
        (["--run", str(trained.parent)], "not the folder of a run"),
    ):
        assert evaluation.main(argv) == 1
        assert said in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    (damaged / "model.safetensors").write_bytes(b"short")
    assert evaluation.main(["--run", str(damaged)]) == 1
    assert "model.safetensors is not a safetensors file" in capsys.readouterr().err


def test_files_can_be_asked_about(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>Count?"}, {"from": "gpt", "value": "1"}]
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file in files:
        file.write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    argv = ["--run", str(trained), "--val_data", *map(str, files)]
    assert evaluation.main(argv) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "(2 questions)" in line
    assert evaluation.main(["--run", str(trained), "--val_data=words.txt"]) == 1
    assert "--val_data words.txt: --data shapes is conversations" in capsys.readouterr().err


def test_evaluators_do_not_need_the_data(trained: Path) -> None:
    found = open_run(trained)
    gone = replace(found, config=found.config.changed(data="gone.json"))
    assert isinstance(open_evaluator(gone, torch.device("cpu")), Evaluator)
