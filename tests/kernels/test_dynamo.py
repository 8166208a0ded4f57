"""Dynamo is told of our functions whoever imports it, and when."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The gradient of a Function of ours inside of torch.compile(torch.func.grad(f)): 1, but 0 if Dynamo
# looks inside and differentiates the rounding.
COMPILED = """
import torch
w = torch.tensor([[0.3, 1.0, -0.2]])
f = torch.compile(torch.func.grad(lambda w: straight_through(w).sum()), backend="aot_eager")
print("gradient", f(w).tolist())
"""
OURS = "from transforms.quantize_int8 import straight_through"
ABSENT = "import sys; assert 'torch._dynamo' not in sys.modules"
RIGHT = "gradient [[1.0, 1.0, 1.0]]"


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "lines",
    [
        (OURS, ABSENT, "import torch._dynamo.utils", COMPILED),
        ("import torch._dynamo", OURS, COMPILED),
        # while another thread imports it
        (
            "import threading, importlib, time",
            "thread = threading.Thread(target=importlib.import_module, args=('torch._dynamo',))",
            "thread.start(); time.sleep(0.5)",
            *(OURS, "thread.join()", COMPILED),
        ),
    ],
    ids=["ours first", "Dynamo first", "two threads"],
)
def test_gradients_are_right_in_every_order_of_imports(lines: tuple[str, ...]) -> None:
    done = run(*lines)
    assert RIGHT in done.stdout, done.stdout + done.stderr


def test_a_dynamo_that_was_not_told_is_refused() -> None:
    """Without fullgraph Dynamo steps back instead, and the function runs as it is."""
    untold = "import kernels.runtime.dynamo; kernels.runtime.dynamo._waiting.clear()"
    whole = COMPILED.replace("backend=", "fullgraph=True, backend=")
    done = run(OURS, untold, whole)
    assert done.returncode != 0
    assert "without telling nanovision" in done.stderr
    assert "gradient" not in done.stdout
