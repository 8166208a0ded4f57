"""Fusing the loss with the head: the same number, the same gradients, and no logits anywhere."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core import Logits, Rule, VLMConfig, from_module, make_batch, preset, vlm
from params import init_params
from params.tree import flatten, map_leaves
from tests.models import language
from tests.rounding import FP64
from transforms import checkpoint, fuse_loss, quantize_int8, unfused_loss, value_and_grad

VOCAB, TOKENS, CHUNK = 61, 200, 64


fused_kernel = importlib.import_module("kernels.loss.linear_cross_entropy")


class Shapes(TorchDispatchMode):
    """Shapes of every tensor that any operation makes, inside the fused kernel's custom op too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.nanovision.linear_cross_entropy.default:
            with self:
                return fused_kernel._loss_and_gradients(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out

    def logits_rows(self) -> int:
        """The most rows of vocabulary width that one tensor held (params have fewer, 16)."""
        sizes = [shape for shape in self.seen if VOCAB in shape]
        return max((torch.Size(shape).numel() // VOCAB for shape in sizes), default=0)


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    monkeypatch.setitem(fused_kernel._CHUNK_ELEMENTS, "cpu", CHUNK * VOCAB)


def llama_and_batch():
    forward, params = from_module(language("Llama", vocab_size=VOCAB, attn_implementation="eager"))
    ids = torch.randint(0, VOCAB, (4, TOKENS // 4))
    return forward, params, {"input_ids": ids, "labels": ids.roll(-1, 1)}


@pytest.mark.parametrize("kind", ["native", "native, int8 head", "foreign"])
def test_logits_never_exist(kind: str, micro, rough, small_chunks) -> None:
    if kind == "foreign":
        forward, params, batch = llama_and_batch()
    else:
        forward, params = vlm(micro["untied"]), rough(micro["untied"])
        batch = make_batch(torch.randint(0, VOCAB, (4, TOKENS // 4)))
        batch["labels"] = batch["tokens"].roll(-1)  # every token is labelled
    if "int8" in kind:
        forward = quantize_int8(forward, skip=())
        params = forward.prepare(params)
    drivers = [lambda loss: loss(params, batch), lambda loss: value_and_grad(loss)(params, batch)]
    if "int8" not in kind:
        drivers.append(lambda loss: grad(loss)(params, batch))
    for run in drivers:
        with Shapes() as dense:
            run(unfused_loss(forward))
        assert dense.logits_rows() == TOKENS  # the watch does see them
        with Shapes() as fused:
            run(fuse_loss(checkpoint(forward)))
        assert fused.logits_rows() == CHUNK


OPTIONS = [
    {},
    {"z_loss": 0.01},
    {"label_smoothing": 0.1},
    {"z_loss": 0.003, "label_smoothing": 0.2},
]


def formula(
    logits: Tensor, labels: Tensor, z_loss: float = 0, label_smoothing: float = 0
) -> Tensor:
    plain = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    kept = labels != -100
    return plain + z_loss * logits.logsumexp(-1)[kept].square().mean()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_cross_entropy_of_dense_logits(
    micro, rough, example, assert_same, options: dict[str, float], softcap: float | None
) -> None:
    config = VLMConfig(dataclasses.replace(micro["untied"].text, softcap=softcap))
    params, batch, forward = rough(config), example(config), vlm(config)
    batch["labels"][5:9] = -100
    want, want_grads = value_and_grad(lambda p, b: formula(forward(p, b), b["labels"], **options))(
        params, batch
    )
    for transform in (fuse_loss, unfused_loss):
        value, grads = value_and_grad(transform(forward, **options))(params, batch)
        assert_same(value, want)
        assert_same(grads, want_grads)


@pytest.mark.parametrize("transform", [fuse_loss, unfused_loss])
def test_loss_is_fp32_and_mean_over_labelled_tokens(micro, rough, example, transform) -> None:
    config = micro["text"]
    params, batch = rough(config, dtype=torch.bfloat16), example(config)
    loss = transform(vlm(config))
    assert loss(params, batch).dtype == torch.float32
    assert loss(params, batch).shape == ()
    one = batch | {
        "labels": torch.full_like(batch["labels"], -100).index_fill(0, torch.tensor(3), 7)
    }
    logits = vlm(config)(params, one).float()
    torch.testing.assert_close(loss(params, one), F.cross_entropy(logits[3:4], torch.tensor([7])))


@pytest.mark.parametrize("transform", [fuse_loss, unfused_loss])
@pytest.mark.parametrize("name", ["text", "mlp"])
def test_no_label_no_loss_no_gradient(micro, rough, example, transform, name: str) -> None:
    config = micro[name]
    params, batch = rough(config), example(config)
    batch["labels"].fill_(-100)
    loss = transform(vlm(config), z_loss=0.1, label_smoothing=0.1)
    value, grads = value_and_grad(loss)(params, batch)
    for got in (grads, grad(loss)(params, batch)):
        assert value == 0
        assert flatten(got).keys() == flatten(params).keys()
        assert all(not g.any() for g in flatten(got).values())


def test_head_bias_is_part_of_the_logits(assert_same) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    forward, params = from_module(Tiny().double(), head="head")
    ids = torch.randint(0, VOCAB, (2, 3, 4))  # any leading shape
    batch = {"ids": ids, "labels": ids.roll(1)}
    want = value_and_grad(
        lambda p, b: F.cross_entropy(forward(p, b).flatten(0, -2), b["labels"].flatten())
    )(params, batch)
    got = value_and_grad(fuse_loss(forward))(params, batch)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


def test_lazy_logits_are_rows_scaled_and_capped(rough, micro) -> None:
    hidden, p = torch.randn(5, 4), {"weight": torch.randn(9, 4), "bias": torch.randn(9)}
    logits = Logits(hidden, p, scale=0.5, softcap=3.0)
    want = 3 * torch.tanh(0.5 * (hidden @ p["weight"].mT + p["bias"]) / 3)
    torch.testing.assert_close(logits.dense(), want)
    rows = torch.tensor([4, 0])
    torch.testing.assert_close(logits.at(rows).dense(), want[rows])
    assert torch.equal(logits.weight(), p["weight"])


def test_scale_and_softcap_reach_the_fused_loss(micro, rough, example, assert_same) -> None:
    """A head that scales (Cohere, Granite): a rule on the head may say so."""
    config = micro["untied"]
    params, batch = rough(config), example(config)

    def scaling(f, path):
        return lambda p, x: dataclasses.replace(f(p, x), scale=0.3, softcap=4.0)

    forward = vlm(config).with_rule(Rule("head", scaling))
    fused, dense = (value_and_grad(t(forward))(params, batch) for t in (fuse_loss, unfused_loss))
    assert_same(fused[0], dense[0])
    assert_same(fused[1], dense[1])
    plain = value_and_grad(fuse_loss(vlm(config)))(params, batch)[0]
    assert abs(plain - fused[0]) > 1e-2


def test_labels_must_fit(micro, rough, example) -> None:
    config = micro["text"]
    params, batch = rough(config), example(config)
    with pytest.raises(ValueError, match="label 61 at position 2 is outside the vocabulary of 61"):
        fuse_loss(vlm(config))(
            params, batch | {"labels": batch["labels"].index_fill(0, torch.tensor(2), 61)}
        )
    with pytest.raises(ValueError, match=r"labels must have shape \[24\]"):
        fuse_loss(vlm(config))(params, batch | {"labels": batch["labels"][1:]})


def test_gradients_flow_to_a_tied_embedding_from_both_ends(micro, rough, example) -> None:
    config = micro["text"]
    params, batch = rough(config), example(config)
    (tied,) = [value_and_grad(fuse_loss(vlm(config)))(params, batch)[1]["text"]["embed"]["weight"]]
    split = VLMConfig(dataclasses.replace(config.text, tied=False))
    apart = map_leaves(lambda t: t, params)
    apart["text"]["lm_head"] = params["text"]["embed"]
    grads = value_and_grad(fuse_loss(vlm(split)))(apart, batch)[1]["text"]
    both = grads["embed"]["weight"] + grads["lm_head"]["weight"]
    torch.testing.assert_close(tied, both, rtol=FP64, atol=FP64)


def test_the_sum_of_the_unembeddings_gradient_may_be_narrow() -> None:
    """bf16 is refused where weights are not, so the option reaches the kernel."""
    config = VLMConfig(preset("tiny").text)
    loss_fn = fuse_loss(vlm(config), accumulate="bf16")
    params = init_params(config, seed=0)
    batch = make_batch(torch.randint(config.text.vocab_size, (2, 8)))
    with pytest.raises(ValueError, match="accumulate='bf16' is for bf16 weights"):
        loss_fn(params, batch)
    half = map_leaves(lambda x: x.to(torch.bfloat16), params)
    narrow = value_and_grad(loss_fn)(half, batch)
    wide = value_and_grad(fuse_loss(vlm(config)))(half, batch)
    assert torch.equal(narrow[0], wide[0])
    for path, leaf in flatten(narrow[1]).items():  # one piece: rounded once either way
        assert torch.equal(leaf, flatten(wide[1])[path])


def test_what_a_module_does_to_its_logits_is_left_to_the_unfused_loss() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).masked_fill(torch.arange(7) > 4, -1e4)

    module = Masked()
    forward, params = from_module(module, head="head")
    batch = {"x": torch.randn(3, 4), "labels": torch.tensor([0, 4, 2])}
    with pytest.raises(TypeError, match=r"masked_fill of its logits .* use unfused_loss"):
        fuse_loss(forward)(params, batch)
    want = F.cross_entropy(module(batch["x"]), batch["labels"])
    torch.testing.assert_close(unfused_loss(forward)(params, batch), want)
