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
        torch.testing.assert_close(norm, want, rtol=1e-9, atol=0.0)
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
    assert_same(script.hessian_vector(loss_fn, params, batch, along), want, 1e-5)


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
