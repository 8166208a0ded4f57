from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from runners.data.shapes import Shapes
from runners.data.tokenizer import (
    SPECIALS,
    ChatTokenizer,
    load_tokenizer,
    sample_texts,
    train_tokenizer,
)
from runners.errors import UserError

TEXTS = ["plain words", "Ünïcödé 漢字 🙂", "a\n\n b\t", "<|end|> is <|image|>", "\x00\x7f", ""]


def test_training_is_deterministic_and_saving_keeps_it(tmp_path: Path):
    one, other = (train_tokenizer(sample_texts(Shapes(), 200)) for _ in range(2))
    one.save(tmp_path / "tokenizer.json")
    other.save(tmp_path / "other.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "tokenizer.json"]
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(one))):
        assert again.vocab_size == one.vocab_size
        assert [again.encode(text) for text in TEXTS] == [one.encode(text) for text in TEXTS]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_and_never_becomes_special(tokenizer: ChatTokenizer, text: str):
    tokens = tokenizer.encode(text)
    assert not set(tokens) & tokenizer.specials
    assert tokenizer.decode(tokens) == text
    assert max(tokens, default=0) < tokenizer.vocab_size


def test_what_the_caller_does_to_tokens_is_not_remembered(tokenizer: ChatTokenizer):
    tokenizer.encode("red circle").append(7)
    assert tokenizer.decode(tokenizer.encode("red circle")) == "red circle"


def test_short_answers_are_one_token(tokenizer: ChatTokenizer):
    for answer in ("red", "purple", "circle", "triangle", "left", "right", "3"):
        assert len(tokenizer.encode(answer)) == 1, answer


def test_special_tokens_show_only_when_asked_for(tokenizer: ChatTokenizer):
    tokens = [tokenizer.user, *tokenizer.encode("hi"), tokenizer.end]
    assert tokenizer.decode(tokens) == "hi"
    assert tokenizer.decode(tokens, specials=True) == "<|user|>hi<|end|>"
    assert len(tokenizer.specials) == len(SPECIALS)


def test_a_foreign_tokenizer_gets_the_special_tokens_at_its_end(tmp_path: Path):
    words = {"<unk>": 0, "<s>": 1, "red": 2, "circle": 9}  # ids with gaps
    foreign = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    foreign.pre_tokenizer = pre_tokenizers.Whitespace()
    foreign.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    foreign.enable_truncation(2)
    foreign.enable_padding(length=8)
    foreign.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.encode("red circle red") == [2, 9, 2]  # no <s>, neither cut nor padded
    ids = [tokenizer.pad, tokenizer.user, tokenizer.assistant, tokenizer.end, tokenizer.image]
    assert len({2, 9, *ids}) == 7
    assert tokenizer.vocab_size == max(9, *ids) + 1
    tokenizer.save(tmp_path / "again.json")
    assert load_tokenizer(tmp_path / "again.json").user == tokenizer.user


def test_errors_name_the_file_and_the_fix(tmp_path: Path, tokenizer: ChatTokenizer):
    with pytest.raises(UserError, match=r"no tokenizer file .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": 3')
    with pytest.raises(UserError, match=r"broken\.json is not a Hugging Face"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"vocab_size=200 is too small.*261"):
        train_tokenizer(["text"], 200)
    tokenizer.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(UserError, match="vocabulary only 300"):
        tokenizer.check_vocabulary(300)


def test_sampling_stops_at_its_limits():
    assert len(list(sample_texts(Shapes(questions=1), 50))) <= 100
    assert sum(map(len, sample_texts(Shapes(), 300, max_chars=1000))) == 1000
