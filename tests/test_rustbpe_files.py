"""The tokenizer rustbpe in files: its own, damaged ones, tiktoken's, GPT-2's, Hugging Face's."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from tests.rustbpe_samples import SPECIALS, TRICKY, Tokenizer, learn, library, rustbpe

DATA = Path(os.environ.get("PILOT_DATA", "data"))
GPT2_FILES = (DATA / "gpt2_encoder.json", DATA / "gpt2_vocab.bpe")
needs_gpt2 = pytest.mark.skipif(not GPT2_FILES[1].is_file(), reason="GPT-2's vocabulary is not in PILOT_DATA")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*library(), TRICKY, "naïve café Привет мир 日本語 " * 3]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(iter(texts), 2000)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def same(one: Tokenizer, other: Tokenizer) -> bool:
    return (
        one.get_mergeable_ranks() == other.get_mergeable_ranks()
        and one.special_tokens() == other.special_tokens()
        and one.get_pattern() == other.get_pattern()
        and one.vocab_size == other.vocab_size
        and one.encode_ordinary(TRICKY) == other.encode_ordinary(TRICKY)
    )


def test_saved_and_loaded(trained: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("an older one")
    trained.save(file)
    assert same(Tokenizer.load(str(file)), trained)
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    assert json.loads(file.read_text())["tokens"][256:258] == [
        token.decode().replace(" ", "Ġ") for token, _ in trained.get_mergeable_ranks()[256:258]
    ]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        trained.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "tokenizer.json"]


def loads(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.json", tmp_path / "damaged.json"
    learn(["some text and some more text"], 262).save(whole)
    content = whole.read_bytes()
    cut = [content[:length] for length in range(0, len(content) - 1, 37)]
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 11)]
    fields = json.loads(content)
    other = [
        {**fields, "version": 2},
        {**fields, "format": "other"},
        {**fields, "more": 1},
        {**fields, "tokens": []},
        [],
    ]
    for damaged in (*cut, *flipped, *(json.dumps(value).encode() for value in other)):
        file.write_bytes(damaged)
        if loads(damaged) == loads(content):
            assert same(Tokenizer.load(file), Tokenizer.load(whole))  # only a blank of the layout was hit
            continue
        with pytest.raises(ValueError, match=f"^{file}: ") as caught:
            Tokenizer.load(file)
        assert "\n" not in str(caught.value)


def test_a_tiktoken_file(trained: Tokenizer, tmp_path: Path) -> None:
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in trained.get_mergeable_ranks()]
    content = b"\n".join(lines) + b"\n"
    (tmp_path / "ours.tiktoken").write_bytes(content)
    for source in (content, tmp_path / "ours.tiktoken", str(tmp_path / "ours.tiktoken")):
        assert same(Tokenizer.from_tiktoken(source, rustbpe.DEFAULT_PATTERN, trained.special_tokens()), trained)
    gap = b"\n".join([*lines[:1999], lines[1999].split()[0] + b" 2100"])
    tokenizer = Tokenizer.from_tiktoken(gap, rustbpe.DEFAULT_PATTERN, {"<|x|>": 2000})
    assert tokenizer.vocab_size == 2101
    with pytest.raises(ValueError, match="2001 is not in the vocabulary"):
        tokenizer.decode([2001])
    bad = {
        "line 2000": content[:-9] + b"\n",
        "line 1": b"IQ== 0 0\n" + content,
        "the ids 97 and 2001 have the same bytes": content + b"YQ== 2001\n",
        "the id 5 is there twice": content + b"cXFxcXFxcXFx 5\n",
        "no id": content + b"cXFxcXFxcXFx 99999999999\n",
        "the byte 0x": b"\n".join(lines[1:]),
        "has no token": b"",
    }
    for line, damaged in bad.items():
        with pytest.raises(ValueError, match=line):
            Tokenizer.from_tiktoken(damaged, rustbpe.DEFAULT_PATTERN)
    for special in (5, -1, 1 << 40):
        with pytest.raises(ValueError, match=r"the special token .* cannot have the id"):
            Tokenizer.from_tiktoken(content, rustbpe.DEFAULT_PATTERN, {"<|x|>": special})
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_tiktoken(tmp_path / "none", rustbpe.DEFAULT_PATTERN)


@needs_gpt2
def test_gpt2s_own_files(texts: list[str], tmp_path: Path) -> None:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    tokenizer = Tokenizer.from_gpt2(*GPT2_FILES)
    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2_FILES[1]), str(GPT2_FILES[0]))
    reference = tiktoken.Encoding(
        "gpt2", pat_str=rustbpe.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )
    other = tokenizers.Tokenizer.from_str(tokenizer.to_huggingface())
    assert dict(tokenizer.get_mergeable_ranks()) == ranks
    assert (tokenizer.vocab_size, tokenizer.special_tokens()) == (50257, {"<|endoftext|>": 50256})
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text) == other.encode(text).ids
    tokenizer.save(tmp_path / "gpt2.json")
    assert same(Tokenizer.load(tmp_path / "gpt2.json"), tokenizer)
    (tmp_path / "bad.json").write_text('{"a": 1}')
    for files in (
        (tmp_path / "bad.json", GPT2_FILES[1]),
        (GPT2_FILES[1], GPT2_FILES[1]),
        (GPT2_FILES[0], tmp_path / "bad.json"),
    ):
        with pytest.raises(ValueError, match=r"not GPT-2's encoder\.json and vocab\.bpe"):
            Tokenizer.from_gpt2(*files)


def test_huggingface_keeps_special_tokens(trained: Tokenizer) -> None:
    other = tokenizers.Tokenizer.from_str(trained.to_huggingface())
    text = "<|bos|>hi <|user|> there"
    assert other.encode(text).ids == trained.encode(text, allowed_special="all")
    assert other.decode(trained.encode("naïve 中文")) == "naïve 中文"
    assert other.get_vocab_size() == trained.vocab_size
