"""Tokenizers: plain bytes, GPT-2's byte-pair encoding, or one that tok_train made."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Protocol, Self

import numpy as np
from pydantic import Field, ValidationError

from protocol import BlobRef, Part, ProtocolError, digest
from tasks.data.tokens import Array

MAX_VOCABULARY = 1 << 20  # tokens
VOCABULARY_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, then the hub's


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    dtype: type[np.unsignedinteger]  # the narrowest for all ids
    separator: int  # between two documents
    leads: bool  # whether it also precedes the first
    vocabulary: bytes | None  # from which another machine builds the same tokenizer

    def encode(self, texts: Sequence[bytes]) -> list[Array]:
        """Return the ids of each text, which is UTF-8 and, except at a document's end, ends before whitespace."""
        ...


class ByteTokenizer:
    """A tokenizer with a token for each byte. 0, which no text contains, separates documents."""

    name = "byte"
    vocab_size = 256
    dtype: type[np.unsignedinteger] = np.uint8
    separator = 0
    leads = False
    vocabulary: bytes | None = None

    def encode(self, texts: Sequence[bytes]) -> list[Array]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]


class BPETokenizer:
    """GPT-2's tokenizer: `vocabulary` has a line "base64(token) rank" for each rank, in order; <|endoftext|> is next.

    Raises ProtocolError unless the vocabulary is exactly that.
    """

    name = "gpt2"
    leads = False

    def __init__(self, vocabulary: bytes) -> None:
        import tiktoken
        from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str

        ranks = parse_vocabulary(vocabulary)
        self.separator = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.dtype: type[np.unsignedinteger] = narrowest(self.vocab_size)
        self.vocabulary: bytes | None = vocabulary
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: self.separator}
        )

    def encode(self, texts: Sequence[bytes]) -> list[Array]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self._encode, texts))

    def _encode(self, text: bytes) -> Array:
        ids: Array = self._encoding.encode_to_numpy(text.decode(), disallowed_special=())
        return ids


class RustTokenizer:
    """A tokenizer that tok_train made: `vocabulary` is its file. Every document begins with its <|bos|>.

    Raises ProtocolError for any other file, and for an unknown pattern: an arbitrary regular expression could take
    unbounded time at a miner.
    """

    name = "rustbpe"
    leads = True

    def __init__(self, vocabulary: bytes) -> None:
        from nanochat.tokenizer import Tokenizer as Trained

        try:
            self.inner = Trained.from_bytes(vocabulary)
            self.separator = self.inner.get_bos_token_id()
        except ValueError as error:
            raise ProtocolError(f"tokenizer: {error}") from None
        if not self.inner.has_known_pattern():
            raise ProtocolError("tokenizer: of a pattern of its own; train it with --pattern nanochat, gpt4 or gpt2")
        self.vocab_size = self.inner.get_vocab_size()
        self.dtype: type[np.unsignedinteger] = narrowest(self.vocab_size)
        self.vocabulary: bytes | None = vocabulary

    def encode(self, texts: Sequence[bytes]) -> list[Array]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda text: self.inner.encode_to_numpy(text.decode()), texts))


class HubVocabulary(Part):
    """What decides the ids of a byte-level BPE of Hugging Face's library whose text is split as GPT-2's.

    Nothing else travels: a pattern of the order's own could take unbounded time at a miner.
    """

    vocab: dict[str, Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]]
    merges: list[tuple[str, str]]  # in the order of merging
    added: list[tuple[str, bool, bool, bool]]  # found before the text is split: text, single_word, lstrip, rstrip
    separator: tuple[str, Annotated[int, Field(ge=0, lt=MAX_VOCABULARY)]]
    leads: bool

    @classmethod
    def parse(cls, blob: bytes) -> Self:
        """Raises ProtocolError for anything that is not such a vocabulary, or contradicts itself."""
        try:
            found = cls.model_validate_json(blob)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise ProtocolError(f"vocabulary: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        for pair in found.merges:
            if not all(token in found.vocab for token in (*pair, "".join(pair))):
                raise ProtocolError(f"vocabulary: {' and '.join(pair)} are merged, but not all three are tokens")
        if not all(token[0] in found.vocab for token in found.added):
            raise ProtocolError("vocabulary: an added token has no id")
        if not found.vocab or len(set(found.vocab.values())) < len(found.vocab):
            raise ProtocolError("vocabulary: no tokens, or two of one id")
        return found

    def pruned(self) -> Self:
        """Return it without the tokens that no text makes."""
        made = {*byte_letters(), *map("".join, self.merges), *(token[0] for token in self.added)}
        return self.model_copy(update={"vocab": {token: id for token, id in self.vocab.items() if token in made}})


class HubTokenizer:
    """A byte-level BPE of Hugging Face's library. Raises ProtocolError for a damaged vocabulary."""

    name = "bpe"

    def __init__(self, vocabulary: bytes) -> None:
        from tokenizers import AddedToken, models, pre_tokenizers
        from tokenizers import Tokenizer as HubLibrary

        self.parts = HubVocabulary.parse(vocabulary)
        self.separator = self.parts.separator[1]
        self.leads = self.parts.leads
        self.vocab_size = max(self.separator, *self.parts.vocab.values()) + 1
        self.dtype: type[np.unsignedinteger] = narrowest(self.vocab_size)
        self.vocabulary: bytes | None = vocabulary
        self.inner = HubLibrary(models.BPE(vocab=self.parts.vocab, merges=self.parts.merges))
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for text, word, left, right in self.parts.added:
            self.inner.add_tokens([AddedToken(text, single_word=word, lstrip=left, rstrip=right, normalized=False)])

    def encode(self, texts: Sequence[bytes]) -> list[Array]:
        found = self.inner.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in found]


