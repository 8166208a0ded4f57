"""Safetensors checkpoints in the layout of Hugging Face, replaced atomically.

A checkpoint is one file ``NAME.safetensors``, or shards beside ``NAME.safetensors.index.json``,
which maps each leaf to its shard (https://huggingface.co/docs/safetensors). A single file is
renamed into place. Shards get names that the old index does not use, and take effect when the new
index is renamed into place. A reader, or a run resumed after a crash, therefore finds either the
old checkpoint or the new one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from params.disk import check_files, flush, fresh, write_tensors, writing
from params.tree import leaf_bytes

NAME, SUFFIX, INDEX = "model.safetensors", ".safetensors", ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


def check_room(target: Path, needed: int) -> None:
    """Raises OSError if the disk of ``target`` has less than ``needed`` bytes free."""
    there = next(p for p in target.absolute().parents if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is not a folder")
    free = shutil.disk_usage(there).free
    if needed + 2**20 > free:  # headers take a little
        raise OSError(
            f"{there} has {free / 1e9:.2f} GB free and it takes {needed / 1e9:.2f} GB: make room, "
            "or choose another folder"
        )


def replace_files(
    target: Path, shards: Sequence[Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> Path:
    """Writes ``target``, or several shards and its index, in place of any checkpoint there.

    Returns the file that was renamed into place. On any error the old checkpoint is untouched and
    no other file remains.
    """
    index = target.with_name(target.name + INDEX)
    old = set(_read_index(index)[0].values()) if index.exists() else set()
    whole = len(shards) == 1
    commit, stale = (target, index) if whole else (index, target)
    names = [] if whole else _shard_names(target.stem, len(shards), old)
    files = [target.with_name(name) for name in names]
    try:
        for path, leaves in zip(files, shards, strict=not whole):
            with fresh(path) as file:
                write_tensors(file, leaves, {"format": "pt"})
                flush(file)
        with writing(commit) as file:
            if whole:
                write_tensors(file, shards[0], {"format": "pt", **metadata})
            else:
                file.write(_index(names, shards, metadata))
    except BaseException:
        for path in files:
            path.unlink(missing_ok=True)
        raise
    for name in (*(old - set(names)), stale.name):
        target.with_name(name).unlink(missing_ok=True)
    return commit


def _index(
    names: Sequence[str], shards: Sequence[Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> bytes:
    weight_map = {leaf: name for name, s in zip(names, shards, strict=True) for leaf in s}
    size = sum(leaf_bytes(leaf) for s in shards for leaf in s.values())
    record = {"metadata": {"total_size": size, **metadata}, "weight_map": weight_map}
    return json.dumps(record, indent=1).encode()


def _shard_names(stem: str, n: int, taken: set[str]) -> list[str]:
    """Hugging Face's names, or the same with a ``b`` if the present checkpoint uses those."""
    names = [f"{stem}-{i:05d}-of-{n:05d}{SUFFIX}" for i in range(1, n + 1)]
    return names if taken.isdisjoint(names) else [f"{stem}b{name[len(stem) :]}" for name in names]


def locate(path: Path) -> Path:
    """The file or index at a path, which may be its folder."""
    if not path.is_dir():
        index = path.with_name(path.name + INDEX)
        return index if index.exists() and not path.exists() else path
    for name in (NAME, NAME + INDEX):
        if (path / name).exists():
            return path / name
    files = sorted(path.glob(f"*{SUFFIX}"))
    # a killed save leaves shards without an index in a new folder: they are no model
    shards = [p for p in files if SHARD.search(p.name)]
    found = sorted(path.glob(f"*{SUFFIX}{INDEX}")) or [p for p in files if p not in shards]
    if not found and shards:
        raise FileNotFoundError(
            f"{path} holds shards ({shards[0].name}) but no *{SUFFIX}{INDEX}: save or copy it again"
        )
    if not found:
        raise FileNotFoundError(f"{path} holds no {SUFFIX} file")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{path} holds several checkpoints, name one of them: {names}")
    return found[0]


def open_leaves(
    found: Path, stack: ExitStack, *, verify: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(leaf name -> open file, metadata)``; the stack closes the files.

    verify: compare each file with its checksum, which reads all of it.
    """
    if not found.is_file():
        raise FileNotFoundError(f"there is no file {found}")
    if not found.name.endswith(INDEX):
        file = stack.enter_context(_open_file(found))
        if verify:
            check_files([found])
        return dict.fromkeys(file.keys(), file), file.metadata() or {}
    weight_map, metadata = _read_index(found)
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (found.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{found} names {len(names)} shards, of which {len(missing)} are missing: "
            f"{missing[0]} must lie beside it"
        )
    files = {name: stack.enter_context(_open_file(found.parent / name)) for name in names}
    if verify:
        check_files([found.parent / name for name in names])
    held = {name: set(file.keys()) for name, file in files.items()}
    for leaf, name in weight_map.items():
        if leaf not in held[name]:
            raise ValueError(f"{found} places {leaf} in {name}, which does not hold it")
    return {leaf: files[name] for leaf, name in weight_map.items()}, metadata


def _open_file(file: Path) -> Any:
    with named_errors(f"cannot read {file}"):
        with file.open("rb") as f:
            start = f.read(4)
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            pickled = start[:1] == b"\x80" or start == b"PK\x03\x04"
            hint = (
                "it looks like a PyTorch pickle, which is never loaded: convert it to safetensors"
                if pickled
                else "it is truncated or of another format: copy or convert it again"
            )
            raise ValueError(f"{file} is not a safetensors file ({error}); {hint}") from error


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """``(leaf name -> file name of its shard, metadata)``; shards must lie beside their index."""
    try:
        record = json.loads(index.read_text())
        weight_map, metadata = dict(record["weight_map"]), dict(record.get("metadata") or {})
        if not all(isinstance(n, str) and n and Path(n).name == n for n in weight_map.values()):
            raise ValueError("a shard's name is not that of a file beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not an index of shards ({error}): copy it again, or delete it"
        ) from error
    return weight_map, metadata


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    """Prefixes errors of the disk with ``what``."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{what}: {error}") from error
    except OSError as error:
        raise type(error)(f"{what}: {error.strerror or error}") from error
