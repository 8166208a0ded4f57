"""The matrix of foreign families, a row a test: ``python -m pytest -m slow tests/foreign``."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("transformers")

from tests.foreign.cells import COLUMNS, row
from tests.foreign.table import families

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What Dynamo tells of itself is longer than any failure."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def check(name: str, columns: list[str]) -> None:
    bad = {c: cell for c, cell in row(families()[name], columns).items() if not cell.good}
    assert not bad, "\n".join(f"{name}, {c}: {cell.glyph} {cell.said}" for c, cell in bad.items())


# One of each kind: a tied head, experts, weights read by hand, two towers, frozen tables, torch's
# own layers and their fast path, shared weights; the columns that take no second.
FEW = [
    "Llama, tied",
    "Mixtral",
    "Mamba",
    "T5",
    "RoFormer",
    "nn.TransformerEncoder",
    "shared weights",
]
CHEAP = [
    "same",
    "vg",
    "fuse",
    "ckpt",
    "kern",
    "int8",
    "fake",
    "lora",
    "qlora",
    "fp8",
    "long",
    "grad",
]


@pytest.mark.parametrize("name", FEW)
def test_a_few(name: str) -> None:
    check(name, CHEAP)


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_family(name: str) -> None:
    check(name, list(COLUMNS))
