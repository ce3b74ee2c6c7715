"""The tokenizer rustbpe: against a slow BPE in Python, tiktoken and Hugging Face's tokenizers; and every bad input."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rustbpe_samples import PATTERNS, SPECIALS, TRICKY, Tokenizer, learn, library, rustbpe


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [*library(), TRICKY, "naïve café Привет мир 日本語 " * 3]


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(iter(texts), 2000)
    tokenizer.add_special_tokens(SPECIALS)
    return tokenizer


def slow_merges(words: Counter[bytes], count: int) -> list[bytes]:
    """BPE as one explains it: the most frequent pair, of equals the lowest ids, again and again."""
    split = {word: [*word] for word in words}
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < 256 + count:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, ids in split.items():
            for pair in itertools.pairwise(ids):
                pairs[pair] += words[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids in split.values():
            at = 0
            while at + 1 < len(ids):
                if (ids[at], ids[at + 1]) == best:
                    ids[at : at + 2] = [len(tokens)]
                at += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


# training


def test_merges_are_the_slow_ways(texts: list[str]) -> None:
    some = [*texts[:3], texts[-2], texts[-1], "a" * 50]
    words = Counter(chunk.encode() for text in some for chunk in regex.findall(rustbpe.DEFAULT_PATTERN, text))
    ranks = learn(some, 256 + 150).get_mergeable_ranks()
    assert ranks == [(token, rank) for rank, token in enumerate(slow_merges(words, 150))]


def test_merges_do_not_depend_on_threads_or_buffers(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(json.dumps([*library(12), "".join(library(12))]))
    code = (
        "import json, sys, rustbpe\nt = rustbpe.Tokenizer()\n"
        "t.train_from_iterator(json.load(open(sys.argv[1])), 1500, buffer_size=int(sys.argv[2]))\nt.save(sys.argv[3])"
    )
    saved = set()
    for threads, buffer in (("1", "8192"), ("2", "3"), ("7", "8192")):
        file = tmp_path / f"{threads}.json"
        command = [sys.executable, "-c", code, str(tmp_path / "text.json"), buffer, str(file)]
        subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "RAYON_NUM_THREADS": threads})
        saved.add(file.read_bytes())
    assert len(saved) == 1


def test_less_text_than_the_vocabulary_wants() -> None:
    with pytest.warns(UserWarning, match="a vocabulary of 259, not 1000"):
        tokenizer = learn(["abcd"], 1000)
    assert tokenizer.vocab_size == 259
    assert [token for token, _ in tokenizer.get_mergeable_ranks()[256:]] == [b"ab", b"cd", b"abcd"]


def test_progress_counts_merges(texts: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    learn(texts, 1000, progress=lambda done, wanted: seen.append((done, wanted)))
    assert seen == sorted(seen)
    assert seen[-1] == (744, 744)


def test_an_error_in_training_leaves_the_tokenizer_as_it_was(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "before.json")
    tokenizer = Tokenizer.load(tmp_path / "before.json")

    def broken() -> Iterator[str]:
        yield "some text"
        raise LookupError("the disk is gone")

    def refuse(done: int, wanted: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="the disk is gone"):
        tokenizer.train_from_iterator(broken(), 300)
    with pytest.raises(LookupError, match="enough"):
        tokenizer.train_from_iterator(["some text"], 300, progress=refuse)
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        tokenizer.train_from_iterator(["text", b"bytes"], 300)
    tokenizer.save(tmp_path / "after.json")
    assert (tmp_path / "after.json").read_bytes() == (tmp_path / "before.json").read_bytes()


def test_special_tokens_count_in_the_vocabulary(texts: list[str]) -> None:
    tokenizer = Tokenizer()
    tokenizer.add_special_tokens(SPECIALS)
    assert tokenizer.special_tokens() == {"<|bos|>": 256, "<|user|>": 257, "<|user|>2": 258}
    tokenizer.train_from_iterator(texts, 500)
    assert tokenizer.vocab_size == 500
    assert tokenizer.special_tokens() == {"<|bos|>": 497, "<|user|>": 498, "<|user|>2": 499}
    with pytest.raises(ValueError, match="vocab_size must be 259 "):
        tokenizer.train_from_iterator(texts, 258)


@pytest.mark.parametrize(
    ("iterator", "arguments", "error", "line"),
    [
        ([], {"vocab_size": 300}, ValueError, "no text"),
        (["", ""], {"vocab_size": 300}, ValueError, "no text"),
        (["a"], {"vocab_size": 255}, ValueError, "vocab_size must be 256"),
        (["a"], {"vocab_size": -1}, ValueError, "vocab_size must be 256"),
        (["a"], {"vocab_size": 1 << 40}, ValueError, "vocab_size must be 256"),
        (["a"], {"vocab_size": 300, "buffer_size": 0}, ValueError, "buffer_size"),
        (["a"], {"vocab_size": 300, "pattern": "(a"}, ValueError, "is broken"),
        (["a-"], {"vocab_size": 300, "pattern": r"\w+"}, ValueError, "leaves text out at byte 1"),
        (["a" * 60], {"vocab_size": 300, "pattern": r"(?=(a|aa)+$)b\1|c"}, ValueError, "gives up"),
        (3, {"vocab_size": 300}, TypeError, "not iterable"),
    ],
)
def test_bad_training(iterator: object, arguments: dict[str, object], error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line) as caught:
        Tokenizer().train_from_iterator(iterator, **arguments)
    assert "\n" not in str(caught.value)


CTRL_C = """
import hashlib, sys, rustbpe
tokenizer, letters = rustbpe.Tokenizer(), str.maketrans("0123456789", "ghijklmnop")

