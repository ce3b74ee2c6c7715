"""The shape of a nanochat GPT, its parameter counts, and its optimizer's flags. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pilot.common.flags import arg

Preset = Literal["modern", "classic"]

VOCAB_MULTIPLE = 64  # tables and head are padded to a multiple; logits are cut to the vocabulary
GATE_CHANNELS = 12  # channels of the residual stream that feed the value embeddings' gates
SMEAR_CHANNELS = 24  # the input of smear's gate
ROTARY_REACH = 10  # the rotary tables cover this many times the sequence length
WINDOW_MULTIPLE = 128


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model; `from_depth` makes one from a preset and a depth."""

    sequence_len: int = 2048
    vocab_size: int = 32_768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # a letter per layer, repeated: S a quarter of the sequence, L all; the last is L
    value_embeds: bool = True
    smear: bool = True
    backout: bool = True

    def __post_init__(self) -> None:
        if min(self.n_layer, self.n_head, self.n_embd) < 1:
            raise ValueError("a model must have layers, heads and a width")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise ValueError(f"n_embd {self.n_embd} must be n_head {self.n_head} times an even number")
        if self.n_kv_head < 1 or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        channels = max(SMEAR_CHANNELS if self.smear else 0, GATE_CHANNELS if self.value_embeds else 0)
        if self.n_embd < channels:
            raise ValueError(f"n_embd {self.n_embd}: gates of this model read {channels} channels; make it wider")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern {self.window_pattern!r}: must be letters S and L, such as SSSL")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        preset: Preset = "modern",
        *,
        vocab_size: int,
        sequence_len: int,
        aspect_ratio: int = 64,
        head_dim: int = 128,
        kv_ratio: int = 1,
        window_pattern: str = "SSSL",
    ) -> GPTConfig:
        """Return `depth` layers of width depth * aspect_ratio, in whole heads; `kv_ratio` query heads share a kv head.

        The preset classic is the first nanochat: no value embeddings, smear, backout or windows.
        """
        heads = math.ceil(depth * aspect_ratio / head_dim)
        if heads % kv_ratio:
            raise ValueError(f"kv_ratio {kv_ratio}: does not divide the {heads} heads of depth {depth}")
        modern = preset == "modern"
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=heads,
            n_kv_head=heads // kv_ratio,
            n_embd=heads * head_dim,
            window_pattern=window_pattern if modern else "L",
            value_embeds=modern,
            smear=modern,
            backout=modern,
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rotary_len(self) -> int:
        """Return the longest sequence that the rotary tables cover."""
        return ROTARY_REACH * self.sequence_len

    @property
    def backout_layer(self) -> int:
        """Return the layer whose output is subtracted again, scaled, before the head."""
        return self.n_layer // 2

    def has_value_embed(self, layer: int) -> bool:
        """Tell whether a layer has a value embedding: every other layer does, including the last."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    def windows(self) -> tuple[int, ...]:
        """Return for each layer how many tokens before its own a query sees at most."""
        short = math.ceil(self.sequence_len / 4 / WINDOW_MULTIPLE) * WINDOW_MULTIPLE
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        letters[-1] = "L"
        return tuple(short if letter == "S" else self.sequence_len for letter in letters)

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of each kind, and their sum as `total`."""
        tables = sum(map(self.has_value_embed, range(self.n_layer)))
        block = self.n_embd * (2 * self.n_embd + 2 * self.kv_dim + 8 * self.n_embd)
        counts = {
            "wte": self.padded_vocab * self.n_embd,
            "value_embeds": tables * self.padded_vocab * self.kv_dim,
            "lm_head": self.padded_vocab * self.n_embd,
            "matrices": self.n_layer * block + tables * self.n_kv_head * GATE_CHANNELS,
            "scalars": 2 * self.n_layer + (SMEAR_CHANNELS + 1 if self.smear else 0) + self.backout,
        }
        return {**counts, "total": sum(counts.values())}

    @property
    def scaling_parameters(self) -> int:
        """Return the parameters that the data-to-parameter ratio counts: the blocks' matrices and the head."""
        counts = self.parameter_counts()
        return counts["matrices"] + counts["lm_head"]

    def flops_per_token(self, length: int | None = None) -> int:
        """Return the FLOPs per token, forward and backward: 6 per matmul parameter, plus attention over `length`."""
        length = length or self.sequence_len
        attention = sum(12 * self.n_head * self.head_dim * min(window, length) for window in self.windows())
        return 6 * self.scaling_parameters + attention


@dataclass(frozen=True)
class MuonAdamWConfig:
    """Muon for the matrices, AdamW for the rest, and their schedules."""

    matrix_lr: float = 0.02
    """Muon's learning rate, for the blocks' matrices. Each rate here is for steps of 2^19 tokens: see --batches."""
    embedding_lr: float = 0.3
    """AdamW's learning rate for the token embedding; value embeddings take half of it."""
    unembedding_lr: float = 0.008
    """AdamW's learning rate for the head."""
    scalar_lr: float = 0.5
    """AdamW's learning rate for the x0 scalars; the residual ones take a hundredth of it."""
    weight_decay: float = 0.28
    """Muon's weight decay at depth 12; it is scaled to the model's size and falls to zero over the run."""
    warmup_steps: int = arg(40, resume="free")
    """Steps of linear warm-up, at most a tenth of the run."""
    warmdown_ratio: float = arg(0.65, resume="free")
    """Share of the run, at its end, in which the learning rates fall."""
    final_lr_frac: float = arg(0.05, resume="free")
    """Learning rates at the end, as a fraction of their peak."""

    def __post_init__(self) -> None:
        for flag in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, flag) < float("inf"):
                raise ValueError(f"--nanochat.optimizer.{flag} {getattr(self, flag)}: must be 0 or more, and finite")
        for flag in ("warmdown_ratio", "final_lr_frac"):
            if not 0 <= getattr(self, flag) <= 1:
                raise ValueError(f"--nanochat.optimizer.{flag} {getattr(self, flag)}: must lie between 0 and 1")
