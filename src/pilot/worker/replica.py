"""The model at a miner: built for an order's task, and brought to its version by states and deltas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

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

Tensors = dict[str, torch.Tensor]


class Replica:
    """One model and its data, kept from order to order. `blobs` are states and deltas that are not in the model yet."""

    def __init__(
        self,
        device: torch.device,
        open_blob: Callable[[TaskSpec, DataSpec, str], Path],
        compiled: bool,
        supports: Callable[[str], bool],
    ) -> None:
        """`supports` tells whether a codec of a name is known here."""
        self._device, self.open_blob, self._compiled, self._supports = device, open_blob, compiled, supports
        self.version: Version | None = None
        self.blobs = BlobBuffers()
        self._built: tuple[TaskSpec, dict[str, Digest], Task, nn.Module] | None = None
        self._saved: Tensors = {}  # copies of the version's tensors that work on it may change

    def prepare(self, order: Order) -> tuple[Task, nn.Module]:
        """Return the order's task with its data, and its model at the order's version, bitwise.

        Raises Refused with `missing` blobs if the steps from the version that was here do not lead there, and
        ProtocolError if a whole state does not either. Then the model is at no version.
        """
        if self._built is None or self._built[:2] != (order.task, order.data.digests):
            self.forget()
            open_blob = partial(self.open_blob, order.task, order.data)
            task = load_task(order.task.name).from_spec(order.task, order.data, open_blob)
            model = task.build_model(self._device, initial=False)
            if self._compiled:
                model.compile()
            self._built = (order.task, order.data.digests, task, model)
        _, _, task, model = self._built
        own = self._tensors()
        for name, t in self._saved.items():  # undo what the last order's work changed
            own[name].copy_(t)
        self._saved = {}
        self._apply_steps(order, own)
        self._saved = {name: b.clone() for name, b in task.buffers(model).items()}  # forward passes change buffers
        return task, model

    def forget(self) -> None:
        """Drop the model and its task."""
        self.version = self._built = None
        self._saved = {}

    def copy_version(self) -> Tensors:
        """Return a copy of the version, for work that changes the model; the next `prepare` restores it."""
        self._saved = {name: t.clone() for name, t in self._tensors().items()}
        return self._saved

    def _tensors(self) -> Tensors:
        assert self._built is not None
        _, _, task, model = self._built
        return {**{n: p.detach() for n, p in task.trainable(model).items()}, **task.buffers(model)}

    # --- versions -------------------------------------------------------------------------------------------------

    def path_to(self, order: Order, version: Version | None, held: Mapping[Digest, int]) -> UpdatePath:
        """Return the path from `version` to the order's version that lacks the fewest bytes, of which `held` are here.

        Raises Refused if no path has only codecs that are known here.
        """
        steps = order.update.steps
        codecs = {codec for codec in {"fp32", *(step.codec for step in steps)} if self._supports(codec)}
        path = shortest_path(order.update, version, codecs, held)
        if path is None:
            readable = {"delta": codecs, "state": codecs & {*DENSE}}
            unknown = sorted({f"{s.kind} as {s.codec}" for s in steps if s.codec not in readable[s.kind]})
            why = f"cannot read a {', '.join(unknown)}" if unknown else "it begins with no whole state"
            raise Refused(400, f"no way to its version: {why}", Fault.MALFORMED)
        return path

    def _apply_steps(self, order: Order, tensors: Tensors) -> None:
        """Bring the model's tensors to the order's version. Raises as `prepare` does."""
        path = self.path_to(order, self.version, self.blobs.sizes)
        steps = [(step, self.blobs.get(step.digest)) for step in path]
        if missing := [step.ref for step, data in steps if data is None]:
            raise Refused(409, "what leads to its version is gone: send the order again", missing=missing)
        try:
            for step, data in steps:
                self.version = None  # neither the old one nor yet the new one
                apply_step(step, data or b"", tensors)
            if order.state_digest and order.state_digest != state_digest(tensors):
                raise ProtocolError(f"the model is not the version {order.version[:12]} that the order proves")
        except ProtocolError as error:
            self.version = None
            if any(step.kind == "state" for step in path):
                raise
            missing = [step.ref for step in self.path_to(order, None, {})]
            raise Refused(409, f"{error}; asks for a whole state", missing=missing) from None
        self.version = order.version


@torch.no_grad()
def apply_step(step: VersionStep, data: Buffer, into: Tensors) -> None:
    """Replace `into` by a state, or add a delta to it. Raises ProtocolError for bad bytes; `into` is then unchanged."""
    codec = load_codec(step.codec)
    specs = {name: t.shape for name, t in into.items()}
    if step.kind == "delta":
        codec.check(data, specs)
        codec.add(data, into)
        return
    state = codec.decode(data, specs)
    for name, target in into.items():
        target.copy_(state[name])
