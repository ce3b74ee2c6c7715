"""Compute: what the miner, the baseline and a later audit share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pilot.training.ranges import indices, merge
from protocol import Range
from tasks import Batch, Task


@dataclass(frozen=True)
class GradientResult:
    """What was computed: the mean gradient over `done`, weighted by its count of examples or tokens.

    Or, where there were inner steps over `done`, the pseudo-gradient: see `pilot.training.inner_loop`.
    """

    done: tuple[Range, ...]
    gradient: dict[str, torch.Tensor]  # fp32, by parameter name, on the model's device
    count: int  # examples or tokens in `done`
    loss: float  # mean over them


class GradientAccumulator:
    """The sum of the task's gradients, one micro-batch at a time; what is done can be taken at any moment between two.

    `batch` may give the task's batches, made ahead.
    """

    def __init__(self, task: Task, model: nn.Module, batch: Callable[[int], Batch] | None = None) -> None:
        self.task, self.model, self.batch = task, model, batch or task.batch
        self.parameters = task.trainable(model)
        for p in self.parameters.values():
            p.grad = None
        self.done: list[Range] = []
        self.count, self.loss = 0, 0.0

    def add(self, index: int) -> None:
        """Micro-batch `index`, forward and backward."""
        batch_loss = self.task.loss(self.model, self.batch(index))
        batch_loss.backward()  # type: ignore[no-untyped-call]
        self.loss += float(batch_loss.detach())
        self.count += self.task.count(index)
        self.done.append(Range(index, index + 1))

    def result(self) -> GradientResult:
        """The mean over what is done, which must not be nothing: so partial work is a mean over it."""
        gradient = {}
        for name, p in self.parameters.items():
            gradient[name] = torch.zeros_like(p) if p.grad is None else p.grad.div_(self.count)
        return GradientResult(merge(self.done), gradient, self.count, self.loss / self.count)


def compute(
    task: Task, model: nn.Module, ranges: Sequence[Range], *, batch: Callable[[int], Batch] | None = None
) -> GradientResult | None:
    """The gradient of the task's loss on all of the ranges; None where they are empty."""
    computation = GradientAccumulator(task, model, batch)
    for index in indices(ranges):
        computation.add(index)
    return computation.result() if computation.done else None
