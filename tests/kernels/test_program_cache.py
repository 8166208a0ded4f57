"""flash-attn 4 and quack are told where to keep their kernels, in a folder of the device, unless a
user says no."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from kernels.runtime import program_cache


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in (program_cache.ENABLED, program_cache.FOLDER, program_cache.QUACK_FOLDER):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("gpu")
def test_a_folder_for_each_kind_of_device(tmp_path: Path) -> None:
    program_cache.keep()
    assert os.environ[program_cache.ENABLED] == "1"
    folder = Path(os.environ[program_cache.FOLDER])
    assert folder == tmp_path / "nanovision" / "flash-attn-4" / "nvidia-h200"
    assert folder.is_dir()
    assert Path(os.environ[program_cache.QUACK_FOLDER]) == tmp_path / "nanovision/quack/nvidia-h200"


@pytest.mark.usefixtures("gpu")
def test_what_the_environment_says_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(program_cache.FOLDER, str(tmp_path / "mine"))
    program_cache.keep()
    assert os.environ[program_cache.FOLDER] == str(tmp_path / "mine")
    assert os.environ[program_cache.ENABLED] == "1"
    monkeypatch.setenv(program_cache.ENABLED, "0")
    monkeypatch.setenv(program_cache.QUACK_FOLDER, "elsewhere")
    program_cache.keep()
    assert os.environ[program_cache.ENABLED] == "0"
    assert os.environ[program_cache.QUACK_FOLDER] == "elsewhere"


@pytest.mark.usefixtures("gpu")
def test_nothing_is_kept_where_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    program_cache.keep()
    assert program_cache.ENABLED not in os.environ
    assert program_cache.QUACK_FOLDER not in os.environ
