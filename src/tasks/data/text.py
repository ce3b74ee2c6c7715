"""Make a token file from text: the validator from its flags, a miner from an order whose file is too large to be sent.

source ─▶ documents ─▶ limits ─▶ split ─▶ tokenizer ─▶ cache/tokens-<key>.bin
          documents.py                    tokenizer.py  tokens.py
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError

from pilot.common.files import replacing
from pilot.common.flags import arg
from pilot.common.paths import naming
from pilot.interfaces import Refused
from protocol import BlobRef, Count, DatasetRef, DataSpec, Digest, Fault, Name, Part, ProtocolError, Text, digest
from tasks import OpenBlob
from tasks.data.documents import (
    Piece,
    TextError,
    hub_documents,
    hub_revision,
    limited,
    local_documents,
    select,
    split,
    standard_library,
    whole,
)
from tasks.data.folders import SUFFIXES, Selection, TextFile
from tasks.data.plain import Encoding
from tasks.data.reading import Document, Findings, Reading
from tasks.data.tokenizer import BPETokenizer, ByteTokenizer, HubTokenizer, RustTokenizer, Tokenizer, vocabulary_ref
from tasks.data.tokenizing import EMPTY, Progress, silent, tokenize
from tasks.data.tokens import MAGIC, Tokens

__all__ = ["TextConfig", "make_tokens", "prepare_tokens", "rebuild_tokens", "silent"]

FRACTION = 0.05  # for validation, if there is no last file for it
VERSION = 2  # of this pipeline; raise it if the same text makes other tokens
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class TextConfig(Reading):
    """The text of a language task."""

    flag: ClassVar[str]  # the flags' prefix

    text: str = arg("stdlib", short=True, resume="free", path="read")
    """Text: stdlib, a file, a folder or a hub data set. stdlib is Python's own sources; files are .txt, .jsonl or
    .parquet, the first two also compressed (.gz, .bz2, .xz, .zst). Of a folder one kind is taken."""

    subset: str | None = None
    """Hub data set: its subset (configuration)."""

    split: str = "train"
    """Hub data set: its split."""

    revision: str | None = None
    """Hub data set: a branch, tag or commit. None: the newest when the text is first read."""

    rows: int = 0
    """Documents (rows, or .txt files) to take from the start. 0: all, which a hub data set does not allow."""

    max_bytes: int = 0
    """Stop after so many bytes of text. 0: take all of it."""

    validation: float = 0.05
    """Fraction of the text kept for validation, below 1. 0: the last of several files is kept whole. Files named for
    validation, as in validation-00000.parquet, come first."""

    seq_len: int = 0
    """Tokens in a sequence. 0: 64 for nano, for all others as many as the model has positions (1024)."""

    batch_size: int = 0
    """Sequences in a micro-batch, the unit in which work is handed out. 0: 8 for nano, 1 for all others."""

    eval_sequences: int = 64
    """Validation sequences in an evaluation."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05  # fraction of the text; 0: files of their own, or the last
    encoding: Encoding = "auto"
    max_replaced: Annotated[float, Field(ge=0, le=1)] = 0.001
    separator: Annotated[str, Field(max_length=100)] = ""


# --- the validator's side ---------------------------------------------------------------------------------------------


def prepare_tokens(
    config: TextConfig, tokenizer: Tokenizer, cache: Path, progress: Progress = silent
) -> tuple[Tokens, DataSpec]:
    """Return the tokens of `config.text`, cached or made now, and the data of an order for them.

    Raises ValueError for a text that does not exist, is unreadable or empty, or lacks the column.
    """
    cache.mkdir(parents=True, exist_ok=True)
    findings = Findings()
    try:
        local = _local_path(config)
        files = select(local) if local else None
        validation = _validation(config, files)
        if files and files.folder:
            train, held_out = files.parts(validation)
            progress(files.line({"training": train, "validation": held_out or f"{validation:g} of it"}))
        key = _cache_key(config, tokenizer, files)
        path, described = cache / f"tokens-{key}.bin", cache / f"tokens-{key}.json"
        if found := _cached(path, described):
            for line in found[2]:
                progress(line)
            return found[:2]
        progress(f"tokens: reading {config.text}")
        with naming("--cache", cache):  # reading the text raises TextError
            tokenize(_pieces(config, files, validation, findings), tokenizer, path, progress)
        source = _source(config)
        if source:
            source = source.model_copy(update={"revision": hub_revision(source)})
    except (TextError, OSError) as error:
        reason = config.named("; ".join([str(error), *(findings.facts() if str(error).startswith(EMPTY) else ())]))
        raise ValueError(f"--{config.flag}.text {config.text}: {reason}") from error
    said = [config.named(f"text: {fact}") for fact in findings.facts(config.separator)]
    for line in said:
        progress(line)
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
            encoding=config.encoding,
            max_replaced=config.max_replaced,
            separator=config.separator,
        ).model_dump(),
    )
    with replacing(described, sync=False) as file:
        file.write(json.dumps({"spec": spec.model_dump(mode="json"), "said": said}).encode())
    return tokens, spec


