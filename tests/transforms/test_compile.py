"""compile as a transform: the whole, wherever it stands, and not inside of torch.func."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import grad, vmap

from core import VLMConfig, vlm
from core.batch import stack_examples
from transforms import (
    checkpoint,
    compile,
    fuse_loss,
    lora,
    mixed_precision,
    value_and_grad,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    # Dynamo looks for .grad at what a block is given, and hides torch's warning unless it raises
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


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
    assert_same(value.double(), want.double())
    assert_same(grads, want_grads)
    value_and_grad(forward)(params, batch)
    assert len(seen) == 1


def mixed_precision64(forward):
    return mixed_precision(forward, torch.float64)


def counting(seen: list[int]):
    def backend(graph: torch.fx.GraphModule, _: object):
        seen.append(1)
        return graph.forward

    return backend


@pytest.mark.parametrize(
    ("chain", "programs"),
    [
        ([], 1),
        ([checkpoint, mixed_precision64], 1),
        ([lambda f: checkpoint(f, every=2)], 2),
        # nothing learns in the first, so what comes in carries a gradient from the third on
        ([lambda f: lora(f, rank=2, select=("blocks.1.attn.q",))], 3),
    ],
    ids=["bare", "checkpoint", "every 2nd", "lora in one"],
)
@pytest.mark.parametrize("first", [True, False], ids=["compile first", "compile last"])
def test_one_compiled_block_serves_all_that_are_alike(
    micro, rough, example, assert_same, chain, programs: int, first: bool
) -> None:
    torch._dynamo.reset()
    text = dataclasses.replace(micro["text"].text, layers=4, dropout=0.2)
    config, seen = VLMConfig(text), []
    loss = bare = vlm(config)
    steps = [lambda f: compile(f, blocks=True, backend=counting(seen), dynamic=False)]
    for step in (*steps, *chain) if first else (*chain, *steps):
        loss = step(loss)
    for step in chain:
        bare = step(bare)
    params, loss = loss.prepare(rough(config)), fuse_loss(loss)
    batch = example(config) | {"seed": torch.tensor(3)}
    value, grads = value_and_grad(loss)(params, batch)
    want, want_grads = value_and_grad(fuse_loss(bare))(params, batch)
    assert sum(seen) == programs
    assert_same(value, want)
    assert_same(grads, want_grads)
    with torch.compiler.set_stance("fail_on_recompile"):
        value_and_grad(loss)(params, batch | {"seed": torch.tensor(4)})


@pytest.mark.parametrize("blocks", [True, False])
def test_two_policies_are_two_programs(micro, rough, example, blocks: bool) -> None:
    """Dynamo guards no policy: programs of one forward must not serve another."""
    torch._dynamo.reset()
    config, seen = micro["text"], []
    params, batch = rough(config), example(config)
    policies = ("nothing", "dots", "attention", ("dots", "attention"))
    for i, policy in enumerate(policies if blocks else policies[:2], start=1):
        loss = fuse_loss(checkpoint(vlm(config), policy=policy))
        compiled = compile(loss, blocks=blocks, backend=counting(seen), dynamic=False)
        value_and_grad(compiled)(params, batch)
        assert sum(seen) == i


def test_blocks_with_other_windows_are_not_alike(micro, rough, example, assert_same) -> None:
    torch._dynamo.reset()
    text = dataclasses.replace(micro["text"].text, layers=4, window=3, global_every=2)
    config, seen = VLMConfig(text), []
    forward = compile(vlm(config), blocks=True, backend=counting(seen), dynamic=False)
    params, batch = rough(config), example(config)
    assert_same(forward(params, batch), vlm(config)(params, batch))
    assert sum(seen) == 2


def test_inside_of_torch_func_it_says_what_to_do(micro, rough, example) -> None:
    config = micro["text"]
    loss = compile(fuse_loss(vlm(config)), backend="eager")
    params, batch = rough(config), example(config)
    with pytest.raises(RuntimeError, match="transforms do not go through"):
        grad(loss)(params, batch)
    with pytest.raises(RuntimeError, match="leave compile out there"):
        vmap(loss, (None, 0))(params, stack_examples([batch]))
