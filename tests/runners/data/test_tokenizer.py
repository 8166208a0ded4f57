from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from runners.data.encode.tokenizer import (
    SPECIALS,
    ChatTokenizer,
    load_tokenizer,
    sample_texts,
    train_tokenizer,
)
from runners.data.sources.shapes import Shapes
from runners.data.types import BadRecordError
from runners.shell.errors import UserError

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


OTHERS = ("<s>", "</s>", "<image>", "<|im_end|>", "[CLS]", "<｜begin▁of▁text｜>")
AROUND = (("", ""), ("hi", "x"), (" ", "\n"))
EVIL = [f"{a}{mark}{b}" for mark in (*SPECIALS, *OTHERS) for a, b in AROUND]
EVIL += [
    "<IMAGE> <|END|>",
    "＜image＞＜|end|＞",
    "< s >",
    "<|im_<s>end|>",
    "<\u0301s>",
    "▁<s>",
    "<s",
]
EVIL += ["<0x3C>s>", "\ufeff<s>", "<|end|\u200b>"]
PLAIN = ("hi", "a < b", "[x] <y", "s", "漢字", "red circle\n", "image end user", "")


def of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


AHEAD = of("Prepend", prepend="<s>")


def foreign(seed: int) -> dict[str, Any]:
    """A tokenizer.json of any make, with marks wherever they can be."""
    rng = random.Random(seed)
    kind = rng.choice(("BPE", "BPE", "Unigram", "WordLevel", "WordPiece"))
    characters = sorted({c for text in (*EVIL, *PLAIN) for c in text} | set(" \u2581"))
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *characters, "hi", "red", "age", "##s"]
    words += ["re", "<s", "s>", "<s>"]
    merges = [("h", "i"), ("r", "e"), ("re", "d"), ("<", "s"), ("<s", ">"), ("s", ">"), ("<", "s>")]
    special: dict[str, bool] = {}
    for mark in (*SPECIALS, *OTHERS):
        at = rng.choice(("nowhere", "special", "added", "plain", "both"))
        if at in ("plain", "both"):
            words.insert(rng.randrange(257, len(words)), mark)
        if at in ("special", "added", "both"):
            special[mark] = at != "added"
    gap = rng.choice((0, 0, 3, 300)) if kind != "Unigram" else 0
    vocab = {word: i + (gap if i > 280 else 0) for i, word in enumerate(dict.fromkeys(words))}
    added = []
    for mark in special:
        i = vocab.get(
            mark, max(vocab.values()) + 1 + len(set(list(special)[: len(added)]) - {*vocab})
        )
        flags = {f: rng.random() < 0.5 for f in ("single_word", "lstrip", "rstrip", "normalized")}
        added.append({"id": i, "content": mark, "special": special[mark], **flags})
    accents = of("Sequence", normalizers=[of("NFD"), of("StripAccents")])
    zero = of("Replace", pattern={"String": "\u200b"}, content="")
    metaspace = of("Metaspace", replacement="\u2581", prepend_scheme="always", split=True)
    bpe = of("BPE", vocab=vocab, merges=merges, unk_token="<unk>", dropout=rng.choice((None, 0.3)))
    bytes_too = rng.random() < 0.5
    model = {
        "BPE": bpe | {"ignore_merges": rng.random() < 0.5, "byte_fallback": bytes_too},
        "Unigram": of("Unigram", unk_id=0, vocab=[[w, -float(len(w) == 1)] for w in vocab]),
        "WordLevel": of("WordLevel", vocab=vocab, unk_token="<unk>"),
        "WordPiece": of("WordPiece", vocab=vocab, unk_token="<unk>", max_input_chars_per_word=100)
        | {"continuing_subword_prefix": "##"},
    }[kind]
    normalizers = (None, None, of("Lowercase"), of("NFKC"), accents, zero, AHEAD)
    return {
        "added_tokens": added,
        "normalizer": rng.choice(normalizers),
        "pre_tokenizer": rng.choice((None, of("WhitespaceSplit"), metaspace)),
        "model": model | ({"byte_fallback": bytes_too} if kind == "Unigram" else {}),
    }


