"""Measures the exact match of a trained model on held-out questions.

    python -m runners.eval --run runs/NAME

Exact match is measured in one teacher-forced pass over the true answers: an answer counts if each
of its tokens, and the ``<|end|>`` after them, is the most likely. This equals greedy decoding:
while all tokens so far are right, the decoder has seen the true prefix and makes the same choice;
at the first wrong token both have failed. (Rounding may decide exact ties either way.)

Questions are asked as in training: each after the true turns before it, with the tokens of the
training row (a run with ``--turns single`` was trained on single questions). ``--ask alone`` asks
each by itself, after its pictures.

Two baselines stand beside it: *blind*, the same model with all pictures grey, and *majority*, the
most frequent answer to each kind of question. A model that uses the pictures is far above both.
Plain text is measured in nats per token and perplexity.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Annotated, Literal

import numpy as np
import torch

from core import Batch, Forward, Logits, VLMConfig
from core.batch import IGNORE
from core.ranges import Range
from params.tree import Tree
from runners.data.encode.encoder import Encoder
from runners.data.feeding.loader import Loader
from runners.data.packing.collate import batch_documents
from runners.data.packing.plan import PackSpec
from runners.data.sources import digests
from runners.data.sources.open import open_files, open_sources
from runners.data.stats import majority_accuracy, readable
from runners.data.types import BadRecordError, Conversation, Document, Source, Turn, alone, prompts
from runners.shell.cli import guarded, parse
from runners.shell.errors import UserError, printable
from runners.training.checkpoints import Run, open_run
from runners.training.compose import choose_device, compute_dtype
from runners.training.setup import build_encoder, plan, run_tokenizer, sample_documents
from runners.training.step import mean_loss
from runners.training.weights import open_params
from transforms import fuse_loss
from transforms.accumulate import to_device

logger = logging.getLogger(__name__)
Ask = Literal["trained", "alone"]
GREY = 128  # the middle of uint8 pixels


@dataclass(frozen=True)
class EvalConfig:
    """Measures a trained model on held-out data."""

    run: str
    """Folder of the run, such as runs/shapes-tiny."""
    split: tuple[str, ...] = ()
    """Held-out splits: val, and unseen for shapes. Default: all."""
    examples: Annotated[int, Range(1, 2**40)] = 512
    """Most questions of a split."""
    val_data: tuple[str, ...] = ()
    """Files to measure on instead of the run's held-out data."""
    image_root: str | None = None
    """Folder of the pictures of --val_data. Default: the file's own."""
    data_changed: bool = False
    """Measure although the data has changed since the run began: what is held out now may have been
    trained on."""
    ask: Ask | None = None
    """trained: each question after the true turns before it, as in training; alone: by itself,
    after its pictures. Default: the run's own --ask."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print JSON instead of lines."""


@dataclass(frozen=True)
class Score:
    """Exact match over some questions, in 0..1."""

    questions: int
    exact: float
    blind: float
    majority: float

    def __str__(self) -> str:
        return (
            f"exact {self.exact:6.1%}  blind {self.blind:6.1%}  majority {self.majority:6.1%}  "
            f"({self.questions} questions)"
        )


@dataclass(frozen=True)
class Report:
    """The result of a split: scores overall and by kind of question, or the loss of plain text."""

    split: str
    score: Score | None
    kinds: dict[str, Score]
    loss: float | None = None

    def lines(self) -> list[str]:
        if self.score is None:
            assert self.loss is not None
            ppl = math.exp(min(self.loss, 700))
            return [f"{self.split:<12} loss {self.loss:.4f}  perplexity {ppl:.2f}"]
        named = [(self.split, self.score), *((f"  {kind}", s) for kind, s in self.kinds.items())]
        width = max(12, *(len(name) for name, _ in named))
        return [f"{name:<{width}} {score}" for name, score in named]


@dataclass(frozen=True)
class Question:
    """A question, its answer and their document.

    prompt: the conversation up to the question. ``document.labels[start:end]`` are the answer's,
    from the ``<|assistant|>`` mark up to its ``<|end|>``.
    """

    prompt: Conversation
    answer: Turn
    document: Document
    start: int
    end: int


def questions(
    source: Source, encoder: Encoder, limit: int, *, ask: Ask = "trained"
) -> list[Question]:
    """The first questions of a source, at most ``limit``. Answers that do not fit a row, which
    training does not see either, are skipped with a warning."""
    found: list[Question] = []
    beyond, most = 0, 1
    for conversation in readable(source):
        if len(found) >= limit:
            break
        singles = alone(conversation)
        most = max(most, len(singles))
        for asked in singles if ask == "alone" else [conversation]:
            whole = questions_of(asked, encoder)
            beyond += sum(turn.role == "assistant" for turn in asked.turns) - len(whole)
            found += whole
    if ask == "alone" and most > 1:
        logger.warning(
            "Questions are asked alone, though training shows them after the turns before them: "
            "the model is measured on what it was not trained for."
        )
    if beyond:
        logger.warning(
            "%d answers do not fit a row of %d tokens: not asked.", beyond, encoder.max_tokens
        )
    return found[:limit]


def questions_of(conversation: Conversation, encoder: Encoder) -> list[Question]:
    """The questions of a conversation whose whole answer fits a row, as in training."""
    try:
        (document,) = encoder(conversation)
    except BadRecordError:
        return []
    labelled = np.concatenate([[False], document.labels != IGNORE, [False]])
    starts, ends = np.flatnonzero(labelled[1:] != labelled[:-1]).reshape(-1, 2).T.tolist()
    answers = [turn for turn in conversation.turns if turn.role == "assistant"]
    return [
        Question(prompt, answer, document, start, end)
        for prompt, answer, start, end in zip(
            prompts(conversation), answers, starts, ends, strict=False
        )
        if document.labels[end - 1] == encoder.tokenizer.end  # else it is cut off
    ]


