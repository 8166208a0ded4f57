"""Where runs and states lie, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core import config_from_dict
from params import init_params
from runners.data.encode.tokenizer import train_tokenizer
from runners.shell.errors import UserError
from runners.training.checkpoints import (
    check_disk,
    claim_folder,
    create_folder,
    load_weights,
    open_run,
)
from runners.training.config import TrainConfig, model_config
from runners.training.states import (
    TrainState,
    find_states,
    keep_states,
    load_state,
    newest_state,
    save_state,
    sweep_states,
)
from runners.training.step import rng_state, set_rng_state

Micro = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def _state(config: TrainConfig, step: int) -> TrainState:
    params = init_params(model_config(config.model), seed=step)
    moments = {"exp_avg.text.norm.weight": torch.full((32,), float(step))}
    return TrainState(step, params, moments, {"epoch": 1, "waiting": [[0, 1, 2]]}, 0.5, rng_state())


def test_a_state_comes_back_whole(micro: Micro, tmp_path: Path) -> None:
    config = micro(steps=20)
    saved = _state(config, 12)
    torch.rand(7)  # moves the generator on from what was saved
    path = save_state(tmp_path, saved, config)
    assert newest_state(tmp_path) == path
    found = load_state(path, init_params(model_config(config.model), device="meta"), config, CPU)
    assert (found.step, found.best, found.loader) == (12, 0.5, saved.loader)
    assert torch.equal(
        found.params["text"]["norm"]["weight"], saved.params["text"]["norm"]["weight"]
    )
    assert found.moments.keys() == saved.moments.keys()
    assert found.moments["exp_avg.text.norm.weight"][0] == 12
    set_rng_state(found.rng)
    expected = torch.rand(3)
    set_rng_state(saved.rng)
    assert torch.equal(torch.rand(3), expected)


def test_a_state_that_cannot_be_written_leaves_nothing(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = micro()
    save_state(tmp_path, _state(config, 3), config)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runners.training.states.write_text", full)
    with pytest.raises(UserError, match=r"cannot write .*00000004: .*No space left on device"):
        save_state(tmp_path, _state(config, 4), config)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["00000003"]


def test_only_states_are_removed(micro: Micro, tmp_path: Path) -> None:
    """Whatever else lies beside or inside of them is somebody's, links lead elsewhere."""
    config, states = micro(), tmp_path / "state"
    for step in (3, 4, 5):
        save_state(tmp_path, _state(config, step), config)
    foreign = ["backup", "00000099", "²", "123", "00000042", ".DS_Store", "00000007.txt"]
    for name in foreign[:4]:
        (states / name).mkdir()
    (states / "backup" / "state.json").touch()
    (states / "00000042").symlink_to(states / "00000004")
    for name in foreign[5:]:
        (states / name).touch()
    (states / "00000003" / "notes").touch()
    (states / "00000008.part").mkdir()
    (states / "00000008.part" / "stateb-00001-of-00002.safetensors.part").touch()
    (states / "00000008.part" / "state.safetensors.part").touch()
    (states / "00000009.part").mkdir()
    (states / "00000009.part" / "state-00001-of-00002.safetensors").touch()
    assert [p.name for p in find_states(tmp_path)] == ["00000003", "00000004", "00000005"]
    assert newest_state(tmp_path) == states / "00000005"
    keep_states(tmp_path, [5])
    sweep_states(tmp_path)
    left = {p.name for p in states.iterdir()}
    assert left == {*foreign, "00000005", "00000003.part", "00000008.part"}
    assert [p.name for p in (states / "00000003.part").iterdir()] == ["notes"]
    assert (states / "backup" / "state.json").exists()
    # An empty folder is no obstacle to the state of its step; one that holds something is.
    save_state(tmp_path, _state(config, 99), config)
    assert newest_state(tmp_path) == states / "00000099"
    (states / "00000100").mkdir()
    (states / "00000100" / "mine").touch()
    with pytest.raises(UserError, match=r"cannot write .*00000100"):
        save_state(tmp_path, _state(config, 100), config)


def test_a_state_is_on_the_disk_before_it_has_its_name(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.add(os.readlink(f"/proc/self/fd/{fd}")))
    replace, part = os.replace, tmp_path / "state" / "00000003.part"

    def named(old: Path, new: Path) -> None:
        if old == part:
            assert {str(part), *(f"{p}.part" for p in part.iterdir())} <= flushed
            flushed.clear()
        replace(old, new)

    monkeypatch.setattr(os, "replace", named)
    save_state(tmp_path, _state(micro(), 3), micro())
    assert flushed == {str(part.parent)}


