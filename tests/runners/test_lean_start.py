"""What a run does not import before its first step is over: seconds that come back unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.runners.conftest import OVERRIDE

# `python -m runners.train` that ends after its first step, and says which modules are there
PROGRAM = """
import json, sys
from runners import train
from runners.training import step

before = step.Learner.train_step

def first(self, *args):
    before(self, *args)
    print(json.dumps(sorted(sys.modules)))
    raise SystemExit(0)

step.Learner.train_step = first
train.main()
"""
# Seconds on a slow core, torch 2.13. On a GPU flash-attn 4 imports Dynamo itself
LATER = {
    "torch._dynamo": "1.2: kernels.runtime.dynamo tells it what it has to know once it is imported",
    "torch._inductor": "1 more: only torch.compile needs it",
    "matplotlib": "0.5: the pictures come at the end",
    "tensorboard": "0.3: for the first row of numbers (runners.training.metrics)",
    "torch.utils.tensorboard": "as tensorboard",
    "transformers": "seconds: only foreign models need it",
    "wandb": "seconds: only with --wandb",
}


def test_the_first_step_comes_before_what_only_later_ones_need(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--runs_dir", str(tmp_path), "--sequence_len", "96"]
    flags += ["--override", *OVERRIDE]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *flags], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.splitlines()[-1])
    assert "runners.train" in imported
    assert {name: LATER[name] for name in imported if name in LATER} == {}
