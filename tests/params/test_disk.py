"""The order in which files reach the disk: what a power cut may find at any moment is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from params import load_params, save_params
from params.disk import make_folder, sync, write_text

Op = tuple[str, str]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """What is flushed, renamed and removed, by name, in order."""
    found: list[Op] = []
    fsync = os.fsync

    def flushed(fd: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        fsync(fd)

    def noted(kind: str, plain: Callable[..., None]) -> Callable[..., None]:
        def call(path: str | Path, *args: str | Path, **keywords: object) -> None:
            plain(path, *args, **keywords)
            found.append((kind, Path(args[0] if args else path).name))

        return call

    monkeypatch.setattr(os, "fsync", flushed)
    for name in ("replace", "unlink"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    return found


def test_a_file_is_on_the_disk_before_its_name(tmp_path: Path, operations: list[Op]) -> None:
    write_text(tmp_path / "a.json", "{}")
    assert operations == [("fsync", "a.json.part"), ("replace", "a.json"), ("fsync", tmp_path.name)]


def test_a_new_folder_is_on_the_disk_too(tmp_path: Path, operations: list[Op]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert sorted(operations) == sorted([("fsync", "a"), ("fsync", tmp_path.name)])
    make_folder(tmp_path / "a" / "b")
    assert len(operations) == 2


def test_an_older_checkpoint_goes_after_the_newer_is_on_the_disk(
    tmp_path: Path, operations: list[Op]
) -> None:
    params = {str(i): torch.ones(256) for i in range(3)}
    for limit in (1024, 1024, 2**30):
        operations.clear()
        save_params(params, tmp_path, max_shard_bytes=limit)
        kinds = [kind for kind, _ in operations]
        named = kinds.index("replace")
        assert ("fsync", tmp_path.name) in operations[named:]
        after = operations.index(("fsync", tmp_path.name))
        assert "unlink" not in kinds[:after]
        written = {name for kind, name in operations[:named] if kind == "fsync"}
        assert len(written) == (1 if limit > 1024 else 4)


def test_what_has_a_name_to_be_written_is_replaced_never_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "a.part").symlink_to(tmp_path / "mine")
    (tmp_path / "model.safetensors.part").symlink_to(tmp_path / "mine")
    write_text(tmp_path / "a", "é")
    save_params({"w": torch.ones(2)}, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "a").read_bytes() == "é".encode()
    assert load_params(tmp_path)["w"].tolist() == [1, 1]


def test_folders_that_cannot_be_flushed_are_as_safe_as_their_system_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
