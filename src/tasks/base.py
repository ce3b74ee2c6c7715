"""The parts of a task that most tasks share: the order's parameters, a token file, epochs, AdamW."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from pilot.interfaces import Blobs, Refused
from protocol import MAX_INDEX, MAX_SERVED_BYTES, DataSpec, Digest, Fault, Part, ProtocolError, TaskSpec
from tasks import OpenBlob
from tasks.data.tokens import Tokens, window_order
from tasks.optimizer import AdamWConfig, Settings, adamw, adamw_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

Dimension = Annotated[int, Field(ge=1, le=1 << 20)]
Seed = Annotated[int, Field(ge=0, le=MAX_INDEX)]

EPOCHS_KEPT = 2  # for rounds that span the end of an epoch
ORDER_BYTES = 48  # a window: keys and permutation while an epoch's order is made, and those that are kept


class Shape(Part):
    """Everything besides the data that determines batches and losses: the parameters of the order's `TaskSpec`."""

    batch_size: Dimension

    @classmethod
    def parse(cls, spec: TaskSpec) -> Self:
        """Return the checked parameters.

        Raises ProtocolError for a parameter that is missing, unknown, of another type or out of bounds.
        """
        try:
            shape = cls.model_validate(spec.parameters)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise ProtocolError(f"task {spec.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        try:
            shape.check()
        except ValueError as error:
            raise ProtocolError(f"task {spec.name}: {error}") from None
        return shape

    def check(self) -> None:
        """Raise ValueError if the parameters contradict each other."""


S = TypeVar("S", bound=Shape)


class BaseTask(Generic[S]):
    """The parts of `tasks.Task` that follow from a shape and a token file.

    A subclass sets `shape`, `_data`, `_tokens` and `_orders`, and overrides whatever differs.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    example: ClassVar[Mapping[str, Any]]
    Optimizer: ClassVar[type] = AdamWConfig

    shape: S
    _data: DataSpec
    _tokens: Tokens
    _orders: EpochOrders

    def spec(self) -> TaskSpec:
        return TaskSpec(name=self.name, parameters=self.shape.model_dump())

    @property
    def data_spec(self) -> DataSpec:
        return self._data

    @property
    def data_digest(self) -> Digest:
        return self._data.blobs["tokens"].digest

    @property
    def _vocabulary_blob(self) -> bytes | None:
        """Return the vocabulary that the validator sends, if there is one."""
        return None

    def blobs(self) -> Blobs:
        blobs: dict[Digest, Any] = {}
        if self._tokens.bytes <= MAX_SERVED_BYTES:
            blobs[self.data_digest] = self._tokens.buffer
        if "vocabulary" in self._data.blobs and self._vocabulary_blob:
            blobs[self._data.blobs["vocabulary"].digest] = self._vocabulary_blob
        return blobs

    @classmethod
    def make_blob(cls, name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
        raise Refused(409, f"the order's {name} is not here", missing=[data.blobs[name]])

    @property
    def batches_per_epoch(self) -> int:
        return self._orders.windows // self.shape.batch_size

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(sorted(model.named_parameters()))

    def buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {}

    def excerpts(self, count: int, length: int) -> list[list[int]]:
        return []

    def optimizer(self, model: nn.Module, config: Any) -> torch.optim.Optimizer:
        return adamw(model, config)

    def settings(self, config: Any, step: int, steps: int, units: int) -> Settings:
        return adamw_settings(config, step, steps)


class EpochOrders:
    """The order in which each epoch visits its windows, a permutation from the seed."""

    def __init__(self, seed: int, windows: int) -> None:
        self.windows = windows
        self._seed = seed
        self._kept: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """Return the permutation of an epoch, (windows,)."""
        if epoch not in self._kept:
            self._kept[epoch] = window_order(self._seed, epoch, self.windows)
            while len(self._kept) > EPOCHS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[epoch]

    def batch(self, index: int, size: int) -> NDArray[np.int64]:
        """Return the windows of micro-batch `index`, (size,), counted across epochs of whole micro-batches."""
        epoch, position = divmod(index, self.windows // size)
        return self(epoch)[position * size : (position + 1) * size]


def open_tokens(data: DataSpec, open_blob: OpenBlob, vocab_size: int) -> Tokens:
    """Open the order's token file. Raises ProtocolError unless these are its tokens, all of them in the vocabulary."""
    if "tokens" not in data.blobs:
        raise ProtocolError("the order's data has no tokens", Fault.WRONG_DATA)
    path = open_blob("tokens")
    try:
        tokens = Tokens.open(path)
    except ProtocolError as error:  # its text names the file, which is nobody else's concern
        raise ProtocolError("the order's tokens are no token file", Fault.WRONG_DATA) from error
    if tokens.ref() != data.blobs["tokens"]:
        raise ProtocolError("the tokens here are not the order's", Fault.WRONG_DATA)
    if vocab_size < 256**tokens.train.itemsize and tokens.largest >= vocab_size:
        raise ProtocolError(f"the order's tokens do not fit in a vocabulary of {vocab_size}")
    return tokens


def spread(ids: NDArray[Any], count: int, length: int) -> list[list[int]]:
    """Return `count` excerpts of `length` ids, evenly spread; fewer if there are not so many ids."""
    count = min(count, len(ids) // length)
    return [ids[at : at + length].tolist() for at in (len(ids) // count * number for number in range(count))]


def token_bytes(data: DataSpec) -> int:
    """Return the size of an order's token file."""
    return data.blobs["tokens"].bytes if "tokens" in data.blobs else 0


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that no message can carry."""
    if not 0 <= seed <= MAX_INDEX:
        raise ValueError(f"--seed {seed}: must lie between 0 and 2^53")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, inside the block only. (`torch.manual_seed` would reseed the GPUs' too.)"""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
