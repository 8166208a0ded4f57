"""Measures what this project claims to be fast.

python -m runners.bench train                # whole training steps, from plain PyTorch to ours
    --peers                                  #     and Hugging Face on the same shape
    --lengths 0.7                            #     and documents of many lengths
    --pictures 1 --lengths 0.7               #     and the whole model, a picture in each document
    --data FILE.json --only graph padded     #     and packed against padded on documents of yours
python -m runners.bench lengths              # whole steps on rows of 2,048 to 131,072 tokens
python -m runners.bench memory               # fp32, bf16, int8: what a step holds, what fits
python -m runners.bench kernels --peers      # every kernel beside torch and other libraries
python -m runners.bench foreign              # Hugging Face's Qwen2 through from_module, Liger
python -m runners.bench overhead             # what pure functions cost, beside the same modules
python -m runners.bench checkpointing        # memory and time of each way to checkpoint
python -m runners.bench trace                # which of our kernels a training step really runs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from runners.benchmarks.foreign import ForeignConfig
from runners.benchmarks.kernels import KernelsConfig, run_kernels
from runners.benchmarks.ladders import CheckpointingConfig, LengthsConfig, MemoryConfig
from runners.benchmarks.overhead import OverheadConfig, run_overhead
from runners.benchmarks.steps import run_step_bench
from runners.benchmarks.trace import TraceConfig, run_trace
from runners.benchmarks.training import TrainBenchConfig
from runners.shell.cli import UsageError, guarded, nearest, parse


class Command(NamedTuple):
    config: type[Any]
    run: Callable[[Any, str], int]  # with the command line, as the results quote it


COMMANDS = {
    "train": Command(TrainBenchConfig, run_step_bench),
    "lengths": Command(LengthsConfig, run_step_bench),
    "memory": Command(MemoryConfig, run_step_bench),
    "kernels": Command(KernelsConfig, run_kernels),
    "foreign": Command(ForeignConfig, run_step_bench),
    "overhead": Command(OverheadConfig, run_overhead),
    "checkpointing": Command(CheckpointingConfig, run_step_bench),
    "trace": Command(TraceConfig, run_trace),
}


def run(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    name, *flags = argv
    if name not in COMMANDS:
        known = list(COMMANDS)
        raise UsageError(f"bench {name}: there are {', '.join(known)}{nearest(name, known)}")
    prog = f"python -m runners.bench {name}"
    config = parse(COMMANDS[name].config, flags, prog=prog)
    return COMMANDS[name].run(config, " ".join([prog, *flags]))


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(lambda: run(argv))


if __name__ == "__main__":
    raise SystemExit(main())
