"""Documents over a pipe: as they were, writable, and no reader waits for one who is gone."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

import numpy as np
import pytest

from runners.data.types import BadRecordError
from runners.data.wire import LARGE, receive, send


def test_arrays_of_all_sizes_come_over_as_they_were() -> None:
    generator = np.random.default_rng(0)
    grid = np.arange(2 * LARGE).reshape(-1, 2)
    grid.flags.writeable = False
    things = [
        [generator.integers(256, size=(n, 3), dtype=np.uint8) for n in (0, 1, LARGE, 300_000)],
        {"grid": grid, "turned": grid.T, "every other": grid[::2], "words": "x" * 100_000},
        BadRecordError("picture missing", "there is none"),
        None,
    ]
    ours, theirs = Pipe()
    sender = threading.Thread(target=lambda: [send(theirs, thing) for thing in things])
    sender.start()  # more than a pipe holds: someone has to read
    arrays, named, error, nothing = [receive(ours) for _ in things]
    sender.join()
    for got, want in zip(arrays, things[0], strict=True):
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
        assert got.flags.writeable
    for name in ("grid", "turned", "every other"):
        assert np.array_equal(named[name], things[1][name])
    assert named["words"] == things[1]["words"]
    assert (error.reason, str(error), nothing) == ("picture missing", "there is none", None)
    ours.close()
    with pytest.raises(BrokenPipeError):
        send(theirs, things[0])
    theirs.close()


@pytest.mark.parametrize("left", [0, 1000])
def test_a_sender_that_is_gone_is_noticed_amid_an_array(left: int) -> None:
    ours, theirs = Pipe()
    whole, copy = Pipe()
    send(whole, np.zeros(LARGE, np.uint8))
    theirs.send_bytes(copy.recv_bytes())  # the head, and then only a part of the array, if any
    theirs.send_bytes(b"0" * left) if left else None
    theirs.close()
    with pytest.raises(EOFError):
        receive(ours)
    for one in (ours, whole, copy):
        one.close()
