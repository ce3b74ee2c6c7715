"""Make a token file from text: the validator from its flags, a miner from an order whose file is too large to be sent.

source ─▶ documents ─▶ limits ─▶ split ─▶ tokenizer ─▶ cache/tokens-<key>.bin
          documents.py                    tokenizer.py  tokens.py
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, ValidationError

from pilot.common.files import replacing
from pilot.common.flags import arg
from pilot.interfaces import Refused
from protocol import BlobRef, Count, DatasetRef, DataSpec, Digest, Fault, Name, Part, ProtocolError, Text, digest
from tasks import OpenBlob
from tasks.data.documents import (
    SUFFIXES,
    Piece,
    TextError,
    hub_documents,
    hub_revision,
    limited,
    local_documents,
    local_files,
    split,
    standard_library,
    whole,
)
from tasks.data.tokenizer import BPETokenizer, ByteTokenizer, HubTokenizer, RustTokenizer, Tokenizer, vocabulary_ref
from tasks.data.tokens import MAGIC, Array, Tokens, write

BATCH = 4 << 20  # bytes of text tokenized at a time
FRACTION = 0.05  # for validation, if there is no last file for it
VERSION = 1  # of this pipeline; raise it if the same text makes other tokens
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TextConfig:
    """The text of a language task."""

    flag: ClassVar[str]  # the flags' prefix

    text: str = arg("stdlib", short=True)
    """Text: stdlib, a file, a folder or a hub data set. stdlib is Python's own sources; files are .txt, .jsonl or
    .parquet."""

    subset: str | None = None
    """Hub data set: its subset (configuration)."""

    split: str = "train"
    """Hub data set: its split."""

    revision: str | None = None
    """Hub data set: a branch, tag or commit. None: the newest when the text is first read."""

    column: str = "text"
    """Column (key) of the text in .jsonl, .parquet and hub data sets; content in tiiuae/falcon-refinedweb."""

    rows: int = 0
    """Documents (rows, or .txt files) to take from the start. 0: all, which a hub data set does not allow."""

    max_bytes: int = 0
    """Stop after so many bytes of text. 0: take all of it."""

    bad_shards: Literal["stop", "skip"] = "stop"
    """What to do about a file of a folder that cannot be read: stop, or say which and go on without it."""

    validation: float = 0.05
    """Fraction of the text kept for validation, below 1. 0: the last of several files is kept whole."""

    seq_len: int = 0
    """Tokens in a sequence. 0: 64 for nano, for all others as many as the model has positions (1024)."""

    batch_size: int = 0
    """Sequences in a micro-batch, the unit in which work is handed out. 0: 8 for nano, 1 for all others."""

    eval_sequences: int = 64
    """Validation sequences in an evaluation."""

    def __post_init__(self) -> None:
        for name in ("rows", "max_bytes", "seq_len", "batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{self.flag}.{name} {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.validation < 1:
            raise ValueError(f"--{self.flag}.validation {self.validation}: must be 0 or lie below 1, such as 0.05")
        if self.eval_sequences < 1:
            raise ValueError(f"--{self.flag}.eval_sequences {self.eval_sequences}: must be 1 or more")


class TextParameters(Part):
    """How an order's token file was made from text: the `DataSpec.parameters` of a language task."""

    tokenizer: Name
    column: Text = "text"
    rows: Count = 0  # documents from the start; 0: all, except of a hub data set
    max_bytes: Count = 0  # of text; 0: all
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05  # fraction of the text; 0: the last file


def silent(line: str) -> None:
    """Ignore a line of progress."""


# --- the validator's side ---------------------------------------------------------------------------------------------


def prepare_tokens(
    config: TextConfig, tokenizer: Tokenizer, cache: Path, progress: Progress = silent
) -> tuple[Tokens, DataSpec]:
    """Return the tokens of `config.text`, cached or made now, and the data of an order for them.

    Raises ValueError for a text that does not exist, is unreadable or empty, or lacks the column.
    """
    cache.mkdir(parents=True, exist_ok=True)
    try:
        key = _cache_key(config, tokenizer)
        path, described = cache / f"tokens-{key}.bin", cache / f"tokens-{key}.json"
        if found := _cached(path, described):
            return found
        progress(f"tokens: reading {config.text}")
        validation = _validation(config)
        tokenize(_pieces(config, validation, progress), tokenizer, path, progress)
        source = _source(config)
        if source:
            source = source.model_copy(update={"revision": hub_revision(source)})
    except (TextError, OSError) as error:
        reason = str(error).replace("--", f"--{config.flag}.")
        raise ValueError(f"--{config.flag}.text {config.text}: {reason}") from error
    tokens = Tokens.open(path)
    blobs = {"tokens": tokens.ref()}
    if vocabulary := vocabulary_ref(tokenizer):
        blobs["vocabulary"] = vocabulary
    spec = DataSpec(
        blobs=blobs,
        source=source,
        parameters=TextParameters(
            tokenizer=tokenizer.name,
            column=config.column,
            rows=config.rows,
            max_bytes=config.max_bytes,
            validation=validation,
        ).model_dump(),
    )
    with replacing(described, sync=False) as file:
        file.write(spec.model_dump_json().encode())
    return tokens, spec


