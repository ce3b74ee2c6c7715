"""Compute: the one function that the miner, the baseline and a later audit share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from market.cursor import indices, merge
from protocol import Range
from tasks import Batch, Task


@dataclass(frozen=True)
class Work:
    """What was computed: the mean gradient over `done`, weighted by its count of examples or tokens."""

    done: tuple[Range, ...]
    gradient: dict[str, torch.Tensor]  # fp32, by parameter name, on the model's device
    count: int  # examples or tokens in `done`
    loss: float  # mean over them


def compute(
    task: Task,
    model: nn.Module,
    ranges: Sequence[Range],
    *,
    should_stop: Callable[[float], bool] = lambda slowest_s: False,
    on_batch: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    batch: Callable[[int], Batch] | None = None,
) -> Work | None:
    """The gradient of the task's loss on the ranges, micro-batch by micro-batch.

    Before each one `should_stop` is told how long the slowest so far took, in seconds; what is done by then is
    returned, None where that is nothing. `batch` may give the task's batches, made ahead. The sum is divided at the
    end, so that partial work is a mean over it.
    """
    parameters = task.trainable(model)
    for p in parameters.values():
        p.grad = None
    done: list[Range] = []
    count, loss, slowest_s = 0, 0.0, 0.0
    for index in indices(ranges):
        if should_stop(slowest_s):
            break
        began = clock()
        batch_loss = task.loss(model, (batch or task.batch)(index))
        batch_loss.backward()  # type: ignore[no-untyped-call]
        loss += float(batch_loss.detach())
        count += task.count(index)
        done.append(Range(index, index + 1))
        slowest_s = max(slowest_s, clock() - began)
        on_batch()
    if not done:
        return None
    gradient = {}
    for name, p in parameters.items():
        gradient[name] = torch.zeros_like(p) if p.grad is None else p.grad.div_(count)
    return Work(merge(done), gradient, count, loss / count)
