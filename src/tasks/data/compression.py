"""Read texts to train a vocabulary on, and compare tokenizers by bytes per token on each kind of text."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.data.documents import local_documents, standard_library
from tasks.data.folders import Selection, TextError, TextFile, select
from tasks.data.plain import PIECE
from tasks.data.reading import Document, Findings, Reading
from tasks.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rustbpe import Tokenizer

PROSE, CODE, LANGUAGES, NUMBERS = KINDS = ("prose", "code", "other languages", "numbers, whitespace")
LOOK = 2000  # characters that decide a text's kind
LONGEST_WORD = 1 << 14  # characters; longer ones are cut
SHORT = 20  # characters; texts with fewer are skipped
SAMPLE = 1 << 20  # characters of each kind to compare
TEXTS = 10_000  # at most this many texts are examined, about a second's work

LETTERS = re.compile(r"[^\W\d_]+")
OTHER_LETTERS = re.compile(r"[^\W\d_\x00-\x7f]+")
SYMBOLS = re.compile(r"[(){}\[\]<>=+/\\|$@&%^~`]+|(?<=[a-z])_(?=[a-z])")  # rare in prose, including Markdown

Encode = Callable[[list[str]], int]  # texts to the number of tokens that they take


def tokenizer_class() -> type[Tokenizer]:
    """Return rustbpe's class. Raises ValueError if it is not built: its folder then imports as an empty package."""
    try:
        from rustbpe import Tokenizer
    except ImportError:
        raise ValueError("rustbpe is not built: install Rust from https://rustup.rs, then `make setup` again") from None
    return Tokenizer


def pattern_of(name: str) -> str:
    """Return a known pattern by its name, or the name itself as a pattern."""
    from rustbpe import DEFAULT_PATTERN, GPT2_PATTERN, NANOCHAT_PATTERN

    return {"nanochat": NANOCHAT_PATTERN, "gpt4": DEFAULT_PATTERN, "gpt2": GPT2_PATTERN}.get(name, name)


# --- texts ------------------------------------------------------------------------------------------------------------


STDLIB: list[TextFile] = []  # in place of files: Python's own sources


def data_files(data: str) -> Selection:
    """Return the files of --data. Raises ValueError if there are none."""
    try:
        return Selection(STDLIB) if data == "stdlib" else select(Path(data).expanduser())
    except TextError as error:
        raise ValueError(f"--data {data}: {error}") from None


def read_texts(
    files: Sequence[TextFile],
    reading: Reading,
    findings: Findings | None = None,
    *,
    doc_cap: int = 0,
    max_chars: int = 0,
) -> Iterator[str]:
    """Yield the first `max_chars` characters, at most `doc_cap` of a document, in texts of up to 2 MB.

    0 is no limit. A .txt file has no cap, since it may hold many documents. Raises TextError for what cannot be read.
    """
    findings = findings or Findings()
    left = max_chars or sys.maxsize
    for document in local_documents(files, reading, findings, 4 * max_chars) if files else standard_library():
        for text in _texts(document, doc_cap, findings):
            yield from _without_long_runs(text[:left])
            left -= len(text)
            if left <= 0:
                return


def _without_long_runs(text: str) -> Iterator[str]:
    """Yield the text, in parts if a word of it is too long to be a word: training takes quadratic time for those."""
    if len(text) <= LONGEST_WORD or max(map(len, text.split()), default=0) <= LONGEST_WORD:
        yield text
        return
    for at in range(0, len(text), LONGEST_WORD):
        yield text[at : at + LONGEST_WORD]


def _texts(document: Document, cap: int, findings: Findings) -> Iterator[str]:
    left = cap if cap and not document.plain else sys.maxsize
    text = ""
    for piece in document.pieces:
        if len(text) + len(piece) > left:
            findings.capped += 1
        text = (text + piece)[:left]
        if len(text) >= PIECE:
            yield text
            left -= len(text)
            text = ""
        if len(text) == left:
            break
    if text:
        yield text


def gpt2_encode(prefix: Path | None) -> Encode | None:
    """Return GPT-2's encoder, without a prefix the one in PILOT_DATA, or None.

    Raises ValueError if its two files are missing or wrong.
    """
    data = os.environ.get("PILOT_DATA")
    if prefix is None and data and Path(data, "gpt2_encoder.json").is_file():
        prefix = Path(data, "gpt2_")
    if prefix is None:
        return None
    try:
        tokenizer = load_tokenizer("gpt2", prefix)
    except ValueError as error:
        raise ValueError(str(error).replace("--gpt2.", "--gpt2-")) from None
    return lambda texts: sum(map(len, tokenizer.encode([text.encode() for text in texts])))


def check_text_limits(max_chars: int, doc_cap: int) -> None:
    """Raise ValueError for flags below 0."""
    for flag, value in (("max-chars", max_chars), ("doc-cap", doc_cap)):
        if value < 0:
            raise ValueError(f"--{flag} {value}: must be 0 or more")


# --- kinds ------------------------------------------------------------------------------------------------------------


def kind_of(text: str) -> str:
    """Return one of KINDS, by the text's first characters."""
    head = text[:LOOK]
    letters = _count(LETTERS, head)
    if letters < 0.4 * len(head):
        return NUMBERS
    if _count(OTHER_LETTERS, head) > 0.015 * letters:  # French has 4 %, German 2 %
        return LANGUAGES
    return CODE if _count(SYMBOLS, head) > 0.015 * len(head) else PROSE


def _count(characters: re.Pattern[str], text: str) -> int:
    return sum(map(len, characters.findall(text)))


class Samples:
    """Collect the first texts of each kind."""

    def __init__(self) -> None:
        self.by_kind: dict[str, list[str]] = {}
        self._left = dict.fromkeys(KINDS, SAMPLE)
        self._texts_left = TEXTS

    def add(self, text: str) -> None:
        if len(text) < SHORT or not self._texts_left or not any(self._left.values()):
            return
        self._texts_left -= 1
        kind = kind_of(text)
        if part := text[: self._left[kind]]:
            self.by_kind.setdefault(kind, []).append(part)
            self._left[kind] -= len(part)


# --- the comparison ---------------------------------------------------------------------------------------------------


def encode_with(tokenizer: Tokenizer) -> Encode:
    return lambda texts: sum(map(len, tokenizer.encode_batch(texts, disallowed_special=())))


def comparison(samples: Samples, ours: Encode, peers: Mapping[str, Encode]) -> list[str]:
    """Return a line for each kind: bytes per token, ours and each peer's, with the difference."""
    rows = [["text", "bytes", "bytes a token", *peers]]
    for kind in KINDS:
        if texts := samples.by_kind.get(kind):
            size = sum(len(text.encode()) for text in texts)
            rate = size / ours(texts)
            theirs = [size / encode(texts) for encode in peers.values()]
            rows.append([kind, f"{size:,}", f"{rate:.3f}", *(f"{x:.3f} (ours {rate / x - 1:+.1%})" for x in theirs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]
