"""Error feedback at a miner: add what the encoding of one gradient lost to the next (Seide et al. 2014).

    u = g + decay * e            is encoded: the gradient, and what is left of those before it
    e = u - decoded(payload)     after a receipt with ACCEPTED; after any other verdict e = u: all of it is left

The miner holds u and the payload that was made of it, and subtracts the payload when the receipt says ACCEPTED. As long
as there is no verdict, e is unknown: gradients are then encoded without feedback, and u stays. u, payload and reply are
written to a file before the reply can leave, and verdicts are in the receipts that a miner keeps, so a miner that is
killed goes on exactly where it was.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import Buffer

from pilot.codec import Codec, load_codec
from pilot.common.files import NO_SPACE
from pilot.interfaces import ResidualStore
from protocol import Digest, Hasher, Hotkey, Order, ProtocolError, Receipt, Reply, Signed, digest

if TYPE_CHECKING:
    from pilot.codec import Tensors
    from pilot.training.executor import TimedExecutor
    from pilot.worker.job import Job

MAX_PLAIN = 4  # encodings without feedback in a row; then the receipt that is awaited is given up
REPEATED_ROUNDS = 2  # rounds that a validator may order again after a restart
KEPT_VERDICTS = 64
POLL_S = 0.05

Encoded = tuple[Buffer, Digest | None, Digest | None]  # payload, and the residual's digest before and after


@dataclass(eq=False)
class EncodedGradient:
    """The last gradient with feedback. The residual still contains it until it is accepted."""

    reply: Reply
    payload: Buffer


class ErrorFeedback:
    """A miner's residual, for one run at a time. Only `record_receipt` may be called from any thread."""

    def __init__(
        self, residuals: ResidualStore, receipts: Callable[[], Iterable[Signed]], say: Callable[[str], None]
    ) -> None:
        """`receipts` returns the last ones that were kept, oldest first."""
        self._residuals, self._receipts, self._say = residuals, receipts, say
        self._key: dict[str, Any] | None = None  # what the residual belongs to; None: not loaded
        self._sum: Tensors = {}  # fp32, on the CPU: u as long as there is a `_last`, otherwise e
        self._last: EncodedGradient | None = None
        self._plain = 0  # encodings since the last one with feedback
        self._save_failed = False
        self._verdicts: dict[tuple[Hotkey, Digest], bool] = {}  # accepted or not
        self._lock = threading.Lock()  # guards the verdicts

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def record_receipt(self, validator: Hotkey, receipt: Receipt) -> None:
        """Note the verdict on an order; of two, the first holds."""
        self._record_verdict(validator, receipt.order, receipt.verdict == "ACCEPTED")

    def _record_verdict(self, validator: Hotkey, order: Digest, accepted: bool) -> None:
        with self._lock:
            self._verdicts.setdefault((validator, order), accepted)
            if len(self._verdicts) > KEPT_VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]

    @property
    def _accepted(self) -> bool | None:
        """Whether the last gradient was accepted; None if there is no verdict, or no such gradient."""
        validator = self._key["validator"] if self._key else ""
        return self._verdicts.get((validator, self._last.reply.order)) if self._last else None

    @property
    def _awaits_verdict(self) -> bool:
        return self._last is not None and self._accepted is None

    async def wait_for_verdict(
        self, job: Job, parameters: Mapping[str, torch.Tensor], executor: TimedExecutor, handover_s: float
    ) -> None:
        """Load the residual before a job's gradient is encoded, and wait for the last verdict if there is time."""
        if not job.order.feedback:
            self.forget()
            return
        await executor.run("load", 0.0, self.load, job.order, job.digest, job.owner, parameters)
        until = executor.clock() + job.wait_s(executor.clock(), handover_s)
        while (
            self._awaits_verdict
            and self.find_encoded(job.digest) is None
            and not job.stopping.is_set()
            and executor.clock() < until
        ):
            await asyncio.sleep(POLL_S)

    def forget(self) -> None:
        """Free the memory. The file stays, and is read again for the next gradient with feedback."""
        self._key, self._sum, self._last = None, {}, None

    # --- the residual -------------------------------------------------------------------------------------------------

    def load(
        self, order: Order, order_digest: Digest, validator: Hotkey, parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Load the residual that belongs to this order's gradient, or start a new one."""
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        key = _key(order, validator, shapes)
        if self._key is None:
            self._read_file(sum(p.numel() for p in parameters.values()))
        differing = [field for field in key if self._key and self._key.get(field) != key[field]]
        if not differing and self._last and self._last.reply.round > order.round + REPEATED_ROUNDS:
            differing = ["run"]  # of the same name
        if differing:
            self._start_over(f"the residual is of another {differing[0]}")
        if self._key is None:
            self._key = key
            self._sum = {name: torch.zeros(shape) for name, shape in shapes.items()}
        if self._last and self._last.reply.round == order.round and self._last.reply.order != order_digest:
            # This order replaces the last one, whose gradient was therefore never applied.
            self._record_verdict(validator, self._last.reply.order, accepted=False)

    def _read_file(self, parameters: int) -> None:
        """Read what an earlier process saved, and the verdicts that it received."""
        try:
            loaded = self._residuals.load(most=8 * parameters + (8 << 20))  # residual, payload, reply and names
            if loaded is None:
                return
            header, tensors = loaded
            fields = json.loads(header)
            self._last = EncodedGradient(Reply.parse(fields["reply"]), tensors.pop("payload").numpy().data)
            self._sum = {name.removeprefix("sum/"): t for name, t in tensors.items()}
            self._key = fields["key"]
        except (ValueError, KeyError, TypeError) as error:
            self._start_over(str(error))
            return
        for signed in self._receipts():
            self.record_receipt(signed.signer, Receipt.parse(signed.body))

    def _start_over(self, why: str) -> None:
        self._say(f"error feedback starts over: {why}")
        self._residuals.drop()
        self._key, self._sum, self._last, self._plain = None, {}, None, 0

    # --- encoding -----------------------------------------------------------------------------------------------------

    def find_encoded(self, order: Digest) -> EncodedGradient | None:
        """Return what was encoded for this order before: it may have left already, and the residual contains it."""
        return self._last if self._last and self._last.reply.order == order else None

    @torch.no_grad()
    def encode(self, codec: Codec, gradient: Tensors) -> Encoded:
        """Encode a gradient (fp32, on any device), whose memory is used up; the caller saves the reply with `save`.

        It takes no further memory but the payload and one tensor. A gradient with NaN or infinity, or with values that
        the codec cannot carry, is encoded without feedback: it would spoil the residual for good.
        """
        if self._last and self._awaits_verdict and self._plain >= MAX_PLAIN:
            key, shapes = self._key, {name: t.shape for name, t in self._sum.items()}
            self._start_over(f"no receipt for round {self._last.reply.round} came")
            self._key, self._sum = key, {name: torch.zeros(shape) for name, shape in shapes.items()}
        if self._key is None or self._awaits_verdict or not all(math.isfinite(g.sum()) for g in gradient.values()):
            self._plain += 1
            return codec.encode(gradient), None, None
        if self._accepted and self._last:
            load_codec(self._last.reply.codec).add(self._last.payload, self._sum, -1.0)
            before = self._last.reply.residual_after
        else:
            before = residual_digest(self._sum)
        self._last = None
        decay = self._key["decay"]
        for name, g in gradient.items():
            gradient[name] = g.contiguous().add_(self._sum[name].to(g.device) * decay)
        payload = codec.encode(gradient)
        try:
            codec.check(payload, {name: u.shape for name, u in gradient.items()})
        except ProtocolError:
            for name, u in gradient.items():  # restores the gradient, up to fp32's rounding
                u.sub_(self._sum[name].to(u.device) * decay)
            self._plain += 1
            return codec.encode(gradient), None, None
        for name, u in gradient.items():
            self._sum[name].copy_(u)
        codec.add(payload, gradient, -1.0)
        return payload, before, residual_digest(gradient)

    def save(self, reply: Reply, payload: Buffer) -> None:
        """Keep a gradient that was encoded with feedback, before its reply can leave."""
        if reply.residual_before is None:
            return
        self._last, self._plain = EncodedGradient(reply, payload), 0
        header = json.dumps({"key": self._key, "reply": reply.text()})
        tensors = {f"sum/{name}": t for name, t in self._sum.items()} | {"payload": _as_tensor(payload)}
        try:
            self._residuals.save(header, tensors)
            self._save_failed = False
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if not self._save_failed:
                self._say("the disk is full, so error feedback is not saved: after a restart it starts over")
            self._save_failed = True


def residual_digest(tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Return the digest of fp32 tensors on any device: names, shapes and values, in the order of the names."""
    hasher = Hasher("residual")
    for name in sorted(tensors):
        hasher.update(f"{name} {list(tensors[name].shape)}\n".encode())
        hasher.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _key(order: Order, validator: Hotkey, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what a residual belongs to: it may only be added to a gradient of the same."""
    return {
        "validator": validator,
        "run": order.run,
        "task": digest("task", order.task.model_dump_json().encode()),
        "model": digest("shapes", json.dumps(sorted(shapes.items())).encode()),
        "mode": "diloco" if order.inner_steps else "gradient",
        "codec": order.codec_up,
        "decay": order.feedback,
    }


def _as_tensor(payload: Buffer) -> torch.Tensor:
    data = memoryview(payload).cast("B")
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
