"""flash-attn 4's kernels are compiled by other processes, for exactly what a run will call."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kernels
from core import Longest
from kernels.attention import attention_flash
from kernels.runtime import dispatch, program_cache
from runners.shell import compile_ahead
from runners.shell.compile_ahead import PARTS, Attention
from runners.train import train
from runners.training import loop, warming
from runners.training.config import TrainConfig
from runners.training.setup import bounds, prepare
from runners.training.step import to_device
from tests.runners.conftest import OVERRIDE

TEXT = Attention(512, 8, 4, 2, 64, 256, None, True, None, False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `process.start` was asked to start; nothing is."""
    modules: list[str] = []
    link = SimpleNamespace(close=lambda: None)
    popen = SimpleNamespace(kill=lambda: None, wait=lambda: 0)
    monkeypatch.setattr(
        compile_ahead.process,
        "start",
        lambda module, quiet: modules.append(module) or compile_ahead.Process(link, popen),  # type: ignore[func-returns-value,arg-type]
    )
    monkeypatch.setattr(compile_ahead, "_spare", [])
    return modules


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An H200 and flash-attn 4, as far as this module asks. Returns the cache's folder."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(compile_ahead, "installed", lambda: True)
    monkeypatch.setattr(compile_ahead, "_DEVICES", (os.devnull,))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(attention_flash, "_until", {part: [] for part in PARTS})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (program_cache.ENABLED, program_cache.FOLDER, program_cache.QUACK_FOLDER):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path / "nanovision" / "flash-attn-4" / "nvidia-h200"


