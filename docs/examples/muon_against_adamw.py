"""Does Muon need fewer tokens than AdamW? Both on the same text, from files that you have.

    python muon_against_adamw.py prepare WORK --sources DIR --suffix .py
    python muon_against_adamw.py run WORK --tokens 5e6 --optimizers adamw --lrs 1e-3 2e-3 4e-3
    python muon_against_adamw.py run WORK --tokens 5e6 --optimizers muon --lrs 2e-3 4e-3 8e-3
    python muon_against_adamw.py show WORK --tokens 5e6
    python muon_against_adamw.py run WORK --tokens 50e6 --optimizers adamw --lrs 2e-3
    python muon_against_adamw.py run WORK --tokens 50e6 --optimizers muon --lrs 4e-3
    python muon_against_adamw.py show WORK --tokens 50e6

`prepare` collects UTF-8 files of the suffixes, each content once, and trains a tokenizer on a
sample. `run` trains with each optimizer at each rate: weights, order of the data, schedule and
number of tokens are the same. Muon's rates are higher: its steps have 0.2 of the rate as their root
mean square from the first on, AdamW's begin with the whole rate. With `--seconds` it stops in time,
saved; the same command goes on, and passes over what is done. What comes after `--` goes to the
trainer. `show` prints validation losses against tokens and how many tokens each run needs for
AdamW's best last loss, and draws them in WORK/muon_against_adamw.png. Everything is in WORK: text/,
tokenizer.json, runs/, logs/.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from runners.data.encode.tokenizer import load_tokenizer, sample_texts, train_tokenizer
from runners.data.sources.text import TextFiles
from runners.data.types import spread
from runners.shell.cli import INTERRUPTED
from runners.training.checkpoints import open_run
from runners.training.metrics import read_metrics

Curve = list[tuple[float, float]]  # tokens, validation loss


def say(text: str) -> None:
    print(text, flush=True)


# -- prepare ----------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> None:
    text = args.work / "text"
    if text.exists():
        say(f"{text} is there already")
    else:
        start = time.perf_counter()
        part = args.work / "text.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        count, size = collect(args.sources, args.suffix, part, int(args.max_mb * 1e6))
        if not count:
            raise SystemExit(f"no text of {' '.join(args.suffix)} in {' '.join(args.sources)}")
        part.rename(text)
        say(f"{count:,} files, {size / 1e6:.1f} MB, in {time.perf_counter() - start:.1f} s")
    source = TextFiles([text])
    path = args.work / "tokenizer.json"
    if path.exists():
        say(f"{path} is there already")
    else:
        start = time.perf_counter()
        train_tokenizer(sample_texts(source), args.vocab_size).save(path)
        say(f"tokenizer trained in {time.perf_counter() - start:.1f} s")
    tokenizer = load_tokenizer(path)
    sample = [source.turns(i)[0].text for i in spread(len(source), 200)]
    length = sum(len(part.encode()) for part in sample)
    tokens = sum(len(tokenizer.encode(part)) for part in sample)
    total = sum(file.stat().st_size for file in source.files)
    say(
        f"{tokenizer.vocab_size:,} kinds of tokens, {length / tokens:.2f} bytes each: "
        f"about {total / length * tokens / 1e6:.1f} million tokens"
    )


def collect(
    sources: Sequence[str], suffixes: Sequence[str], out: Path, most: int
) -> tuple[int, int]:
    """Writes each text once, as a file named by its content; gives how many, and their bytes."""
    seen: set[str] = set()
    size = 0
    for file in (f for source in sources for f in sorted(Path(source).rglob("*"))):
        if file.suffix not in suffixes or not file.is_file():
            continue
        data = file.read_bytes()
        name = hashlib.blake2b(data, digest_size=8).hexdigest()
        if name in seen or not data.strip() or not is_utf8(data):
            continue
        if size + len(data) > most:
            break
        seen.add(name)
        size += len(data)
        (out / f"{name}.txt").write_bytes(data)
        if len(seen) % 2000 == 0:
            say(f"{len(seen):,} files, {size / 1e6:.0f} MB")
    return len(seen), size


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# -- run --------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    end = time.monotonic() + args.seconds if args.seconds else None
    for lr in args.lrs:
        for optimizer in args.optimizers:
            if not train(args, optimizer, lr, end):
                say("out of time: the same command goes on")
                return


def train(args: argparse.Namespace, optimizer: str, lr: float, end: float | None) -> bool:
    """One training, or the rest of one. False if the time was over before it ended."""
    steps = max(2, round(args.tokens / (args.rows * args.sequence_len)))
    name = f"{optimizer}-{lr:g}-{args.tokens:g}"
    runs = args.work / "runs"
    done = runs / name / "done"
    if done.exists():
        say(f"{name} is there already")
        return True
    if end is not None and end - time.monotonic() < args.least:
        return False
    vocabulary = load_tokenizer(args.work / "tokenizer.json").vocab_size
    flags = {
        "name": name,
        "runs_dir": runs,
        "resume": "auto",
        "stage": "pretrain",
        "data": args.work / "text",
        "tokenizer": args.work / "tokenizer.json",
        "preset": args.preset,
        "optimizer": optimizer,
        "lr": lr,
        "steps": steps,
        "sequence_len": args.sequence_len,
        "device_batch_size": args.rows,
        "warmup_steps": max(1, steps // 20),
        "beta2": 0.95,
        "keep": "last",
        "val_every": max(1, steps // args.points),
        "save_every": steps,
        "eval_examples": 0,
        "samples": 0,
        "tensorboard": 0,
        "seed": args.seed,
    }
    command = [
        sys.executable,
        "-u",
        "-m",
        "runners.train",
        *(f"--{k}={v}" for k, v in flags.items()),
    ]
    rows = -(-vocabulary // 64) * 64
    command += [
        "--override",
        "vision=none",
        f"text.vocab_size={rows}",
        *args.override,
        *args.trainer,
    ]
    say(f"{name}: {steps} steps")
    status = watch(command, args.work / "logs" / f"{name}.log", end)
    # SIGTERM before the first step, where there is nothing to save yet, just ends the trainer
    if status not in (0, INTERRUPTED, -signal.SIGTERM):
        raise SystemExit(f"{name} ended with status {status}")
    if status == 0:
        done.touch()
    return status == 0


def watch(command: Sequence[str], log: Path, end: float | None) -> int:
    """Runs a command, its words here and in a log; at ``end`` it is asked to save and stop."""
    log.parent.mkdir(exist_ok=True)
    with (
        log.open("a") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        ended(process, end),
    ):
        print(" ".join(command), file=file, flush=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", file=file, flush=True)
            say(line.rstrip("\n"))
        return process.wait()


@contextmanager
def ended(process: subprocess.Popen[str], end: float | None) -> Iterator[None]:
    """Asks a process to end at a point of the monotonic clock, if it has not ended before."""
    timer = None
    if end is not None:
        left = max(0.0, end - time.monotonic())
        timer = threading.Timer(left, process.terminate)
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


# -- show -------------------------------------------------------------------------------------


def show(args: argparse.Namespace) -> dict[str, Curve]:
    curves = dict(read_curves(args.work / "runs", args.tokens))
    if not curves:
        raise SystemExit(f"no runs of {args.tokens:g} tokens in {args.work / 'runs'}")
    last = {name: curve[-1][1] for name, curve in curves.items()}
    target = min((loss for name, loss in last.items() if name.startswith("adamw")), default=None)
    for name, curve in curves.items():
        say(name)
        for tokens, loss in curve:
            say(f"  {tokens / 1e6:8.3f} million tokens: validation loss {loss:.4f}")
    for name in sorted(curves, key=lambda name: last[name]):
        needed = None if target is None else reached(curves[name], target)
        words = f", AdamW's best after {needed / 1e6:.3f} million tokens" if needed else ""
        say(f"{name}: {last[name]:.4f}{words}")
    draw(args.work / "muon_against_adamw.png", curves)
    say(f"drawn in {args.work / 'muon_against_adamw.png'}")
    return curves


def read_curves(runs: Path, tokens: float) -> Iterator[tuple[str, Curve]]:
    """By name; runs that have not ended are left out, for their last loss is none."""
    for folder in sorted(runs.glob(f"*-{tokens:g}")):
        if not (folder / "done").exists():
            say(f"{folder.name} has not ended: left out")
            continue
        config = open_run(folder).config
        batch = (
            config.data.sequence_len * config.data.device_batch_size * config.optim.grad_accum_steps
        )
        rows = [row for row in read_metrics(folder) if "val_loss" in row]
        yield folder.name, [(float(r["step"]) * batch, float(r["val_loss"])) for r in rows]  # type: ignore[arg-type]


def reached(curve: Curve, target: float) -> float | None:
    """Tokens at which a loss is reached, on the straight line between two measurements."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if high > target >= low:
            return before + (after - before) * (high - target) / (high - low)
    return None


