"""What the first kernels on a GPU wait for, begun while the data is still being prepared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import kernels
from core import Longest, VLMConfig
from kernels.runtime import dispatch, launch
from runners.data.packing import PackSpec
from runners.shell.compile_ahead import Attention
from runners.training.compose import choose_backends, compute_dtype
from runners.training.config import TrainConfig


@contextmanager
def warming(device: torch.device) -> Iterator[None]:
    """Inside, threads open the device and hash Triton's library; at its end both are done.

    Both are work outside of Python, which meanwhile reads data and imports. Beside the tokenizing
    of a sample the hash added 0.2 to 0.27 s instead of 0.33 to 0.44 (two slow cores, busy); beside
    imports, which hold Python's lock, it saves nothing. On a CPU there is nothing to do.
    """
    work = (lambda: _open(device), _hash_triton) if device.type == "cuda" else ()
    threads = [threading.Thread(target=_quietly, args=(one,), name="warming") for one in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def _open(device: torch.device) -> None:
    """Makes the device's context, and what cuBLAS sets up for its first product."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(ones, ones)


def _hash_triton() -> None:
    """Triton names its cached kernels by a hash of itself, of 500 MB: once a process."""
    if launch.triton is not None:
        launch.triton.runtime.cache.triton_key()


def _quietly(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        return  # the first kernel meets the same, and says so in the main thread


def attentions(
    config: TrainConfig, model: VLMConfig, device: torch.device, spec: PackSpec, longest: Longest
) -> list[Attention]:
    """The attentions of a run that flash-attn 4 will compute if it is installed, for
    `compile_ahead.begin`: of the decoder and of the vision tower's blocks."""
    text, vision = model.text, model.vision
    dtype, _ = compute_dtype(config, device)
    if device.type != "cuda" or dtype != torch.bfloat16:
        return []
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = [
        Attention(
            spec.rows * spec.row_len, spec.rows * (spec.max_docs + 1), text.heads, text.kv_heads,
            text.head_size, longest.document or spec.row_len, None, True, window, deterministic,
        )
        for window in dict.fromkeys(text.window_of(layer) for layer in range(text.layers))
    ]  # fmt: skip
    if vision is not None and spec.images is not None:
        picture = longest.picture
        found.append(
            Attention(
                spec.max_patches, spec.max_images + 1, vision.heads, vision.heads,
                vision.dim // vision.heads, picture or spec.max_patches,
                picture if longest.equal_pictures else None, False, None, deterministic,
            )
        )  # fmt: skip
    with kernels.override(**choose_backends(config, device)):
        return [
            a
            for a in found
            if dispatch.wants_flash_attn_4(
                device=str(device),
                dtype=dtype,
                head_dim=a.head_dim,
                group=a.heads // a.kv_heads,
                max_seqlen=a.longest,
                length=a.length,
                window=a.window,
            )
        ]
