"""Bits per byte: a loss that is comparable across vocabularies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (B, T)


@dataclass(frozen=True)
class Sums:
    """Sums over an evaluation's targets: all of them, and those that stand for bytes of text."""

    nats: float
    targets: float
    text_nats: float
    text_bytes: float

    @property
    def loss(self) -> float:
        """Return the mean nats per target; NaN if there are none."""
        return self.nats / self.targets if self.targets else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Return the bits per byte; inf if there are no bytes."""
        return self.text_nats / (math.log(2) * self.text_bytes) if self.text_bytes else math.inf


@torch.no_grad()
def evaluate(
    model: Callable[..., torch.Tensor],  # model(x, y, reduction="none") -> nats, (B, T)
    batches: Iterable[Batch],
    token_bytes: NDArray[Any] | torch.Tensor | None,  # (vocab,): see Tokenizer.token_bytes; None: unknown
) -> Sums:
    """Sum the losses in fp64. Targets of -1 do not count, nor do special tokens as text. Keeps the model's mode.

    If torch.distributed is initialized, the sums are over all ranks, which evaluate batches of their own.
    """
    device = _device(model)
    exact = torch.device("cpu") if device.type == "mps" else device  # mps has no fp64
    sizes = torch.zeros(0) if token_bytes is None else torch.as_tensor(token_bytes).to(exact)
    sums = torch.zeros(4, dtype=torch.float64, device=exact)
    for inputs, targets in batches:
        nats = model(inputs.to(device), targets.to(device), reduction="none").to(exact).double()
        targets = targets.to(exact)
        counted = targets >= 0
        sums[0] += torch.where(counted, nats, 0.0).sum()
        sums[1] += counted.sum()
        if len(sizes):
            count = torch.where(counted, sizes[targets.clamp(min=0)], 0)  # bytes, (B, T)
            sums[2] += torch.where(count > 0, nats, 0.0).sum()
            sums[3] += count.sum()
    if _distributed():
        torch.distributed.all_reduce(sums)
    return Sums(*sums.tolist())


def evaluate_bpb(
    model: Callable[..., torch.Tensor], batches: Iterable[Batch], token_bytes: NDArray[Any] | torch.Tensor
) -> float:
    """Return the bits per byte of the targets that stand for bytes; inf if there are none. See `evaluate`."""
    return evaluate(model, batches, token_bytes).bits_per_byte


def own_share(batches: range) -> range:
    """Return this rank's share of what all ranks evaluate together."""
    if not _distributed():
        return batches
    return batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device(model: object) -> torch.device:
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))
