from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runners.data.sources.split import WHOLE, digest_of, fingerprints, groups_of, hold_out


@pytest.mark.parametrize("most", [1, 5, 400])
def test_the_share_is_met_as_nearly_as_groups_allow(most: int):
    rng = np.random.default_rng(most)
    for count in (2, 3, 10, 200):
        names = [digest_of(number) for number in range(count)]
        for fraction in (1e-6, 0.05, 0.29, 0.5, 0.999):
            weights = rng.integers(1, most + 1, count).tolist()
            chosen = hold_out(names, weights, fraction, seed=0)
            assert 0 < len(set(chosen)) == len(chosen) < count
            left = [weights[i] for i in range(count) if i not in chosen]
            missed = abs(sum(weights[i] for i in chosen) - fraction * sum(weights))
            # neither side may be empty, whatever that costs the share
            assert missed <= min(left) / 2 + 1e-9 or len(chosen) == 1 or len(left) == 1
    assert hold_out([b"one"], [7], 0.5, 0) == []


def test_groups_are_joined_through_others():
    rng = np.random.default_rng(0)
    keys = [rng.integers(0, 150, rng.integers(1, 4)).tolist() for _ in range(100)]
    groups = groups_of(keys)
    assert sorted(item for group in groups for item in group) == list(range(100))
    shared = [{key for item in group for key in keys[item]} for group in groups]
    assert sum(map(len, shared)) == len(set.union(*shared))  # no key in two
    for group, together in zip(groups, shared, strict=True):  # and each group hangs together
        reached = set(keys[group[0]])
        for _ in group:
            reached |= {k for item in group if reached & set(keys[item]) for k in keys[item]}
        assert reached == together


@pytest.mark.parametrize("size", [0, 1000, WHOLE, WHOLE + 1, 3 * WHOLE])
def test_fingerprints_tell_contents_and_not_names(tmp_path: Path, size: int):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    contents = [data, data, data + b"x"]
    if size:
        contents += [bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    first, twin, *others = fingerprints(paths)
    assert first == twin
    assert len({first, *others}) == 1 + len(others)
    (missing,) = fingerprints([tmp_path / "none"])
    assert isinstance(missing, FileNotFoundError)
