"""A recorded function gives what it gives unrecorded, and says what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core import Bounds, make_batch, vlm
from core.config import VLMConfig
from params import flatten, init_params
from params.tree import map_leaves
from transforms import checkpoint, cuda_graph, fuse_loss, value_and_grad
from transforms.cuda_graph import SHAPES, WARM_UP

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def double(params: Any, batch: Any) -> Tensor:
    return params["w"] * batch["x"]


def test_params_on_a_cpu_are_refused() -> None:
    with pytest.raises(ValueError, match="must be on a GPU"):
        cuda_graph(double)({"w": torch.ones(2)}, {"x": torch.ones(2)})


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_the_same(micro: dict[str, VLMConfig], recompute: bool) -> None:
    """Six steps of plain descent: losses and gradients, as new batches come and params change."""
    model = micro["untied"]
    forward = vlm(model, bounds=Bounds(16))
    loss_fn = fuse_loss(checkpoint(forward) if recompute else forward)
    eager = value_and_grad(loss_fn)
    recorded = cuda_graph(eager)
    torch.manual_seed(0)
    params = init_params(model, device=torch.device("cuda"))
    mine, theirs = (map_leaves(lambda leaf: leaf.clone(), params) for _ in range(2))
    for step in range(6):
        tokens = torch.randint(model.text.vocab_size, (2, 16))
        batch = {name: leaf.cuda() for name, leaf in make_batch(tokens).items()}
        for fn, tree in ((recorded, mine), (eager, theirs)):
            loss, grads = fn(tree, batch)
            for path, leaf in flatten(tree).items():
                leaf -= 0.1 * flatten(grads)[path]
            if fn is recorded:
                got = (loss.clone(), {p: g.clone() for p, g in flatten(grads).items()})
        torch.testing.assert_close(got[0], loss, msg=lambda m, s=step: f"step {s}: {m}")
        for path, grad in flatten(grads).items():
            torch.testing.assert_close(got[1][path], grad, rtol=1e-4, atol=1e-5)
        assert float(loss) > 0


@pytest.mark.gpu
@on_gpu
def test_a_replay_launches_nothing_from_python() -> None:
    calls = []

    def noted(params: Any, batch: Any) -> Tensor:
        calls.append(1)
        return double(params, batch)

    run = cuda_graph(noted)
    params = {"w": torch.full((3,), 2.0, device="cuda")}
    results = []
    for step in range(WARM_UP + 4):
        results.append(run(params, {"x": torch.full((3,), float(step), device="cuda")}).tolist())
    assert len(calls) == WARM_UP + 1
    assert results == [[2.0 * step] * 3 for step in range(WARM_UP + 4)]


@pytest.mark.gpu
@on_gpu
def test_shapes_are_recorded_anew_but_not_without_end() -> None:
    run = cuda_graph(double)
    params = {"w": torch.full((1,), 3.0, device="cuda")}
    for _ in range(WARM_UP + 2):
        for size in range(1, SHAPES + 1):
            assert run(params, {"x": torch.ones(size, device="cuda")}).tolist() == [3.0] * size
    with pytest.raises(ValueError, match="more than 4 kinds of batches"):
        run(params, {"x": torch.ones(SHAPES + 1, device="cuda")})


@pytest.mark.gpu
@on_gpu
def test_other_params_are_refused() -> None:
    run = cuda_graph(double)
    batch = {"x": torch.ones(3, device="cuda")}
    params = {"w": torch.ones(3, device="cuda")}
    for _ in range(WARM_UP + 1):
        run(params, batch)
    with pytest.raises(ValueError, match="not the tensors they were"):
        run({"w": torch.ones(3, device="cuda")}, batch)


@pytest.mark.gpu
@on_gpu
def test_what_waits_for_the_gpu_cannot_be_recorded() -> None:
    run = cuda_graph(lambda params, batch: params["w"] * float(batch["x"].sum()))
    params, batch = {"w": torch.ones(3, device="cuda")}, {"x": torch.ones(3, device="cuda")}
    for _ in range(WARM_UP):
        run(params, batch)
    with pytest.raises(RuntimeError) as caught:
        run(params, batch)
    assert any("must not wait for the GPU" in note for note in caught.value.__notes__)
