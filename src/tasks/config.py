"""The tasks' and the optimizer's flags: each default lives here, each docstring is the flag's help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MAX_VOCABULARY = 1 << 20
SPECIAL_TOKENS = (  # nanochat's
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
)


@dataclass(frozen=True)
class TokTrainConfig:
    """Train a byte-pair vocabulary on a text, and say how it compares with GPT-2's."""

    data: str = "stdlib"
    """stdlib (Python's own sources), or a .txt, .jsonl or .parquet file, or a folder of them."""

    column: str = "text"
    """Column (key) of the text in .jsonl and .parquet files."""

    max_chars: int = 2_000_000_000
    """Characters of the text to train on. 0: all of it."""

    doc_cap: int = 10_000
    """Characters to take of a document, so that no long one has more say than many short ones. 0: all of it."""

    vocab_size: int = 32_768
    """Tokens, the 256 bytes and the special ones among them. More make small models pay more for their embeddings."""

    pattern: str = "nanochat"
    """How text is cut first: nanochat (digits by two), gpt4 (by three), gpt2, or a regular expression."""

    special: tuple[str, ...] = SPECIAL_TOKENS
    """Special tokens, which get the last ids, in this order."""

    out: Path = Path("tokenizer.json")
    """File for the tokenizer."""

    gpt2_vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: gpt2_ in PILOT_DATA."""

    def __post_init__(self) -> None:
        _check_text_limits(self.max_chars, self.doc_cap)
        least = 256 + len(self.special)
        if not least <= self.vocab_size <= MAX_VOCABULARY:
            raise ValueError(
                f"--vocab-size {self.vocab_size}: must lie between {least}, for 256 bytes and {len(self.special)} "
                f"special tokens, and {MAX_VOCABULARY}"
            )
        for token in self.special:
            if not token or self.special.count(token) > 1:
                raise ValueError(f"--special {token!r}: must not be empty, nor given twice")


@dataclass(frozen=True)
class TokEvalConfig:
    """Check a tokenizer on a text: whether it gives every document back, how well it compresses, how fast it is."""

    tokenizer: Path = Path("tokenizer.json")
    """File that tok_train wrote."""

    data: str = "stdlib"
    """stdlib (Python's own sources), or a .txt, .jsonl or .parquet file, or a folder of them."""

    column: str = "text"
    """Column (key) of the text in .jsonl and .parquet files."""

    max_chars: int = 100_000_000
    """Characters of the text to take. 0: all of it."""

    doc_cap: int = 0
    """Characters to take of a document. 0: all of it."""

    gpt2_vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: gpt2_ in PILOT_DATA."""

    tiktoken: Path | None = None
    """A .tiktoken file of cl100k, GPT-4's, to compare with that too."""

    def __post_init__(self) -> None:
        _check_text_limits(self.max_chars, self.doc_cap)


def _check_text_limits(max_chars: int, doc_cap: int) -> None:
    for flag, value in (("max-chars", max_chars), ("doc-cap", doc_cap)):
        if value < 0:
            raise ValueError(f"--{flag} {value}: must be 0 or more")
