"""compile as a transform: the whole, wherever it stands, and not inside of torch.func."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from core import vlm
from core.batch import stack_examples
from transforms import checkpoint, compile, fuse_loss, value_and_grad

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_everything_is_compiled_wherever_it_stands(
    micro, rough, example, assert_same, place: int
) -> None:
    torch._dynamo.reset()
    config = micro["text"]
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object):
        seen.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph.forward

    chain = [checkpoint, fuse_loss]
    chain.insert(place, lambda f: compile(f, backend=backend))
    forward = vlm(config)
    for step in chain:
        forward = step(forward)
    params, batch = rough(config), example(config)
    value, grads = value_and_grad(forward)(params, batch)
    want, want_grads = value_and_grad(fuse_loss(vlm(config)))(params, batch)
    assert len(seen) == 1  # one graph, loss and all
    assert_same(value.double(), want.double(), 1e-9)
    assert_same(grads, want_grads, 1e-9)
    value_and_grad(forward)(params, batch)
    assert len(seen) == 1


def test_inside_of_torch_func_it_says_what_to_do(micro, rough, example) -> None:
    config = micro["text"]
    loss = compile(fuse_loss(vlm(config)), backend="eager")
    params, batch = rough(config), example(config)
    with pytest.raises(RuntimeError, match="transforms do not go through"):
        grad(loss)(params, batch)
    with pytest.raises(RuntimeError, match="leave compile out there"):
        vmap(loss, (None, 0))(params, stack_examples([batch]))