def _cached(path: Path, described: Path) -> tuple[Tokens, DataSpec, list[str]] | None:
    """Return an earlier call's result, if it is intact, and what it said of the text."""
    if not (path.exists() and described.exists()):
        return None
    try:
        tokens, kept = Tokens.open(path), json.loads(described.read_bytes())
        spec, said = DataSpec.model_validate_json(json.dumps(kept["spec"])), [str(line) for line in kept["said"]]
    except (ValueError, TypeError, KeyError):  # damaged, or of another version: make it again
        return None
    return (tokens, spec, said) if tokens.digest == spec.blobs["tokens"].digest else None


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


def _validation(config: TextConfig, files: Selection | None) -> float:
    """Return the fraction for validation, or 0 if that has files of its own or is the last of several."""
    if files and files.validation:
        return 0.0
    return config.validation or (0.0 if files and len(files.train) > 1 else FRACTION)


def _pieces(config: TextConfig, files: Selection | None, validation: float, findings: Findings) -> Iterable[Piece]:
    if files:
        return _local_pieces(files, config, config.rows, config.max_bytes, validation, findings)
    source = _source(config)
    documents = hub_documents(source, config, config.rows, findings) if source else standard_library()
    return split(limited(documents, config.rows, config.max_bytes), validation)


def _local_pieces(
    files: Selection, reading: Reading, rows: int, max_bytes: int, validation: float, findings: Findings
) -> Iterable[Piece]:
    """Apply the limits to the training part, and separately to the files for validation."""

    def documents(part: list[TextFile]) -> Iterable[Document]:
        return limited(local_documents(part, reading, findings, max_bytes), rows, max_bytes)

    train, held_out = files.parts(validation)
    if not held_out:
        return split(documents(train), validation)
    return itertools.chain(whole(documents(train), False), whole(documents(held_out), True))


def _cache_key(config: TextConfig, tokenizer: Tokenizer, files: Selection | None) -> Digest:
    """Hash everything that determines the tokens."""
    identity: Any = f"Python {sys.version}"
    if source := _source(config):
        identity = source.model_dump()
    elif files:
        stats = [(file.name, file.path.stat()) for file in files.files]
        identity = [
            str(Path(config.text).expanduser().resolve()),
            [(name, s.st_size, s.st_mtime_ns) for name, s in stats],
        ]
    vocabulary = vocabulary_ref(tokenizer)
    cut = (config.column, config.rows, config.max_bytes, config.validation, config.bad_shards)
    read = (config.encoding, config.max_replaced, config.separator)
    parts = (VERSION, identity, tokenizer.name, tokenizer.leads, vocabulary and vocabulary.digest, cut, read)
    return digest("tokens cache", json.dumps(parts).encode())


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
    # skip what cannot be read, as the validator may have done; the digest tells whether the tokens are the same
    reading = Reading(made.column, made.encoding, made.max_replaced, made.separator, bad_shards="skip")
    if local:
        return _local_pieces(select(local), reading, made.rows, made.max_bytes, made.validation, Findings())
    if spec.source is None:
        raise _wrong("data: too large to be sent, and of no public data set: start the miner with --data")
    if not COMMIT.fullmatch(spec.source.revision or ""):
        raise _wrong(f"data set {spec.source.name}: the order names no commit of it")
    if not made.rows:
        raise _wrong(f"data set {spec.source.name}: the order takes no number of rows of it")
    documents = limited(hub_documents(spec.source, reading, made.rows), made.rows, made.max_bytes)
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
