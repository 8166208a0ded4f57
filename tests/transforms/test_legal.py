"""The closed list of what does not go together."""

from __future__ import annotations

import itertools
from functools import partial, update_wrapper

import pytest

from core import vlm
from transforms import (
    checkpoint,
    compile,
    fake_quant,
    fp8,
    fuse_loss,
    lora,
    mixed_precision,
    quantize_int8,
    token_logprobs,
    unfused_loss,
)
from transforms.legal import ILLEGAL

TRANSFORMS = {
    t.__name__: t
    for t in (
        checkpoint,
        compile,
        fake_quant,
        update_wrapper(partial(fp8, skip=()), fp8),
        fuse_loss,
        update_wrapper(partial(lora, rank=2), lora),
        mixed_precision,
        quantize_int8,
        token_logprobs,
        unfused_loss,
    )
}
REFUSED = {frozenset(pair) for pair in ILLEGAL}


@pytest.mark.parametrize(("a", "b"), list(itertools.product(TRANSFORMS, repeat=2)))
def test_every_pair_is_legal_or_says_why_not(micro, a: str, b: str) -> None:
    once = TRANSFORMS[a](vlm(micro["text"]))
    if frozenset((a, b)) in REFUSED:
        reason = ILLEGAL.get((a, b)) or ILLEGAL[b, a]
        with pytest.raises(ValueError, match=f"{b} cannot be applied after {a}: ") as error:
            TRANSFORMS[b](once)
        assert reason in str(error.value)
        # also when something else came between
        other = "checkpoint" if "mixed_precision" in (a, b) else "mixed_precision"
        with pytest.raises(ValueError, match=f"cannot be applied after {a}"):
            TRANSFORMS[b](TRANSFORMS[other](once))
    else:
        assert TRANSFORMS[b](once).applied == (a, b)


def test_the_list_names_transforms_that_exist() -> None:
    assert set(itertools.chain(*ILLEGAL)) <= set(TRANSFORMS)
    assert {a for a, b in ILLEGAL if a == b} == {
        "fuse_loss",
        "unfused_loss",
        "token_logprobs",
        "quantize_int8",
        "fake_quant",
        "mixed_precision",
        "lora",
        "compile",
        "fp8",
    }
