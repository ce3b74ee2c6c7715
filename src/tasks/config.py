"""The tasks' and the optimizer's flags: each default lives here, each docstring is the flag's help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from nanochat.config import MuonAdamWConfig, Preset
from pilot.common.flags import arg


@dataclass(frozen=True)
class TextConfig:
    """The text of a language task."""

    flag: ClassVar[str]  # the task's, before the dot

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


@dataclass(frozen=True)
class GPT2Config(TextConfig):
    """GPT-2 on a text."""

    flag: ClassVar[str] = "gpt2"

    model: str = arg("nano", short=True)
    """nano (0.8M), small (124M), medium, large or xl (1.6B). These are parameters. Or a GPT-2 on the hub, or a folder
    with one."""

    tokenizer: str = "auto"
    """byte (256 tokens), gpt2 (byte-pair encoding, 50257 tokens), or a file that tok_train wrote. auto: byte for nano,
    gpt2 for all others."""

    vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: the hub's gpt2."""


@dataclass(frozen=True)
class NanochatConfig(TextConfig):
    """nanochat's GPT on a text, with Muon and AdamW."""

    flag: ClassVar[str] = "nanochat"

    depth: int = arg(4, short=True)
    """Layers of the model. Width, heads, learning rates and the length of a run follow from it."""

    preset: Preset = "modern"
    """modern, or classic: without value embeddings, smear, backout and sliding windows."""

    aspect_ratio: int = 64
    """Width a layer of depth."""

    head_dim: int = 128
    """Width of an attention head."""

    kv_ratio: int = 1
    """Query heads to a key and value head (grouped-query attention)."""

    window_pattern: str = "SSSL"
    """Attention windows of the layers, repeated: S a quarter of the sequence, L all of it."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the activations; weights and gradients are fp32. auto: bf16 on a CUDA device that has it, else fp32."""

    text: str = arg("auto", short=True)
    """Text: auto, or as for --gpt2.text. auto: the shards that python -m nanochat.dataset downloaded, or stdlib if there
    are none."""

    tokenizer: str = "auto"
    """A file that tok_train wrote, or byte (256 tokens and the special ones). auto: tokenizer.json in
    NANOCHAT_BASE_DIR, or byte where there is none."""

    crop: Literal["discard", "keep"] = "discard"
    """What becomes of the rest of a document that was cut to fill a row: discard, or keep it for another row."""

    validation: float = 0.0
    """Fraction of the text kept for validation. 0: the last of several files is, of a single one a twentieth."""

    seq_len: int = 512
    """Tokens in a sequence: the model's context."""

    batch_size: int = 4
    """Sequences in a micro-batch, the unit in which work is handed out."""

    optimizer: MuonAdamWConfig = field(default_factory=MuonAdamWConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "aspect_ratio", "head_dim", "kv_ratio", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--nanochat.{name} {getattr(self, name)}: must be 1 or more")


@dataclass(frozen=True)
class QuadraticConfig:
    """A noisy quadratic with a known optimum: micro-batches cost next to nothing, for emulations and smoke tests."""

    dimension: int = 2560
    """Parameters, of 4 bytes each."""

    samples: int = 256
    """Samples in an epoch: half of them come from the seed, the others are their mirror images."""

    batch_size: int = 8
    """Samples in a micro-batch, the unit in which work is handed out."""

    condition: float = 100.0
    """Largest curvature over the smallest: the larger, the more steps it takes."""

    noise: float = 0.1
    """Standard deviation of the samples of a micro-batch in each coordinate, about an optimum below 1/4 in each."""

    def __post_init__(self) -> None:
        for name, value in (("dimension", self.dimension), ("batch_size", self.batch_size)):
            if not 1 <= value <= 1 << 20:
                raise ValueError(f"--quadratic.{name} {value}: must lie between 1 and 2^20")
        if self.samples < 2 or self.samples % 2 or self.samples * self.dimension > 16 << 20:
            raise ValueError(
                f"--quadratic.samples {self.samples}: must be even, and with --quadratic.dimension {self.dimension} "
                "make at most 16 MB"
            )
        if not 1 <= self.condition <= 1e9:
            raise ValueError(f"--quadratic.condition {self.condition}: must lie between 1 and 1e9")
        if not 0 <= self.noise <= 1e3:
            raise ValueError(f"--quadratic.noise {self.noise}: must lie between 0 and 1000")


@dataclass(frozen=True)
class AdamWConfig:
    """The optimizer that moves the model, and its schedule; with --mode diloco that of the miners' inner steps too. The
    task nanochat has its own."""

    lr: float = arg(3e-3, short=True)
    """Peak learning rate."""

    beta1: float = arg(0.9, resume="fixed")
    """Decay of the gradient's running mean, per round or inner step."""

    beta2: float = arg(0.95, resume="fixed")
    """Decay of the squared gradient's running mean, per round or inner step."""

    eps: float = arg(1e-8, resume="fixed")
    """Added to the root of the squared gradient's mean."""

    weight_decay: float = arg(0.1, resume="fixed")
    """Decoupled weight decay, on matrices only."""

    clip: float = arg(1.0, resume="fixed")
    """Largest global L2 norm of the gradient. 0: no clipping."""

    warmup: int = 10
    """Rounds of linear warm-up; with --mode diloco the inner steps of a round count each."""

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
