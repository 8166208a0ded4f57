"""Where runs and states lie, and every way in which they can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core import config_from_dict
from params import init_params
from runners.checkpoints import (
    State,
    check_room,
    choose_folder,
    create_folder,
    load_state,
    load_weights,
    newest_state,
    open_run,
    save_state,
)
from runners.config import TrainConfig, model_config
from runners.data.tokenizer import train_tokenizer
from runners.errors import UserError
from runners.step import rng_state, set_rng_state

Micro = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def _state(config: TrainConfig, step: int) -> State:
    params = init_params(model_config(config), seed=step)
    moments = {"exp_avg.text.norm.weight": torch.full((32,), float(step))}
    return State(step, params, moments, {"epoch": 1, "waiting": [[0, 1, 2]]}, 0.5, rng_state())


def test_a_state_comes_back_whole_and_replaces_the_older(micro: Micro, tmp_path: Path) -> None:
    config = micro(steps=20)
    save_state(tmp_path, _state(config, 3), config)
    saved = _state(config, 12)
    torch.rand(7)  # moves the generator on from what was saved
    path = save_state(tmp_path, saved, config)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["00000012"]
    assert newest_state(tmp_path) == path
    found = load_state(path, init_params(model_config(config), device="meta"), config, CPU)
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


def test_a_state_half_written_is_not_taken_for_one(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = micro()
    save_state(tmp_path, _state(config, 3), config)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("runners.checkpoints.write_text", full)
        with pytest.raises(UserError, match="No space left on device"):
            save_state(tmp_path, _state(config, 4), config)
    found = newest_state(tmp_path)
    assert found is not None
    assert found.name == "00000003"
    save_state(tmp_path, _state(config, 5), config)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["00000005"]


def test_a_state_of_another_config_is_refused_by_name(micro: Micro, tmp_path: Path) -> None:
    like = init_params(model_config(micro()), device="meta")
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
        ("state.json", b'{"version": 99, "config": {}}', "format 99"),
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
        load_state(path, init_params(model_config(micro()), device="meta"), micro(), CPU)


def test_a_state_of_another_shape_is_refused(micro: Micro, tmp_path: Path) -> None:
    path = save_state(tmp_path, _state(micro(), 3), micro())
    data = model_config(micro()).to_dict()
    data["text"]["mlp_dim"] = 64
    with pytest.raises(UserError, match=r"mlp\.\w+\.weight"):
        load_state(path, init_params(config_from_dict(data), device="meta"), micro(), CPU)


def test_names_of_runs(micro: Micro, tmp_path: Path) -> None:
    runs = Path(micro().runs_dir)
    unnamed = micro(name=None)
    assert choose_folder(unnamed) == (runs / "shapes-tiny", None)
    assert choose_folder(micro(resume="auto")) == (runs / "micro", None)
    for name in ("shapes-tiny", "shapes-tiny-2", "micro"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").touch()
    assert choose_folder(unnamed) == (runs / "shapes-tiny-3", None)
    assert choose_folder(micro(name=None, data="pets/train.json"))[0] == runs / "train-tiny"
    with pytest.raises(UserError, match="--resume=auto, or choose another --name"):
        choose_folder(micro())
    state = runs / "shapes-tiny" / "state" / "00000007"
    state.mkdir(parents=True)
    (state / "state.json").touch()
    auto = micro(name=None, resume="auto")
    assert choose_folder(auto) == (runs / "shapes-tiny", state)
    for path in (state, runs / "shapes-tiny"):
        assert choose_folder(micro(resume=str(path))) == (runs / "shapes-tiny", state)
    with pytest.raises(UserError, match="no resumable state"):
        choose_folder(micro(resume=str(runs / "micro")))


def test_room_and_rights_are_looked_at_first(
    micro: Micro, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = init_params(model_config(micro()), device="meta")
    check_room(tmp_path / "not" / "yet", params, params)
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"0\.0 GB free, but this run needs") as caught:
        check_room(tmp_path / "not" / "yet", params, params)
    assert "--runs_dir" in str(caught.value)
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not writable"):
        check_room(tmp_path / "file" / "run", params, params)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not writable"):
        check_room(tmp_path, params, params)


def test_a_folder_tells_its_run(micro: Micro, tmp_path: Path) -> None:
    folder, config = tmp_path / "run", micro(lr=0.25)
    create_folder(folder, config, model_config(config), train_tokenizer(["a b c"], 300))
    found = open_run(folder)
    assert (found.config, found.model) == (config, model_config(config))
    with pytest.raises(UserError, match="model"):
        load_weights(folder, init_params(found.model, device="meta"), CPU)
    record = json.loads((folder / "config.json").read_text())
    del record["model"]["text"]["dim"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"config\.json is damaged: text lacks the field 'dim'"):
        open_run(folder)
    with pytest.raises(UserError, match="not the folder of a run"):
        open_run(tmp_path)
