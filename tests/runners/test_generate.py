"""Decoding with the cache against decoding without, sampling, streaming, and the command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import Batch, VLMConfig, make_batch, vlm
from params import init_params
from params.tree import Tree
from runners import generate
from runners.data.types import IMAGE, Conversation, Turn
from runners.engine.decoding import KVCache, Sampler, attend_last, decode, with_cache
from runners.generate import pieces, prompt_batch
from runners.shell.errors import UserError
from runners.train import train
from runners.training.config import TrainConfig, model_config
from runners.training.metrics import Display
from runners.training.setup import prepare
from tests.rounding import FP32
from transforms import cast_matrices, mixed_precision

Micro = Callable[..., TrainConfig]


def _model(micro: Micro, *override: str) -> tuple[VLMConfig, Tree]:
    model = model_config(
        micro(override=(*micro().model.override, "text.vocab_size=300", *override)).model
    )
    # Wide initial weights: greedy choices vary instead of repeating one token.
    return model, {k: _wider(v) for k, v in init_params(model, seed=1).items()}


def _wider(tree: Tree) -> Tree:
    return {k: _wider(v) if isinstance(v, dict) else v * 5 for k, v in tree.items()}


def _without_cache(
    model: VLMConfig, params: Tree, prompt: Batch, count: int, pictures: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Greedy decoding that runs the whole document anew for every token."""
    forward, tokens = vlm(model), prompt["tokens"].tolist()
    for _ in range(count):
        batch = make_batch(torch.tensor([tokens]))
        if pictures:
            batch |= {k: prompt[k] for k in prompt if k not in batch}
            unused = batch["image_slots"] >= len(prompt["tokens"])
            batch["image_slots"] = batch["image_slots"].masked_fill(unused, len(tokens))
        logits = forward(params, batch)[-1]
        tokens.append(int(logits.argmax()))
        yield tokens[-1], logits


@pytest.mark.parametrize(
    "override",
    [
        (),
        ("text.window=3", "text.global_every=2"),
        ("text.tied=false", "text.qk_norm=true", "text.softcap=20"),
        ("projector.kind=resampler", "projector.queries=3", "projector.heads=2"),
    ],
)
@pytest.mark.parametrize("pictures", [True, False])
def test_the_cache_changes_no_token(
    micro: Micro, override: tuple[str, ...], pictures: bool
) -> None:
    model, params = _model(micro, *override)
    torch.manual_seed(0)
    if pictures:
        each = model.image_tokens(4)
        row = torch.tensor([[5, 6, *[1] * each, 7, *[1] * each, 8, 9]])
        images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(2)]
        prompt = make_batch(row, config=model, images=images, image_token=1)
    else:
        prompt = make_batch(torch.randint(2, 300, (1, 7)))
    expected = list(_without_cache(model, params, prompt, 8, pictures))
    found = list(decode(vlm(model), model, params, prompt, max_tokens=8))
    assert found == [token for token, _ in expected]
    assert len(set(found)) > 2, "too dull a model to tell anything"

    cache = KVCache(model.text.layers, 20)
    run = with_cache(vlm(model), model, cache)
    torch.testing.assert_close(run(params, prompt)[0], expected[0][1], rtol=FP32, atol=FP32)


def test_a_chunk_of_tokens_sees_its_own_past_only() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 4, 8), torch.randn(6, 2, 8), torch.randn(6, 2, 8)
    for window in (None, 2):
        whole = attend_last(q, k, v, window)
        parts = [attend_last(q[i : i + 2], k[: i + 2], v[: i + 2], window) for i in (0, 2, 4)]
        torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(attend_last(q, k, v, 2), attend_last(q, k, v, None))


def test_the_cache_knows_its_end(micro: Micro) -> None:
    model, params = _model(micro)
    run = with_cache(vlm(model), model, KVCache(model.text.layers, 3))
    with pytest.raises(ValueError, match="holds 3 positions, not 4"):
        run(params, make_batch(torch.ones(1, 4, dtype=torch.int64)))


def test_decoding_stops_where_it_should(micro: Micro) -> None:
    model, params = _model(micro)
    prompt = make_batch(torch.tensor([[5, 6, 7]]))
    free = list(decode(vlm(model), model, params, prompt, max_tokens=6))
    assert len(free) == 6
    stop = free[3]
    cut = list(decode(vlm(model), model, params, prompt, max_tokens=6, stop={stop}))
    assert cut == free[: free.index(stop)]


def test_cast_matrices_gives_the_numbers_of_mixed_precision(micro: Micro) -> None:
    model, params = _model(micro)
    batch = make_batch(torch.tensor([[5, 6, 7, 8]]))
    expected = mixed_precision(vlm(model), torch.bfloat16)(params, batch)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(vlm(model)(cast_matrices(params, torch.bfloat16), batch), expected)


