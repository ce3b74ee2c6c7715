"""Error feedback at a miner: what the encoding of one gradient lost is added to the next (Seide et al. 2014).

    u = g + decay * e            is encoded: the gradient, and what is left of those before it
    e = u - decoded(payload)     once a receipt says ACCEPTED; with any other verdict e = u: the whole gradient stays

Held is u, with the payload that was made of it; an ACCEPTED takes that from it. While there is no verdict nobody knows
what is left: then a gradient is encoded plainly, and all stays as it is. u, payload and reply are in a file before the
reply can leave, verdicts in the receipts that a miner keeps anyway: so one that is killed goes on exactly.
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

PATIENCE = 4  # plain encodings in a row, after which the receipt that is awaited is given up
OPEN = 2  # rounds that a validator's restart may order again
VERDICTS = 64  # of the last orders
POLL_S = 0.05

Encoded = tuple[Buffer, Digest | None, Digest | None]  # payload, and the residual's digest before and after


@dataclass(eq=False)
class EncodedGradient:
    """What was encoded last, and is in the sum until it is accepted."""

    reply: Reply
    payload: Buffer


class ErrorFeedback:
    """One miner's, of one run at a time. `heard` may be called in any thread, all else that computes in one."""

    def __init__(
        self, residuals: ResidualStore, receipts: Callable[[], Iterable[Signed]], say: Callable[[str], None]
    ) -> None:
        """`receipts`: the last ones that were kept, oldest first."""
        self._residuals, self._receipts, self._say = residuals, receipts, say
        self._key: dict[str, Any] | None = None  # whose the sum is; None: not loaded
        self._sum: Tensors = {}  # fp32, on the CPU: u while there is something `sent`, else e
        self.sent: EncodedGradient | None = None
        self._plain = 0  # encodings since the last one with error feedback
        self._unkept = False
        self._verdicts: dict[tuple[Hotkey, Digest], bool] = {}  # accepted or not
        self._lock = threading.Lock()  # of the verdicts

    # --- receipts -----------------------------------------------------------------------------------------------------

    def heard(self, validator: Hotkey, receipt: Receipt) -> None:
        """What became of an order, as it is said first."""
        self._judge(validator, receipt.order, receipt.verdict == "ACCEPTED")

    def _judge(self, validator: Hotkey, order: Digest, accepted: bool) -> None:
        with self._lock:
            self._verdicts.setdefault((validator, order), accepted)
            if len(self._verdicts) > VERDICTS:
                del self._verdicts[next(iter(self._verdicts))]

    @property
    def _accepted(self) -> bool | None:
        """What was sent; None while there is no verdict."""
        validator = self._key["validator"] if self._key else ""
        return self._verdicts.get((validator, self.sent.reply.order)) if self.sent else None

    @property
    def awaits(self) -> bool:
        """A verdict."""
        return self.sent is not None and self._accepted is None

    async def ready(
        self, job: Job, parameters: Mapping[str, torch.Tensor], executor: TimedExecutor, handing_over_s: float
    ) -> None:
        """Before an order's gradient is encoded: the sum is there, and so is the last verdict, if it comes in time."""
        if not job.order.feedback:
            self._key, self._sum, self.sent = None, {}, None  # its memory; the file stays
            return
        await executor.run("load", 0.0, self.open, job.order, job.digest, job.owner, parameters)
        until = executor.clock() + job.patience_s(executor.clock(), handing_over_s)
        while self.awaits and self.again(job.digest) is None and not job.stopping.is_set() and executor.clock() < until:
            await asyncio.sleep(POLL_S)

    # --- the sum ------------------------------------------------------------------------------------------------------

    def open(self, order: Order, name: Digest, validator: Hotkey, parameters: Mapping[str, torch.Tensor]) -> None:
        """Make the sum the one that this order's gradient belongs to; `name` is the order's digest."""
        shapes = {tensor: tuple(p.shape) for tensor, p in parameters.items()}
        key = _key(order, validator, shapes)
        if self._key is None:
            self._load(sum(p.numel() for p in parameters.values()))
        others = [field for field in key if self._key and self._key.get(field) != key[field]]
        if not others and self.sent and self.sent.reply.round > order.round + OPEN:
            others = ["run"]  # of the same name
        if others:
            self._begin_anew(f"what is left is of another {others[0]}")
        if self._key is None:
            self._key = key
            self._sum = {tensor: torch.zeros(shape) for tensor, shape in shapes.items()}
        if self.sent and self.sent.reply.round == order.round and self.sent.reply.order != name:
            self._judge(validator, self.sent.reply.order, accepted=False)  # its place is taken: it was never applied

    def _load(self, parameters: int) -> None:
        """What an earlier process left, with the verdicts that it had heard."""
        try:
            loaded = self._residuals.load(most=8 * parameters + (8 << 20))  # sum, payload, reply and names
            if loaded is None:
                return
            header, tensors = loaded
            fields = json.loads(header)
            self.sent = EncodedGradient(Reply.parse(fields["reply"]), tensors.pop("payload").numpy().data)
            self._sum = {tensor.removeprefix("sum/"): t for tensor, t in tensors.items()}
            self._key = fields["key"]
        except (ValueError, KeyError, TypeError) as error:
            self._begin_anew(str(error))
            return
        for signed in self._receipts():
            self.heard(signed.signer, Receipt.parse(signed.body))

    def _begin_anew(self, why: str) -> None:
        self._say(f"error feedback begins anew: {why}")
        self._residuals.drop()
        self._key, self._sum, self.sent, self._plain = None, {}, None, 0

    # --- encoding -----------------------------------------------------------------------------------------------------

    def again(self, order: Digest) -> EncodedGradient | None:
        """What was encoded for this order before: it may have left then, and its gradient is in the sum already."""
        return self.sent if self.sent and self.sent.reply.order == order else None

    @torch.no_grad()
    def encode(self, codec: Codec, gradient: Tensors) -> Encoded:
        """`gradient`, fp32 on any device, is used up: no other memory is taken but the payload's, and a tensor's.

        `keep` follows. A gradient with NaN or infinity, or with more than the codec can carry, is encoded plainly too:
        the sum would never get over it.
        """
        if self.sent and self.awaits and self._plain >= PATIENCE:
            key, shapes = self._key, {name: t.shape for name, t in self._sum.items()}
            self._begin_anew(f"no receipt for round {self.sent.reply.round} came")
            self._key, self._sum = key, {name: torch.zeros(shape) for name, shape in shapes.items()}
        if self._key is None or self.awaits or not all(math.isfinite(g.sum()) for g in gradient.values()):
            self._plain += 1
            return codec.encode(gradient), None, None
        if self._accepted and self.sent:
            load_codec(self.sent.reply.codec).add(self.sent.payload, self._sum, -1.0)
            before = self.sent.reply.residual_after
        else:
            before = residual_digest(self._sum)
        self.sent = None
        decay = self._key["decay"]
        for name, g in gradient.items():
            gradient[name] = g.contiguous().add_(self._sum[name].to(g.device) * decay)
        payload = codec.encode(gradient)
        try:
            codec.check(payload, {name: u.shape for name, u in gradient.items()})
        except ProtocolError:
            for name, u in gradient.items():  # to fp32's rounding what it was; the sum is untouched
                u.sub_(self._sum[name].to(u.device) * decay)
            self._plain += 1
            return codec.encode(gradient), None, None
        for name, u in gradient.items():
            self._sum[name].copy_(u)
        codec.add(payload, gradient, -1.0)
        return payload, before, residual_digest(gradient)

    def keep(self, reply: Reply, payload: Buffer) -> None:
        """Of an encoding with digests, before anybody can have the reply: with a plain one nothing changes."""
        if reply.residual_before is None:
            return
        self.sent, self._plain = EncodedGradient(reply, payload), 0
        header = json.dumps({"key": self._key, "reply": reply.text()})
        tensors = {f"sum/{name}": t for name, t in self._sum.items()} | {"payload": _as_tensor(payload)}
        try:
            self._residuals.save(header, tensors)
            self._unkept = False
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            if not self._unkept:
                self._say("error feedback is not kept, the disk is full: after a restart it begins anew")
            self._unkept = True


def residual_digest(tensors: Mapping[str, torch.Tensor]) -> Digest:
    """Of fp32 tensors on any device: names, shapes and values, in the order of the names."""
    hasher = Hasher("residual")
    for name in sorted(tensors):
        hasher.update(f"{name} {list(tensors[name].shape)}\n".encode())
        hasher.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _key(order: Order, validator: Hotkey, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a sum is of: a gradient of anything else has no use for it."""
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
