"""Files written whole or not at all, on the disk before anything older goes, with a checksum.

A file is written beside its name as ``NAME.part``, flushed to the disk (fsync) and renamed; the
folder that holds it is flushed too. So a process killed at any moment, and a machine that loses its
power, leave the old file or the new one. A killed process leaves at most a ``NAME.part``, which the
next writer of that name replaces.
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

# Metadata: CRC-32 of the file's bytes, in 8 hex digits, with zeros where it stands itself. It finds
# every error of up to 32 bits in a row, at the speed of a fast disk; SHA-256 takes 4 times as long.
CHECKSUM = "nanovision.crc32"
ZEROS = "0" * 8
PART = ".part"
_MARK = f'"{CHECKSUM}":"'.encode()
_CHUNK = 2**24  # bytes written, or read, at once
# https://huggingface.co/docs/safetensors: the format's names of the types
_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4",
}  # fmt: skip
_DTYPES = {getattr(torch, name): said for name, said in _NAMES.items() if hasattr(torch, name)}


# -- files and folders ------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flushes a file or a folder to the disk: else a power cut can leave a name without content."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems flush no folders: there a rename is as safe as they make it.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, on the disk."""
    new = [p for p in (path, *path.absolute().parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync(folder.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to be filled, which takes the place of ``path`` at the end, or leaves it untouched."""
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
    """Writes UTF-8, whole or not at all."""
    with writing(path) as file:
        file.write(text.encode())


def fresh(path: Path) -> BinaryIO:
    """A new file. A link that has its name is removed, never followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def rename(old: Path, new: Path) -> None:
    """Gives a file or folder that is on the disk its name there."""
    old.replace(new)
    sync(new.parent)


# -- tensors ----------------------------------------------------------------------------------


def write_tensors(
    file: BinaryIO, leaves: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file with its checksum; leaves go through host memory one by one.

    Raises ValueError for a dtype that the format lacks.
    """
    order = sorted(leaves, key=lambda name: (-leaves[name].element_size(), name))  # all aligned
    header: dict[str, object] = {"__metadata__": {**metadata, CHECKSUM: ZEROS}}
    end = 0
    for name in order:
        leaf = leaves[name]
        if leaf.dtype not in _DTYPES:
            raise ValueError(f"safetensors has no dtype for {leaf.dtype} ({name}): cast it")
        start, end = end, end + leaf.numel() * leaf.element_size()
        dtype, shape = _DTYPES[leaf.dtype], list(leaf.shape)
        if dtype == "F4":  # PyTorch counts pairs
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
    """Raises ValueError naming the file whose bytes are not those that were written.

    Files without a checksum, as other libraries write them, pass.
    """
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
