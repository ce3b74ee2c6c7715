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


def learning_rate(config: TrainingConfig, step: int) -> float:
    return config.optimizer.lr * schedule(config.optimizer, step, config.rounds)


def train(learner: Learner, steps: Iterable[tuple[tuple[Range, ...], float]]) -> Iterator[Work | None]:
    """For each (ranges, learning rate) an optimizer step on the mean gradient over the ranges.

    Where a round had no good reply its ranges are empty: None, and nothing moves.
    """
    for ranges, lr in steps:
        work = compute(learner.task, learner.model, ranges)
        if work is not None:
            learner.step(work.gradient, lr)
        yield work
