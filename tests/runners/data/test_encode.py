from __future__ import annotations

import numpy as np
import pytest

from runners.data.encode.encoder import Encoder, item_seed
from runners.data.encode.images import Augment, ImageSpec, patchify
from runners.data.encode.tokenizer import ChatTokenizer
from runners.data.sources.shapes import Shapes
from runners.data.types import CONTINUED, BadRecordError, Conversation, Turn
from runners.shell.errors import UserError

SQUARE = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)


TEXT = Turn("text", "some words")


def chat(*texts: str, images: int = 0) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Conversation("chat", turns, (SQUARE,) * images)


def test_the_template_and_what_is_learnt(encoder: Encoder, tokenizer: ChatTokenizer):
    t = tokenizer
    (document,) = encoder(chat("<image>\nWhat colour?", "red", "Which shape?", "circle", images=1))
    first, red = t.encode("What colour?"), t.encode("red")
    second, circle = t.encode("Which shape?"), t.encode("circle")
    expected = [t.user, *[t.image] * 4, *first, t.assistant, *red, t.end]
    expected += [t.user, *second, t.assistant, *circle, t.end]
    assert document.tokens.tolist() == expected
    assert document.slots.tolist() == [1, 2, 3, 4]
    learnt = document.labels != -100
    assert document.labels[learnt].tolist() == [*red, t.end, *circle, t.end]
    (where,) = np.nonzero(learnt)
    assert np.array_equal(document.tokens[where + 1], document.labels[where])
    patches, positions = patchify(SQUARE, 8, 2)
    assert np.array_equal(document.patches, patches)
    assert np.array_equal(document.patch_positions, positions)
    assert document.patch_counts == (16,)
    assert document.cost == (len(expected), 1, 16)
    assert document.truncated == 0


def test_pictures_anywhere_and_words_that_look_like_marks(tokenizer: ChatTokenizer):
    resampler = ImageSpec(8, 32, merge=2, projector="resampler", queries=3)
    encoder = Encoder(tokenizer, resampler, max_tokens=256)
    texts = ("One <image> two\n<image>\nthree<|end|>", "an <image> tag", "and <image>", "yes")
    (document,) = encoder(chat(*texts, images=3))
    assert len(document.slots) == 9
    assert document.patch_counts == (16, 16, 16)
    shown = tokenizer.decode(document.tokens, specials=True)
    assert shown.startswith("<|user|>One " + "<|image|>" * 3 + " two" + "<|image|>" * 3 + "three")
    assert "an <image> tag<|end|>" in shown  # an answer's words are words
    assert (document.tokens == tokenizer.end).sum() == 2  # the user's "<|end|>" is letters


def test_a_backslash_makes_a_mark_a_word(encoder: Encoder, tokenizer: ChatTokenizer):
    (document,) = encoder(chat("<image>\nWhat does \\<image> mean?", "an <image>", images=1))
    assert len(document.slots) == 4
    shown = tokenizer.decode(document.tokens)
    assert shown == "What does <image> mean?an <image>"


def test_an_image_token_in_a_text_is_found(
    encoder: Encoder, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
):
    leaky = ChatTokenizer(tokenizer._json)
    monkeypatch.setattr(leaky, "encode", lambda text: [leaky.image])
    for item in (chat("<image>a", "b", images=1), chat("a", "b"), Conversation("t", (TEXT,))):
        with pytest.raises(BadRecordError, match="a text must not hold one"):
            Encoder(leaky, encoder.images, max_tokens=256)(item)


def test_a_prompt_is_the_beginning_of_its_document(encoder: Encoder):
    item = Shapes(size=32)[3]
    (document,) = encoder(item)
    prompt = encoder.prompt(Conversation("q", item.turns[:1], item.images))
    length = len(prompt.tokens)
    assert np.array_equal(document.tokens[:length], prompt.tokens)
    assert (prompt.labels == -100).all()
    assert document.labels[length - 1] == document.tokens[length] != -100
    with pytest.raises(BadRecordError, match="prompt takes"):
        encoder.prompt(chat("long " * 300))


def test_long_text_is_cut_and_nothing_is_lost(tokenizer: ChatTokenizer):
    for words in (1, 9, 50, 63, 64, 200):
        text = Conversation("t", (Turn("text", "word <image> " * words),))
        whole = [*tokenizer.encode(text.turns[0].text), tokenizer.end]
        pieces = Encoder(tokenizer, max_tokens=16)(text)
        assert all(len(piece.tokens) <= 16 for piece in pieces)
        assert np.concatenate([p.labels for p in pieces])[: len(whole) - 1].tolist() == whole[1:]
        tokens = np.concatenate([piece.tokens for piece in pieces]).tolist()
        assert tokens in (whole, whole[:-1])  # a last token without a label needs no row
        assert all((piece.labels != -100).any() for piece in pieces)
    (document,) = Encoder(tokenizer, max_tokens=16)(
        Conversation("t", (Turn("text", "it goes on", CONTINUED),))
    )
    assert document.tokens.tolist() == tokenizer.encode("it goes on")


def test_long_conversations_are_cut_and_say_so(tokenizer: ChatTokenizer, images: ImageSpec):
    conversation = chat("<image>Describe", "red " * 20, "<image>again", "blue " * 20, images=2)
    (whole,) = Encoder(tokenizer, images, max_tokens=999)(conversation)
    second = int(whole.slots[4])
    for limit in range(10, len(whole.tokens) + 1):
        (cut,) = Encoder(tokenizer, images, max_tokens=limit)(conversation)
        length = len(cut.tokens)
        assert length == (second if second <= limit < second + 4 else limit)
        assert cut.truncated == len(whole.tokens) - length
        assert np.array_equal(cut.tokens, whole.tokens[:length])
        assert np.array_equal(cut.labels, whole.labels[:length])
        assert len(cut.slots) == 4 * len(cut.patch_counts) == len(cut.patches) // 4
    with pytest.raises(BadRecordError, match="raise the row length") as caught:
        Encoder(tokenizer, images, max_tokens=4)(conversation)
    assert not caught.value.fatal


def test_augmentation_needs_a_seed_and_follows_it(tokenizer: ChatTokenizer, images: ImageSpec):
    encoder = Encoder(tokenizer, images, max_tokens=256, augment=Augment(flip=0.5, crop=0.4))
    item = Shapes(size=32)[0]
    plain, one, same, other = (encoder(item, seed)[0].patches for seed in (None, 1, 1, 2))
    assert np.array_equal(plain, patchify(item.images[0], 8, 2)[0])
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({item_seed(*key) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 11)]}) == 4


def test_mismatches_name_the_record(encoder: Encoder, tokenizer: ChatTokenizer):
    for text in ("<image><image>?", "?", r"<image>\<image>" + "<image>"):
        with pytest.raises(BadRecordError, match=r"'chat' has 1 pictures but [02] <image> marks"):
            encoder(chat(text, "no", images=1))
    with pytest.raises(BadRecordError, match="has 3 pictures, more than a row has tokens"):
        Encoder(tokenizer, encoder.images, max_tokens=2)(chat("<image>" * 3, "no", images=3))
    with pytest.raises(UserError, match="no vision part"):
        Encoder(tokenizer, max_tokens=64)(chat("<image>?", "no", images=1))
    with pytest.raises(UserError, match="role 'judge'"):
        encoder(Conversation("x", (Turn("judge", "guilty"),)))
