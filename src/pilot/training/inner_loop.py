"""A miner's part of a DiLoCo round (Douillard et al. 2023): steps with an optimizer of its own, and their sum.

    micro-batches ─▶ gradients, accumulated ─▶ mean, clipped ─▶ inner step ─▶ …        p(0) ─▶ p(1) ─▶ … ─▶ p(n)
                                                                    pseudo-gradient of each parameter: p(0) - p(n)

The optimizer, its flags and its schedule are the order's, and so the validator's. An `InnerLoop` is used like any
`GradientAccumulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pilot.training.gradient import GradientAccumulator, GradientResult
from pilot.training.ranges import merge
from protocol import Fault, InnerSteps, Order, ProtocolError
from tasks import Task
from tasks.optimizer import apply_settings, optimizer_from_order


class InnerLoop(GradientAccumulator):
    """Inner steps over `inner.batches` micro-batches each, which change the model.

    If the work ends within a step, that step is made with the mean over its micro-batches so far.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        inner: InnerSteps,
        base: Mapping[str, torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """`base` is a copy of the parameters, by name. Without an `optimizer` a new one is made.

        Raises ProtocolError for optimizer flags that the task does not have.
        """
        super().__init__(task, model)
        self.inner, self.base = inner, base
        self.config = optimizer_from_order(task.spec().name, task.Optimizer, inner.optimizer)
        self.clip: float = getattr(self.config, "clip", 0.0)
        self.optimizer = optimizer or task.optimizer(model, self.config)
        self.steps = 0
        self._accumulated: list[int] = []  # micro-batches of the next step

    def add(self, index: int) -> None:
        """Add the gradient of micro-batch `index`; after the last one of an inner step, make the step."""
        super().add(index)
        self._accumulated.append(index)
        if len(self._accumulated) == self.inner.batches:
            self._step()

    def _step(self) -> None:
        units = sum(map(self.task.count, self._accumulated))
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
        self._accumulated = []

    @torch.no_grad()
    def result(self) -> GradientResult:
        """Return the pseudo-gradient over what is done. Raises ProtocolError if the steps led to NaN or infinity."""
        if self._accumulated:
            self._step()
        gradient = {name: self.base[name] - p for name, p in self.parameters.items()}
        if not all(bool(g.isfinite().all()) for g in gradient.values()):
            self.optimizer.state.clear()  # the next order might reuse it
            raise ProtocolError(f"{self.steps} inner steps led to NaN or infinity", Fault.NONFINITE)
        buffers = self.task.buffers(self.model)
        return GradientResult(merge(self.done), gradient, self.count, self.loss / self.count, buffers)


class AccumulatorFactory:
    """Makes the gradient accumulator of each order, and keeps the inner optimizer between orders that say so."""

    def __init__(self) -> None:
        self._kept: tuple[nn.Module, object, torch.optim.Optimizer] | None = None

    def create(
        self, order: Order, task: Task, model: nn.Module, copy_parameters: Callable[[], Mapping[str, torch.Tensor]]
    ) -> GradientAccumulator:
        """Return the accumulator for an order. `copy_parameters` is called if inner steps will change the model.

        Raises ProtocolError as `InnerLoop` does.
        """
        inner = order.inner_steps
        if inner is None:
            return GradientAccumulator(task, model)
        use = (order.run, dict(inner.optimizer)) if inner.keep else None
        kept = self._kept[2] if self._kept and use and self._kept[0] is model and self._kept[1] == use else None
        self._kept = None  # frees its memory for a new one
        loop = InnerLoop(task, model, inner, copy_parameters(), kept)
        self._kept = (model, use, loop.optimizer) if use else None
        return loop
