"""Plain training: the same task, optimizer, schedule and indices in one process, to compare a marketplace with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from codec import load_codec
from market.config import TrainingConfig
from market.learner import Learner
from market.work import Work, compute
from protocol import Range
from tasks import Task
from tasks.optimizer import schedule


def new_learner(config: TrainingConfig, task: Task, device: torch.device) -> Learner:
    """The model and optimizer that a validator with the same flags would start from."""
    return Learner(task, config.optimizer, load_codec("fp32"), device)


def train(config: TrainingConfig, learner: Learner, steps: Iterable[tuple[Range, ...]]) -> Iterator[Work]:
    """An optimizer step for each element of `steps`, on the mean gradient over its ranges.

    Where a round had no good reply, and so an element is empty, nothing is computed and nothing moves.
    """
    for step, ranges in enumerate(steps):
        work = compute(learner.task, learner.model, ranges)
        if work is not None:
            learner.step(work.gradient, config.optimizer.lr * schedule(config.optimizer, step, config.rounds))
            yield work
