"""What the language tasks share: the order's parameters, an epoch's order, the data that are handed over."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from protocol import DataSpec, Fault, Part, ProtocolError, TaskSpec
from tasks import OpenBlob
from tasks.tokens import Tokens, window_order

Dimension = Annotated[int, Field(ge=1, le=1 << 20)]

EPOCHS_KEPT = 2  # for rounds that span the end of an epoch


class Shape(Part):
    """Everything besides the data that determines batches and losses: the parameters of the order's `TaskSpec`."""

    batch_size: Dimension

    @classmethod
    def parse(cls, spec: TaskSpec) -> Self:
        """Raises ProtocolError for a parameter that is missing, unknown, ill-typed or out of bounds."""
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
        """Raises ValueError where the parameters do not go together."""


class EpochOrders:
    """The permutation in which each epoch visits its `windows`, by the seed; the last ones used are kept."""

    def __init__(self, seed: int, windows: int) -> None:
        self.windows = windows
        self._seed = seed
        self._kept: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """(windows,)"""
        if epoch not in self._kept:
            self._kept[epoch] = window_order(self._seed, epoch, self.windows)
            while len(self._kept) > EPOCHS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[epoch]

    def batch(self, index: int, size: int) -> NDArray[np.int64]:
        """(size,): the windows of micro-batch `index`, counted across epochs of whole micro-batches."""
        epoch, position = divmod(index, self.windows // size)
        return self(epoch)[position * size : (position + 1) * size]


def open_tokens(data: DataSpec, open_blob: OpenBlob, vocab_size: int) -> Tokens:
    """Open the order's token file. Raises ProtocolError unless these are its tokens, all of them in the vocabulary."""
    if "tokens" not in data.blobs:
        raise ProtocolError("the order's data has no tokens", Fault.WRONG_DATA)
    tokens = Tokens.open(open_blob("tokens"))
    ordered = data.blobs["tokens"].digest
    if tokens.digest != ordered:
        raise ProtocolError(f"tokens {tokens.digest[:12]}, not {ordered[:12]}", Fault.WRONG_DATA)
    if vocab_size < 256**tokens.train.itemsize and tokens.largest >= vocab_size:
        raise ProtocolError(f"token {tokens.largest} of a vocabulary of {vocab_size}")
    return tokens


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator from `seed`, inside only. (`torch.manual_seed` would reseed the GPUs' too.)"""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
