"""The worker: a process of its own that turns item numbers into documents."""

from __future__ import annotations

import pickle

from runners.data.encode.encoder import item_seed
from runners.data.feeding.columns import send_results
from runners.data.types import BadRecordError, Encode, Request, Result, Source
from runners.shell.wire import Link


def encode_item(source: Source, encode: Encode, seed: int | None, epoch: int, index: int) -> Result:
    """The documents of one item: a pure function of its arguments. Bad records are returned."""
    try:
        return encode(source[index], None if seed is None else item_seed(seed, epoch, index))
    except BadRecordError as error:
        return error


def serve(link: Link) -> None:
    """Answer a job, and then lists of requests with their results."""
    source, encode, seed = pickle.loads(link.receive()[0])
    while True:
        requests: list[Request] = link.receive()[0]
        send_results(link, [encode_item(source, encode, seed, *r) for r in requests])