def test_sampling() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert Sampler().start()(logits) == 1
    assert {Sampler(5.0, top_k=1).start()(logits) for _ in range(9)} == {1}
    assert {Sampler(5.0, top_p=1e-6).start()(logits) for _ in range(9)} == {1}

    def draws(sampler: Sampler, count: int = 2000) -> torch.Tensor:
        choose = sampler.start()
        return torch.bincount(torch.tensor([choose(logits) for _ in range(count)]), minlength=4)

    everything = draws(Sampler(2.0, seed=1))
    expected = (logits / 2).softmax(0) * 2000
    assert torch.equal(everything, draws(Sampler(2.0, seed=1)))
    assert not torch.equal(everything, draws(Sampler(2.0, seed=2)))
    # Five standard deviations of a binomial.
    assert ((everything - expected).abs() < 5 * (expected * (1 - expected / 2000)).sqrt()).all()
    assert draws(Sampler(2.0, top_k=2))[[0, 3]].sum() == 0
    assert draws(Sampler(2.0, top_k=2))[2] > 0
    # 1 holds 0.52 and 2 holds 0.31 of the probability: 0.6 needs both, 0.5 only the first.
    assert draws(Sampler(2.0, top_p=0.6))[[0, 3]].sum() == 0
    assert draws(Sampler(2.0, top_p=0.6))[2] > 0
    assert draws(Sampler(2.0, top_p=0.5))[1] == 2000


def test_text_streams_in_whole_characters() -> None:
    data = "né→x".encode()
    seen = list(pieces(list(data), lambda ids: bytes(ids).decode(errors="replace")))
    assert seen == ["n", "é", "→", "x"]
    cut = list(pieces(list(data[:-2]), lambda ids: bytes(ids).decode(errors="replace")))
    assert "".join(cut) == "né\ufffd"  # what never became whole is shown at the end


def test_a_prompt_is_the_start_of_its_training_document(micro: Micro) -> None:
    job = prepare(micro())
    conversation = job.data.sources.train[0]
    question, answer = conversation.turns[:2]
    asked = Conversation("x", (question,), conversation.images)
    (document,) = job.data.encoder(Conversation("x", (question, answer), conversation.images))
    batch = prompt_batch(job.data.encoder, asked)
    length = len(batch["tokens"])
    assert batch["tokens"].tolist() == document.tokens[:length].tolist()
    answered = job.data.tokenizer.decode(document.tokens[length:])
    assert answered == answer.text
    assert batch["image_slots"].tolist() == document.slots.tolist()
    with pytest.raises(UserError, match="prompt takes"):
        prompt_batch(job.data.encoder, Conversation("x", (Turn("user", "word " * 200),)))
    with pytest.raises(UserError, match="1 pictures but 2"):
        prompt_batch(
            job.data.encoder, Conversation("x", (Turn("user", IMAGE * 2),), conversation.images)
        )


def test_the_command_speaks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(trained)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(picture)
    asked = ["--run", folder, "--prompt", "What colour?", "--max_tokens=5"]
    said = []
    for extra in (
        ["--image", str(picture)],
        [f"--image={picture},{picture}"],
        ["--temperature=1", "--seed=1"],
        ["--temperature=1", "--seed=1"],
        ["--temperature=1", "--seed=2"],
    ):
        assert generate.main(asked + extra) == 0
        said.append(capsys.readouterr().out)
    assert all(line.endswith("\n") for line in said)
    assert said[2] == said[3] != said[4]
    for wrong, message in (
        (["--run", folder, "--image", "nowhere.png", "--prompt=a"], "nowhere.png does not exist"),
        (["--run", folder, "--image", str(tmp_path), "--prompt=a"], str(tmp_path)),
        (["--run", str(tmp_path), "--prompt=a"], "not the folder of a run"),
        (["--run", folder, "--prompt", "<image>what?"], "0 pictures but 1"),
    ):
        assert generate.main(wrong) == 1
        assert message in capsys.readouterr().err


def test_a_text_model_continues_text(
    micro: Micro, quiet: Callable[[], Display], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh\n" * 400)
    config = micro(data=str(text), val_fraction=0.0, steps=30, lr=0.01, vocab_size=261)
    folder = str(train(config, quiet()))
    assert generate.main(["--run", folder, "--prompt", "abcde", "--max_tokens", "4"]) == 0
    assert capsys.readouterr().out == "fgh\n\n"
    assert generate.main(["--run", folder, "--prompt", "a", "--image", "x.png"]) == 1
