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


@pytest.mark.slow
@pytest.mark.parametrize("name", families())
def test_family(name: str) -> None:
    check(name, list(COLUMNS))
