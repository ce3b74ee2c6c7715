"""The validator's model and the only optimizer that touches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Buffer

from codec import Codec
from protocol import BlobRef, Digest, Update, Version, chain, digest
from tasks import Task
from tasks.optimizer import Settings, apply_settings
from values import Blobs


class Learner:
    """Holds the exact parameters, the optimizer and the version chain. Used live, in replay, and by the baseline."""

    def __init__(self, task: Task, config: Any, codec: Codec, device: torch.device) -> None:
        """`config` is the optimizer's, which the task knows."""
        self.task = task
        self.clip: float = getattr(config, "clip", 0.0)  # largest global L2 norm of the gradient; 0: any
        self.codec = codec
        self.model: nn.Module = task.build_model(device, initial=True)
        self.parameters = task.trainable(self.model)
        self.optimizer = task.optimizer(self.model, config)
        self.base: Version | None = None
        self.blob: Buffer = b""
        self.keep_before = False
        self.before: tuple[Digest, Buffer] | None = None  # the version before, where it is to be kept
        self.encode()

    @property
    def version(self) -> Version:
        """version(t+1) = chain(version(t), digest of the update's bytes)."""
        return chain(self.base, self.blob_digest)

    @property
    def update(self) -> Update:
        """How a miner gets to `version`: under full broadcast, by the whole state in `blob`."""
        ref = BlobRef(kind="state", digest=self.blob_digest, bytes=len(memoryview(self.blob)))
        return Update(broadcast="full", base=self.base, blob=ref)

    def step(self, gradient: Mapping[str, torch.Tensor], settings: Settings) -> None:
        """Clip, then one optimizer step. Leaves the version as it was: `advance` encodes and names the next."""
        for name, p in self.parameters.items():
            p.grad = gradient[name].to(p.device)
        if self.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
        apply_settings(self.optimizer, settings)
        self.optimizer.step()
        for p in self.parameters.values():
            p.grad = None  # its memory is the next gradient's

    def advance(self) -> None:
        """The parameters as they are now become the next version."""
        self.base = self.version
        self.encode()

    @property
    def blobs(self) -> Blobs:
        """The states that miners may ask for."""
        return {self.blob_digest: self.blob, **dict([self.before] if self.before else [])}

    def encode(self) -> None:
        state = {**self.parameters, **self.task.buffers(self.model)}
        self.before = (self.blob_digest, self.blob) if self.keep_before else None
        self.blob = b""  # its memory is the next one's
        self.blob = self.codec.encode(state)
        self.blob_digest: Digest = digest("state", self.blob)

    def state(self) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """What a snapshot holds: versions; parameters, buffers, and the optimizer's moments by parameter name."""
        tensors = self._model_state()
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        return {"base": self.base or "", "version": self.version}, tensors

    def load_state(self, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError where the snapshot is of another model; this one is then as it was."""
        self.load_tensors(tensors)
        self.base = header["base"] or None
        self.encode()
        self.before = None  # not this one's
        if self.version != header["version"]:
            raise ValueError(
                f"snapshot: its state makes version {self.version[:12]}, its header says {header['version'][:12]}"
            )

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As `load_state`, but for the version, which is left as it was."""
        own = self._model_state()
        moments = {key for key in tensors if key.startswith("optimizer/")}
        for key in sorted(own.keys() | (tensors.keys() - moments)):
            if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
                raise ValueError(f"snapshot: {key} is not as in this model")
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        self.optimizer.state.clear()
        for key in sorted(moments):
            _, moment, name = key.split("/", 2)
            p = self.parameters[name]
            self.optimizer.state[p][moment] = tensors[key].to(p.device, copy=True)

    def _model_state(self) -> dict[str, torch.Tensor]:
        """The model's own tensors, not copies, by their names in a snapshot."""
        parameters = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        return parameters | {f"buffer/{name}": b for name, b in self.task.buffers(self.model).items()}


def load_replica(task: Task, model: nn.Module, codec: Codec, blob: Buffer) -> None:
    """The miner's side of `Learner.encode`: a state into the model. ProtocolError unless exactly its tensors."""
    targets: dict[str, torch.Tensor] = {**task.trainable(model), **task.buffers(model)}
    tensors = codec.decode(blob, {name: t.shape for name, t in targets.items()})
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
