"""A miner's part of a DiLoCo round: steps with an optimizer of its own, and how far they came.

    micro-batches ─▶ gradients, accumulated ─▶ mean, clipped ─▶ inner step ─▶ …        p(0) ─▶ p(1) ─▶ … ─▶ p(n)
                                                                    pseudo-gradient of each parameter: p(0) - p(n)

The optimizer, its flags and its schedule are the order's, so they are the validator's own; which of the two forms of
work an order asks for makes no difference to whoever runs it: an `InnerLoop` is used as a `work.Computation` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pilot.training.gradient import GradientAccumulator, GradientResult
from pilot.training.ranges import merge
from protocol import Fault, InnerSteps, Order, ProtocolError
from tasks import Task
from tasks.optimizer import apply_settings, from_parameters


class InnerLoop(GradientAccumulator):
    """Inner steps from the model as it is, over `inner.batches` micro-batches each; the model moves.

    Where the work ends within a step, that one is made with the mean over what there is of it.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        inner: InnerSteps,
        base: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """`base` is a copy of the parameters, by name. Without an `optimizer` a new one begins.

        Raises ProtocolError for optimizer flags that the task has not.
        """
        super().__init__(task, model)
        self.inner, self.base = inner, base
        self.config = from_parameters(task.spec().name, inner.optimizer)
        self.clip: float = getattr(self.config, "clip", 0.0)
        self.optimizer = optimizer or task.optimizer(model, self.config)
        self.steps = 0
        self._gathered: list[int] = []  # micro-batches of the step to come

    def add(self, index: int) -> None:
        """Micro-batch `index`, forward and backward; with the last one of an inner step also that."""
        super().add(index)
        self._gathered.append(index)
        if len(self._gathered) == self.inner.batches:
            self._step()

    def _step(self) -> None:
        units = sum(map(self.task.count, self._gathered))
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.div_(units)
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        step = self.inner.first_step + self.steps
        apply_settings(self.optimizer, self.task.settings(self.config, step, self.inner.steps, units))
        self.optimizer.step()
        for p in self.parameters.values():
            p.grad = None
        self.steps += 1
        self._gathered = []

    @torch.no_grad()
    def result(self) -> GradientResult:
        """The pseudo-gradient over what is done. ProtocolError where the steps led to NaN or infinity."""
        if self._gathered:
            self._step()
        gradient = {name: self.base[name] - p for name, p in self.parameters.items()}
        if not all(bool(g.isfinite().all()) for g in gradient.values()):
            self.optimizer.state.clear()  # or a kept one would never get over it
            raise ProtocolError(f"{self.steps} inner steps led to NaN or infinity", Fault.NONFINITE)
        return GradientResult(merge(self.done), gradient, self.count, self.loss / self.count)


class WorkStarter:
    """Begins a miner's orders, and keeps between them what they say shall be kept: the optimizer of inner steps."""

    def __init__(self) -> None:
        self._kept: tuple[nn.Module, object, torch.optim.Optimizer] | None = None

    def begin(
        self, order: Order, task: Task, model: nn.Module, lend: Callable[[], Mapping[str, torch.Tensor]]
    ) -> GradientAccumulator:
        """The order's work, not yet begun. `lend` copies the parameters, which inner steps move.

        Raises ProtocolError as `InnerLoop` does.
        """
        inner = order.inner_steps
        if inner is None:
            return GradientAccumulator(task, model)
        use = (order.run, dict(inner.optimizer)) if inner.keep else None
        kept = self._kept[2] if self._kept and use and self._kept[0] is model and self._kept[1] == use else None
        self._kept = None  # another's memory is this one's
        loop = InnerLoop(task, model, inner, lend(), kept)
        self._kept = (model, use, loop.optimizer) if use else None
        return loop
