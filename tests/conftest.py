"""What every room's tests share: one thread, a fixed seed, models that run in milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from core import ProjectorConfig, TextConfig, VisionConfig, VLMConfig, make_batch
from core.batch import Batch
from kernels.runtime import dispatch
from params import init_params
from params.tree import Tree, flatten, map_leaves
from tests.rounding import MODEL, ulps

IMAGE_TOKEN = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-case", action="store_true", help="on a GPU: every case of every test of a kernel"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: more threads only wait for each other
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What a test changes of the process the next does not see, in whatever order they run."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    recording, asked = torch.is_grad_enabled(), dict(dispatch._overrides)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    torch.set_grad_enabled(recording)
    dispatch._overrides.clear()
    dispatch._overrides.update(asked)
    if torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode():
        torch.cuda.set_sync_debug_mode(0)
    if "torch._dynamo" in sys.modules:  # functions of one text share their limit of programs
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def micro() -> dict[str, VLMConfig]:
    """Text alone (tied, untied), the two projectors, fixed positions; GQA, two layers."""
    sizes = {"vocab_size": 61, "dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_dim": 24}
    text = TextConfig(**sizes)  # type: ignore[arg-type]
    untied = TextConfig(**sizes, tied=False, qkv_bias=True, qk_norm=True)  # type: ignore[arg-type]
    vision = VisionConfig(
        dim=16, layers=2, heads=2, mlp_dim=24, patch_size=4, image_size=16, merge=2
    )
    resampler = ProjectorConfig("resampler", queries=3, heads=2)
    return {
        "text": VLMConfig(text),
        "untied": VLMConfig(untied),
        "mlp": VLMConfig(text, vision, ProjectorConfig(hidden=20)),
        "resampler": VLMConfig(untied, vision, resampler),
        "sincos": VLMConfig(
            text, replace(vision, positions="sincos2d"), ProjectorConfig(hidden=20)
        ),
    }


@pytest.fixture(scope="session")
def rough() -> Callable[..., Tree]:
    """Params of a config with every leaf off its round start: no bias is 0, no norm's weight 1."""

    def make(config: VLMConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
        generator = torch.Generator().manual_seed(seed)

        def shake(leaf: Tensor) -> Tensor:
            return leaf + 0.2 * torch.randn(leaf.shape, generator=generator).to(leaf)

        return map_leaves(shake, init_params(config, seed, dtype=dtype))

    return make


@pytest.fixture(scope="session")
def example() -> Callable[..., Batch]:
    """A batch of rows, each with a picture if the config has eyes: see ``make_batch``."""

    def make(
        config: VLMConfig, rows: int = 2, length: int = 12, seed: int = 0, side: int = 16
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(2, config.text.vocab_size, (rows, length), generator=generator)
        if config.vision is None:
            return make_batch(tokens)
        count = config.image_tokens((side // config.vision.patch_size) ** 2)
        tokens[:, 2 : 2 + count] = IMAGE_TOKEN
        images = [
            torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
            for _ in range(rows)
        ]
        return make_batch(tokens, config=config, images=images, image_token=IMAGE_TOKEN)

    return make


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Two trees (or tensors) with the same leaves, but for the rounding of their largest entries.

    terms: of the sums that are rounded (see ``ulps``); 0: bit for bit. dtype: that they are rounded
    to, where it is not the leaf's. rtol: instead, where it is not rounding that parts them. A leaf
    that should be 0 (a key's bias has no gradient: softmax does not see it) may be off by the
    rounding of the others. NaN never passes.
    """

    def check(
        got: Tree | Tensor,
        want: Tree | Tensor,
        terms: int = MODEL,
        dtype: torch.dtype | None = None,
        *,
        rtol: float | None = None,
    ) -> None:
        assert terms == int(terms), "terms, not a tolerance: that is rtol="
        left = {"": got} if isinstance(got, Tensor) else flatten(got)
        right = {"": want} if isinstance(want, Tensor) else flatten(want)
        assert left.keys() == right.keys()
        sizes = {path: leaf.abs().max().item() for path, leaf in right.items()}
        floor = 1e-2 * max(sizes.values())
        for path, tensor in left.items():
            assert tensor.shape == right[path].shape, path
            assert tensor.dtype == right[path].dtype, path
            error = (tensor - right[path]).abs().max().item()
            allowed = rtol
            if allowed is None:
                exact = terms == 0 or not tensor.is_floating_point()
                allowed = 0.0 if exact else ulps(dtype or tensor.dtype, terms)
            assert allowed < 0.1, f"{path}: {terms} roundings to {dtype or tensor.dtype}"
            limit = allowed * max(sizes[path], floor)
            assert error <= limit, f"{path}: off by {error:.3g}, allowed {limit:.3g}"

    return check
