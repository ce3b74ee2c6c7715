"""The model at a miner: built for an order's task, and brought to its version by what the chain says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from typing_extensions import Buffer

from pilot.codec import DENSE, load_codec
from pilot.interfaces import Refused
from pilot.training.learner import state_digest
from pilot.training.versions import UpdatePath, shortest_path
from pilot.worker.blob_inbox import BlobBuffers
from protocol import DataSpec, Digest, Fault, Order, ProtocolError, TaskSpec, Version, VersionStep
from tasks import Task, load_task
from tasks.tokens import Tokens

Tensors = dict[str, torch.Tensor]


class Replica:
    """One model and its data, kept from order to order; `states` are the states and deltas that are not yet in it."""

    def __init__(
        self,
        device: torch.device,
        find_tokens: Callable[[DataSpec], Tokens],
        compiled: bool,
        knows: Callable[[str], bool],
    ) -> None:
        """`knows` codecs by their names."""
        self._device, self.find_tokens, self._compiled, self._knows = device, find_tokens, compiled, knows
        self.version: Version | None = None
        self.states = BlobBuffers()
        self._built: tuple[TaskSpec, Digest, Task, nn.Module] | None = None
        self._base: Tensors = {}  # what of the version the work on it may move

    def prepare(self, order: Order) -> tuple[Task, nn.Module]:
        """The order's task and data, and its model at the order's version, bit for bit as the validator's replica.

        Raises Refused with what heals it, where the steps from the version that was here do not lead there; and
        ProtocolError where a whole state does not either. Then it is at no version.
        """
        if self._built is None or self._built[:2] != (order.task, order.data.tokens.digest):
            self.version = self._built = None
            self._base = {}
            task = load_task(order.task.name).from_spec(order.task, order.data, self.find_tokens(order.data))
            model = task.build_model(self._device, initial=False)
            if self._compiled:
                model.compile()
            self._built = (order.task, order.data.tokens.digest, task, model)
        _, _, task, model = self._built
        self._put_back()
        self._go(order)
        self._base = {name: b.clone() for name, b in task.buffers(model).items()}  # which forward passes move
        return task, model

    def lend(self) -> Tensors:
        """A copy of the version, for work that moves the model; the next `prepare` puts it back."""
        self._base = {name: t.clone() for name, t in self._tensors().items()}
        return self._base

    def _put_back(self) -> None:
        own = self._tensors() if self._base else {}
        for name, t in self._base.items():
            own[name].copy_(t)
        self._base = {}

    def _tensors(self) -> Tensors:
        assert self._built is not None
        _, _, task, model = self._built
        return {**{n: p.detach() for n, p in task.trainable(model).items()}, **task.buffers(model)}

    # --- versions -------------------------------------------------------------------------------------------------

    def way(self, order: Order, version: Version | None, missing: Callable[[VersionStep], int]) -> UpdatePath:
        """How to come from `version` to the order's: the shortest way by the bytes that are `missing` yet.

        Raises Refused where there is none of codecs that are known here.
        """
        way = shortest_path(order.update, version, missing, self._usable)
        if way is None:
            unknown = sorted({f"{step.kind} as {step.codec}" for step in order.update.steps if not self._usable(step)})
            why = f"cannot read a {', '.join(unknown)}" if unknown else "it begins with no whole state"
            raise Refused(400, f"no way to its version: {why}", Fault.MALFORMED)
        return way

    def _usable(self, step: VersionStep) -> bool:
        return self._knows(step.codec) and (step.kind == "delta" or step.codec in DENSE)

    def _go(self, order: Order) -> None:
        way = self.way(order, self.version, lambda step: 0 if step.digest in self.states else step.bytes)
        found = [(step, self.states.get(step.digest)) for step in way]
        if missing := [step.ref for step, data in found if data is None]:
            raise Refused(409, "what leads to its version is gone: send the order again", missing=missing)
        tensors = self._tensors()
        try:
            for step, data in found:
                self.version = None  # neither the old one nor yet the new one
                apply(step, data or b"", tensors)
            if order.state_digest and order.state_digest != state_digest(tensors):
                raise ProtocolError(f"the model is not the version {order.version[:12]} that the order proves")
        except ProtocolError as error:
            self.version = None
            if any(step.kind == "state" for step in way):
                raise
            heal = [step.ref for step in self.way(order, None, lambda step: step.bytes)]
            raise Refused(409, f"{error}; asks for a whole state", missing=heal) from None
        self.version = order.version


@torch.no_grad()
def apply(step: VersionStep, data: Buffer, into: Tensors) -> None:
    """A state in place of `into`, or a delta added to it. ProtocolError, with `into` as it was, unless it is that."""
    codec = load_codec(step.codec)
    specs = {name: t.shape for name, t in into.items()}
    if step.kind == "delta":
        codec.check(data, specs)
        codec.add(data, into)
        return
    state = codec.decode(data, specs)
    for name, target in into.items():
        target.copy_(state[name])
