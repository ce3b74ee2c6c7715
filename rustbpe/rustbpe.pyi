"""Byte-pair encoding: a trainer and an encoder, in Rust."""

from collections.abc import Callable, Collection, Iterable, Sequence
from os import PathLike
from typing import Literal

import numpy as np
import numpy.typing as npt

DEFAULT_PATTERN: str
"""GPT-4's, as the published rustbpe 0.1.0 has it."""
NANOCHAT_PATTERN: str
"""The same with at most two digits a chunk, which suits small vocabularies."""
GPT2_PATTERN: str
CL100K_PATTERN: str

class Tokenizer:
    """A byte-pair tokenizer: train it, load it or import it; then encode and decode.

    A tokenizer may be used by several threads at once. Where a chunk of text has several encodings, it is tiktoken's.
    A pattern that gives up on a text, or leaves some of it out, is a ValueError: no text is ever skipped.
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
        """Learn a vocabulary of `vocab_size` tokens: 256 bytes, merges, the special tokens added before.

        Texts are taken from the iterator `buffer_size` at a time; only their distinct words are kept. The merges do not
        depend on the number of threads (`RAYON_NUM_THREADS`, else all cores). `progress(done, wanted)` counts merges.
        UserWarning where the text gives fewer merges than wanted; `vocab_size` then says what was reached.
        ValueError for no text at all, a vocabulary too small, a bad pattern. After an error or Ctrl-C the tokenizer is
        what it was before.
        """
    def encode(
        self,
        text: str,
        *,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[int]:
        """The ids of a text. Special tokens in it: those of `allowed_special` (none by default) become their ids, those
        of `disallowed_special` (by default all others) are a ValueError, the rest are ordinary text."""
    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are ordinary text."""
    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        num_threads: int | None = None,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> list[list[int]]:
        """As `encode`, of many texts on `num_threads` threads (by default all cores)."""
    batch_encode = encode_batch  # under the published package's name
    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Collection[str] | Literal["all"] = ...,
        disallowed_special: Collection[str] | Literal["all"] = "all",
    ) -> npt.NDArray[np.uint32]:
        """As `encode`, into an array."""
    def decode(self, ids: Iterable[int] | npt.NDArray[np.integer], errors: str = "replace") -> str:
        """The text of some ids; `errors` as for `bytes.decode`. ValueError for an id that is not in the vocabulary."""
    def decode_bytes(self, ids: Iterable[int] | npt.NDArray[np.integer]) -> bytes: ...
    @property
    def vocab_size(self) -> int:
        """One more than the highest id: 256 bytes, merges, special tokens."""
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Tokens as bytes with their ids, without the special ones."""
    def add_special_tokens(self, tokens: Sequence[str]) -> None:
        """Give each of these the next id after the highest."""
    def special_tokens(self) -> dict[str, int]: ...
    def encode_single_token(self, token: str | bytes) -> int:
        """The id of a special token or of an ordinary one; KeyError if it is neither."""
    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
    @staticmethod
    def load(path: str | PathLike[str]) -> Tokenizer:
        """Read what `save` wrote. ValueError where the file is damaged or something else."""
    def to_tiktoken(self, name: str = "rustbpe") -> dict[str, object]:
        """What `tiktoken.Encoding(**…)` takes."""
    def to_huggingface(self) -> str:
        """A tokenizer.json: `tokenizers.Tokenizer.from_str` makes the same ids of a text."""
    @staticmethod
    def from_tiktoken(
        path_or_bytes: str | PathLike[str] | bytes, pattern: str, special_tokens: dict[str, int] = ...
    ) -> Tokenizer:
        """From a tiktoken file (its path, or its content as bytes): a line a token, in base64, and its id."""
    @staticmethod
    def from_gpt2(encoder_json_path: str | PathLike[str], vocab_bpe_path: str | PathLike[str]) -> Tokenizer:
        """From GPT-2's own two files, with its own ids."""
