"""Atomic, durable writes of files, and safetensors files with a checksum.

A file is written as ``NAME.part``, flushed to the disk (fsync) and renamed; its folder is flushed
too. A killed process or a power cut therefore leaves the old file or the new one, and at most a
``NAME.part``, which the next write replaces.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# Metadata: CRC-32 of the file, computed with zeros in place of its own 8 hex digits.
# SHA-256 takes 4 times as long.
CHECKSUM = "nanovision.crc32"
ZEROS = "0" * 8
PART = ".part"
_MARK = f'"{CHECKSUM}":"'.encode()
_CHUNK = 2**24  # bytes written, or read, at once
# https://huggingface.co/docs/safetensors: torch's dtype:the format's name of it
_NAMES = """
float64:F64 float32:F32 float16:F16 bfloat16:BF16 int64:I64 int32:I32 int16:I16 int8:I8
uint64:U64 uint32:U32 uint16:U16 uint8:U8 bool:BOOL complex64:C64
float8_e4m3fn:F8_E4M3 float8_e5m2:F8_E5M2 float8_e4m3fnuz:F8_E4M3FNUZ float8_e5m2fnuz:F8_E5M2FNUZ
float8_e8m0fnu:F8_E8M0 float4_e2m1fn_x2:F4
"""
_PAIRS = [pair.split(":") for pair in _NAMES.split()]
_DTYPES = {getattr(torch, ours): theirs for ours, theirs in _PAIRS if hasattr(torch, ours)}


# -- files and folders ------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk; a power cut may empty a file that is not flushed."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems cannot flush folders
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Makes a folder and its parents, and flushes them to the disk."""
    new = [p for p in (path, *path.absolute().parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``path`` on exit; on an error ``path`` is untouched."""
    part = path.with_name(path.name + PART)
    try:
        with fresh(part) as file:
            yield file
            flush(file)
        rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replaces a file by a UTF-8 text, atomically."""
    with writing(path) as file:
        file.write(text.encode())


def fresh(path: Path) -> BinaryIO:
    """A new file. An existing link of its name is removed, not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Renames a flushed file or folder, and flushes the rename."""
    old.replace(new)
    sync(new.parent)


# -- tensors ----------------------------------------------------------------------------------


def write_tensors(
    file: BinaryIO, leaves: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with its checksum; leaves are copied to the host one at a time.

    Raises ValueError for a dtype that the format lacks.
    """
    # largest elements first: every leaf is aligned
    order = sorted(leaves, key=lambda name: (-leaves[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {**metadata, CHECKSUM: ZEROS}}
    end = 0
    for name in order:
        leaf = leaves[name]
        if leaf.dtype not in _DTYPES:
            raise ValueError(f"safetensors has no dtype for {leaf.dtype} ({name}): cast it")
        start, end = end, end + leaf.numel() * leaf.element_size()
        dtype, shape = _DTYPES[leaf.dtype], list(leaf.shape)
        if dtype == "F4":  # PyTorch's element is a pair
            shape[-1] *= 2
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    words = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    words += b" " * (-len(words) % 8)
    head = len(words).to_bytes(8, "little") + words
    checksum = 0
    with ThreadPoolExecutor(1, "checksum") as beside:
        for piece in _pieces(head, leaves, order):
            summed = beside.submit(zlib.crc32, piece, checksum)
            file.write(piece)
            checksum = summed.result()
    file.seek(head.index(_MARK) + len(_MARK))
    file.write(_hex(checksum))


def _pieces(
    head: bytes, leaves: Mapping[str, Tensor], order: Sequence[str]
) -> Iterator[bytes | memoryview]:
    yield head
    for name in order:
        leaf = leaves[name].detach().cpu().contiguous()
        if leaf.numel():
            whole = leaf.reshape(-1).view(torch.uint8).numpy().data
            yield from (whole[at : at + _CHUNK] for at in range(0, len(whole), _CHUNK))


def _hex(checksum: int) -> bytes:
    return f"{checksum:08x}".encode()


def check_files(files: Sequence[Path]) -> None:
    """Raises ValueError for a file that does not match its checksum; files without one pass."""
    with ThreadPoolExecutor(min(8, max(1, len(files))), "checksum") as pool:
        for file, whole in zip(files, pool.map(_is_whole, files), strict=True):
            if not whole:
                raise ValueError(
                    f"{file} is damaged: its content does not match its checksum; restore it from "
                    "a copy, or write it again"
                )


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        length = file.read(8)
        head = length + file.read(min(int.from_bytes(length, "little"), 10**8))
        mark = head.find(_MARK)
        if mark < 0:
            return True
        at = mark + len(_MARK)
        end = at + len(ZEROS)
        checksum = zlib.crc32(head[:at] + ZEROS.encode() + head[end:])
        while piece := file.read(_CHUNK):
            checksum = zlib.crc32(piece, checksum)
        return head[at:end] == _hex(checksum)
