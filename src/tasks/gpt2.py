"""GPT-2 on text: Hugging Face's `GPT2LMHeadModel` from a shape, a folder or the hub, on a token file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from pilot.common.flags import arg
from protocol import MAX_BLOB_BYTES, DataSpec, ProtocolError, TaskSpec
from tasks import Need, OpenBlob
from tasks.base import (
    ORDER_BYTES,
    BaseTask,
    Dimension,
    EpochOrders,
    Seed,
    Shape,
    check_seed,
    open_tokens,
    seeded,
    spread,
    token_bytes,
)
from tasks.data.hub_tokenizer import named_tokenizer, own_tokenizer
from tasks.data.text import TextConfig, make_tokens, prepare_tokens, silent
from tasks.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from tasks.data.tokens import Array, Tokens
from tasks.gpt2_files import exported, line_of, load_config, load_weights

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn

    Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (batch_size, seq_len), int64, on the CPU

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
GPT2_SIZES = (50257, 50304)  # of its vocabulary, as it is and padded for speed
# Values that the backward pass keeps of a token: of a block, in its two widths, and of the logits (measured).
BLOCK_WIDTHS, INNER_WIDTHS, LOGIT_COPIES = 16, 7, 5
NO_SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}  # GPT-2's own ids are beyond 256 tokens


@dataclass(frozen=True)
class GPT2Config(TextConfig):
    """GPT-2 on a text."""

    flag: ClassVar[str] = "gpt2"

    model: str = arg("nano", short=True, path="read")
    """nano (0.8M), small (124M), medium, large or xl (1.6B). These are parameters. Or a GPT-2 on the hub, or a folder
    with one."""

    tokenizer: str = arg("auto", resume="free", path="read")
    """byte (256 tokens), gpt2 (byte-pair encoding, 50257 tokens), a file that tok_train wrote, or a model's folder or
    tokenizer.json. auto: byte for nano, the model's own for a folder or the hub, gpt2 for the other sizes."""

    vocabulary: Path | None = arg(None, resume="free")
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: the hub's gpt2."""


class GPT2Shape(Shape):
    """Model, batches and seed."""

    n_layer: Annotated[int, Field(ge=1, le=512)]
    n_head: Annotated[int, Field(ge=1, le=512)]
    n_embd: Dimension
    n_inner: Dimension
    n_positions: Dimension
    vocab_size: Dimension
    activation_function: Literal["gelu_new", "gelu", "gelu_pytorch_tanh", "relu", "silu"]
    layer_norm_epsilon: Annotated[float, Field(gt=0, lt=1)]
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    tie_word_embeddings: bool
    seq_len: Dimension
    batch_size: Dimension
    eval_sequences: Dimension
    seed: Seed

    def check(self) -> None:
        """Raise ValueError if the parameters contradict each other."""
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.parameters * 4 > MAX_BLOB_BYTES:
            raise ValueError("a model too large for its state to be sent")
        if self.seq_len > self.n_positions:
            raise ValueError(f"--gpt2.seq_len {self.seq_len}: the model has {self.n_positions} positions")

    @property
    def parameters(self) -> int:
        """Return how many values the model has."""
        width, inner = self.n_embd, self.n_inner
        block = width * (4 * width + 2 * inner) + 9 * width + inner  # matrices, then biases and norms
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.n_positions
        return self.n_layer * block + tables * width + 2 * width

    def config(self) -> transformers.GPT2Config:
        import transformers

        options: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        # only the eager kernel supports reorder_and_upcast_attn
        options["attn_implementation"] = "eager" if self.reorder_and_upcast_attn else "sdpa"
        sizes = self.model_dump(exclude={"seq_len", "batch_size", "eval_sequences", "seed"})
        return transformers.GPT2Config(**sizes, **options, **NO_SPECIAL, use_cache=False)