def byte_letters() -> tuple[str, ...]:
    """Return the letter that stands for each byte in GPT-2's files: itself if printable, else one from 256 on."""
    letters = [chr(b) if b in range(33, 127) or (b in range(161, 256) and b != 173) else "" for b in range(256)]
    unprintable = [byte for byte, letter in enumerate(letters) if not letter]
    return tuple(letter or chr(256 + unprintable.index(byte)) for byte, letter in enumerate(letters))


def narrowest(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the narrowest type for all ids."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def parse_vocabulary(blob: bytes) -> dict[bytes, int]:
    """Return the tokens' ranks 0, 1, … in order. Raises ProtocolError unless every single byte is among them."""
    ranks: dict[bytes, int] = {}
    for rank, line in enumerate(blob.splitlines()):
        word, _, number = line.partition(b" ")
        try:
            token = base64.b64decode(word, validate=True)
        except binascii.Error as error:
            raise ProtocolError(f"vocabulary: line {rank + 1}: {error}") from None
        if number != str(rank).encode() or token in ranks or not token or rank >= MAX_VOCABULARY:
            raise ProtocolError(f"vocabulary: line {rank + 1}: not a new token with rank {rank}")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ProtocolError(f"vocabulary: byte {missing[0]} has no token")
    return ranks


def vocabulary_ref(tokenizer: Tokenizer) -> BlobRef | None:
    if tokenizer.vocabulary is None:
        return None
    blob = tokenizer.vocabulary
    return BlobRef(kind="vocabulary", digest=digest("vocabulary", blob), bytes=len(blob))


def load_tokenizer(name: str, vocabulary: Path | None) -> Tokenizer:
    """Load the tokenizer of `--gpt2.tokenizer`. Raises ValueError if the vocabulary is not available."""
    if name == "byte":
        return ByteTokenizer()
    if name != "gpt2":
        return load_file("gpt2", Path(name).expanduser())
    encoder, merges = _hub_files() if vocabulary is None else _local_files(vocabulary)
    return BPETokenizer(read_vocabulary(encoder, merges))


def load_file(task: str, path: Path) -> RustTokenizer:
    """Load a tokenizer from a file of tok_train."""
    try:
        return RustTokenizer(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"--{task}.tokenizer {path}: {error.strerror}; make one with python scripts/tok_train.py --out {path}"
        ) from None
    except ProtocolError as error:
        raise ValueError(f"--{task}.tokenizer {path}: {error}") from None


def _local_files(vocabulary: Path) -> tuple[Path, Path]:
    for prefix in (f"{vocabulary}/", f"{vocabulary}/gpt2_", f"{vocabulary}"):
        for encoder, merges in VOCABULARY_FILES:
            if Path(prefix + encoder).is_file() and Path(prefix + merges).is_file():
                return Path(prefix + encoder), Path(prefix + merges)
    raise ValueError(
        f"--gpt2.vocabulary {vocabulary}: no encoder.json and vocab.bpe there; name their folder or prefix"
    )


def _hub_files() -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download

    encoder, merges = VOCABULARY_FILES[1]
    try:
        return Path(hf_hub_download("gpt2", encoder)), Path(hf_hub_download("gpt2", merges))
    except OSError as error:
        raise ValueError(
            "--gpt2.tokenizer gpt2: cannot fetch the hub's vocabulary "
            f"({str(error).splitlines()[0]}); give --gpt2.vocabulary, or --gpt2.tokenizer byte"
        ) from None


def read_vocabulary(encoder: Path, merges: Path) -> bytes:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    try:
        # tiktoken caches by path; with the files' hashes it never uses an outdated copy
        merges_hash, encoder_hash = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (merges, encoder))
        ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder), merges_hash, encoder_hash)
    except (OSError, ValueError, KeyError, AttributeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "the two do not fit together"
        raise ValueError(f"--gpt2.vocabulary: cannot read {encoder} and {merges}: {reason}") from None
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)
