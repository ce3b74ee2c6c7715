"""Hold the validator's model, the only optimizer that changes it, and the replica that miners have of it.

    exact parameters ──── step(gradient) ───▶ exact parameters
          │ − replica                               Q(d): quantised by the codec
          ▼
       advance:  d ──▶ Q(d) ──▶ update ─▶ miners
                         │ decoded: one multiplication and one addition a value, at both ends
                         ▼
                      replica

Every replica applies the same bytes by the same arithmetic, so all replicas are bit-equal. What Q lost stays in the
difference and goes into the next delta. With `--broadcast full` the whole state is sent, and the replica is the exact
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import Buffer

from pilot.codec import load_codec
from pilot.interfaces import Blobs, BlobStore, Diverged
from pilot.training.versions import MemoryBlobStore, VersionHistory
from protocol import Digest, ProtocolError, Update, Version, digest
from tasks import Task
from tasks.optimizer import Settings, apply_settings

Tensors = dict[str, torch.Tensor]

MAX_GROWTH = 10.0  # of the norm of all parameters in one step
SAFE_NORM = 1e15  # of a gradient: fp32 holds the sums of the squares of such
ADVICE = "(--optimizer.lr, --outer-lr), and go on with --resume from the last committed round"


class Learner:
    """The exact parameters, the optimizers, the replica and its versions: live, in replay and in plain training."""

    def __init__(
        self,
        task: Task,
        config: Any,
        device: torch.device,
        broadcast: str = "full",
        codec: str = "fp32",
        keep: BlobStore | None = None,
    ) -> None:
        """Build the task's model and optimizers.

        `config` is the task's optimizer's. `codec` encodes deltas, or states with `full`. `keep` stores the bytes of
        the versions; None: in memory.
        """
        self.task = task
        self.clip: float = getattr(config, "clip", 0.0)  # largest global L2 norm of the gradient; 0: any
        self.codec = codec  # may change from version to version
        self.model: nn.Module = task.build_model(device, initial=True)
        self.parameters = task.trainable(self.model)
        self.optimizer = task.optimizer(self.model, config)
        self.outer = torch.optim.SGD(self.parameters.values(), lr=0.0)  # for rounds of DiLoCo
        full = broadcast == "full"
        for name, buffer in task.buffers(self.model).items():
            if not full and not buffer.dtype.is_floating_point:
                raise ValueError(
                    f"--broadcast {broadcast}: buffer {name} holds integers, which deltas cannot carry; use full"
                )
        plain = torch.contiguous_format  # codecs add to flat memory, whatever the model's own layout
        self.replica: Tensors | None = (
            None if full else {n: t.detach().clone(memory_format=plain) for n, t in self._exact.items()}
        )
        first = codec if full else "fp32"
        # A restart may continue from the version before the newest, whose blobs must then still be stored.
        self.history = VersionHistory(keep or MemoryBlobStore(), not full, first, self._encoded(first))
        self._proof: tuple[Version, Digest] | None = None
        self._norm = self._norm_of(self.parameters.values())  # of the parameters when `check_step` last saw them

    # --- the model ------------------------------------------------------------------------------------------------

    @property
    def _exact(self) -> Tensors:
        """Return every tensor that travels: trained parameters and buffers."""
        return {**self.parameters, **self.task.buffers(self.model)}

    def step(
        self,
        gradient: Mapping[str, torch.Tensor],
        settings: Settings,
        buffers: Mapping[str, torch.Tensor] | None = None,  # None: the model has them already
    ) -> None:
        """Take one optimizer step. The version stays; `advance` makes the next.

        With an "outer_lr" among the settings the gradient is a pseudo-gradient, and the outer optimizer takes the step.
        """
        own = self.task.buffers(self.model)
        for name, buffer in (buffers or {}).items():
            own[name].copy_(buffer)
        for name, p in self.parameters.items():
            p.grad = gradient[name].to(p.device)
        if "outer_lr" in settings:
            momentum = settings["outer_momentum"]
            self.outer.param_groups[0].update(lr=settings["outer_lr"], momentum=momentum, nesterov=momentum > 0)
            self.outer.step()
        else:
            if self.clip:
                nn.utils.clip_grad_norm_(self.parameters.values(), self.clip)
            apply_settings(self.optimizer, settings)
            self.optimizer.step()
        for p in self.parameters.values():
            p.grad = None  # frees memory for the next gradient

    def check_step(self, largest: float = math.inf) -> None:
        """Raise Diverged if the last step left NaN or infinity, or parameters many times as large as before it.

        An optimizer whose moments overflowed never moves a parameter again. They are checked unless `largest`, the norm
        of the largest gradient in the step, is too small for that.
        """
        norm, before = self._norm_of(self.parameters.values()), self._norm
        states = [s for _, o in self._optimizers for s in o.state.values()] if largest > SAFE_NORM else []
        moments = [t for state in states for t in state.values() if torch.is_tensor(t)]
        if not math.isfinite(norm) or not math.isfinite(self._norm_of(moments)):
            raise Diverged(f"the model is no longer finite: lower the learning rate {ADVICE}")
        if before and norm > MAX_GROWTH * before:
            grown = f"one step took the norm of the model from {before:.4g} to {norm:.4g}"
            raise Diverged(f"{grown}: lower the learning rate {ADVICE}")
        self._norm = norm

    @staticmethod
    def _norm_of(tensors: Iterable[torch.Tensor]) -> float:
        """Return the Euclidean norm; not finite if any value is not, or its square is beyond fp32."""
        norms = [float(torch.linalg.vector_norm(t.detach(), dtype=torch.float32)) for t in tensors]
        return math.sqrt(sum(norm * norm for norm in norms))

    @contextmanager
    def replica_model(self) -> Iterator[nn.Module]:
        """Give the model with the replica's values inside the block. Tensors are swapped, not copied."""
        self._swap()
        try:
            yield self.model
        finally:
            self._swap()

    def _swap(self) -> None:
        replica = self.replica or {}
        for name, t in replica.items():
            exact = self._exact[name]
            exact.data, replica[name] = t, exact.data

    # --- versions -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Make the next version, as close to the exact parameters as the codec allows. Raises Diverged."""
        if self.replica is None:
            self.history.replace(self.version, self.codec, lambda: self._encoded(self.codec))
            return
        codec = load_codec(self.codec)
        delta = codec.encode(_Difference(self._exact, self.replica))
        try:
            codec.check(delta, {name: t.shape for name, t in self.replica.items()})
        except ProtocolError as error:  # as a version, it would make every miner fail
            raise Diverged(f"the model is no longer finite ({error}): lower the learning rate {ADVICE}") from None
        codec.add(delta, self.replica)
        self.history.extend(self.codec, delta)
        if self.history.wants_snapshot:
            self.history.add_snapshot(self._encoded("fp32"))

    def mend(self) -> None:
        """Make a snapshot for newcomers after a restart, if blobs of the newest version are missing on disk."""
        if not self.history.is_complete:
            self.history.add_snapshot(self._encoded("fp32"))

    def _encoded(self, codec: str) -> Buffer:
        """Encode the whole state that miners have."""
        return load_codec(codec).encode(self._exact if self.replica is None else self.replica)

    @property
    def version(self) -> Version:
        return self.history.version

    @property
    def base(self) -> Version | None:
        """Return the version before the newest."""
        return self.history.update.versions[-2]

    @property
    def update(self) -> Update:
        """Return the update that leads a miner to `version`."""
        return self.history.update

    @property
    def blobs(self) -> Blobs:
        """Return the blobs of the update, by digest."""
        return self.history.blobs

    def find(self, updates: Collection[Update]) -> Blobs:
        """Return the stored blobs of updates, which may be those of an earlier process's orders.

        A whole state of the newest version is made again.
        """
        if any(u.version == self.version and s.steps == len(u.steps) for u in updates for s in u.snapshots):
            self.snapshot_now()
        return {name: data for update in updates for name, data in self.history.find(update).items()}

    def snapshot_now(self) -> Update:
        """Return the update for a miner that reads only fp32: a whole state, bit-equal to what others have."""
        return self.history.with_snapshot(self._as_broadcast)

    def _as_broadcast(self) -> Buffer:
        step = self.update.steps[-1]
        if self.replica is not None or step.codec == "fp32":
            return self._encoded("fp32")
        specs = {name: t.shape for name, t in self._exact.items()}
        return load_codec("fp32").encode(load_codec(step.codec).decode(self.history.blobs[step.digest], specs))

    def state_digest(self) -> Digest | None:
        """Return the digest of `version`'s whole state, which proves a replica; None with `full`."""
        if self.replica is None:
            return None
        if self._proof is None or self._proof[0] != self.version:
            self._proof = self.version, state_digest(self.replica)
        return self._proof[1]

    # --- snapshots of the validator -------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, str], Tensors]:
        """Return a snapshot's header and tensors: parameters, buffers, replica, and optimizer moments by parameter."""
        tensors = self._model_state()
        for kind, optimizer in self._optimizers:
            for name, p in self.parameters.items():
                for key, value in optimizer.state.get(p, {}).items():
                    if value is not None:  # SGD without momentum
                        tensors[f"{kind}/{key}/{name}"] = value
        return {"version": self.version, "update": self.update.model_dump_json()}, tensors

    def load_state(self, header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a snapshot. Raises ValueError for one of another model; this model is then unchanged."""
        if "update" not in header:
            raise ValueError("its snapshot was made by an older release; finish the run with that one")
        update = Update.model_validate_json(header["update"])
        self.load_tensors(tensors)
        if self.replica is None:
            codec = update.steps[-1].codec
            self.history.replace(update.base, codec, lambda: self._encoded(codec))
        else:
            self.history.restore(update)
        if self.version != header["version"]:
            raise ValueError(
                f"snapshot: its state makes version {self.version[:12]}, its header says {header['version'][:12]}"
            )

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load a snapshot's tensors as `load_state` does, but keep the version."""
        own = self._model_state()
        moments = {key for key in tensors if key.split("/")[0] in dict(self._optimizers)}
        for key in sorted(own.keys() | (tensors.keys() - moments)):
            if key not in own or key not in tensors or own[key].shape != tensors[key].shape:
                raise ValueError(f"snapshot: {key} does not fit this model")
        for key, tensor in own.items():
            tensor.copy_(tensors[key])
        for kind, optimizer in self._optimizers:
            optimizer.state.clear()
            for key in sorted(moments):
                of, moment, name = key.split("/", 2)
                if of == kind:
                    p = self.parameters[name]
                    optimizer.state[p][moment] = tensors[key].to(p.device, copy=True)
        self._norm = self._norm_of(self.parameters.values())

    @property
    def _optimizers(self) -> tuple[tuple[str, torch.optim.Optimizer], ...]:
        return ("optimizer", self.optimizer), ("outer", self.outer)

    def _model_state(self) -> Tensors:
        """Return the model's and the replica's tensors, not copies, by their names in a snapshot."""
        parameters = {f"model/{name}": p.detach() for name, p in self.parameters.items()}
        buffers = {f"buffer/{name}": b.detach() for name, b in self.task.buffers(self.model).items()}
        return parameters | buffers | {f"replica/{name}": t for name, t in (self.replica or {}).items()}


class _Difference(Mapping[str, torch.Tensor]):
    """The differences of tensors of the same names, each computed on access: a codec holds one at a time."""

    def __init__(self, minuend: Tensors, subtrahend: Tensors) -> None:
        self._minuend, self._subtrahend = minuend, subtrahend

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._minuend[name].detach() - self._subtrahend[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._minuend)

    def __len__(self) -> int:
        return len(self._minuend)


def state_digest(tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Return the digest of a whole state in fp32, which is that of its snapshot."""
    return digest("state", load_codec("fp32").encode(tensors))
