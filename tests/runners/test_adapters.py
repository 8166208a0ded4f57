"""Runs of adapters, of int8 weights and of rounded ones: what they compute, keep and open."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core import vlm
from params import flatten, load_params, unflatten
from params.int8 import dequantize_weight, quantize_weight
from runners.data.sources.digests import DATA
from runners.eval import open_evaluator
from runners.shell.errors import UserError
from runners.train import train
from runners.training.checkpoints import MODEL, load_weights, open_run
from runners.training.config import TrainConfig, UsageError, check, parse_config
from runners.training.metrics import Display, read_metrics
from runners.training.setup import prepare
from runners.training.weights import MERGED
from transforms import cast_matrices

Micro = Callable[..., TrainConfig]
Quiet = Callable[[], Display]
CPU = torch.device("cpu")


@pytest.fixture
def adapting(micro: Micro, trained: Path) -> TrainConfig:
    """Adapters over a run that has learnt something."""
    base = open_run(trained).config
    return base.changed(
        runs_dir=micro().run.runs_dir,
        name="adapters",
        init_from=str(trained),
        lora_rank=2,
        steps=4,
        lr=0.02,
        warmup_steps=0,
    )


def losses(folder: Path) -> list[object]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_run_of_adapters_keeps_them_alone(
    adapting: TrainConfig, quiet: Quiet, trained: Path, quantize: str | None
) -> None:
    config = adapting.changed(quantize=quantize, lora_alpha=4.0, merge=True)  # type: ignore[arg-type]
    folder = train(config, quiet())
    assert folder is not None
    kept = flatten(load_params(folder / MODEL))
    assert kept
    assert all(path.endswith(("lora_a", "lora_b")) for path in kept)
    assert any(leaf.any() for path, leaf in kept.items() if path.endswith("lora_b"))

    # by hand: the base, or its rounded twin, and beside each linear alpha / rank times B A
    evaluator = open_evaluator(open_run(folder), CPU)
    base = flatten(load_params(trained / MODEL))
    merged = flatten(load_params(folder / MERGED / MODEL))
    assert merged.keys() == base.keys()
    held = base
    if quantize:
        # every matrix but the head, which the embedding is, too, where they are tied
        prepared = flatten(evaluator.params)
        paths = {path.removesuffix("_int8") for path in prepared if path.endswith("weight_int8")}
        rounded = {p: dequantize_weight(*quantize_weight(base[p]), torch.float32) for p in paths}
        assert paths
        held = base | rounded
    change = {
        path.removesuffix("lora_a") + "weight": 4.0 / 2 * kept[path[:-1] + "b"] @ a
        for path, a in kept.items()
        if path.endswith("lora_a")
    }
    for path, leaf in merged.items():
        torch.testing.assert_close(leaf, base[path] + change.get(path, 0.0))
    whole = unflatten({path: leaf + change.get(path, 0.0) for path, leaf in held.items()})
    batch = prepare(config.changed(name="other")).data.validation[0]
    got = evaluator.forward(evaluator.params, batch)
    wanted = vlm(evaluator.model)(whole, batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    # the merged folder opens as a run, and can be begun from; the adapters cannot
    opened = open_run(folder / MERGED)
    assert (opened.config.model.lora_rank, (folder / MERGED / DATA).is_file()) == (0, True)
    assert load_weights(opened.folder, open_evaluator(opened, CPU).params, CPU)
    with pytest.raises(UserError, match=r"holds adapters: .*--merge 1"):
        train(config.changed(name="on top", init_from=str(folder)), quiet())


def test_adapters_are_resumed_to_the_same_losses(
    adapting: TrainConfig, quiet: Quiet, trained: Path, tmp_path: Path
) -> None:
    config = adapting.changed(quantize="int8", steps=4)
    straight = train(config.changed(name="straight"), quiet())
    assert train(config.changed(stop_at=2), quiet()) is None
    resumed = train(parse_config([f"--resume={config.run.runs_dir}/adapters"]), quiet())
    assert straight is not None
    assert resumed is not None
    assert losses(resumed) == losses(straight)
    record = json.loads((resumed / "config.json").read_text())
    changed = tmp_path / "other.safetensors"
    changed.write_bytes((trained / MODEL).read_bytes()[:-1] + b"x")
    record["train"]["init_from"] = str(changed)
    (resumed / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="other weights than the ones that the adapters"):
        open_evaluator(open_run(resumed), CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounded_weights_are_trained_in_full(micro: Micro, quiet: Quiet, dtype: str) -> None:
    """The loss is that of the weights as quantize_int8 will hold them: rounded from their own
    dtype, whatever is computed in."""
    config = micro(fake_quant=True, dtype=dtype, steps=2)
    job = prepare(config)
    assert job.composed.matrices == torch.float32
    assert {leaf.dtype for leaf in flatten(job.params).values()} == {torch.float32}
    batch = job.data.validation[0]
    rounded = {
        path: dequantize_weight(*quantize_weight(leaf), torch.float32)
        if leaf.ndim == 2 and path.endswith("weight") and not path.startswith("text.embed")
        else leaf
        for path, leaf in flatten(job.params).items()
    }
    plain = prepare(config.changed(fake_quant=False)).composed
    wanted = plain.forward(cast_matrices(unflatten(rounded), plain.matrices), batch)
    got = job.composed.forward(job.params, batch)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=0, atol=0)
    folder = train(config, quiet())
    assert folder is not None
    assert "lora" not in " ".join(flatten(load_params(folder / MODEL)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": 4}, "name them with --init_from"),
        ({"quantize": "int8"}, "--lora_rank=16 puts adapters beside them"),
        ({"quantize": "int8", "fake_quant": True}, "give one"),
        ({"merge": True}, "--merge is of adapters"),
        ({"lora_alpha": 2.0}, "--lora_alpha is of adapters"),
    ],
)
def test_flags_that_do_not_go_together(micro: Micro, flags: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check(micro(**flags))


def test_adapters_stand_where_trainable_says(adapting: TrainConfig) -> None:
    job = prepare(adapting.changed(trainable=("text.blocks.0.attn",)))
    found = [path for path in flatten(job.params) if path.endswith("lora_a")]
    assert found
    assert all(path.startswith("text.blocks.0.attn") for path in found)
    with pytest.raises(UserError, match="nothing to adapt"):
        prepare(adapting.changed(trainable=("text.norm",)))