def draw(path: Path, curves: dict[str, Curve]) -> None:
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, curve in curves.items():
        style = "-" if name.startswith("muon") else "--"
        axes.plot(
            [t / 1e6 for t, _ in curve],
            [v for _, v in curve],
            style,
            marker="o",
            markersize=3,
            label=name.rpartition("-")[0],
        )
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = parser.add_subparsers(required=True)
    first = parts.add_parser("prepare", help="collect text, train a tokenizer")
    first.add_argument("--sources", nargs="+", required=True, help="folders to search")
    first.add_argument("--suffix", nargs="+", default=[".py"])
    first.add_argument("--max_mb", type=float, default=250, help="of text, at most")
    first.add_argument("--vocab_size", type=int, default=16_384)
    first.set_defaults(do=prepare)
    second = parts.add_parser("run", help="train")
    second.add_argument("--optimizers", nargs="+", default=["adamw", "muon"])
    second.add_argument("--lrs", nargs="+", type=float, default=[2e-3])
    second.add_argument("--preset", default="small")
    second.add_argument("--override", nargs="+", default=[], help="more overrides of the preset")
    second.add_argument("--rows", type=int, default=32, help="of a batch")
    second.add_argument("--sequence_len", type=int, default=2048)
    second.add_argument("--points", type=int, default=10, help="validations")
    second.add_argument("--seed", type=int, default=0)
    second.add_argument("--seconds", type=float, help="stop in time to end after so many")
    second.add_argument("--least", type=float, default=30, help="begin nothing with less left")
    second.set_defaults(do=run)
    third = parts.add_parser("show", help="print and draw what came out")
    third.set_defaults(do=show)
    for part in (first, second, third):
        part.add_argument("work", type=Path, help="folder of all that is made")
    for part in (second, third):
        part.add_argument("--tokens", type=float, default=50e6, help="of each training")
    args = parser.parse_args(words[:cut])
    args.trainer = words[cut + 1 :]
    return args


def main(argv: Sequence[str] | None = None) -> object:
    args = parse(argv)
    return args.do(args)


if __name__ == "__main__":
    main()
