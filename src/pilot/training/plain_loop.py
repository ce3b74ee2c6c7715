"""Train plainly in one process, with the same task, optimizer, schedule and indices as a marketplace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from pilot.interfaces import Diverged
from pilot.training.gradient import GradientResult, check_finite, compute
from pilot.training.learner import Learner
from protocol import Range
from tasks import Batch
from tasks.optimizer import Settings


def train(
    learner: Learner,
    steps: Iterable[tuple[tuple[Range, ...], Settings]],
    combine: Callable[[GradientResult], GradientResult] = lambda work: work,
    batch: Callable[[int], Batch] | None = None,
) -> Iterator[GradientResult | None]:
    """Take an optimizer step for each (ranges, settings), on the mean gradient over the ranges.

    Yield the work of each step. A round without a good reply has empty ranges: it yields None and takes no step.
    `combine` merges the work of several ranks; `batch` returns the task's batches.
    """
    for ranges, settings in steps:
        work = compute(learner.task, learner.model, ranges, batch=batch)
        if work is not None:
            work = combine(work)
            if not math.isfinite(work.loss):
                raise Diverged(f"the loss is {work.loss}")
            check_finite("the gradient", work.gradient)
            learner.step(work.gradient, settings)
        yield work