@dataclass(frozen=True)
class Evaluator:
    """A trained model with its encoder."""

    forward: Forward
    params: Tree  # matrices in the compute dtype
    model: VLMConfig
    encoder: Encoder
    rows: int  # of a batch

    @property
    def device(self) -> torch.device:
        return self.params["text"]["embed"]["weight"].device

    @torch.no_grad()
    def exact(self, asked: Sequence[Question], *, blind: bool = False) -> list[bool]:
        """Whether greedy decoding gives exactly each answer."""
        documents = list(dict.fromkeys(question.document for question in asked))
        batches, places = batch_documents(documents, self._spec(documents))
        rights = []
        for batch in batches:
            if blind and "patches" in batch:
                batch |= {"patches": torch.full_like(batch["patches"], GREY)}
            right = batch["labels"] == IGNORE
            rows = (~right).nonzero().flatten()
            sent = to_device(batch, self.device)
            predict = replace(self.forward, finish=partial(_argmax, rows=rows.to(self.device)))
            right[rows] = predict(self.params, sent).cpu() == batch["labels"][rows]
            rights.append(right)
        place_of = dict(zip(documents, places, strict=True))
        found = []
        for question in asked:
            place = place_of[question.document]
            answer = slice(place.start + question.start, place.start + question.end)
            found.append(bool(rights[place.batch][answer].all()))
        return found

    def report(self, split: str, source: Source, limit: int, *, ask: Ask = "trained") -> Report:
        """Exact match, blind and majority figures of a split of questions."""
        asked = questions(source, self.encoder, limit, ask=ask)
        if not asked:
            raise UserError(f"{split}: no question fits a row of {self.encoder.max_tokens} tokens")
        seen, unseen = self.exact(asked), self.exact(asked, blind=True)
        results = list(zip(asked, seen, unseen, strict=True))
        kinds = sorted({question.answer.kind for question in asked})
        by_kind = {k: _score([r for r in results if r[0].answer.kind == k]) for k in kinds}
        return Report(split, _score(results), by_kind if len(kinds) > 1 else {})

    def text_report(self, split: str, source: Source, limit: int) -> Report:
        """The loss of plain text, over up to ``limit`` rows."""
        spec = self._spec(list(sample_documents(source, self.encoder, limit)))
        loader = Loader(source, self.encoder, spec, repeat=False, shuffle=False)
        batches = list(islice(loader, max(1, limit // self.rows)))
        loader.close()
        return Report(split, None, {}, mean_loss(fuse_loss(self.forward), self.params, batches))

    def _spec(self, documents: Sequence[Document]) -> PackSpec:
        return plan(self.encoder, documents, self.rows, self.model)


def _argmax(logits: Logits, batch: Batch, *, rows: torch.Tensor) -> torch.Tensor:
    return logits.at(rows).dense().argmax(-1)


def _score(results: Sequence[tuple[Question, bool, bool]]) -> Score:
    counts: dict[str, Counter[str]] = {}
    for question, _, _ in results:
        counts.setdefault(question.answer.kind, Counter())[question.answer.text] += 1
    total = len(results)
    exact = sum(seen for _, seen, _ in results) / total
    blind = sum(unseen for _, _, unseen in results) / total
    return Score(total, exact, blind, majority_accuracy(counts))


def open_evaluator(run: Run, device: torch.device) -> Evaluator:
    """A run with its best weights. Raises UserError naming what is missing or does not fit."""
    encoder = build_encoder(run.config.data, run.model, run_tokenizer(run))
    forward, params = open_params(run, compute_dtype(run.config.speed, device)[0], device)
    return Evaluator(forward, params, run.model, encoder, run.config.data.device_batch_size)


def evaluate(
    evaluator: Evaluator,
    splits: Mapping[str, Source],
    limit: int,
    *,
    chat: bool,
    ask: Ask = "trained",
) -> list[Report]:
    """The reports of all splits."""
    if not chat:
        return [evaluator.text_report(name, source, limit) for name, source in splits.items()]
    return [evaluator.report(name, source, limit, ask=ask) for name, source in splits.items()]


def held_out(run: Run, config: EvalConfig) -> Mapping[str, Source]:
    """The splits to measure: what the run held out, or files."""
    if not config.val_data:
        sources = open_sources(run.config, run.model)
        digests.check(run.folder, sources.digests, allowed=config.data_changed)
        return sources.held_out
    files = run.config.changed(val_data=config.val_data, image_root=config.image_root)
    return {"val": open_files(files.data)}


def run(argv: Sequence[str] | None = None) -> None:
    config = parse(EvalConfig, argv, prog="python -m runners.eval")
    found = open_run(config.run)
    device = choose_device(found.config.changed(device=config.device).run)
    evaluator = open_evaluator(found, device)
    splits = held_out(found, config)
    if not splits:
        raise UserError(
            f"{found.folder} was trained with --val_fraction=0, nothing is held out: name files "
            "with --val_data"
        )
    for name in config.split:
        if name not in splits:
            raise UserError(f"--split {name}: this run has {', '.join(splits)}")
    chosen = {name: splits[name] for name in config.split or splits}
    ask = config.ask or found.config.run.ask
    reports = evaluate(evaluator, chosen, config.examples, chat=found.config.data.chat, ask=ask)
    if config.json:
        print(json.dumps([asdict(report) for report in reports], indent=1), flush=True)
    else:
        lines = [line for report in reports for line in report.lines()]
        print(printable("\n".join(lines)), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(argv))


if __name__ == "__main__":
    raise SystemExit(main())
