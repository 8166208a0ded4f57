"""The suite on other kinds of CPU than this one, as far as libraries can be told: which tests fail.

    python tests/any_cpu.py                    # everything, some 15 minutes for each kind
    python tests/any_cpu.py tests/kernels      # some paths

PyTorch's own loops and numpy's OpenBLAS, which multiplies in Triton's interpreter, choose their
instructions by the CPU; so sums are made in other orders, with and without fused multiplications.
Tests that compile for GPUs are left out: they compute nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "tests" / "kernels"
VARIABLES = ("ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE")
# each value once, and together: a run costs as long as CI
KINDS = [("default", "Haswell"), ("avx2", "SkylakeX"), ("", "")]


def run(paths: list[str], kind: tuple[str, ...], interpreted: bool) -> tuple[str, list[str]]:
    """The last line of a run, and the names of what failed."""
    environment = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "TRITON_INTERPRET")}
    environment |= {name: value for name, value in zip(VARIABLES, kind, strict=True) if value}
    # what Inductor keeps does not say for which capability it was written
    room = Path(tempfile.gettempdir()) / f"inductor-{'-'.join(value or 'unset' for value in kind)}"
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(room)
    which = "not slow and not real_weights and not compiles"
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
        which = "interpreter"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    if done.returncode not in (0, 1, 5):  # 5: nothing is selected
        failed.append(f"pytest ended with {done.returncode}: {done.stderr[-300:]}")
    return lines[-1] if lines else "", failed


def main(arguments: list[str]) -> int:
    paths = arguments or ["tests", "core", "kernels", "params", "transforms", "runners"]
    inside = [p for p in paths if (ROOT / p.partition("::")[0]).resolve().is_relative_to(KERNELS)]
    inside += ["tests/kernels"] if "tests" in paths else []
    failures: list[str] = []
    print(f"| {' | '.join(VARIABLES)} | run | result |\n|---|---|---|---|", flush=True)
    for kind in KINDS:
        for name, chosen in (("tests", paths), ("interpreter", inside)):
            if not chosen:
                continue
            result, failed = run(chosen, kind, name == "interpreter")
            cells = (*(value or "unset" for value in kind), name, result)
            print(f"| {' | '.join(cells)} |", flush=True)
            failures += [f"{kind}: {line}" for line in failed]
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
