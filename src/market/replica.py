"""The model at a miner: built for an order's task, at the version that its state made it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from codec import load_codec
from market.learner import load_replica
from market.states import States
from protocol import DataSpec, Digest, Order, TaskSpec, Version
from tasks import Task, load_task
from tasks.tokens import Tokens
from values import Refused


class Replica:
    """One model and its data, kept from order to order; `states` are those received and not yet in it."""

    def __init__(self, device: torch.device, find_tokens: Callable[[DataSpec], Tokens], compiled: bool) -> None:
        self._device, self.find_tokens, self._compiled = device, find_tokens, compiled
        self.version: Version | None = None
        self.state: Digest | None = None  # that made it
        self.states = States()
        self._built: tuple[TaskSpec, Digest, Task, nn.Module] | None = None

    def prepare(self, order: Order) -> tuple[Task, nn.Module]:
        """The order's task and data, and its model at the order's version."""
        if self._built is None or self._built[:2] != (order.task, order.data.tokens.digest):
            self.version = self.state = self._built = None
            task = load_task(order.task.name).from_spec(order.task, order.data, self.find_tokens(order.data))
            model = task.build_model(self._device, initial=False)
            if self._compiled:
                model.compile()
            self._built = (order.task, order.data.tokens.digest, task, model)
        _, _, task, model = self._built
        if self.version != order.version:
            state = self.states.get(order.update.blob.digest)
            if state is None:
                raise Refused(409, "the state is gone: send the order again", missing=[order.update.blob])
            self.version = self.state = None  # neither the old one nor yet the new one
            load_replica(task, model, load_codec(order.codec_down), state)
            self.version, self.state = order.version, order.update.blob.digest
        return task, model
