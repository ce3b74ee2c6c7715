"""nanochat's GPT on text: rows packed from whole documents, Muon and AdamW at the validator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from nanochat.common import attention_need, base_dir, check_memory, memory_need
from nanochat.config import GPTConfig, MuonAdamWConfig, Preset
from nanochat.schedules import settings
from nanochat.shards import list_shards
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
from tasks.data.text import TextConfig, make_tokens, prepare_tokens, silent
from tasks.data.tokenizer import RustTokenizer, load_file
from tasks.data.tokens import Tokens
from tasks.optimizer import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nanochat.dataloader import Loader, PackingIndex

    Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (batch_size, seq_len), int64, on the CPU

LEAST_DOCUMENT = 8  # average tokens of a document that a miner accepts: packing 4 million documents takes seconds
FEW = 100_000
BYTES = {"fp32": 4, "bf16": 2}  # bytes of one activation
Heads = Annotated[int, Field(ge=1, le=512)]


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

    text: str = arg("auto", short=True, resume="free", path="read")
    """Text: auto, or as for --gpt2.text. auto: the shards that python -m nanochat.dataset downloaded, or stdlib if
    there are none."""

    tokenizer: str = arg("auto", resume="free", path="read")
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


class NanochatShape(Shape):
    """Model, packing, batches and seed."""

    n_layer: Heads
    n_head: Heads
    n_kv_head: Heads
    n_embd: Dimension
    vocab_size: Dimension
    sequence_len: Annotated[int, Field(ge=2, le=1 << 17)]
    window_pattern: Annotated[str, Field(pattern=r"^[SL]{1,64}$")]
    value_embeds: bool
    smear: bool
    backout: bool
    dtype: Literal["fp32", "bf16"]
    crop: Literal["discard", "keep"]
    bos: Annotated[int, Field(ge=0, lt=1 << 20)]
    batch_size: Dimension
    eval_sequences: Dimension
    seed: Seed

    def check(self) -> None:
        config = self.config()  # raises ValueError if the widths do not fit
        if 4 * config.parameter_counts()["total"] > MAX_BLOB_BYTES:
            raise ValueError("a model too large for its state to be sent")
        if self.bos >= self.vocab_size:
            raise ValueError(f"bos {self.bos} is not in a vocabulary of {self.vocab_size}")

    def config(self) -> GPTConfig:
        return GPTConfig(**self.model_dump(include=set(GPTConfig.__dataclass_fields__)))


class Nanochat(BaseTask[NanochatShape]):
    """The task (tasks.Task). A row is T + 1 tokens of packed documents, each behind a <|bos|>: T inputs, T targets."""

    name: ClassVar[str] = "nanochat"
    unit: ClassVar[str] = "tokens"
    Config: ClassVar[type] = NanochatConfig
    Optimizer: ClassVar[type] = MuonAdamWConfig
    example: ClassVar[Mapping[str, Any]] = {
        "depth": 2,
        "aspect_ratio": 16,
        "head_dim": 16,
        "seq_len": 32,
        "batch_size": 2,
        "eval_sequences": 4,
        "text": "stdlib",
        "tokenizer": "byte",
        "max_bytes": 100_000,
    }

    def __init__(
        self, shape: NanochatShape, data: DataSpec, tokens: Tokens, tokenizer: RustTokenizer | None = None
    ) -> None:
        """Miners have no tokenizer. Raises ValueError if the text makes no micro-batch."""
        self.shape = shape
        self.config = shape.config()
        self._data = data
        self._tokens = tokens
        self._tokenizer = tokenizer
        self._train = self._packed("train", shape.crop)
        self._orders = EpochOrders(shape.seed, len(self._train))
        if not self.batches_per_epoch:
            raise ValueError(
                f"--nanochat.text: {len(tokens.train)} tokens for training make {len(self._train)} rows of "
                f"{shape.sequence_len}, less than a micro-batch of {shape.batch_size}; give more text, or lower "
                "--nanochat.batch_size or --nanochat.seq_len"
            )

    def _packed(self, part: Literal["train", "validation"], crop: Literal["discard", "keep"]) -> PackingIndex:
        """Pack a part of the tokens into rows. The validator caches them beside the tokens; a miner does not."""
        from nanochat.dataloader import PackingIndex

        tokens, bos, row_len = getattr(self._tokens, part), self.shape.bos, self.shape.sequence_len + 1
        if self._tokenizer is None:
            return PackingIndex.build(tokens, bos, row_len, crop=crop)
        digest = self._tokenizer.inner.digest
        name, folder = f"{part}-{self.data_digest}", self._tokens.path.parent
        return PackingIndex.cached(folder, tokens, name=name, bos=bos, row_len=row_len, crop=crop, tokenizer=digest)

    @cached_property
    def _validation(self) -> PackingIndex:
        """Pack all of the validation text, whatever --nanochat.crop does with the training text."""
        return self._packed("validation", "keep")

    @classmethod
    def prepare(
        cls,
        config: NanochatConfig,
        *,
        seed: int,
        cache: Path,
        device: torch.device | None = None,
        progress: Callable[[str], None] = silent,
    ) -> Self:
        """Make the task from its flags. Raises ValueError, in one line, if model or text is not available."""
        check_seed(seed)
        tokenizer = _tokenizer(config.tokenizer, progress)
        import torch

        shape = _resolve(config, tokenizer, device or torch.device("cpu"), seed)
        tokens, data = prepare_tokens(replace(config, text=_text(config.text, progress)), tokenizer, cache, progress)
        task = cls(shape, data, tokens, tokenizer)
        kept, total = task._train.kept, task._train.total
        advice = "" if config.crop == "keep" else "; --nanochat.crop keep takes all"
        progress(f"packed {kept / total:.0%} of {total / 1e6:.1f} M tokens into {len(task._train):,} rows{advice}")
        if not len(task._validation):
            raise ValueError(
                f"--nanochat.validation: {len(tokens.validation)} tokens for validation are less than a row of "
                f"{shape.sequence_len}; raise --nanochat.validation, or give more text or a smaller --nanochat.seq_len"
            )
        return task

    @classmethod
    def from_spec(cls, spec: TaskSpec, data: DataSpec, open_blob: OpenBlob) -> Self:
        shape = NanochatShape.parse(spec)
        tokens = open_tokens(data, open_blob, shape.vocab_size)
        documents = sum(int(np.count_nonzero(part == shape.bos)) for part in (tokens.train, tokens.validation))
        if documents * LEAST_DOCUMENT > len(tokens.train) + len(tokens.validation) + LEAST_DOCUMENT * FEW:
            raise ProtocolError(f"{documents} documents of less than {LEAST_DOCUMENT} tokens: packing takes too long")
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
        shape = NanochatShape.parse(spec)
        config, batch, size = shape.config(), shape.batch_size, BYTES[shape.dtype]
        values, tokens = config.parameter_counts()["total"], batch * shape.sequence_len
        both = memory_need(config, batch, optimizer=False, activation_bytes=size)  # with parameters and gradients
        return Need(
            parameters=values,
            working=both - 8 * values + attention_need(config, batch, size),
            data=token_bytes(data) // (shape.sequence_len + 1) * ORDER_BYTES + token_bytes(data) + 16 * tokens,
            flops=float(tokens * config.flops_per_token()),
        )

    # --- the model ----------------------------------------------------------------------------------------------------

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        """Build the model in training mode, in fp32. Initial weights come from the CPU, the same for all devices.

        Raises ProtocolError if the device lacks the memory to train it.
        """
        import torch

        from nanochat.gpt import GPT

        try:
            _check_memory(self.config, self.shape.batch_size, self.shape.dtype, torch.device(device), initial)
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        model = GPT(self.config, torch.float32 if self.shape.dtype == "fp32" else torch.bfloat16, device)
        if initial:
            with seeded(self.shape.seed):
                model.init_weights()
        return model.train()

    def optimizer(self, model: nn.Module, config: Any) -> torch.optim.Optimizer:
        from nanochat.optim import build_optimizer

        return build_optimizer(model, config)

    def settings(self, config: Any, step: int, steps: int, units: int) -> Settings:
        return settings(config, self.config, step, steps, units)

    def flops(self, model: nn.Module) -> float:
        return float(self.config.flops_per_token())

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return what `nanochat.checkpoint_manager.load_model` and `scripts/base_eval.py` need."""
        meta: dict[str, Any] = {"config": asdict(self.config), "dtype": self.shape.dtype}
        meta["validation"] = self._data.parameters["validation"]
        if self._tokenizer is None or self._tokenizer.vocabulary is None:
            return meta, {}
        meta["tokenizer"] = self._tokenizer.inner.digest
        return meta, {"tokenizer.json": self._tokenizer.vocabulary}

    # --- the data -----------------------------------------------------------------------------------------------------

    def batch(self, index: int) -> Batch:
        return _shifted(self._train.rows(self._orders.batch(index, self.shape.batch_size)))

    def excerpts(self, count: int, length: int) -> list[list[int]]:
        return spread(self._tokens.validation, count, length)

    def loader(self, device: torch.device, rank: int = 0, world: int = 1) -> Loader:
        """Load the same batches in order, every `world`-th from `rank`, ahead of time and on the device."""
        from nanochat.dataloader import Loader

        size, tokenizer = self.shape.batch_size, self._tokenizer.inner.digest if self._tokenizer else None
        return Loader(self._train, self._orders, size, rank=rank, world_size=world, device=device, tokenizer=tokenizer)

    def count(self, index: int) -> int:
        return self.shape.batch_size * self.shape.sequence_len

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the cross-entropy in nats, summed over the batch's tokens; an fp32 scalar."""
        device = next(model.parameters()).device
        inputs, targets = (ids.to(device, non_blocking=True) for ids in batch)
        loss: torch.Tensor = model(inputs, targets, reduction="sum")
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return {"val_loss": mean nats per token, "val_bpb": bits per byte} over evenly spread validation rows.

        A miner has no tokenizer, so it cannot count bytes: it returns only the loss.
        """
        import torch

        from nanochat.loss_eval import evaluate, own_share

        rows = self._validation
        wanted = min(self.shape.eval_sequences, len(rows))
        chosen = np.arange(wanted, dtype=np.int64) * len(rows) // wanted
        size = self.shape.batch_size
        batches = (_shifted(rows.rows(chosen[i : i + size])) for i in own_share(range(0, wanted, size)))
        sizes = self._tokenizer.inner.token_bytes() if self._tokenizer else None
        training = model.training
        model.eval()
        with torch.no_grad():
            sums = evaluate(model, batches, sizes)
        model.train(training)
        return {"val_loss": sums.loss} | ({"val_bpb": sums.bits_per_byte} if self._tokenizer else {})


def _shifted(rows: Any) -> Batch:
    import torch

    ids = torch.from_numpy(rows)  # (batch_size, seq_len + 1)
    return ids[:, :-1], ids[:, 1:]


def _tokenizer(name: str, progress: Callable[[str], None]) -> RustTokenizer:
    """Load the tokenizer of --nanochat.tokenizer. Raises ValueError if it is not available."""
    path = base_dir() / "tokenizer.json" if name == "auto" else Path(name).expanduser()
    if name == "byte" or (name == "auto" and not path.exists()):
        from nanochat.tokenizer import Tokenizer

        if name == "auto" and list_shards():
            raise ValueError(
                f"--nanochat.tokenizer auto: there are shards, but no {path}; python -m scripts.tok_train makes it, or "
                "give --nanochat.tokenizer byte"
            )
        if name == "auto":
            progress(f"tokenizer: bytes, for there is no {path}; python -m scripts.tok_train makes one")
        return RustTokenizer(Tokenizer.bytewise().blob)
    return load_file("nanochat", path)


def _text(name: str, progress: Callable[[str], None]) -> str:
    """Resolve --nanochat.text auto."""
    if name != "auto":
        return name
    folder = base_dir() / "base_data"
    if list_shards(folder):
        return str(folder)
    progress(
        f"text: the standard library, for there are no shards in {folder}; python -m nanochat.dataset -n 8 gets some"
    )
    return "stdlib"


def _resolve(config: NanochatConfig, tokenizer: RustTokenizer, device: torch.device, seed: int) -> NanochatShape:
    """Return the shape that the flags describe, with the tokenizer's vocabulary."""
    try:
        model = GPTConfig.from_depth(
            config.depth,
            config.preset,
            vocab_size=tokenizer.vocab_size,
            sequence_len=config.seq_len,
            aspect_ratio=config.aspect_ratio,
            head_dim=config.head_dim,
            kv_ratio=config.kv_ratio,
            window_pattern=config.window_pattern,
        )
        dtype = _dtype(config.dtype, device)
        _check_memory(model, config.batch_size, dtype, device, optimizer=True)
        shape = NanochatShape(
            **asdict(model),
            dtype=dtype,
            crop=config.crop,
            bos=tokenizer.separator,
            batch_size=config.batch_size,
            eval_sequences=config.eval_sequences,
            seed=seed,
        )
        shape.check()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{first['loc'][0]} {first['input']}: {first['msg']}"
        raise ValueError(f"--nanochat.depth {config.depth}: {reason}") from None
    except ValueError as error:
        flag = f"--nanochat.depth {config.depth}: "
        raise ValueError(flag + str(error).removeprefix(flag)) from None
    return shape


def _dtype(name: Literal["auto", "fp32", "bf16"], device: torch.device) -> Literal["fp32", "bf16"]:
    """Resolve --nanochat.dtype auto for this device."""
    import torch

    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _check_memory(config: GPTConfig, batch: int, dtype: str, device: torch.device, optimizer: bool) -> None:
    """Check the memory. On a CPU it also holds the state, and at a miner, without an optimizer, the payload."""
    copies = (1 if optimizer else 2) if device.type == "cpu" else 0
    check_memory(config, batch, device, optimizer, activation_bytes=BYTES[dtype], copies=copies)