def _cached(path: Path, described: Path) -> tuple[Tokens, DataSpec] | None:
    """Return an earlier call's result, if it is intact."""
    if not (path.exists() and described.exists()):
        return None
    try:
        tokens, spec = Tokens.open(path), DataSpec.model_validate_json(described.read_bytes())
    except ValueError:  # damaged, or of another version: make it again
        return None
    return (tokens, spec) if tokens.digest == spec.blobs["tokens"].digest else None


def _local_path(config: TextConfig) -> Path | None:
    """Return the text as a path, whether or not it exists, or None if it is a name."""
    path = Path(config.text).expanduser()
    named = HUB_NAME.fullmatch(config.text) and not config.text.endswith(SUFFIXES)
    return None if config.text == "stdlib" or (named and not path.exists()) else path


def _source(config: TextConfig) -> DatasetRef | None:
    """Return the hub data set, if the text is one."""
    if config.text == "stdlib" or _local_path(config):
        return None
    if not config.rows:
        raise TextError("no such file or folder; of a data set on the hub, give --rows, such as 100000")
    try:
        return DatasetRef(name=config.text, subset=config.subset, split=config.split, revision=config.revision)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise TextError(f"--{first['loc'][0]} {first['input']}: no such thing on the hub") from None


def _validation(config: TextConfig) -> float:
    """Return the fraction for validation, or 0 if it is the last of several files."""
    path = None if config.validation else _local_path(config)
    return config.validation or (0.0 if path and len(local_files(path)) > 1 else FRACTION)


def _pieces(config: TextConfig, validation: float, progress: Progress) -> Iterable[Piece]:
    skip = progress if config.bad_shards == "skip" else None
    if path := _local_path(config):
        return _local_pieces(path, config.column, config.rows, config.max_bytes, validation, skip)
    source = _source(config)
    documents = hub_documents(source, config.column, config.rows) if source else standard_library()
    return split(limited(documents, config.rows, config.max_bytes), validation)


def _local_pieces(
    path: Path, column: str, rows: int, max_bytes: int, validation: float, skip: Progress | None = None
) -> Iterable[Piece]:
    """Apply the limits to the training part, and separately to a last file for validation."""
    files = local_files(path)
    if validation:
        return split(limited(local_documents(files, column, skip), rows, max_bytes), validation)
    if len(files) < 2:
        raise TextError("one file, where the last of several is the validation part")
    parts = (local_documents(files[:-1], column, skip), local_documents(files[-1:], column, skip))
    return itertools.chain.from_iterable(
        whole(limited(documents, rows, max_bytes), which == 1) for which, documents in enumerate(parts)
    )


def _cache_key(config: TextConfig, tokenizer: Tokenizer) -> Digest:
    """Hash everything that determines the tokens."""
    identity: Any = f"Python {sys.version}"
    if source := _source(config):
        identity = source.model_dump()
    elif path := _local_path(config):
        stats = [(file.relative_to(path).as_posix(), file.stat()) for file in local_files(path)]
        identity = [str(path.resolve()), [(name, s.st_size, s.st_mtime_ns) for name, s in stats]]
    vocabulary = vocabulary_ref(tokenizer)
    cut = (config.column, config.rows, config.max_bytes, config.validation, config.bad_shards)
    parts = (VERSION, identity, tokenizer.name, tokenizer.leads, vocabulary and vocabulary.digest, cut)
    return digest("tokens cache", json.dumps(parts).encode())


# --- tokens -----------------------------------------------------------------------------------------------------------


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
    for batch in _batches(pieces):
        for piece, ids in zip(batch, tokenizer.encode([piece.data for piece in batch]), strict=True):
            if piece.starts and (tokenizer.leads or begun[piece.validation]):
                yield piece.validation, separator
            begun[piece.validation] = True
            yield piece.validation, ids
            text_bytes += len(piece.data)
            tokens += len(ids)
        if tokens * separator.itemsize > limit:
            raise TextError("more text than the order's")
        progress(f"tokens: {tokens / 1e6:.1f} M from {text_bytes / 1e6:.1f} MB of text")
    if not tokens:
        raise TextError("empty: there is no text in it")


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