def words(count):
    yield from (hashlib.sha256(b"%d" % number).hexdigest().translate(letters) for number in range(count))

def endless():
    while True:
        said()
        yield "some text " * 9999

def said(*_):
    print("on", flush=True)

try:
    texts = endless() if sys.argv[1] == "texts" else words(200_000)
    tokenizer.train_from_iterator(texts, 1 << 22, progress=said)
except KeyboardInterrupt:
    print("stopped", tokenizer.vocab_size)
"""


@pytest.mark.parametrize("phase", ["texts", "merges"])
def test_ctrl_c_ends_training(tmp_path: Path, phase: str) -> None:
    """Among endless texts; and in merges that take many seconds."""
    command = [sys.executable, "-c", CTRL_C, phase]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().endswith("stopped 256\n")
        assert process.wait() == 0


def test_memory_holds_words_not_texts(tmp_path: Path) -> None:
    code = (
        "import resource, rustbpe\nt = rustbpe.Tokenizer()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "text = 'the quick brown fox jumps over the lazy dog, é. ' * 20_000\n"
        "t.train_from_iterator([text], 300)\nbefore = peak()\n"
        "t.train_from_iterator((text + str(n) for n in range(300)), 300)\nprint(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert int(out) < 150_000  # KB, where the texts are 290 MB


# encoding


def test_ids_are_tiktokens_and_huggingfaces(trained: Tokenizer, texts: list[str]) -> None:
    reference = tiktoken.Encoding(**trained.to_tiktoken())
    other = tokenizers.Tokenizer.from_str(trained.to_huggingface())
    for text in texts:
        ids = trained.encode(text)
        assert ids == reference.encode(text)
        assert ids == other.encode(text).ids
        assert trained.decode(ids) == text
        assert trained.encode_to_numpy(text).tolist() == ids
    for threads in (1, 3, None):
        assert trained.encode_batch(texts, num_threads=threads) == reference.encode_batch(texts)
    assert trained.batch_encode(texts[:3]) == reference.encode_batch(texts[:3])
    assert trained.encode_batch([]) == []


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W", r"\s?\S+|\s+"])
def test_every_pattern_is_tiktokens(texts: list[str], pattern: str) -> None:
    tokenizer = learn(texts[-12:], 700, pattern=pattern)
    reference = tiktoken.Encoding(**tokenizer.to_tiktoken())
    other = tokenizers.Tokenizer.from_str(tokenizer.to_huggingface())
    assert tokenizer.get_pattern() == pattern
    for text in (*texts[-12:], "  ends in blanks \n \n  ", "\n\n", "'"):
        assert tokenizer.encode(text) == reference.encode(text) == other.encode(text).ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(), st.sampled_from(TRICKY))))
def test_any_text_is_tiktokens_and_comes_back(trained: Tokenizer, text: str) -> None:
    reference = tiktoken.Encoding(**trained.to_tiktoken())
    ids = trained.encode_ordinary(text)
    assert ids == reference.encode_ordinary(text)
    assert trained.decode(ids) == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_lone_surrogates_are_replaced(trained: Tokenizer) -> None:
    reference = tiktoken.Encoding(**trained.to_tiktoken())
    for text in ("a\ud800b", "\udc00", "\ud83d\ude00"):
        assert trained.encode(text) == reference.encode(text)
    assert learn(["a\ud800b"] * 2, 258).vocab_size == 258


def test_one_chunk_of_a_million_letters(trained: Tokenizer) -> None:
    reference = tiktoken.Encoding(**trained.to_tiktoken())
    begin = time.monotonic()
    for text in ("a" * 1_000_000, " " * 1_000_000, "ab" * 500_000):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert ids[:1000] == reference.encode(text[:100_000])[:1000]
    assert time.monotonic() - begin < 30  # quadratic time would take hours


def test_special_tokens_are_tiktokens(trained: Tokenizer) -> None:
    reference = tiktoken.Encoding(**{**trained.to_tiktoken(), "special_tokens": {"<|bos|>": 2000, "<|user|>": 2001}})
    text = "<|bos|>hi <|user|><|bos|> there<|us"
    for allowed in ("all", {"<|bos|>"}, {"<|bos|>", "<|user|>"}, set()):
        arguments = {"allowed_special": allowed, "disallowed_special": ()}
        assert trained.encode(text, **arguments) == reference.encode(text, **arguments)
        assert trained.encode_batch([text], **arguments) == reference.encode_batch([text], **arguments)
        assert trained.encode_to_numpy(text, **arguments).tolist() == reference.encode(text, **arguments)
    assert trained.encode_ordinary(text) == reference.encode_ordinary(text)
    assert trained.encode("<|user|>2<|user|>", allowed_special="all") == [2002, 2001]  # the longest
    for arguments in (
        {},
        {"allowed_special": {"<|bos|>"}},
        {"disallowed_special": ["<|user|>"]},
        {"disallowed_special": {"hi"}},
    ):
        for tokenizer in (trained, reference):
            with pytest.raises(ValueError, match=r"special token|disallowed"):
                tokenizer.encode(text, **arguments)
    assert trained.decode([2000, 2001]) == "<|bos|><|user|>"
    assert trained.encode_single_token("<|bos|>") == 2000
    assert trained.encode_single_token("a") == trained.encode_single_token(b"a") == 97


def test_a_thread_encodes_while_another_does(trained: Tokenizer, texts: list[str]) -> None:
    wanted, wrong = [trained.encode(text) for text in texts], []

    def work() -> None:
        wrong.extend(text for text, ids in zip(texts, wanted, strict=True) if trained.encode(text) != ids)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_decoding_takes_what_encoding_gives(trained: Tokenizer) -> None:
    ids = trained.encode("naïve 中文")
    array = np.array(ids)
    for form in (ids, tuple(ids), iter(ids), array, array.astype(np.uint32), array.astype(np.uint16), array[::1]):
        assert trained.decode(form) == "naïve 中文"
    assert trained.decode(array.astype(np.uint32)[::-1]) == trained.decode(ids[::-1])
    assert trained.decode_bytes([0xE4, 0x61]) == b"\xe4a"
    assert trained.decode([0xE4, 0x61, 0xFF]) == b"\xe4a\xff".decode("utf-8", "replace")
    assert trained.decode([0xE4, 0x61], errors="ignore") == "a"
    with pytest.raises(UnicodeDecodeError):
        trained.decode([0xE4, 0x61], errors="strict")


@pytest.mark.parametrize(
    ("call", "error", "line"),
    [
        (lambda t: t.encode(b"bytes"), TypeError, "a text must be a str, not bytes"),
        (lambda t: t.encode(None), TypeError, "a text must be a str"),
        (lambda t: t.encode_batch(["a", 3]), TypeError, "a text must be a str, not int"),
        (lambda t: t.encode_batch(["a"], num_threads=0), ValueError, "num_threads"),
        (lambda t: t.encode("a", allowed_special={"<|nobody|>"}), ValueError, "no special token"),
        (lambda t: t.encode("a", allowed_special="some"), ValueError, "allowed_special"),
        (lambda t: t.encode("a <|bos|>"), ValueError, r"the special token .<\|bos\|>"),
        (lambda t: t.encode_batch(["a <|bos|>"]), ValueError, r"the special token .<\|bos\|>"),
        (lambda t: t.decode([2003]), ValueError, "2003 is not in the vocabulary"),
        (lambda t: t.decode([-1]), ValueError, "-1 is not in the vocabulary"),
        (lambda t: t.decode([1 << 70]), ValueError, "is not in the vocabulary"),
        (lambda t: t.decode(np.array([-1])), ValueError, "-1 is not in the vocabulary"),
        (lambda t: t.decode(["a"]), TypeError, "an id must be an int"),
        (lambda t: t.decode([255], errors="no such"), LookupError, "no such"),
        (lambda t: t.encode_single_token("nobody knows this"), KeyError, "there is no token"),
        (lambda t: t.add_special_tokens(["<|bos|>"]), ValueError, "is there already"),
        (lambda t: t.add_special_tokens(["<|x|>", "<|x|>"]), ValueError, "is there already"),
        (lambda t: t.add_special_tokens([""]), ValueError, "must not be empty"),
        (lambda t: t.save("/nowhere/at/all.json"), FileNotFoundError, "No such file"),
        (lambda t: Tokenizer.load("/nowhere/at/all.json"), FileNotFoundError, "No such file"),
    ],
)
def test_bad_calls(trained: Tokenizer, call: Callable[[Tokenizer], object], error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line) as caught:
        call(trained)
    assert "\n" not in str(caught.value)
