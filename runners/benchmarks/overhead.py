"""`bench overhead`: a module's forward through `from_module`, beside the module itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from core import from_module
from runners.benchmarks.clock import Clock, CpuClock, CudaClock, measured_ceilings
from runners.benchmarks.harness import Case, Settings
from runners.benchmarks.kernels import Cases
from runners.benchmarks.kernels import bench as measure_cases
from runners.benchmarks.providers import Forward, Inputs, MissingError, Provider
from runners.benchmarks.report import console
from runners.shell.cli import UsageError

Run = Callable[[], Tensor]
TURNS = 20  # of a round
LEGEND = (
    "ms: median of one forward without gradients. speed: the module's time over this one's. error: "
    "the worst |x - y| / |y| against the module's results."
)


@dataclass(frozen=True)
class OverheadConfig:
    """Times a Hugging Face Llama's forward, by itself and through from_module, eager and through
    torch.compile; on the CPU, and on a GPU if there is one."""

    tokens: tuple[int, ...] = (16, 128, 1024)
    """Sizes, in tokens of one document."""
    layers: int = 8
    width: int = 256
    compiled: bool = True
    """Measure through torch.compile too."""
    rounds: int = 15
    """Rounds in which both take turns."""
    seconds: float = 0.1
    """Measuring time of each in a round."""
    out: str = "runs/bench"
    """Folder for overhead.jsonl, .md and .png, of a GPU overhead_cuda; replaced if there."""


def llama_pair(config: OverheadConfig, tokens: int, device: torch.device) -> tuple[Run, Run]:
    """(the module, its pure forward), on the same weights and tokens. Raises MissingError without
    transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingError("not installed (pip install transformers)") from None

    torch.manual_seed(0)
    module: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=config.width,
            intermediate_size=3 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 64,
            num_key_value_heads=config.width // 64,
        )
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    module = module.to(device, dtype).eval()
    forward, params = from_module(module)
    batch = {"input_ids": torch.randint(1024, (1, tokens)).to(device)}

    def direct() -> Tensor:
        return module(**batch, use_cache=False).logits

    return direct, partial(forward, params, batch)


def case(config: OverheadConfig, device: torch.device, tokens: int, compiled: bool) -> Case:
    pair: list[Run] = []  # made once, for both

    def provider(name: str, which: int) -> Provider:
        def build(sets: Sequence[Inputs]) -> Forward:
            if not pair:
                pair.extend(llama_pair(config, tokens, device))
            run = pair[which]
            return lambda i: run()

        return Provider(name, build, compiled=compiled, graph=False)

    by = "compiled" if compiled else "eager"
    return Case(
        "from_module",
        f"{tokens:,} tokens",
        0.0,
        "bf16",
        lambda device, generator: {},
        (provider("module", 0), provider("from_module", 1)),
        sets=1,
        reference="module",
        direction=f"{by}, {device.type.upper()}",
    )


def run_overhead(config: OverheadConfig, command: str) -> int:
    """Raises UsageError for sizes that make no model."""
    if config.width < 64 or config.width % 64:
        raise UsageError(f"--width must be a multiple of 64, not {config.width}")
    for name in ("layers", "rounds", "seconds"):
        if getattr(config, name) <= 0:
            raise UsageError(f"--{name} must be more than 0, not {getattr(config, name)}")
    if not config.tokens or min(config.tokens) < 1:
        raise UsageError(f"--tokens must be 1 or more, not {config.tokens}")
    clocks: list[Clock] = [CpuClock(), *([CudaClock()] if torch.cuda.is_available() else [])]
    for clock in clocks:
        bench(config, clock, command, console())
    return 0


def bench(
    config: OverheadConfig, clock: Clock, command: str, output: Console, backend: str = "inductor"
) -> int:
    """Writes overhead.* of the CPU, overhead_cuda.* of a GPU."""
    name = "overhead" if clock.device.type == "cpu" else "overhead_cuda"
    size = f"A model of {config.layers} layers, {config.width} wide; fp32 on a CPU, bf16 on a GPU."
    what = Cases(name, "Overhead", f"{LEGEND} {size}", "speed")
    # a turn is a call or two, so that other load on the machine hits both alike
    settings = Settings(TURNS * config.rounds, config.seconds * config.rounds, backend)
    ways = (False, True) if config.compiled else (False,)
    cases = [case(config, clock.device, n, by) for n in config.tokens for by in ways]
    out = Path(config.out)
    return measure_cases(cases, clock, settings, out, command, output, measured_ceilings, what)
