"""What a batch holds, and the arithmetic that it takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
import torch

from core import make_batch
from runners.data.packing.collate import collate
from runners.training.config import TrainConfig, model_config
from runners.training.flops import Load, measure_load, peak_flops, training_flops
from runners.training.setup import prepare, sample_documents

Micro = Callable[..., TrainConfig]


@pytest.mark.parametrize("projector", ["mlp", "resampler"])
def test_padding_is_no_load(micro: Micro, projector: str) -> None:
    override = (f"projector.kind={projector}", "projector.queries=3", "projector.heads=2")
    job = prepare(micro(override=(*micro().model.override, *override)))
    documents = list(islice(sample_documents(job.data.sources.train, job.data.encoder, 3), 3))
    batch = collate([documents[:1], documents[1:2]], job.data.spec)
    load = measure_load(job.model, batch, job.data.pad)
    assert load.documents.tolist() == [len(d.tokens) for d in documents[:2]]
    assert load.tokens < batch["tokens"].numel()
    assert load.pictures.tolist() == [4, 4]


def test_text_has_no_pictures(micro: Micro) -> None:
    batch = make_batch(torch.ones(2, 5, dtype=torch.int64))
    load = measure_load(model_config(micro().model), batch, pad=0)
    assert load.documents.tolist() == [5, 5]
    assert load.pictures.tolist() == []


def test_flops_add_up_and_frozen_parts_cost_less(micro: Micro) -> None:
    model = model_config(micro().model)
    load = Load(torch.tensor([10, 30]), torch.tensor([4, 4]))
    text = 40 * model.flops_per_token(25)  # (10 * 10 + 30 * 30) / 40
    vision = 8 * model.flops_per_patch(4)
    everything = training_flops(model, load, {"text", "vision", "projector"})
    assert everything == pytest.approx(text + vision)
    aligning = training_flops(model, load, {"projector"})
    assert aligning == pytest.approx(text * 2 / 3 + vision / 3)
    assert training_flops(model, load, {"text"}) == pytest.approx(text + vision / 3)


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert 1e9 < peak < 1e14


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("X1", None),
    ],
)
def test_peaks_of_gpus_are_known_by_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
