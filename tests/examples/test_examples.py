"""The scripts of docs/examples do what they say, checked by slower and plainer means."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.func import grad, jacfwd

from core import TextConfig, VLMConfig, make_batch, preset, vlm
from params import init_params
from params.tree import flatten, map_leaves, unflatten
from tests.rounding import FP64
from transforms import checkpoint, fuse_loss, value_and_grad

FOLDER = Path(__file__).parents[2] / "docs" / "examples"

# torch.func.jvp scripts its decompositions when first used
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_per_example_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    script = load("per_example_gradients")
    norms = script.main()
    assert capsys.readouterr().out.endswith(f"outlier: example {script.WRONG}\n")
    right = [i for i in range(len(norms)) if i != script.WRONG]
    assert norms[right].max() < 0.2
    assert norms[script.WRONG] > 10

    config = preset("tiny")
    loss_fn = fuse_loss(checkpoint(vlm(config)))
    examples = script.make_examples()
    params = script.train(loss_fn, init_params(config, seed=0), examples[:3])
    params = map_leaves(torch.Tensor.double, params)  # what remains of a loss near 0 is rounding
    exact = script.gradient_norms(loss_fn, params, examples)
    for example, norm in zip(examples, exact, strict=True):
        _, grads = value_and_grad(loss_fn)(params, example)
        want = torch.cat([g.flatten() for g in flatten(grads).values()]).norm()
        torch.testing.assert_close(norm, want, rtol=FP64, atol=0.0)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-2, atol=0.0)


def test_hessian_eigenvalue_settles(capsys: pytest.CaptureFixture[str]) -> None:
    quotients = load("hessian_eigenvalue").main(iterations=12)
    assert capsys.readouterr().out.count("Rayleigh quotient") == 12
    assert quotients[-1] == pytest.approx(46, rel=0.02)
    assert quotients[-1] == pytest.approx(quotients[-2], rel=0.005)


def test_hessian_vector_is_the_difference_of_gradients(
    assert_same: Callable[..., None],
) -> None:
    script = load("hessian_eigenvalue")
    config = preset("tiny")
    loss_fn = fuse_loss(checkpoint(vlm(config)))
    params = init_params(config, seed=0, dtype=torch.float64)
    batch = make_batch(torch.randint(config.text.vocab_size, (2, 12)))
    along = map_leaves(lambda t: torch.randn_like(t) / 1000, params)
    step = 1e-3  # of a vector about as long as 1: an error of 1e-6 of the second order
    ahead, behind = (
        value_and_grad(loss_fn)(map_leaves(lambda p, v, s=s: p + s * v, params, along), batch)[1]
        for s in (step, -step)
    )
    want = map_leaves(lambda a, b: (a - b) / (2 * step), ahead, behind)
    assert_same(script.hessian_vector(loss_fn, params, batch, along), want, rtol=1e-5)


def test_top_eigenvalue_is_that_of_the_whole_hessian(capsys: pytest.CaptureFixture[str]) -> None:
    script = load("hessian_eigenvalue")
    config = VLMConfig(TextConfig(7, 4, 1, 1, 1, 4))
    loss_fn = fuse_loss(checkpoint(vlm(config)))
    params = init_params(config, seed=0, dtype=torch.float64)
    batch = make_batch(torch.randint(7, (2, 5)))
    flat = flatten(params)
    sizes = [leaf.numel() for leaf in flat.values()]

    def loss_of_row(row: torch.Tensor) -> torch.Tensor:
        parts = zip(flat.items(), row.split(sizes), strict=True)
        return loss_fn(unflatten({name: part.view_as(leaf) for (name, leaf), part in parts}), batch)

    whole = jacfwd(grad(loss_of_row))(torch.cat([leaf.flatten() for leaf in flat.values()]))
    values, vectors = torch.linalg.eigh(whole)
    top = int(values.abs().argmax())
    quotients, vector = script.top_eigenvalue(loss_fn, params, batch, iterations=40)
    assert quotients[-1] == pytest.approx(float(values[top]), rel=1e-6)
    row = torch.cat([leaf.flatten() for leaf in flatten(vector).values()])
    assert abs(float(row @ vectors[:, top])) == pytest.approx(1, rel=1e-4)


def test_muon_against_adamw(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole way with a tiny model; a training that is stopped goes on to the same losses."""
    script = load("muon_against_adamw")
    for i in range(12):
        words = " ".join(f"word{k % (i + 3)} = {k * i % 7}" for k in range(120))
        (tmp_path / f"{i}.py").write_text(words)
        (tmp_path / f"again{i}.py").write_text(words)
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe\xff")
    work = str(tmp_path / "work")
    script.main(["prepare", "--sources", str(tmp_path), "--vocab_size", "300", work])
    assert "12 files, 0.0 MB" in capfd.readouterr().out

    small = ["--tokens", "512", "--preset", "tiny", "--rows", "1", "--sequence_len", "64"]
    sizes = ["text.layers=1", "text.dim=32", "text.heads=1", "text.kv_heads=1", "text.mlp_dim=32"]
    small += ["--points", "2", "--override", *sizes]
    last = ["--", "--val_batches=1", "--val_fraction=0.3", "--device=cpu", "--dtype=fp32"]
    command = ["run", work, *small]
    script.main([*command, "--optimizers", "adamw", *last])
    script.main([*command, "--optimizers", "muon", *last, "--stop_at=3"])
    said = capfd.readouterr().out
    assert "Stopped after step 3 of 8" in said
    assert "Using Muon for matrices" in said
    assert "Using Muon" in (tmp_path / "work" / "logs" / "muon-0.002-512.log").read_text()
    script.main([*command, "--seconds=0.3", "--least=0", *last])
    assert "out of time" in capfd.readouterr().out
    script.main([*command, *last])
    said = capfd.readouterr().out
    assert "adamw-0.002-512 is there already" in said
    assert "continued after step 3" in said

    curves = script.main(["show", work, "--tokens", "512"])
    assert {name: [t for t, _ in curve] for name, curve in curves.items()} == {
        "adamw-0.002-512": [256, 512],
        "muon-0.002-512": [256, 512],
    }
    assert (tmp_path / "work" / "muon_against_adamw.png").stat().st_size > 10_000
    assert script.reached([(0.0, 4.0), (10.0, 2.0)], 3.0) == 5.0
    assert script.reached([(0.0, 4.0), (10.0, 2.0)], 1.0) is None