class GPT2(BaseTask[GPT2Shape]):
    """The task (tasks.Task). Window w of a part of the text is its tokens [w T, w T + T]: T inputs, T targets."""

    name: ClassVar[str] = "gpt2"
    unit: ClassVar[str] = "tokens"
    Config: ClassVar[type] = GPT2Config
    example: ClassVar[Mapping[str, Any]] = {"max_bytes": 100_000, "seq_len": 16, "batch_size": 2, "eval_sequences": 4}

    def __init__(
        self,
        shape: GPT2Shape,
        data: DataSpec,
        tokens: Tokens,
        pretrained: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`pretrained` names the source of the initial weights. Miners have neither it nor the tokenizer.

        Raises ValueError if the text is shorter than one micro-batch, or its validation part than a sequence.
        """
        self.shape = shape
        self._data = data
        self._tokens = tokens
        self._pretrained = pretrained
        self._tokenizer = tokenizer
        self._orders = EpochOrders(shape.seed, self._count_windows(tokens.train))
        if not self.batches_per_epoch:
            raise ValueError(
                f"--gpt2.text: {len(tokens.train)} tokens for training are less than a micro-batch of "
                f"{shape.batch_size} x {shape.seq_len}; give more text, or lower --gpt2.batch_size or --gpt2.seq_len"
            )
        if not self._count_windows(tokens.validation):
            raise ValueError(
                f"--gpt2.validation: {len(tokens.validation)} tokens for validation are less than a sequence of "
                f"{shape.seq_len}; raise --gpt2.validation, or give more text or a smaller --gpt2.seq_len"
            )

    @classmethod
    def prepare(
        cls,
        config: GPT2Config,
        *,
        seed: int,
        cache: Path,
        device: torch.device | None = None,
        progress: Callable[[str], None] = silent,
    ) -> Self:
        """Make the task from its flags. Raises ValueError, in one line, if model or text is not available."""
        check_seed(seed)
        pretrained = None if config.model in PRESETS else _load_config(config.model)
        tokenizer = _load_tokenizer(config, pretrained, progress)
        shape = _resolve(config, pretrained, tokenizer, seed)
        tokens, data = prepare_tokens(config, tokenizer, cache, progress)
        return cls(shape, data, tokens, config.model if pretrained else None, tokenizer)

    @classmethod
    def from_spec(cls, spec: TaskSpec, data: DataSpec, open_blob: OpenBlob) -> Self:
        shape = GPT2Shape.parse(spec)
        tokens = open_tokens(data, open_blob, shape.vocab_size)
        try:
            return cls(shape, data, tokens)
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    @classmethod
    def make_blob(cls, name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
        return make_tokens(name, data, open_blob, local, cache)

    @property
    def _vocabulary_blob(self) -> bytes | None:
        return self._tokenizer.vocabulary if self._tokenizer else None

    @classmethod
    def need(cls, spec: TaskSpec, data: DataSpec) -> Need:
        shape = GPT2Shape.parse(spec)
        width, inner, length = shape.n_embd, shape.n_inner, shape.seq_len
        tokens = shape.batch_size * length
        block = BLOCK_WIDTHS * width + INNER_WIDTHS * inner
        values = shape.n_layer * block + 8 * width + LOGIT_COPIES * shape.vocab_size
        if shape.reorder_and_upcast_attn:  # the eager kernel holds whole matrices of scores
            values += (2 * shape.n_layer + 4) * shape.n_head * length
        matrices = shape.parameters - shape.n_positions * width
        return Need(
            parameters=shape.parameters,
            working=4 * tokens * values,
            data=token_bytes(data) // length * ORDER_BYTES + 16 * tokens,
            flops=tokens * (6.0 * matrices + 12.0 * shape.n_layer * width * length),
        )

    # --- the model ----------------------------------------------------------------------------------------------------

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        """Build the model in training mode, in fp32. Initial weights come from the CPU, the same for all devices."""
        model = self._initial_model().to(device) if initial else self._empty_model(device)
        return model.train()

    def _initial_model(self) -> nn.Module:
        from transformers import GPT2LMHeadModel

        model: nn.Module
        if self._pretrained:
            try:
                model = load_weights(self._pretrained, self.shape.config())
            except (OSError, ValueError) as error:
                raise ValueError(f"--gpt2.model {self._pretrained}: {line_of(error)}") from error
        else:
            with seeded(self.shape.seed):
                model = GPT2LMHeadModel(self.shape.config())
        return model

    def _empty_model(self, device: torch.device | str) -> nn.Module:
        import torch
        from transformers import GPT2LMHeadModel

        with torch.device("meta"):
            model: nn.Module = GPT2LMHeadModel(self.shape.config())
        model.to_empty(device=device)
        # to_empty gave two tied parameters separate memory
        model.tie_weights()  # type: ignore[operator]
        return model

    def flops(self, model: nn.Module) -> float:
        """Count 6 per parameter except positions, plus attention over the whole sequence."""
        shape = self.shape
        matrices = sum(p.numel() for p in model.parameters()) - shape.n_positions * shape.n_embd
        head = 0 if shape.tie_word_embeddings else -shape.vocab_size * shape.n_embd  # then one of two tables is read
        return 6.0 * (matrices + head) + 12.0 * shape.n_layer * shape.n_embd * shape.seq_len

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return what Hugging Face's AutoModelForCausalLM, AutoTokenizer and pipeline need in a checkpoint's folder."""
        return {"task": self.spec().model_dump(), "tokenizer": self._data.parameters["tokenizer"]}, self._exported

    @cached_property
    def _exported(self) -> dict[str, bytes]:
        assert self._tokenizer is not None  # a miner describes nothing
        files = exported(self.shape.config(), self._tokenizer)
        return files | ({"vocabulary": self._tokenizer.vocabulary} if self._tokenizer.vocabulary else {})

    # --- the data -----------------------------------------------------------------------------------------------------

    def _count_windows(self, part: Array) -> int:
        return max(len(part) - 1, 0) // self.shape.seq_len

    def batch(self, index: int) -> Batch:
        return self._windows_of(self._tokens.train, self._orders.batch(index, self.shape.batch_size))

    def _windows_of(self, part: Array, windows: np.ndarray[Any, np.dtype[np.int64]]) -> Batch:
        import torch

        length = self.shape.seq_len
        rows = np.stack([part[w * length : w * length + length + 1] for w in windows.tolist()])
        ids = torch.from_numpy(rows.astype(np.int64))  # (batch_size, seq_len + 1)
        return ids[:, :-1], ids[:, 1:]

    def count(self, index: int) -> int:
        return self.shape.batch_size * self.shape.seq_len

    def excerpts(self, count: int, length: int) -> list[list[int]]:
        return spread(self._tokens.validation, count, length)

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy in nats, summed over the batch's tokens; an fp32 scalar."""
        from torch.nn import functional as F

        device = next(model.parameters()).device
        inputs, targets = (ids.to(device) for ids in batch)
        logits = model(input_ids=inputs, use_cache=False).logits.float()  # (batch_size, seq_len, vocab_size)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction="sum")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return {"val_loss": mean nats per token} over `eval_sequences` evenly spread validation windows."""
        import torch

        there = self._count_windows(self._tokens.validation)
        wanted = min(self.shape.eval_sequences, there)
        windows = np.arange(wanted, dtype=np.int64) * there // wanted
        training = model.training
        model.eval()
        total = 0.0
        with torch.no_grad():
            for start in range(0, wanted, self.shape.batch_size):
                batch = self._windows_of(self._tokens.validation, windows[start : start + self.shape.batch_size])
                total += float(self.loss(model, batch))
        model.train(training)
        return {"val_loss": total / (wanted * self.shape.seq_len)}


def _load_config(name: str) -> transformers.GPT2Config:
    try:
        return load_config(name)
    except OSError as error:
        known = ", ".join(PRESETS)
        raise ValueError(
            f"--gpt2.model {name}: not {known}, nor a GPT-2 in a folder or on the hub ({line_of(error)})"
        ) from error
    except ValueError as error:
        raise ValueError(f"--gpt2.model {name}: {error}") from error


def _load_tokenizer(
    config: GPT2Config, pretrained: transformers.GPT2Config | None, progress: Callable[[str], None]
) -> Tokenizer:
    """Return the tokenizer that the flags name or, with auto, the one that the model was trained with."""
    if config.tokenizer != "auto":
        try:
            named = named_tokenizer(config.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"--gpt2.tokenizer {config.tokenizer}: {line_of(error)}") from None
        return named or load_tokenizer(config.tokenizer, config.vocabulary)
    if pretrained is None or config.vocabulary is not None:
        return load_tokenizer("byte" if config.model == "nano" else "gpt2", config.vocabulary)
    try:
        own = own_tokenizer(config.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--gpt2.model {config.model}: {line_of(error)}") from None
    if own is None and pretrained.vocab_size == ByteTokenizer.vocab_size:
        progress("tokenizer: bytes, for the model has 256 tokens and no tokenizer of its own")
        return ByteTokenizer()
    if own is None and pretrained.vocab_size not in GPT2_SIZES:
        raise ValueError(
            f"--gpt2.model {config.model}: it has no tokenizer.json, nor vocab.json and merges.txt, and its vocabulary "
            f"of {pretrained.vocab_size} is not GPT-2's; copy them there, or name a tokenizer with --gpt2.tokenizer"
        )
    if own is None:
        progress("tokenizer: GPT-2's, for the model has none of its own")
        return load_tokenizer("gpt2", None)
    progress(f"tokenizer: the model's own, {own.vocab_size:,} tokens")
    return own


def _resolve(
    config: GPT2Config, pretrained: transformers.GPT2Config | None, tokenizer: Tokenizer, seed: int
) -> GPT2Shape:
    """Return the shape: the model's own, or the preset's with as many embeddings as the tokenizer has tokens."""

    import transformers

    model = pretrained or transformers.GPT2Config(
        **PRESETS[config.model], vocab_size=tokenizer.vocab_size, **NO_SPECIAL
    )
    if tokenizer.vocab_size > model.vocab_size:
        name = tokenizer.name if config.tokenizer == "auto" else config.tokenizer
        raise ValueError(
            f"--gpt2.tokenizer {name}: {tokenizer.vocab_size} tokens, {config.model} knows {model.vocab_size}"
        )
    nano = config.model == "nano"
    chosen: dict[str, Any] = {
        "n_inner": model.n_inner or 4 * model.n_embd,
        "seq_len": config.seq_len or (64 if nano else model.n_positions),
        "batch_size": config.batch_size or (8 if nano else 1),
        "eval_sequences": config.eval_sequences,
        "seed": seed,
    }
    parameters = {name: chosen.get(name, getattr(model, name, None)) for name in GPT2Shape.model_fields}
    try:
        shape = GPT2Shape.model_validate(parameters)
        shape.check()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"--gpt2.model {config.model}: {first['loc'][0]} {first['input']}: {first['msg']}") from None
    except ValueError as error:
        flag = "" if str(error).startswith("--") else f"--gpt2.model {config.model}: "
        raise ValueError(f"{flag}{error}") from None
    return shape