# --- the miner's side -------------------------------------------------------------------------------------------------


def make_tokens(name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
    """Make the token file of a language task at a miner (tasks.Task.make_blob)."""
    ref = data.blobs[name]
    if name != "tokens":
        raise Refused(409, f"the order's {name} is not here", missing=[ref])
    return rebuild_tokens(data, local, open_blob("vocabulary") if "vocabulary" in data.blobs else None, cache)


def rebuild_tokens(
    spec: DataSpec, local: Path | None, vocabulary: Path | None, cache: Path, progress: Progress = silent
) -> Path:
    """Make the file of an order's tokens, which are too many to be sent.

    `local` is `--data`: a token file, or the text itself, which is then split and tokenized as the order says. Without
    it, the text comes from the order's data set. `vocabulary` is the file of the order's vocabulary.

    Raises Refused (WRONG_DATA) if the data is not available, or makes other tokens. The refusal says what is wrong with
    the order, but nothing of what is here: contents, digests and paths are in its `__cause__`, for the miner's own log.
    """
    ref = spec.blobs["tokens"]
    origin = "this miner's --data" if local else f"data set {spec.source.name}" if spec.source else "data"
    try:
        if local and _is_token_file(local):
            return _checked(local, ref)
        path = cache / f"tokens-{ref.digest}.bin"
        if not path.exists():
            made = _text_parameters(spec)
            tokenizer = _ordered_tokenizer(spec, made, vocabulary)
            cache.mkdir(parents=True, exist_ok=True)
            tokenize(_ordered_pieces(spec, made, local), tokenizer, path, progress, ref.bytes)
        try:
            return _checked(path, ref)
        except TextError:
            path.unlink()  # its tokens are not those of its name
            raise
    except TextError as error:
        raise _wrong(f"{origin}: does not make the order's tokens") from error


def _wrong(reason: str) -> Refused:
    return Refused(409, reason[:1000], Fault.WRONG_DATA)


def _is_token_file(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _checked(path: Path, ref: BlobRef) -> Path:
    """Raise TextError unless the file holds the tokens of `ref`: equal in size, too, which an order cannot make up."""
    try:
        found = Tokens.open(path).ref()
    except ProtocolError as error:
        raise TextError(str(error)) from None
    if found != ref:
        raise TextError(f"{path}: its tokens are {found.digest[:12]}, the order's are {ref.digest[:12]}")
    return path


def _text_parameters(spec: DataSpec) -> TextParameters:
    try:
        return TextParameters.model_validate(spec.parameters)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _wrong(f"data: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _ordered_pieces(spec: DataSpec, made: TextParameters, local: Path | None) -> Iterable[Piece]:
    if local:
        # skip unreadable files, as the validator may have done; the digest tells whether the tokens are the same
        return _local_pieces(local, made.column, made.rows, made.max_bytes, made.validation, silent)
    if spec.source is None:
        raise _wrong("data: too large to be sent, and of no public data set: start the miner with --data")
    if not COMMIT.fullmatch(spec.source.revision or ""):
        raise _wrong(f"data set {spec.source.name}: the order names no commit of it")
    if not made.rows:
        raise _wrong(f"data set {spec.source.name}: the order takes no number of rows of it")
    documents = limited(hub_documents(spec.source, made.column, made.rows), made.rows, made.max_bytes)
    return split(documents, made.validation)


def _ordered_tokenizer(spec: DataSpec, made: TextParameters, vocabulary: Path | None) -> Tokenizer:
    if made.tokenizer == ByteTokenizer.name:
        return ByteTokenizer()
    kinds: dict[str, Callable[[bytes], Tokenizer]] = {
        BPETokenizer.name: BPETokenizer,
        RustTokenizer.name: RustTokenizer,
        HubTokenizer.name: HubTokenizer,
    }
    ref = spec.blobs.get("vocabulary")
    if made.tokenizer not in kinds or ref is None:
        raise _wrong(f"data: unknown tokenizer {made.tokenizer}, or one without a vocabulary")
    if vocabulary is None:
        raise Refused(409, "the order's vocabulary is not here", missing=[ref])
    blob = vocabulary.read_bytes()
    if digest("vocabulary", blob) != ref.digest:
        raise _wrong("data: another vocabulary than the order's")
    return kinds[made.tokenizer](blob)
