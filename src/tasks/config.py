"""The tasks' and the optimizer's flags: each default lives here, each docstring is the flag's help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class GPT2Config:
    """GPT-2 on a text."""

    model: str = "nano"
    """nano (0.8M parameters), small (124M), medium, large, xl (1.6B); or a GPT-2 on the hub or in a folder."""

    text: str = "stdlib"
    """stdlib (Python's own sources), a .txt, .jsonl or .parquet file or a folder of them, or a data set on the hub."""

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

    tokenizer: Literal["auto", "byte", "gpt2"] = "auto"
    """byte (256 tokens), or gpt2 (byte-pair encoding, 50257 tokens). auto: byte for nano, gpt2 for all others."""

    vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: the hub's gpt2."""

    seq_len: int = 0
    """Tokens in a sequence. 0: 64 for nano, for all others as many as the model has positions (1024)."""

    batch_size: int = 0
    """Sequences in a micro-batch, the unit in which work is handed out. 0: 8 for nano, 1 for all others."""

    validation: float = 0.05
    """Fraction of the text kept for validation, between 0 and 1."""

    eval_sequences: int = 64
    """Validation sequences in an evaluation."""

    def __post_init__(self) -> None:
        for flag in ("rows", "max_bytes", "seq_len", "batch_size"):
            if getattr(self, flag) < 0:
                raise ValueError(f"--gpt2.{flag} {getattr(self, flag)}: must be 0 or more")
        if not 0 < self.validation < 1:
            raise ValueError(f"--gpt2.validation {self.validation}: must lie between 0 and 1, such as 0.05")
        if self.eval_sequences < 1:
            raise ValueError(f"--gpt2.eval_sequences {self.eval_sequences}: must be 1 or more")


@dataclass(frozen=True)
class AdamWConfig:
    """The optimizer that moves the model, and its schedule."""

    lr: float = 3e-3
    """Peak learning rate."""

    beta1: float = 0.9
    """Decay of the gradient's running mean, per round."""

    beta2: float = 0.95
    """Decay of the squared gradient's running mean, per round."""

    eps: float = 1e-8
    """Added to the root of the squared gradient's mean."""

    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""

    clip: float = 1.0
    """Largest global L2 norm of the gradient. 0: no clipping."""

    warmup: int = 10
    """Rounds of linear warm-up."""

    final_lr: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for flag in ("lr", "eps", "weight_decay", "clip", "warmup"):
            if not 0 <= getattr(self, flag) < float("inf"):
                raise ValueError(f"--optimizer.{flag} {getattr(self, flag)}: must be 0 or more, and finite")
        for flag in ("beta1", "beta2"):
            if not 0 <= getattr(self, flag) < 1:
                raise ValueError(f"--optimizer.{flag} {getattr(self, flag)}: must be at least 0 and below 1")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"--optimizer.final_lr {self.final_lr}: must lie between 0 and 1")


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
