"""The held-out records: a seeded choice of whole groups that does not depend on their order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WHOLE = 1 << 16  # bytes: of a longer file its start, middle and end are read
_PIECE = 1 << 14
_TOGETHER = 256  # files a thread takes at once


def digest_of(*parts: bytes | str | int) -> bytes:
    """A digest of 16 bytes of some values, in their order.

    >>> digest_of("ab", "c") == digest_of("a", "bc")
    False
    """
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def file_digest(path: Path) -> bytes:
    """A digest of 16 bytes of a whole file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def groups_of(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """Groups of items (their indices) that share a key, directly or through others.

    >>> groups_of([["a"], ["b"], ["a", "c"], ["c"]])
    [[0, 2, 3], [1]]
    """
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    owner: dict[Hashable, int] = {}
    for item, shared in enumerate(keys):
        for key in shared:
            one, other = root(owner.setdefault(key, item)), root(item)
            parent[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = {}
    for item in range(len(keys)):
        groups.setdefault(root(item), []).append(item)
    return list(groups.values())


def unique(names: Sequence[bytes]) -> list[bytes]:
    """Makes names distinct by the number of equal ones before them."""
    seen: Counter[bytes] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(digest_of(name, seen[name]))
    return distinct


def shuffled(names: Sequence[bytes], seed: int) -> list[int]:
    """Indices of the items in an order that depends on seed and names alone: adding or moving items
    does not change the order of the others."""
    prefix = str(seed).encode()
    ranks = [digest_of(prefix, name) for name in names]
    return sorted(range(len(names)), key=ranks.__getitem__)


def hold_out(
    names: Sequence[bytes], weights: Sequence[int], fraction: float, seed: int
) -> list[int]:
    """Indices of the held-out groups, in the order of `shuffled`.

    Their weight is `fraction` of the whole, up to half of the lightest remaining group. With two
    groups or more neither side is empty; fewer are all trained on.
    """
    order = shuffled(names, seed)
    target, taken, total = fraction * sum(weights), [], 0
    left = []
    for item in order:
        if total + weights[item] <= target:
            taken.append(item)
            total += weights[item]
        else:
            left.append(item)
    if len(left) > 1:
        lightest = min(left, key=weights.__getitem__)
        if not taken or abs(total + weights[lightest] - target) < target - total:
            taken.append(lightest)
    return taken


def fingerprints(paths: Sequence[Path]) -> list[bytes | OSError]:
    """A digest of 16 bytes of each file's size and content; or the error of reading it.

    Of a file over 64 KiB three pieces of 16 KiB are read, so that a million pictures take minutes,
    not hours: a compressed picture differs everywhere behind its first change.
    """
    pieces = [paths[i : i + _TOGETHER] for i in range(0, len(paths), _TOGETHER)]
    with ThreadPoolExecutor(8) as pool:  # network disks serve many requests at once
        found = list(pool.map(lambda piece: [_fingerprint(path) for path in piece], pieces))
    return [fingerprint for piece in found for fingerprint in piece]


def _fingerprint(path: Path) -> bytes | OSError:
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            starts = (0,) if size <= WHOLE else (0, (size - _PIECE) // 2, size - _PIECE)
            read = []
            for start in starts:
                file.seek(start)
                read.append(file.read(WHOLE if len(starts) == 1 else _PIECE))
    except OSError as error:
        return error
    return digest_of(size, *read)
