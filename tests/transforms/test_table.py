"""The table of the algebra (`tests.transforms.table`): what CI runs, and all of it (`slow`)."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from params import num_bytes
from params.tree import flatten
from tests.transforms.table import (
    DRIVERS,
    FORWARDS,
    REFUSED,
    STEPS,
    check,
    legal,
    orders,
    subject,
)
from transforms import value_and_grad
from transforms.legal import ILLEGAL

pytestmark = [
    # torch.func.jvp scripts its decompositions when first used
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning"),
]

EAGER = tuple(driver for driver in DRIVERS if driver != "compiled loss")
TWO = ("native vision-language", "Llama")
needs_transformers = {name for name in FORWARDS if name not in ("native text", TWO[0], "odd")}


def drivers_for(names: tuple[str, ...]) -> tuple[str, ...]:
    """A compiled chain takes seconds: one driver that works, and those that say why not."""
    refused = tuple(d for d in EAGER if ("compile", d) in REFUSED)
    return ("value_and_grad", *refused) if "compile" in names else EAGER


def run(forward: str, names: tuple[str, ...], drivers: tuple[str, ...]) -> None:
    if forward in needs_transformers:
        pytest.importorskip("transformers")
    assert check(forward, names, drivers) == len(drivers)


def pairs() -> list[tuple[str, tuple[str, ...]]]:
    """Singles and ordered pairs; compiled, which takes seconds, pairs of the foreign one alone."""
    names = [(), *orders(1), *orders(2)]
    return [
        (forward, chain)
        for forward in TWO
        for chain in names
        if forward == "Llama" or "compile" not in chain or len(chain) == 1
    ]


def words(part: str | tuple[str, ...]) -> str:
    return part if isinstance(part, str) else " ".join(part)


@pytest.mark.parametrize(("forward", "names"), pairs(), ids=words)
def test_singles_and_ordered_pairs(forward: str, names: tuple[str, ...]) -> None:
    run(forward, names, drivers_for(names))


@pytest.mark.parametrize("forward", [name for name in FORWARDS if name not in TWO])
def test_every_other_forward_bare(forward: str) -> None:
    run(forward, (), tuple(DRIVERS))


REST = [
    (forward, names)
    for forward in FORWARDS
    for names in (*orders(1), *orders(2), *orders(3))
    if len(names) == 3 or forward not in TWO
]
SAMPLE = random.Random(0).sample(REST, 28)


@pytest.mark.parametrize(("forward", "names"), SAMPLE, ids=words)
def test_a_sample_of_the_rest(forward: str, names: tuple[str, ...]) -> None:
    run(forward, names, drivers_for(names))


LONG = [
    ("checkpoint", "fake_quant", "lora", "mixed_precision", "fuse_kernels", "fuse_loss"),
    ("fuse_loss", "fuse_kernels", "mixed_precision", "lora", "quantize_int8", "checkpoint"),
]


@pytest.mark.parametrize("names", LONG, ids=" ".join)
@pytest.mark.parametrize("forward", TWO)
def test_whole_chains(forward: str, names: tuple[str, ...]) -> None:
    """All transforms at once, by every driver: what each gives inside of a compiled loss too."""
    run(forward, names, tuple(DRIVERS))


@pytest.mark.slow
@pytest.mark.parametrize("forward", FORWARDS)
def test_all_of_it(forward: str) -> None:
    """Every order of up to three transforms by every driver."""
    for names in ((), *orders(1), *orders(2), *orders(3)):
        run(forward, names, tuple(DRIVERS))


def test_what_is_illegal_is_refused_in_either_order() -> None:
    of = subject("native text")
    for a, b in itertools.permutations(STEPS, 2):
        if not legal((a, b)):
            with pytest.raises(ValueError, match=f"{b} cannot be applied after {a}"):
                of.apply((a, b))
    assert {pair for pair in itertools.permutations(STEPS, 2) if not legal(pair)} == {
        pair for both in ILLEGAL for pair in (both, both[::-1]) if len({*pair} & STEPS.keys()) == 2
    }


def test_transforms_change_no_params_and_leave_the_forward_alone() -> None:
    of = subject("native text")
    before = {path: t.clone() for path, t in flatten(of.params).items()}
    rules = of.forward.rules
    for names in orders(2):
        if "compile" not in names:
            loss, params = of.apply(names)
            value_and_grad(loss)(params, of.batches[0])
    assert of.forward.rules is rules
    for path, t in flatten(of.params).items():
        assert torch.equal(t, before[path])
        assert not t.requires_grad


def test_quantised_params_are_smaller() -> None:
    of = subject("native text")
    _, params = of.apply(("quantize_int8",))
    assert num_bytes(params) < num_bytes(of.params) / 2  # fp64 to int8, tiny rows
