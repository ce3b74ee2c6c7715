"""Plan DiLoCo: the rounds with inner steps, the step that a round begins with, and what its orders say.

    rounds   0 … warmup_rounds - 1        each a gradient round: one step of the validator's own optimizer
             warmup_rounds … rounds - 1   each `tau` inner steps at every miner, then one outer step

One schedule goes over all of these steps, so that the learning rate does not jump where the inner steps begin. The
method and its outer optimizer, SGD with Nesterov momentum: Douillard et al. 2023, arXiv 2311.08105.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pilot.training.ranges import indices, merge
from protocol import InnerSteps, Range

if TYPE_CHECKING:
    from tasks import Task
    from tasks.optimizer import Settings


@dataclass(frozen=True)
class DiLoCo:
    """The plan of a run in `--mode diloco`."""

    tau: int  # inner steps of a round
    batches: int  # micro-batches of an inner step
    outer_lr: float
    momentum: float  # Nesterov's, of the outer steps; 0: plain SGD
    keep: bool  # the miners' optimizers go on from round to round
    warmup_rounds: int  # gradient rounds, which come first
    rounds: int  # rounds in the whole run
    optimizer: Mapping[str, int | float] = field(default_factory=dict)  # the flags of the miners' optimizers

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.step(self.rounds)

    def inner(self, round: int) -> bool:
        """Return whether miners make inner steps in this round."""
        return round >= self.warmup_rounds

    def step(self, round: int) -> int:
        """Return the steps of the run before this round."""
        return min(round, self.warmup_rounds) + self.tau * max(0, round - self.warmup_rounds)

    def ordered(self, round: int) -> InnerSteps | None:
        """Return the inner steps that the round's orders name; None in a gradient round."""
        if not self.inner(round):
            return None
        return InnerSteps(
            batches=self.batches,
            first_step=self.step(round),
            steps=self.steps,
            keep=self.keep,
            optimizer=dict(self.optimizer),
        )


def warmup_rounds(warmup: float, rounds: int, tau: int) -> int:
    """Return the gradient rounds G that do the first `warmup` of all micro-batches: G = warmup (G + (rounds - G) tau).

    At least one of the rounds is left to DiLoCo.
    """
    return max(0, min(round(warmup * rounds * tau / (1 - warmup + warmup * tau)), rounds - 1))


def round_settings(diloco: DiLoCo | None, task: Task, config: Any, rounds: int) -> Callable[[int, int], Settings]:
    """Return a function of round and units that gives the settings of the validator's step."""

    def settings(round: int, units: int) -> Settings:
        if diloco is None:
            return task.settings(config, round, rounds, units)
        if diloco.inner(round):
            return {"outer_lr": diloco.outer_lr, "outer_momentum": diloco.momentum}
        return task.settings(config, diloco.step(round), diloco.steps, units)

    return settings


def plain_steps(
    diloco: DiLoCo | None, task: Task, config: Any, round: int, done: Sequence[Sequence[Range]], settings: Settings
) -> list[tuple[tuple[Range, ...], Settings]]:
    """Return the ranges and settings of plain training's steps for a round; `done` has each miner's part.

    A gradient round is one step, by its own `settings`. Where there were inner steps the k-th ones of all miners are
    one step.
    """
    if diloco is None or "outer_lr" not in settings:
        return [(merge(r for ranges in done for r in ranges), settings)]
    parts, first = [list(indices(ranges)) for ranges in done], diloco.step(round)
    steps: list[tuple[tuple[Range, ...], Settings]] = []
    for start in range(0, max(map(len, parts), default=0), diloco.batches):
        together = sorted(i for part in parts for i in part[start : start + diloco.batches])
        own = task.settings(config, first + len(steps), diloco.steps, sum(map(task.count, together)))
        steps.append((merge(Range(i, i + 1) for i in together), own))
    return steps
