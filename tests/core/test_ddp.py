"""as_module under DistributedDataParallel: two processes give the gradient of both batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from core import TextConfig, VLMConfig, as_module, make_batch, vlm
from params import init_params
from params.tree import flatten
from tests.processes import run_together
from tests.rounding import FP32
from transforms import checkpoint, fuse_loss, value_and_grad

CONFIG = VLMConfig(TextConfig(61, 16, 2, 4, 2, 24))


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return make_batch(torch.randint(61, (2, 8), generator=generator))


def work(rank: int, room: Path) -> None:
    loss_fn = fuse_loss(checkpoint(vlm(CONFIG)))
    module = as_module(loss_fn, init_params(CONFIG))
    parallel = DistributedDataParallel(module)  # held: its hooks die with it
    parallel(batch_of(rank)).backward()
    torch.save({n: p.grad for n, p in module.named_parameters()}, room / f"{rank}.pt")


def test_gradients_are_averaged(tmp_path: Path) -> None:
    run_together(work, tmp_path)
    grads = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    loss_fn, params = fuse_loss(vlm(CONFIG)), init_params(CONFIG)
    alone = [flatten(value_and_grad(loss_fn)(params, batch_of(rank))[1]) for rank in (0, 1)]
    assert grads[0].keys() == alone[0].keys()
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name])
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(grads[0][name], mean, rtol=FP32, atol=FP32)