def test_a_flipped_bit_is_found_and_the_state_before_it_used(
    micro: Micro, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = micro()
    older, path = (save_state(tmp_path, _state(config, step), config) for step in (3, 5))
    like = init_params(model_config(config.model), device="meta")
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    random = np.random.default_rng(0)
    for turn in range(40):
        name = sorted(whole)[turn % 2]
        broken = bytearray(whole[name])
        at = int(random.integers(len(broken) if turn % 4 else 300))
        broken[at] ^= 1 << int(random.integers(8))
        (path / name).write_bytes(broken)
        caplog.clear()
        if newest_state(tmp_path) == older:
            assert str(path) in caplog.text
            with pytest.raises(UserError, match=str(path)):
                load_state(path, like, config, CPU)
        else:  # it changed nothing: the name of the checksum, or a letter of white space
            assert torch.equal(
                load_state(path, like, config, CPU).params["text"]["embed"]["weight"],
                init_params(model_config(config.model), seed=5)["text"]["embed"]["weight"],
            )
            assert at < 400
        (path / name).write_bytes(whole[name])
    (path / "state.json").write_text("{")  # and a run that goes on from the older replaces it
    assert save_state(tmp_path, _state(config, 5), config) == newest_state(tmp_path) == path
    for damaged in (older, path):
        (damaged / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"every state in .* is damaged"):
        newest_state(tmp_path)


def test_a_state_of_another_config_is_refused_by_name(micro: Micro, tmp_path: Path) -> None:
    like = init_params(model_config(micro().model), device="meta")
    path = save_state(tmp_path, _state(micro(), 3), micro())
    load_state(path, like, micro(log_every=7, stop_at=9), CPU)
    with pytest.raises(UserError, match="another config") as caught:
        load_state(path, like, micro(lr=0.5, seed=9), CPU)
    assert "--seed 0 -> 9, --lr 0.0012 -> 0.5" in str(caught.value)
    assert "--init_from" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("state.json", b"{", "state.json is damaged"),
        ("state.json", b"[]", "state.json is damaged"),
        ("state.json", b"[" * 100_000, "state.json is damaged"),
        ("state.json", b'{"version": 99, "config": {}}', "format 99"),
        (
            "state.json",
            b'{"version": 2, "config": {}}',
            "state.json .* does not match its checksum",
        ),
        ("state.safetensors", b"not safetensors", "state.safetensors"),
        ("state.safetensors", None, "state.safetensors"),
    ],
)
def test_a_damaged_state_is_named(
    micro: Micro, tmp_path: Path, file: str, damage: bytes | None, said: str
) -> None:
    path = save_state(tmp_path, _state(micro(), 3), micro())
    (path / file).unlink()
    if damage is not None:
        (path / file).write_bytes(damage)
    with pytest.raises(UserError, match=said):
        load_state(path, init_params(model_config(micro().model), device="meta"), micro(), CPU)


def test_a_state_of_another_shape_is_refused(micro: Micro, tmp_path: Path) -> None:
    path = save_state(tmp_path, _state(micro(), 3), micro())
    data = model_config(micro().model).to_dict()
    data["text"]["mlp_dim"] = 64
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight"):
        load_state(path, init_params(config_from_dict(data), device="meta"), micro(), CPU)


def claimed(config: TrainConfig) -> tuple[Path, Path | None]:
    claim = claim_folder(config)
    claim.release()
    return claim.folder, claim.state


