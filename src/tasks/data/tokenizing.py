"""Tokenize the pieces of a text into a token file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from tasks.data.documents import Piece, TextError
from tasks.data.tokenizer import Tokenizer
from tasks.data.tokens import Array, write

BATCH = 4 << 20  # bytes of text tokenized at a time
EMPTY = "empty: there is no text in it"

Progress = Callable[[str], None]


def silent(line: str) -> None:
    """Ignore a line of progress."""


def tokenize(
    pieces: Iterable[Piece], tokenizer: Tokenizer, path: Path, progress: Progress = silent, limit: int = sys.maxsize
) -> None:
    """Write the token file. One token separates the documents of a part, and with some tokenizers leads the first.

    Raises TextError if there is no text, or more than `limit` bytes of tokens.
    """
    with tempfile.TemporaryFile(dir=path.parent) as spool:  # validation tokens are written last, but found in between

        def train() -> Iterator[Array]:
            for validation, tokens in _encoded(pieces, tokenizer, progress, limit):
                if validation:
                    spool.write(tokens.astype(tokenizer.dtype, copy=False).tobytes())
                else:
                    yield tokens

        write(path, train(), _spooled(spool, tokenizer), tokenizer.dtype)


def _spooled(spool: IO[bytes], tokenizer: Tokenizer) -> Iterator[Array]:
    spool.seek(0)
    while data := spool.read(BATCH):
        yield np.frombuffer(data, dtype=tokenizer.dtype)


def _encoded(
    pieces: Iterable[Piece], tokenizer: Tokenizer, progress: Progress, limit: int
) -> Iterator[tuple[bool, Array]]:
    separator = np.array([tokenizer.separator], dtype=tokenizer.dtype)
    begun = {False: False, True: False}
    text_bytes = tokens = 0
    blank = True
    for batch in _batches(pieces):
        for piece, ids in zip(batch, tokenizer.encode([piece.data for piece in batch]), strict=True):
            if piece.starts and (tokenizer.leads or begun[piece.validation]):
                yield piece.validation, separator
            begun[piece.validation] = True
            yield piece.validation, ids
            blank = blank and (not piece.data or piece.data.isspace())
            text_bytes += len(piece.data)
            tokens += len(ids)
        if tokens * separator.itemsize > limit:
            raise TextError("more text than the order's")
        progress(f"tokens: {tokens / 1e6:.1f} M from {text_bytes / 1e6:.1f} MB of text")
    if blank:
        raise TextError(EMPTY)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
