from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from runners.data.encode.encoder import Encoder
from runners.data.encode.tokenizer import ChatTokenizer
from runners.data.sources.text import MAX_BYTES, TextFiles, num_bytes
from runners.data.types import CONTINUED
from runners.shell.errors import UserError


def words(source: TextFiles) -> list[str]:
    return [source[i].turns[0].text for i in range(len(source))]


def test_files_or_paragraphs_are_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n  \nthree\r\n\r\nfour")
    (tmp_path / "b.md").write_text("ünï\n")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    assert words(TextFiles([tmp_path])) == ["one\ntwo\n\n  \nthree\r\n\r\nfour", "ünï\n"]
    by_paragraph = TextFiles([tmp_path], documents="paragraph")
    assert words(by_paragraph) == ["one\ntwo", "three", "four", "ünï\n"]
    assert by_paragraph[1].turns[0].role == "text"
    assert by_paragraph[1].id.endswith("a.txt:15")
    assert words(TextFiles([tmp_path / "b.md"])) == ["ünï\n"]


@pytest.mark.parametrize("text", ["word and word\n" * 20_000, "漢字🙂" * 40_000, "a" * 200_001])
def test_long_documents_come_in_parts_and_nothing_is_lost(
    tmp_path: Path, tokenizer: ChatTokenizer, text: str
):
    (tmp_path / "long.txt").write_text(text)
    source = TextFiles([tmp_path])
    parts = words(source)
    assert len(parts) > 2
    assert "".join(parts) == text
    assert max(len(part.encode()) for part in parts) <= MAX_BYTES
    kinds = [source.turns(i)[0].kind for i in range(len(source))]
    assert kinds == [CONTINUED] * (len(parts) - 1) + [""]
    ends = [
        sum(int((d.tokens == tokenizer.end).sum()) for d in Encoder(tokenizer, max_tokens=10**6)(c))
        for c in (source[0], source[len(source) - 1])
    ]
    assert ends == [0, 1]


def test_whole_documents_are_held_out_by_their_bytes(tmp_path: Path):
    lengths = [1 + i * 7919 % 90 for i in range(400)]
    texts = [f"paragraph {i // 2}: " + "word " * lengths[i // 2] for i in range(400)]  # twins
    texts += ["a long one: " + "long " * 30_000]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    whole = TextFiles([tmp_path], documents="paragraph")
    train, val = whole.parted(0.2, seed=3)
    assert not set(words(train)) & set(words(val))
    assert sorted(words(train) + words(val)) == sorted(words(whole))
    size = sum(map(num_bytes, whole.documents))
    assert abs(sum(map(num_bytes, val.documents)) - 0.2 * size) < 100
    assert words(
        TextFiles([tmp_path], documents="paragraph", split="val", fraction=0.2, seed=3)
    ) == words(val)
    assert pickle.loads(pickle.dumps(val))[3].turns == val[3].turns
    with pytest.raises(UserError, match=r"is one document.*--documents=paragraph"):
        TextFiles([tmp_path]).parted(0.2)


def test_errors_name_the_file(tmp_path: Path):
    with pytest.raises(UserError, match=r"text file .*no\.txt does not exist"):
        TextFiles([tmp_path / "no.txt"])
    with pytest.raises(UserError, match=r"No \*\.txt"):
        TextFiles([tmp_path])
    (tmp_path / "blank.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no text"):
        TextFiles([tmp_path])
    (tmp_path / "latin.txt").write_bytes(b"good\n\nbad \xe9 byte")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 text \(byte 10\)"):
        TextFiles([tmp_path], documents="paragraph")
    for coding, message in (("utf-16", "UTF-16 and not UTF-8"), ("utf-16-le", "byte 1 is NUL")):
        (tmp_path / "latin.txt").write_bytes("good\n\nbad".encode(coding))
        with pytest.raises(UserError, match=message):
            TextFiles([tmp_path], documents="paragraph")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a file"):
        TextFiles([tmp_path / "pipe"])
    with pytest.raises(UserError, match="documents=line"):
        TextFiles([tmp_path], documents="line")
    (tmp_path / "latin.txt").write_bytes(b"good")
    with pytest.raises(UserError, match="fraction=0"):
        TextFiles([tmp_path], split="val", fraction=0)