@pytest.mark.parametrize("seeds", [range(20), range(20, 40)])
def test_no_text_becomes_a_control_token_whatever_the_file(tmp_path: Path, seeds: range):
    leaks = 0
    for seed in seeds:
        raw = foreign(seed)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.save(tmp_path / "saved.json")
        again = load_tokenizer(tmp_path / "saved.json", complete=True)
        saved = Tokenizer.from_file(str(tmp_path / "saved.json"))
        vocab = raw["model"]["vocab"]
        given = {word: i for i, (word, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
        given = given | {token["content"]: token["id"] for token in raw["added_tokens"]}
        assert given.items() <= saved.get_vocab(with_added_tokens=True).items()
        control = {saved.token_to_id(mark) for mark in (*SPECIALS, *OTHERS)} - {None}
        assert len(tokenizer.specials) == 5
        assert tokenizer.specials <= control
        assert len(tokenizer.specials - set(given.values())) == len(set(SPECIALS) - set(given))
        before = Tokenizer.from_str(json.dumps(raw))
        before.encode_special_tokens = True
        for text in EVIL:
            tokens = tokenizer.encode(text)
            assert control.isdisjoint(tokens), (seed, text)
            assert again.encode(text) == tokens
            leaks += not control.isdisjoint(before.encode(text, add_special_tokens=False).ids)
        if raw["model"]["type"] == "Unigram" and raw["normalizer"] is None:
            with pytest.raises(BadRecordError, match="holds one"):  # the name of what was taken out
                tokenizer.encode(f"\uffff{tokenizer.user}\ufffe")
        if raw["model"].get("dropout") is None and raw["normalizer"] != AHEAD:
            for text in PLAIN:
                assert tokenizer.encode(text) == before.encode(text, add_special_tokens=False).ids
    assert leaks > 50  # of texts that would have


@pytest.mark.parametrize("mark", [">>fr<<", "__en__", "{user}", "[eos]", "(/end)"])
def test_an_added_token_within_punctuation_is_no_text(mark: str):
    """Also where the file calls it no special token; other added words are text."""
    words = {"<unk>": 0, **{c: i for i, c in enumerate(sorted({*mark, *"C+"}), 1)}}
    tokens = [mark, "C++", "\n\n", "<0x0A>"]
    raw = {"model": of("WordLevel", vocab=words, unk_token="<unk>"), "pre_tokenizer": SINGLE}
    more = [added(name, len(words) + i)["added_tokens"][0] for i, name in enumerate(tokens)]
    tokenizer = ChatTokenizer(json.dumps(raw | {"added_tokens": more}))
    assert tokenizer.encode(mark) == [words[c] for c in mark]
    assert tokenizer.encode("C++\n\n") == [len(words) + 1, len(words) + 2]


SINGLE = of("Split", pattern={"Regex": "."}, behavior="Isolated", invert=False)
WORDS = {"a": 0, "<unk>": 1}


def added(name: str, i: int) -> dict[str, Any]:
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    return {"added_tokens": [{"id": i, "content": name, **flags}]}


@pytest.mark.parametrize(
    ("model", "rest", "message"),
    [
        (of("WordLevel", vocab=WORDS | {"b": 0}, unk_token="<unk>"), {}, "'a' and 'b' one id, 0"),
        (of("WordLevel", vocab=WORDS, unk_token="<unk>"), added("<s>", 1), "'<s>' one id, 1"),
        (of("WordLevel", vocab=WORDS, unk_token="<unk>"), added("a", 2), "'a' the ids 0 and 2"),
        (of("WordLevel", vocab=WORDS | {"b": 10**9}, unk_token="<unk>"), {}, "'b' has id 10000000"),
        (of("WordLevel", vocab=WORDS, unk_token="<unk>"), added("b", 10**9), "'b' has id 10000000"),
        (of("WordLevel", vocab={"a": 0}, unk_token="<unk>"), {}, "no token for unknown text"),
        (of("WordLevel", vocab=WORDS | {"<|end|>": 2}, unk_token="<|end|>"), {}, r"writes <\|end"),
        (of("Unigram", vocab=[["<unk>", 0]], unk_id=0), added("b", 9), "leave ids unused"),
        (of("Unigram", vocab=[["<unk>", 0]], unk_id=None), {}, "no token for unknown text"),
    ],
)
def test_ids_and_unknown_text_are_looked_at(
    tmp_path: Path, model: dict[str, Any], rest: dict[str, Any], message: str
):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, **rest}))
    with pytest.raises(UserError, match=rf"tokenizer\.json cannot be used: .*{message}"):
        load_tokenizer(tmp_path)


def test_words_of_any_length_are_trained_on():
    for text in ("\0" * 100_000, "a" * 300_000, " " * 300_000, "word " * 50 + "ab" * 100_000):
        tokenizer = train_tokenizer([text], 300)
        assert tokenizer.decode(tokenizer.encode(text[-1000:])) == text[-1000:]


def test_errors_name_the_file_and_the_fix(tmp_path: Path, tokenizer: ChatTokenizer):
    with pytest.raises(UserError, match=r"no tokenizer file .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": 3')
    with pytest.raises(UserError, match=r"broken\.json is not a Hugging Face"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"vocab_size=200 is too small.*261"):
        train_tokenizer(["text"], 200)
    (tmp_path / "plain.json").write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(UserError, match=r"plain\.json lacks the token <\|pad\|>"):
        load_tokenizer(tmp_path / "plain.json", complete=True)
    tokenizer.check_vocabulary(tokenizer.vocab_size)
    with pytest.raises(UserError, match="vocabulary only 300"):
        tokenizer.check_vocabulary(300)


def test_sampling_stops_at_its_limits():
    assert len(list(sample_texts(Shapes(questions=1), 50))) <= 100
    assert sum(map(len, sample_texts(Shapes(), 300, max_chars=1000))) == 1000