def test_processes_are_begun_early_where_nothing_is_compiled(
    gpu: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ahead.expect()
    assert started == ["runners.shell.compiler"] * len(PARTS)
    (gpu / "source" / "fwd").mkdir(parents=True)
    (gpu / "source" / "fwd" / "kernel.o").touch()
    compile_ahead.expect()
    assert len(started) == len(PARTS)  # another device's would count too
    monkeypatch.setenv(program_cache.FOLDER, str(gpu / "elsewhere"))
    compile_ahead.expect()
    assert len(started) == 2 * len(PARTS)
    monkeypatch.setattr(compile_ahead, "installed", lambda: False)
    compile_ahead.expect()
    monkeypatch.setattr(compile_ahead, "installed", lambda: True)
    monkeypatch.setattr(compile_ahead, "_DEVICES", ("/dev/no-such-gpu",))
    compile_ahead.expect()
    monkeypatch.setattr(compile_ahead, "_DEVICES", (os.devnull,))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    compile_ahead.expect()
    assert len(started) == 2 * len(PARTS)


def test_only_what_was_not_compiled_before(gpu: Path) -> None:
    jobs = compile_ahead._jobs([TEXT, TEXT])
    assert [job.part for job in jobs] == list(PARTS)
    assert {job.mark.parent for job in jobs} == {gpu}
    assert jobs[0].environment["CUTE_DSL_ARCH"] == "sm_90a"
    assert jobs[0].environment["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(gpu)
    jobs[0].mark.touch()
    assert [job.part for job in compile_ahead._jobs([TEXT])] == ["backward"]
    more = TEXT._replace(tokens=4096, documents=64, longest=2048, window=None)
    longer = more._replace(longest=1024)
    assert len(compile_ahead._jobs([more, longer])) == len(PARTS)  # one set of kernels serves both
    other = TEXT._replace(head_dim=128)
    assert len(compile_ahead._jobs([TEXT, other])) == 3


@pytest.mark.usefixtures("gpu")
def test_processes_without_a_job_are_ended_at_once() -> None:
    compile_ahead.expect()
    helpers = list(compile_ahead._spare)
    assert len(helpers) == len(PARTS)
    compile_ahead.begin([])
    assert compile_ahead._spare == []
    assert all(helper.popen.returncode == -signal.SIGKILL for helper in helpers)


@pytest.mark.usefixtures("gpu")
def test_one_that_died_early_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    compile_ahead.expect()
    for helper in compile_ahead._spare:
        helper.popen.kill()
        helper.popen.wait()
    compile_ahead.begin([TEXT])
    for part in PARTS:
        attention_flash._wait_for(part)
    assert ["its process ended" in record.getMessage() for record in caplog.records] == [True] * 2


@pytest.mark.usefixtures("gpu")
def test_one_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_ahead, "PATIENCE", 0.01)
    compile_ahead.begin([TEXT])
    for part in PARTS:
        attention_flash._wait_for(part)
    assert ["takes over" in record.getMessage() for record in caplog.records] == [True, True]


@pytest.mark.usefixtures("gpu")
def test_nothing_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    monkeypatch.setenv(program_cache.ENABLED, "0")
    compile_ahead.begin([TEXT])
    assert started == []


def test_a_failure_is_said_and_the_call_goes_on(
    gpu: Path, caplog: pytest.LogCaptureFixture
) -> None:
    impossible = TEXT._replace(kv_heads=3)  # where flash-attn 4 is missing, that is the failure
    compile_ahead.begin([impossible])
    with caplog.at_level(logging.WARNING, "runners"):
        for part in PARTS:
            assert len(attention_flash._until[part]) == 1
            attention_flash._wait_for(part)
            attention_flash._wait_for(part)  # once is enough
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "flash-attn 4's forward was not compiled ahead" in told[0]
    assert "Error" in told[0]
    assert not list(gpu.glob("*.compiled"))


def test_what_is_compiled_is_what_a_run_calls(
    micro: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Attention] = []
    attention = kernels.attention

    def spy(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, **how: Any
    ) -> Any:
        length = how.get("length")
        called.append(
            Attention(
                q.shape[0], len(ends) - 1, q.shape[1], k.shape[1], q.shape[2],
                length or how["max_seqlen"], length, how["causal"], how.get("window"), False,
            )
        )  # fmt: skip
        return attention(q, k, v, ends, **how)

    config = micro(override=(*OVERRIDE, "text.window=16", "text.global_every=2"))
    job = prepare(config)
    try:
        batch = to_device(next(iter(job.loader)), job.device)
    finally:
        job.loader.close()
    monkeypatch.setattr(kernels, "attention", spy)
    job.composed.loss_fn(job.params, batch)
    monkeypatch.setattr(dispatch, "wants_flash_attn_4", lambda **_: True)
    monkeypatch.setattr(warming, "compute_dtype", lambda *_: (torch.bfloat16, ""))
    cuda = torch.device("cuda")
    found = warming.attentions(config, job.model, cuda, job.spec, bounds(job.spec))
    assert set(found) == set(called)
    assert len(found) == 3  # of the decoder, with and without a window, and of the eye
    assert warming.attentions(config, job.model, job.device, job.spec, Longest()) == []


CALLS = """
import glob, os, torch
from kernels import attention, override
from kernels.attention import attention_flash
from runners.shell import compile_ahead
job = compile_ahead.Attention(*{job!r})
compile_ahead.begin([job])
waits = {{part: len(found) for part, found in attention_flash._until.items()}}
for part in compile_ahead.PARTS:
    attention_flash._wait_for(part)
def kept():
    folder = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]
    return sorted(glob.glob(folder + "/**/*.o", recursive=True))
before = kept()
q, k, v = (
    torch.randn(job.tokens, n, job.head_dim, device="cuda").bfloat16().requires_grad_()
    for n in (job.heads, job.kv_heads, job.kv_heads)
)
ends = torch.linspace(0, job.tokens, job.documents + 1, device="cuda").int()
with override(attention="flash-attn-4"):
    out = attention(
        q, k, v, ends, causal=job.causal, window=job.window, max_seqlen=job.longest,
        length=job.length,
    )
    out.sum().backward()
torch.cuda.synchronize()
assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))
print(waits, len(before) >= 4, kept() == before)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not compile_ahead.installed(), reason="needs flash-attn 4")
@pytest.mark.parametrize("job", [TEXT])  # one kind: each takes 40 s
def test_calls_find_what_was_compiled(job: Attention, tmp_path: Path) -> None:
    environment = os.environ | {
        program_cache.FOLDER: str(tmp_path), program_cache.ENABLED: "1",
    }  # fmt: skip
    for expected in ("{'forward': 1, 'backward': 1}", "{'forward': 0, 'backward': 0}"):
        done = subprocess.run(
            [sys.executable, "-c", CALLS.format(job=tuple(job))],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{expected} True True"


RUN = """
import json, sys
from runners.shell import compile_ahead
compile_ahead.expect()
from runners import train
from runners.training import loop
from runners.training.metrics import read_metrics
rehearse, rehearsed = loop.rehearse, []
loop.rehearse = lambda *args: rehearsed.append(rehearse(*args))
assert train.main() == 0
folder = sys.argv[sys.argv.index("--runs_dir") + 1] + "/" + sys.argv[sys.argv.index("--name") + 1]
from pathlib import Path
print(json.dumps([rehearsed, read_metrics(Path(folder))[0]["loss"]]))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(not compile_ahead.installed(), reason="needs flash-attn 4")
def test_a_first_run_rehearses_and_computes_the_same(tmp_path: Path) -> None:
    environment = os.environ | {
        program_cache.FOLDER: str(tmp_path / "flash"), program_cache.ENABLED: "1",
    }  # fmt: skip
    losses = []
    for name, rehearsed in (("cold", [True]), ("warm", [])):
        flags = [
            "--runs_dir", str(tmp_path), "--name", name, "--sequence_len", "1024", "--steps", "4",
            "--log_every", "1", "--val_every", "0", "--eval_examples", "0", "--samples", "0",
            "--override", *OVERRIDE, "text.dim=256",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", RUN, *flags],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "was not compiled ahead" not in done.stdout + done.stderr
        found, loss = json.loads(done.stdout.splitlines()[-1])
        assert found == rehearsed
        losses.append(loss)
    assert losses[0] == losses[1]  # of the first step: flash-attn 4 sums gradients in any order


def test_a_wait_that_nobody_ends_is_rehearsed_for_once(
    micro: Callable[..., TrainConfig], quiet: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsals: list[int] = []
    monkeypatch.setattr(attention_flash, "_until", {"forward": [], "backward": [lambda: None]})
    monkeypatch.setattr(loop, "rehearse", lambda *_: rehearsals.append(1))
    assert train(micro(steps=4), quiet()) is not None
    assert rehearsals == [1]
