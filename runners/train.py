"""Trains a model, evaluates it, and draws samples of its answers.

python -m runners.train                         # a tiny model on drawn shapes
python -m runners.train --data train.json --preset small --sequence_len=2048
python -m runners.train --resume runs/NAME      # with the flags that it has
python -m runners.train --config runs/NAME      # the same run again, in a folder of its own
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

import kernels
from params import count, num_bytes, unflatten
from params.disk import write_text
from runners.data.sources import digests
from runners.data.types import BadRecordError, Source, alone, literal, spread, without_pictures
from runners.eval import Evaluator, Report, evaluate, questions_of
from runners.generate import answer
from runners.shell.cli import INTERRUPTED, guarded
from runners.shell.lock import LOCK
from runners.training.checkpoints import check_disk, claim_folder, create_folder, record_start
from runners.training.config import TrainConfig, parse_config
from runners.training.figures import Sample, draw_loss, draw_samples
from runners.training.loop import Training, interruptible
from runners.training.metrics import Display, Metrics, check_wandb, read_metrics, warned
from runners.training.provenance import origin
from runners.training.resume import continued
from runners.training.settings import OptimSettings, RunSettings
from runners.training.setup import Job, build_encoder, prepare
from runners.training.states import read_record
from runners.training.step import Learner
from runners.training.weights import MERGED, base_digest, save_merged, trained_params
from transforms import cast_matrices


def train(
    config: TrainConfig, display: Display | None = None, *, command: str | None = None
) -> Path | None:
    """Runs a config to its end. Returns the run's folder, or None if it was interrupted and can be
    resumed. Raises UserError. Apart from the lock on the folder, nothing is written before
    everything is validated.

    command: the command line, for the run's config.json.
    """
    begun = time.monotonic()
    display = display or Display(config.optim.steps)
    with display.logging("runners"), display.logging("kernels"), ExitStack() as stack:
        check_wandb(config.run)
        claim = claim_folder(config)
        stack.callback(claim.release)
        folder = claim.folder
        if claim.state is not None:
            _, step, old = read_record(claim.state)
            config = continued(old, config, step, claim.state)
        elif config.model.lora_rank and config.model.init_from:
            # absolute, because the run may be opened from another directory
            config = config.changed(init_from=str(Path(config.model.init_from).absolute()))
        job = prepare(config, claim.state)
        stack.callback(job.data.loader.close)  # its workers run already
        learner = Learner(
            job.params, config.optim, job.select, job.composed.matrices, seed=config.run.seed
        )
        check_disk(folder, learner.kept, unflatten(learner.learning), config.run.keep_states)
        if job.state is not None:
            learner.restore(job.state)
        begin = origin(command, learner.step, job.device)
        if job.state is None:
            base = base_digest(config.model)
            create_folder(folder, config, job.model, job.data.tokenizer, begin, base)
        else:
            record_start(folder, config, begin)
        digests.save(folder, job.data.sources.digests)
        for line in describe(job, learner, folder):
            display.say(line)
        metrics = Metrics(folder, config.run, after=learner.step)
        try:
            backends = kernels.override(**job.composed.backends)
            with interruptible() as asked, display, backends:
                stop = within(config.run.max_minutes, begun, asked)
                finished = Training(job, learner, folder, metrics, display, begun).run(stop)
        finally:
            metrics.close()
            job.data.loader.close()
        display.say(job.data.loader.stats.line())
        if not finished:
            again = shlex.join(["python", "-m", "runners.train", "--resume", str(folder)])
            display.say(
                f"Stopped after step {learner.step} of {config.optim.steps}, saved; "
                f"continue: {again}"
            )
            return None
        for line in finish(job, folder):
            display.say(line)
    return folder


def within(minutes: float | None, begun: float, asked: Callable[[], bool]) -> Callable[[], bool]:
    """Whether ``asked()``, or the minutes since ``begun`` (by ``time.monotonic``) are over."""
    if minutes is None:
        return asked
    return lambda: asked() or time.monotonic() - begun >= 60 * minutes


def describe(job: Job, learner: Learner, folder: Path) -> list[str]:
    """The lines at the start of a run: model, data, and each optimisation, on or off, and why."""
    learns = sum(leaf.numel() for leaf in learner.learning.values())
    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "CPU"
    spec = job.data.spec
    pictures = f", room for {spec.max_images} pictures" if spec.images else ""
    begun = f"continued after step {learner.step}" if learner.step else "new"
    return [
        f"Run {folder} ({begun}), {device}, torch {torch.__version__}",
        f"Model {job.config.model.preset}: {count(job.params):,} parameters "
        f"({num_bytes(job.params) / 1e6:,.0f} MB), {learns:,} learn; "
        f"vocabulary {job.model.text.vocab_size}",
        f"Data {job.config.data.data}: {len(job.data.sources.train):,} records; batches of "
        f"{spec.rows} rows of {spec.row_len} tokens{pictures}",
        job.data.sources.summary,
        *job.composed.report,
        f"Using {optimizer_name(job.config.optim, job.device)}, "
        f"{job.config.optim.schedule} schedule",
    ]


def optimizer_name(config: OptimSettings, device: torch.device) -> str:
    """The optimizer and its kernel, in words."""
    if config.optimizer == "adamw8bit":
        return "AdamW with moments of 8 bits (bitsandbytes)"
    adamw = "AdamW in a loop over the leaves (torch.optim)"
    if config.use_fused_adamw:
        adamw = f"fused AdamW ({kernels.choose('adamw', str(device))})"
    if config.optimizer == "adamw":
        return adamw
    muon = kernels.choose("muon", str(device))
    return f"Muon for matrices ({muon} beside its products), {adamw} for the rest"


def finish(job: Job, folder: Path) -> list[str]:
    """Evaluates the best weights on the held-out splits, and draws loss.png and samples.png."""
    with warned("loss.png"):
        draw_loss(folder / "loss.png", read_metrics(folder))
    if job.config.model.merge:
        save_merged(folder, job.config, job.model)
    params = trained_params(folder, job.params, job.device)
    evaluator = Evaluator(
        job.composed.forward,
        cast_matrices(params, job.composed.matrices),
        job.model,
        build_encoder(job.config.data, job.model, job.data.tokenizer),
        job.config.data.device_batch_size,
    )
    reports: list[Report] = []
    config, chat, splits = job.config.run, job.config.data.chat, job.data.sources.held_out
    if config.eval_examples:
        reports = evaluate(evaluator, splits, config.eval_examples, chat=chat, ask=config.ask)
        text = json.dumps([dataclasses.asdict(report) for report in reports], indent=1)
        with warned("eval.json"):
            write_text(folder / "eval.json", text)
    if config.samples and chat and splits:
        samples = sample(evaluator, splits["val"], config)
        with warned("samples.png"):
            draw_samples(folder / "samples.png", samples)
    written = sorted(
        p.name for p in folder.iterdir() if (p.is_file() and p.name != LOCK) or p.name == MERGED
    )
    return [*(line for r in reports for line in r.lines()), f"In {folder}: {', '.join(written)}"]


def sample(evaluator: Evaluator, source: Source, config: RunSettings) -> list[Sample]:
    """Held-out questions about different pictures, with the model's answers."""
    encoder, samples = evaluator.encoder, []
    for number, index in enumerate(spread(len(source), config.samples)):
        try:
            shown = source[index]
        except BadRecordError:
            continue
        single = alone(shown) if config.ask == "alone" else [shown]
        asked = [question for one in single for question in questions_of(one, encoder)]
        if not asked:
            continue
        question = asked[number % len(asked)]  # not always the first of a picture
        said = encoder.tokenizer.decode(answer(evaluator, question.prompt, max_tokens=48))
        words = literal(without_pictures(question.prompt.turns[-1].text))
        samples.append(Sample(question.prompt.images, words, question.answer.text, said))
    return samples


def run(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(argv, gpu=torch.cuda.is_available())
    command = shlex.join(["python", "-m", "runners.train", *argv])
    return 0 if train(config, command=command) is not None else INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(argv))


if __name__ == "__main__":
    raise SystemExit(main())