def test_names_of_runs(micro: Micro, tmp_path: Path) -> None:
    runs = Path(micro().run.runs_dir)
    unnamed = micro(name=None)
    assert claimed(unnamed) == (runs / "shapes-tiny", None)
    assert claimed(micro(resume="auto")) == (runs / "micro", None)
    assert not runs.exists()
    for name in ("shapes-tiny", "shapes-tiny-2", "micro"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").touch()
    assert claimed(unnamed) == (runs / "shapes-tiny-3", None)
    assert claimed(micro(name=None, data="pets/train.json"))[0] == runs / "train-tiny"
    with pytest.raises(UserError, match="--resume=auto, or choose another --name"):
        claimed(micro())
    state = save_state(runs / "shapes-tiny", _state(unnamed, 7), unnamed)
    auto = micro(name=None, resume="auto")
    assert claimed(auto) == (runs / "shapes-tiny", state)
    for path in (state, runs / "shapes-tiny"):
        assert claimed(micro(resume=str(path))) == (runs / "shapes-tiny", state)
    assert claimed(micro(resume=str(runs / "micro"))) == (runs / "micro", None)
    with pytest.raises(UserError, match="no resumable state"):
        claimed(micro(resume=str(runs / "nowhere")))
    older = save_state(runs / "shapes-tiny", _state(unnamed, 5), unnamed)
    (state / "state.json").write_text("{")
    assert claimed(auto) == (runs / "shapes-tiny", older)
    with pytest.raises(
        UserError, match=r"damaged.* --resume=.*shapes-tiny' takes the newest whole"
    ):
        claimed(micro(resume=str(state)))


def test_a_run_that_saved_nothing_begins_again(micro: Micro) -> None:
    """Killed before its first state, at whichever file."""
    auto, folder = micro(resume="auto"), Path(micro().run.runs_dir) / "micro"
    folder.mkdir(parents=True)
    for name in (
        ".lock",
        "tokenizer.json.part",
        ".tmpAbc123",
        "tokenizer.json",
        "config.json.part",
    ):
        (folder / name).touch()
        assert claimed(auto) == (folder, None)
        claimed(micro())  # not even named in vain
    assert {p.name for p in folder.iterdir()} == {"tokenizer.json"}
    (folder / "notes").touch()
    with pytest.raises(UserError, match="is not the folder of a run"):
        claimed(auto)
    (folder / "config.json").touch()
    (folder / "state" / "00000012").mkdir(parents=True)
    (folder / "loss.png.part").touch()
    (folder / "mine.part").touch()
    assert claimed(auto) == (folder, None)
    assert {p.name for p in folder.iterdir()} == {
        "tokenizer.json",
        "notes",
        "config.json",
        "state",
        "mine.part",
    }
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match="has weights but no state"):
        claimed(auto)


def test_an_unnamed_run_begins_again_if_it_was_told_the_same(micro: Micro) -> None:
    auto = micro(name=None, resume="auto")
    tokenizer = train_tokenizer(["a b c"], 300)
    first = Path(auto.run.runs_dir) / "shapes-tiny"
    create_folder(first, auto, model_config(auto.model), tokenizer)
    assert claimed(auto) == (first, None)
    assert claimed(micro(name=None, resume="auto", lr=0.5))[0].name == "shapes-tiny-2"


def test_a_folder_has_one_owner(micro: Micro) -> None:
    """Named: the second is refused, however it begins. Unnamed: it takes another number."""
    folder = Path(micro().run.runs_dir) / "micro"
    owner = f"process {os.getpid()} on {socket.gethostname()}"
    claim = claim_folder(micro())
    for again in (micro(), micro(resume="auto")):
        with pytest.raises(UserError, match=f"micro is in use by {owner}: .*another --name"):
            claim_folder(again)
    save_state(folder, _state(micro(), 3), micro())
    for again in (micro(), micro(resume="auto"), micro(resume=str(folder))):
        with pytest.raises(UserError, match=f"in use by {owner}"):
            claim_folder(again)
    claim.release()
    assert claimed(micro(resume="auto"))[1] == folder / "state" / "00000003"
    one, two = claim_folder(micro(name=None)), claim_folder(micro(name=None))
    assert [one.folder.name, two.folder.name] == ["shapes-tiny", "shapes-tiny-2"]
    two.release()
    one.release()
    assert [p.name for p in folder.parent.iterdir()] == ["micro"]
    assert not (folder / ".lock").exists()


def test_a_folder_that_cannot_be_locked_is_warned_about(
    micro: Micro, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    claimed(micro())
    assert "micro cannot be locked (No locks available)" in caplog.text


def test_room_and_rights_are_looked_at_first(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = init_params(model_config(micro().model), device="meta")
    check_disk(tmp_path / "not" / "yet", params, params)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.0 GB free, but this run needs") as caught:
        check_disk(tmp_path / "not" / "yet", params, params)
    assert "--runs_dir" in str(caught.value)
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not writable"):
        check_disk(tmp_path / "file" / "run", params, params)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable"):
        check_disk(tmp_path, params, params)


def test_a_folder_tells_its_run(micro: Micro, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", micro(lr=0.25)
    create_folder(folder, config, model_config(config.model), train_tokenizer(["a b c"], 300))
    found = open_run(folder)
    assert (found.config, found.model) == (config, model_config(config.model))
    with pytest.raises(UserError, match="model"):
        load_weights(folder, init_params(found.model, device="meta"), CPU)
    record = json.loads((folder / "config.json").read_text())
    del record["model"]["text"]["dim"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config\.json is damaged: text lacks the field 'dim'"):
        open_run(folder)
    with pytest.raises(UserError, match="not the folder of a run"):
        open_run(tmp_path)
