"""Exact match against real decoding, and the figures beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core import Rule
from params.tree import Tree
from runners import eval as evaluation
from runners.checkpoints import open_run
from runners.data.types import Conversation, Document, Turn
from runners.eval import Evaluator, Question, _score, open_evaluator, questions
from runners.generate import answer
from runners.sources import open_sources


def test_exact_match_is_what_greedy_decoding_gives(trained: Path) -> None:
    found = open_run(trained)
    evaluator = open_evaluator(found, torch.device("cpu"))
    val = open_sources(found.config, found.model).held_out["val"]
    asked = list(questions(val, evaluator.encoder, 40))
    assert len(asked) == 40
    decoded = []
    for question in asked:
        user, truth = question.conversation.turns
        prompt = replace(question.conversation, turns=(user,))
        tokens = list(answer(evaluator, prompt, max_tokens=20))
        decoded.append(evaluator.encoder.tokenizer.decode(tokens) == truth.text)
    exact = evaluator.exact(asked)
    assert exact == decoded
    assert any(exact)
    assert not all(exact)


def test_the_blind_figure_is_blind(trained: Path) -> None:
    found = open_run(trained)
    evaluator = open_evaluator(found, torch.device("cpu"))
    val = open_sources(found.config, found.model).held_out["val"]
    asked = list(questions(val, evaluator.encoder, 24))
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
        turns = (Turn("user", "?"), Turn("assistant", text, kind))
        document: Document = None  # type: ignore[assignment]
        return Question(Conversation("x", turns), document)

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


def test_every_question_of_a_picture_is_asked_alone(trained: Path) -> None:
    found = open_run(trained)
    evaluator = open_evaluator(found, torch.device("cpu"))
    val = open_sources(found.config, found.model).held_out["val"]
    asked = list(questions(val, evaluator.encoder, 7))
    assert len(asked) == 7
    assert all(len(q.conversation.turns) == 2 and len(q.document.patch_counts) == 1 for q in asked)
    kinds = {q.answer.kind for q in asked}
    assert kinds == {"colour", "count"}


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


def test_evaluators_do_not_need_the_data(trained: Path) -> None:
    found = open_run(trained)
    gone = replace(found, config=replace(found.config, data="gone.json"))
    assert isinstance(open_evaluator(gone, torch.device("cpu")), Evaluator)
