"""The tokenizer: text to ids and back, the bytes of each token, and conversations with the tokens to learn.

The names of special tokens in a text are ordinary text; only this module's own code inserts special ids.
"""

from __future__ import annotations

import os
import tempfile
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from protocol import Digest, digest

if TYPE_CHECKING:
    import rustbpe

BOS = "<|bos|>"  # before every document
USER = ("<|user_start|>", "<|user_end|>")
ASSISTANT = ("<|assistant_start|>", "<|assistant_end|>")
PYTHON = ("<|python_start|>", "<|python_end|>")  # the assistant calls its tool
OUTPUT = ("<|output_start|>", "<|output_end|>")  # and the tool answers
SPECIAL_TOKENS = (BOS, *USER, *ASSISTANT, *PYTHON, *OUTPUT)

Conversation = Mapping[str, Any]  # {"messages": [{"role": …, "content": …}, …]}
Turn = list[tuple[str, str]]  # a message's parts, each with type and text


class Tokenizer:
    """A tokenizer that tok_train made. Safe to use from several threads."""

    def __init__(self, inner: rustbpe.Tokenizer, blob: bytes) -> None:
        self.inner = inner
        self.blob = blob  # the bytes of its file
        self.digest: Digest = digest("vocabulary", blob)
        self.special_tokens: dict[str, int] = inner.special_tokens()

    @classmethod
    def from_bytes(cls, blob: bytes) -> Tokenizer:
        """Make it from a tokenizer file's bytes. Raises ValueError if they are damaged or something else."""
        kind = _rustbpe().Tokenizer
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_bytes(blob)
            try:
                inner = kind.load(path)
            except ValueError as error:
                raise ValueError(str(error).removeprefix(f"{path}: ")) from None
        return cls(inner, blob)

    @classmethod
    def from_rustbpe(cls, inner: rustbpe.Tokenizer) -> Tokenizer:
        """Make it from a newly trained vocabulary, and add the special tokens."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            inner.save(path)
            return cls(inner, path.read_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Load its file. Raises ValueError, in one line with its name, if it is missing or damaged."""
        try:
            return cls.from_bytes(Path(path).read_bytes())
        except OSError as error:
            hint = f"python scripts/tok_train.py --out {path} makes one"
            raise ValueError(f"tokenizer {path}: {error.strerror or error}; {hint}") from None
        except ValueError as error:
            raise ValueError(f"tokenizer {path}: {error}") from None

    @classmethod
    def bytewise(cls) -> Tokenizer:
        """Make one of 256 bytes and nanochat's special tokens, without training. Its digest is always the same."""
        package = _rustbpe()
        ranks = b"".join(b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
        inner = package.Tokenizer.from_tiktoken(ranks, package.NANOCHAT_PATTERN)
        inner.add_special_tokens(SPECIAL_TOKENS)
        return cls.from_rustbpe(inner)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write its file atomically."""
        partial = Path(f"{os.fspath(path)}.{os.getpid()}.part")
        try:
            partial.write_bytes(self.blob)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    # --- the vocabulary -----------------------------------------------------------------------------------------------

    def get_vocab_size(self) -> int:
        return self.inner.vocab_size

    def get_special_tokens(self) -> set[str]:
        return set(self.special_tokens)

    def encode_special(self, token: str) -> int:
        """Return the id of a special token. Raises ValueError if this tokenizer does not have it."""
        if token not in self.special_tokens:
            known = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"this tokenizer has no special token {token}, only {known}; see tok_train.py --special")
        return self.special_tokens[token]

    def get_bos_token_id(self) -> int:
        return self.encode_special(BOS)

    def has_known_pattern(self) -> bool:
        """Tell whether its pattern is one of rustbpe's own. Any other could take unbounded time."""
        package = _rustbpe()
        known = (package.NANOCHAT_PATTERN, package.DEFAULT_PATTERN, package.GPT2_PATTERN, package.CL100K_PATTERN)
        return self.inner.get_pattern() in known

    @cached_property
    def _sizes(self) -> NDArray[np.int32]:
        sizes = np.zeros(self.get_vocab_size(), dtype=np.int32)
        for token, rank in self.inner.get_mergeable_ranks():
            sizes[rank] = len(token)
        return sizes

    def token_bytes(self) -> NDArray[np.int32]:
        """Return how many bytes of text each token stands for, (vocab,); 0 for special ones."""
        return self._sizes.copy()

    # --- text ---------------------------------------------------------------------------------------------------------

    @overload
    def encode(
        self,
        text: str,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        text: list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> list[int] | list[list[int]]:
        """Return the ids of a text, or of each of several, on `num_threads` threads (by default all cores).

        `prepend` and `append` are special tokens or ids to put before and after each.
        """
        before = [] if prepend is None else [self._id(prepend)]
        after = [] if append is None else [self._id(append)]
        if isinstance(text, str):
            return before + self.inner.encode_ordinary(text) + after
        many = self.inner.encode_batch(text, num_threads=num_threads, disallowed_special=())
        return [before + ids + after for ids in many] if before or after else many

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        return self.inner.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """Return the text of ids, special ones by their names. Raises ValueError for an unknown id."""
        return self.inner.decode(ids)

    def _id(self, token: int | str) -> int:
        return token if isinstance(token, int) else self.encode_special(token)

    # --- conversations ------------------------------------------------------------------------------------------------

    def render_conversation(self, conversation: Conversation, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation, at most `max_tokens`, and a mask: 1 for tokens that the assistant learns.

        Messages alternate between user and assistant, after an optional one of the system, which becomes part of the
        user's first. The assistant's content is a text or a list of parts {"type": …, "text": …}: text and python are
        its own, python_output is the tool's answer. Raises ValueError, with the message's number, for anything else.
        """
        ids, mask = self._render(_turns(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the ids up to the beginning of the assistant's answer to the user's last message.

        An answer at the end of the conversation is left out.
        """
        turns = _turns(conversation)
        if len(turns) % 2 == 0:
            turns = turns[:-1]
        ids, _ = self._render(turns)
        return [*ids, self.encode_special(ASSISTANT[0])]

    def _render(self, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
        ids, mask = [self.get_bos_token_id()], [0]

        def add(new: list[int], learnt: int) -> None:
            ids.extend(new)
            mask.extend([learnt] * len(new))

        for number, parts in enumerate(turns):
            if number % 2 == 0:
                add(self._fenced(USER, parts[0][1]), 0)
                continue
            start, end = map(self.encode_special, ASSISTANT)
            add([start], 0)
            for kind, text in parts:
                if kind == "text":
                    add(self.encode(text), 1)
                elif kind == "python":
                    add(self._fenced(PYTHON, text), 1)
                else:
                    add(self._fenced(OUTPUT, text), 0)
            add([end], 1)
        return ids, mask

    def _fenced(self, fence: tuple[str, str], text: str) -> list[int]:
        return self.encode(text, prepend=fence[0], append=fence[1])


def get_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """Load a tokenizer, by default tokenizer.json in NANOCHAT_BASE_DIR. Raises ValueError if it does not exist."""
    if path is None:
        from nanochat.common import base_dir

        path = base_dir() / "tokenizer.json"
    return Tokenizer.load(path)


def _rustbpe() -> Any:
    try:
        import rustbpe
        from rustbpe import Tokenizer  # noqa: F401  (if it is not built, its folder imports as an empty package)
    except ImportError:
        raise ValueError("rustbpe is not built: install cargo from https://rustup.rs, then `make setup`") from None
    return rustbpe


def _turns(conversation: Conversation) -> list[Turn]:
    """Return the messages, the user's at even places, the assistant's at odd ones, the system's within the first."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("a conversation is {'messages': [...]} with at least one message")
    turns: list[Turn] = []
    system: str | None = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number}: must have a role and a content")
        role, content = message["role"], message["content"]
        if number == 1 and role == "system":
            ((_, system),) = _parts(number, role, content)
            continue
        wanted = ("user", "assistant")[len(turns) % 2]
        if role != wanted:
            raise ValueError(f"message {number}: is from {role!r}, must be from {wanted!r}")
        turns.append(_parts(number, role, content))
    if system is not None:
        if not turns:
            raise ValueError("message 2: is missing; after the system's there must be the user's")
        turns[0] = [("text", f"{system}\n\n{turns[0][0][1]}")]
    return turns


def _parts(number: int, role: str, content: Any) -> Turn:
    if isinstance(content, str):
        return [("text", content)]
    if role != "assistant":
        raise ValueError(f"message {number}: the {role}'s content must be a text")
    if not isinstance(content, list):
        raise ValueError(f"message {number}: the assistant's content must be a text or a list of parts")
    parts = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, Mapping) else (None, None)
        if kind not in ("text", "python", "python_output") or not isinstance(text, str):
            raise ValueError(f"message {number}: a part has a type (text, python, python_output) and a text")
        parts.append((kind, text))
    return parts
