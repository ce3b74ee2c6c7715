"""Compute gradients, for miners and plain training alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pilot.interfaces import Diverged
from pilot.training.ranges import indices, merge
from protocol import Range
from tasks import Batch, Task


@dataclass(frozen=True)
class GradientResult:
    """The mean gradient over `done`, or after inner steps the pseudo-gradient (pilot.training.inner_loop)."""

    done: tuple[Range, ...]
    gradient: dict[str, torch.Tensor]  # fp32, by parameter name, on the model's device
    count: int  # examples or tokens in `done`
    loss: float  # mean over them
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)  # the model's, as the forward passes left them


class GradientAccumulator:
    """The sum of the task's gradients, one micro-batch at a time. The result can be taken after any of them."""

    def __init__(self, task: Task, model: nn.Module, batch: Callable[[int], Batch] | None = None) -> None:
        """`batch` gives the batches if they are prepared elsewhere; None: the task makes them."""
        self.task, self.model, self.batch = task, model, batch or task.batch
        self.parameters = task.trainable(model)
        for p in self.parameters.values():
            p.grad = None
        self.done: list[Range] = []
        self.count, self.loss = 0, 0.0

    def add(self, index: int) -> None:
        """Add the gradient of micro-batch `index`."""
        batch_loss = self.task.loss(self.model, self.batch(index))
        batch_loss.backward()  # type: ignore[no-untyped-call]
        self.loss += float(batch_loss.detach())
        self.count += self.task.count(index)
        self.done.append(Range(index, index + 1))

    def result(self) -> GradientResult:
        """Return the mean over the micro-batches that were added, of which there must be one."""
        gradient = {}
        for name, p in self.parameters.items():
            gradient[name] = torch.zeros_like(p) if p.grad is None else p.grad.div_(self.count)
        buffers = self.task.buffers(self.model)
        return GradientResult(merge(self.done), gradient, self.count, self.loss / self.count, buffers)


def compute(
    task: Task, model: nn.Module, ranges: Sequence[Range], *, batch: Callable[[int], Batch] | None = None
) -> GradientResult | None:
    """Return the mean gradient over all of the ranges; None if they are empty."""
    accumulator = GradientAccumulator(task, model, batch)
    for index in indices(ranges):
        accumulator.add(index)
    return accumulator.result() if accumulator.done else None


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise Diverged if one of the tensors holds NaN or infinity."""
    norms = {
        name: torch.linalg.vector_norm(tensor.detach(), math.inf)  # as much work as a read: nothing is written
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    if not norms:
        return
    device = next(iter(norms.values())).device
    finite = torch.stack([norm.to(device, torch.float32) for norm in norms.values()]).isfinite().tolist()
    for name, good in zip(norms, finite, strict=True):
        if not good:
            raise Diverged(f"{what} is no longer finite ({name})")
