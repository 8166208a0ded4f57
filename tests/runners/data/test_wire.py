"""Arrays in shared memory: as they were, writable, used again in time and never before."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from runners.data.feeding.columns import results_of, send_results
from runners.data.types import BadRecordError, Document
from runners.shell.wire import Gone, Link, Shapes


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    one, other = map(Link, socket.socketpair())
    yield one, other
    one.close()
    other.close()


def lend(link: Link, value: int, shapes: Shapes) -> None:
    loan = link.lend(shapes)
    for array in loan.arrays.values():
        array[...] = value
    link.send(value, loan)


def test_things_and_arrays_come_over_as_they_were(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    shapes: Shapes = {
        "few": ((3,), "int64"),
        "none": ((0, 7), "uint8"),
        "odd": ((5, 3), "uint8"),
        "many": ((300, 300), "int32"),
    }
    loan = ours.lend(shapes)
    generator = np.random.default_rng(0)
    sent = {name: generator.integers(100, size=shape) for name, (shape, _) in shapes.items()}
    for name, array in sent.items():
        loan.arrays[name][...] = array
    ours.send({"words": "x" * 50_000}, loan)
    ours.send(BadRecordError("picture missing", "there is none"))
    thing, arrays = theirs.receive()
    assert thing == {"words": "x" * 50_000}
    for name, (shape, dtype) in shapes.items():
        assert (arrays[name].shape, arrays[name].dtype) == (shape, dtype)
        assert np.array_equal(arrays[name], sent[name])
        assert arrays[name].flags.writeable
    error, nothing = theirs.receive()
    assert (error.reason, str(error), nothing) == ("picture missing", "there is none", {})
    ours.close()
    assert np.array_equal(arrays["many"], sent["many"])


def test_memory_is_used_again_when_nothing_refers_to_it(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    shapes: Shapes = {"one": ((1000,), "int64"), "two": ((10, 100), "uint8")}
    held = []
    for value in range(20):
        lend(ours, value, shapes)
        _, arrays = theirs.receive()
        held.append(arrays["two"][2:4].reshape(-1))
        del arrays, held[:-3]  # a part of the last three
        theirs.send("taken")
        ours.receive()
        assert all((part == value - i).all() for i, part in enumerate(reversed(held)))
    assert len(ours._blocks) == 4
    lend(ours, 7, {"one": ((100_000,), "int64")})  # fits none
    lend(ours, 8, {"one": ((10,), "int64")})
    large, small = theirs.receive()[1]["one"], theirs.receive()[1]["one"]
    assert ((large == 7).all(), (small == 8).all(), len(ours._blocks)) == (True, True, 5)


def test_what_is_held_beyond_the_most_is_copied(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    theirs.most = 3
    held = []
    for value in range(20):
        lend(ours, value, {"one": ((1000,), "int64")})
        held.append(theirs.receive()[1]["one"])
        theirs.send("taken")
        ours.receive()
    assert all((array == value).all() for value, array in enumerate(held))
    assert len(ours._blocks) == 4


def test_another_end_that_is_gone_is_noticed(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    theirs._end.sendall(b"half a head")
    theirs.close()
    with pytest.raises(Gone):
        ours.receive()
    with pytest.raises(Gone):
        ours.receive()
    with pytest.raises(Gone):
        lend(ours, 1, {"one": ((10,), "int64")})


def document(name: str, length: int, pictures: int) -> Document:
    patches = np.full((4 * pictures, 12), length, np.uint8)
    places = np.arange(8 * pictures, dtype=np.int64).reshape(-1, 2)
    numbers = np.arange(length, dtype=np.int64)
    return Document(name, numbers, -numbers, numbers[:pictures], patches, places, (4,) * pictures)


def test_documents_come_over_as_they_were(ends: tuple[Link, Link]) -> None:
    ours, theirs = ends
    bad = BadRecordError("picture unreadable", "it is", fatal=False)
    results = [[document("a", 5, 2)], bad, [], [document("b", 9, 0), document("c", 3, 1)]]
    send_results(ours, results)
    send_results(ours, [bad, []])
    one, two, three, four = results_of(*theirs.receive())
    assert (type(two), str(two), two.fatal, three) == (BadRecordError, "it is", False, [])
    for got, want in zip([*one, *four], [*results[0], *results[3]], strict=True):
        for name, value in vars(want).items():
            assert np.array_equal(getattr(got, name), value)
    bad, none = results_of(*theirs.receive())
    assert (str(bad), none) == ("it is", [])
