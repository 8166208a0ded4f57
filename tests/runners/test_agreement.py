"""The fast step learns what the plain one does: gradients, loss curves, packed and padded rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from params import flatten
from runners.data.packing.collate import collate
from runners.train import train
from runners.training.config import TrainConfig
from runners.training.metrics import Display, read_metrics
from runners.training.setup import prepare, sample_documents
from runners.training.step import Learner
from tests.rounding import FP32
from transforms import accumulate_grads, cast_matrices, value_and_grad

Micro = Callable[..., TrainConfig]
Quiet = Callable[[], Display]
# the baseline of the ladder: nothing fused, everything fp32
PLAIN: dict[str, Any] = {
    "dtype": "fp32",
    "compile": False,
    "use_fused_loss": False,
    "use_flash_attn": False,
    "use_fused_kernels": False,
    "use_fused_adamw": False,
}
FAST: dict[str, Any] = {"dtype": "bf16"}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(
    "flags",
    [{}, {"use_gradient_checkpointing": True}, {"state_dtype": "bf16"}],
    ids=["fast", "checkpointed", "bf16 states"],
)
def test_gradients_of_one_step_agree_to_bf16_error(micro: Micro, flags: dict[str, Any]) -> None:
    """bf16 keeps 8 bits: an entry that passes some ten roundings on its way is off by about
    sqrt(10) * 2**-9 of its size, sums of them by less. A lost or doubled term is off by more."""
    plain, fast = prepare(micro(**PLAIN)), prepare(micro(**FAST | flags))
    batch = next(iter(plain.data.loader))
    plain.data.loader.close()
    exact, wanted = value_and_grad(plain.composed.loss_fn)(plain.params, batch)
    working = cast_matrices(fast.params, fast.composed.dtype)
    loss, grads = value_and_grad(fast.composed.loss_fn)(working, batch)
    assert float(loss) == pytest.approx(float(exact), rel=2**-8)
    mine, theirs = flatten(grads), flatten(wanted)
    assert mine.keys() == theirs.keys()
    whole = [torch.cat([g[path].flatten().double() for path in theirs]) for g in (mine, theirs)]
    assert relative(*whole) < 2**-6
    for path, grad in theirs.items():
        # a leaf whose gradient is a thousandth of the others' is rounding noise of theirs
        if grad.double().square().mean().sqrt() > 1e-3 * whole[1].square().mean().sqrt():
            assert relative(mine[path], grad) < 2**-4, path


def test_packed_and_padded_rows_agree(micro: Micro) -> None:
    """The same documents, several to a row, and one to a row with padding behind it."""
    job = prepare(micro())
    documents = list(islice(sample_documents(job.data.sources.train, job.data.encoder, 8), 5))
    packed = collate([documents[:2], documents[2:]], job.data.spec)
    padded = collate(
        [[document] for document in documents],
        replace(job.data.spec, rows=5, kept_images=0, kept_patches=0),
    )
    grad_fn = value_and_grad(job.composed.loss_fn)
    loss, _, grads = accumulate_grads(grad_fn, job.params, [packed])
    same, _, others = accumulate_grads(grad_fn, job.params, [padded])
    torch.testing.assert_close(same, loss, rtol=FP32, atol=0)
    for path, grad in grads.items():
        # fp32 sums of some hundred terms in another order; a key's bias has no gradient
        assert float((others[path] - grad).norm()) <= 1e-5 * float(grad.norm()) + 1e-8, path


def curve(config: TrainConfig, display: Display) -> list[float]:
    """The loss of a run, in means over tenths of it."""
    folder = train(config, display)
    assert folder is not None
    losses = [float(row["loss"]) for row in read_metrics(folder) if "loss" in row]
    tenth = len(losses) // 10
    return [mean(losses[i : i + tenth]) for i in range(0, len(losses), tenth)]


def apart(a: list[float], b: list[float]) -> float:
    return mean(abs(x - y) for x, y in zip(a, b, strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "fast": {},
    "compiled": {"compile": True},
    "bf16 states": {"state_dtype": "bf16"},
    "fp8": {"use_fp8": True},
}


BASE = TrainConfig.of(
    device="cpu",
    steps=300,
    warmup_steps=30,
    log_every=1,
    val_every=0,
    val_batches=1,
    eval_examples=0,
    samples=0,
    tensorboard=False,
    workers=0,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Curves of the plain way, of three seeds."""
    display = Display(1, console=Console(quiet=True))
    folder = str(tmp_path_factory.mktemp("plain"))
    return [
        curve(BASE.changed(**PLAIN, seed=seed, name=str(seed), runs_dir=folder), display)
        for seed in range(3)
    ]


@pytest.mark.slow
# Dynamo looks at the .grad of what a compiled block is given, the output of the one before it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # Inductor's imports
@pytest.mark.parametrize("way", WAYS)
def test_loss_curves_agree_within_the_noise_of_the_seed(
    way: str, plain: list[list[float]], quiet: Quiet, tmp_path: Path
) -> None:
    """300 steps of the tiny preset: the fast run lies as near to the plain one of the same seed as
    plain runs of other seeds lie to each other, or nearer."""
    noise = mean(apart(plain[i], plain[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    fast = curve(BASE.changed(**FAST | WAYS[way], runs_dir=str(tmp_path)), quiet())
    assert fast[-1] < 0.8 * fast[0]
    assert apart(fast, plain[0]) <= noise


def test_working_copies_follow_their_masters(micro: Micro) -> None:
    job = prepare(micro(dtype="bf16"))
    learner = Learner(job.params, job.config.optim, None, torch.bfloat16)
    grad_fn = value_and_grad(job.composed.loss_fn)
    batches = iter(job.data.loader)
    before = {path: leaf.clone() for path, leaf in flatten(learner.params).items()}
    for _ in range(3):
        learner.train_step(grad_fn, [next(batches)])
    job.data.loader.close()
    working = flatten(learner.working)
    for path, leaf in flatten(learner.params).items():
        assert leaf.dtype == torch.float32
        assert not torch.equal(leaf, before[path]), path
        if leaf.ndim > 1:
            assert torch.equal(working[path], leaf.bfloat16()), path
        else:
            assert working[path] is leaf


def test_bf16_states_take_half_the_memory_and_are_saved_as_such(micro: Micro, quiet: Quiet) -> None:
    config = micro(dtype="bf16", state_dtype="bf16", stop_at=3, name="half")
    assert train(config, quiet()) is None
    job = prepare(config.changed(resume="auto"), Path(config.run.runs_dir) / "half/state/00000003")
    job.data.loader.close()
    assert job.state is not None
    for path, leaf in flatten(job.params).items():
        wanted = torch.bfloat16 if leaf.ndim > 1 else torch.float32
        assert leaf.dtype == wanted, path
        assert job.state.moments[f"exp_avg_sq.{path}"].dtype == wanted
    learner = Learner(job.params, job.config.optim, None, torch.bfloat16)
    assert all(
        w is p
        for w, p in zip(
            flatten(learner.working).values(), flatten(learner.params).values(), strict=True
        )
    )
