"""Byte-pair encoding: a trainer and an encoder, in Rust."""

from collections.abc import Callable, Collection, Iterable, Sequence
from os import PathLike
from typing import Literal

import numpy as np
import numpy.typing as npt

DEFAULT_PATTERN: str
"""GPT-4's pattern, as in the published rustbpe 0.1.0."""
NANOCHAT_PATTERN: str
"""The same, with at most two digits per chunk, which suits small vocabularies."""
GPT2_PATTERN: str
CL100K_PATTERN: str

class Tokenizer:
    """A byte-pair tokenizer: train it, load it or import it; then encode and decode.

    It is safe to use from several threads. If a chunk of text has several encodings, the result is tiktoken's. A
    pattern that fails on a text, or does not cover all of it, raises ValueError: no text is ever skipped.
    """

    def __init__(self) -> None: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, merges, and the special tokens already added.

        Takes `buffer_size` texts from the iterator at a time, and keeps only their distinct words. The merges do not
        depend on the number of threads (`RAYON_NUM_THREADS`, by default all cores). `progress(done, wanted)` counts
        merges. Warns (UserWarning) if the text has fewer merges than wanted; `vocab_size` is then what was reached.
        Raises ValueError for no text, too small a vocabulary or a bad pattern. An error or Ctrl-C leaves the tokenizer
        unchanged.
        """
    def encode(
        self,
        text: str,
        *,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[int]:
        """Return the ids of a text. Special tokens in it become their ids if in `allowed_special` (by default none),
        raise ValueError if in `disallowed_special` (by default all others), and are ordinary text otherwise."""
    def encode_ordinary(self, text: str) -> list[int]:
        """Return the ids of a text, with special tokens as ordinary text."""
    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        num_threads: int | None = None,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[list[int]]:
        """Encode many texts, as `encode` does, on `num_threads` threads (by default all cores)."""
    batch_encode = encode_batch  # under the published package's name
    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> npt.NDArray[np.uint32]:
        """Encode a text, as `encode` does, into an array."""
    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer], errors: str = "replace") -> str:
        """Return the text of ids; `errors` as for `bytes.decode`. Raises ValueError for an unknown id."""
    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes: ...
    @property
    def vocab_size(self) -> int:
        """The highest id plus one: 256 bytes, merges, special tokens."""
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Return tokens, as bytes, and their ids, without the special ones."""
    def add_special_tokens(self, tokens: Sequence[str]) -> None:
        """Give each of these the next id after the highest."""
    def special_tokens(self) -> dict[str, int]: ...
    def encode_single_token(self, token: str | bytes) -> int:
        """Return the id of a special or an ordinary token. Raises KeyError if it is neither."""
    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file atomically."""
    @staticmethod
    def load(path: str | PathLike[str]) -> Tokenizer:
        """Read a file of `save`. Raises ValueError if it is damaged or something else."""
    def to_tiktoken(self, name: str = "rustbpe") -> dict[str, object]:
        """Return the arguments of `tiktoken.Encoding(**…)`."""
    def to_huggingface(self) -> str:
        """Return a tokenizer.json, with which `tokenizers.Tokenizer.from_str` gives the same ids."""
    @staticmethod
    def from_tiktoken(
        path_or_bytes: str | PathLike[str] | bytes, pattern: str, special_tokens: dict[str, int] = ...
    ) -> Tokenizer:
        """Import a tiktoken file, by path or content: a line per token, in base64, with its id."""
    @staticmethod
    def from_gpt2(encoder_json_path: str | PathLike[str], vocab_bpe_path: str | PathLike[str]) -> Tokenizer:
        """Import GPT-2's two files, with GPT-2's ids."""
