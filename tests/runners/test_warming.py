"""What a GPU's first kernels wait for begins beside other work, and no failure of it ends a run."""

from __future__ import annotations

import threading

import pytest
import torch

from runners.training import warming


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_nothing_is_begun_for_a_cpu() -> None:
    before = names()
    with warming.warming(torch.device("cpu")):
        assert names() == before


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_done_at_the_end(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done, may_end = [], threading.Event()

    def opening(device: torch.device) -> None:
        may_end.wait(60)
        done.append(device)
        if fails:
            raise RuntimeError("no such device")

    monkeypatch.setattr(warming, "_open", opening)
    monkeypatch.setattr(warming, "_hash_triton", lambda: done.append("hashed"))
    device = torch.device("cuda")
    with warming.warming(device):
        assert "warming" in names()
        may_end.set()
    assert set(done) == {device, "hashed"}
    assert "warming" not in names()


def test_triton_hashes_itself_once() -> None:
    key = pytest.importorskip("triton.runtime.cache").triton_key
    warming._hash_triton()
    hits = key.cache_info().hits
    key()
    assert key.cache_info().hits == hits + 1
