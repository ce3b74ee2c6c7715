"""The whole round, in order. `Market.play` is the marketplace in one screen; the rest of the file is its steps.

    plan        ranges from the one cursor, an order a miner: durable before it is sent
    broadcast   orders out; a miner that lacks the version's state or the data says so and gets them
    collect     replies and payloads until all are in or the deadline; each verified as it arrives
    aggregate   accepted contributions → one gradient, in the order of the hotkeys
    step        the only optimizer; the next version of the model
    score       evidence → scores → weights; a signed receipt for each order
    commit      one ledger transaction, then the receipts go out

The next round's orders leave before this round's commit is on disk (its miners need not wait for a disk), so a restart
may find two rounds open: it finishes the first from what was received, which makes the same version, and the second's
orders hold unchanged. Receipts and weights wait for the commit.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from typing_extensions import Buffer

from aggregation import Aggregator
from codec import Codec
from market.cursor import Cursor, indices, size, subtract
from market.learner import Learner
from market.verify import Contribution, verify
from protocol import Fault, Hotkey, Message, Order, ProtocolError, Range, Receipt, Signed, Stop
from ranking import Evidence, Ranker
from tasks import Task
from tasks.optimizer import Settings, kept_settings
from values import Blobs, Faulted, Received, RoundRecord

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Network(Protocol):
    """The wire as a round needs it: HTTP (transport.dendrite), or in one process under a virtual clock (loopback)."""

    def now(self) -> float: ...
    def seal(self, message: Message) -> Signed: ...
    def peers(self) -> tuple[Hotkey, ...]: ...
    async def wait_for_peer(self, timeout_s: float) -> bool: ...
    async def exchange(self, order: Order, signed: Signed, blobs: Blobs, path: Path, largest: int) -> Received: ...
    async def tell(self, hotkey: Hotkey, signed: Signed) -> bool: ...


class Store(Protocol):
    """What is kept (records.store): every call returns when it is durable."""

    def open_round(self, round: int, orders: Sequence[Signed]) -> None: ...
    def orders(self, round: int) -> tuple[Signed, ...]: ...
    def payload_path(self, round: int, hotkey: Hotkey) -> Path: ...
    def payload(self, round: int, hotkey: Hotkey) -> Buffer: ...
    def seal(self, received: Received) -> None: ...
    def received(self, round: int) -> tuple[Received, ...]: ...
    def commit(self, record: RoundRecord) -> None: ...
    def committed(self, since: int) -> Sequence[RoundRecord]: ...
    def head(self) -> RoundRecord | None: ...


@dataclass(frozen=True)
class Terms:
    """What every order of a run says, and how long the validator is patient."""

    run: str
    batches: int  # micro-batches a miner and round
    deadline_s: float
    patience: int  # rounds in a row without a good reply
    codec_up: str
    codec_down: str


@dataclass(frozen=True)
class Delivery:
    """A verified contribution, and the reply that brought it."""

    received: Received
    contribution: Contribution


@dataclass
class Opened:
    """A round under way."""

    round: int
    started: float
    orders: dict[Hotkey, Order]
    signed: dict[Hotkey, Signed]
    exchanges: dict[Hotkey, asyncio.Task[Delivery | Faulted]] = field(default_factory=dict)
    sealing: list[asyncio.Future[None]] = field(default_factory=list)
    last: Received | None = None  # the reply that came when no other was awaited: sealed when nobody waits for the disk


class Market:
    """The validator's side of the rounds: state is the learner, the cursor, the ranker and the round's number."""

    def __init__(
        self,
        terms: Terms,
        task: Task,
        learner: Learner,
        network: Network,
        store: Store,
        ranker: Ranker,
        aggregate: Aggregator,
        codec: Codec,
        settings: Callable[[int], Settings],
        worker: Executor | None = None,
    ) -> None:
        self.terms, self.task, self.learner, self.network, self.store = terms, task, learner, network, store
        self.ranker, self.aggregate, self.codec, self.settings = ranker, aggregate, codec, settings
        self.worker = worker  # one thread for everything that computes on tensors
        self.round = 0
        self.empty_rounds = 0
        self.cursor = Cursor()
        self.specs = {name: p.shape for name, p in task.trainable(learner.model).items()}
        self.largest = codec.largest(self.specs)  # bytes of a payload
        self.blobs = task.blobs()
        self.before_step: asyncio.Future[object] | None = None  # a snapshot still being written from the parameters

    # --- a round --------------------------------------------------------------------------------------------------

    async def play(self, opened: Opened, *, last: bool) -> Opened | None:
        """Finish an open round, down to its commit. Returns the next one, already open, unless this is the last."""
        outcomes = await self._collect(opened)
        collected = self.network.now()
        accepted = [o.contribution for _, o in sorted(outcomes.items()) if isinstance(o, Delivery)]
        settings = self.settings(opened.round)
        await self._learn(accepted, settings)
        seconds = {"collect_s": collected - opened.started, "learn_s": self.network.now() - collected}
        record = self._score(opened, outcomes, {**settings, **seconds})
        self.round = opened.round + 1
        self.empty_rounds = 0 if accepted else self.empty_rounds + 1
        more = not (last or self.out_of_patience)
        early = await self.open() if more and self.network.peers() else None  # nobody there: there is time to commit
        await self._commit(opened, record)
        await self._announce(record)
        return early or (await self.open() if more else None)

    @property
    def out_of_patience(self) -> bool:
        return self.empty_rounds >= self.terms.patience

    async def open(self) -> Opened:
        """Plan and broadcast: orders of this round that are on disk already are sent again, unchanged."""
        orders = self._standing_orders() or await self._plan()
        opened = Opened(
            round=self.round,
            started=self.network.now(),
            orders={order.hotkey: order for order, _ in orders},
            signed={order.hotkey: signed for order, signed in orders},
        )
        _, self.cursor = self.cursor.take(sum(size(order.ranges) for order, _ in orders))
        received = {r.reply.hotkey: r for r in await asyncio.to_thread(self.store.received, self.round)}
        for hotkey in opened.orders:
            exchange = self._exchange(opened, hotkey, received.get(hotkey))
            opened.exchanges[hotkey] = asyncio.create_task(exchange)
        return opened

    def _standing_orders(self) -> list[tuple[Order, Signed]]:
        """This round's orders as a killed validator left them, if they are for the version that we hold."""
        standing = [(Order.parse(s.body), s) for s in self.store.orders(self.round)]
        return [(order, s) for order, s in standing if order.version == self.learner.version]

    async def _plan(self) -> list[tuple[Order, Signed]]:
        """1. Disjoint ranges for every miner that is there, as durable orders. None at all if nobody comes in time."""
        if not self.network.peers():
            await self.network.wait_for_peer(self.terms.deadline_s)
        planned: list[tuple[Order, Signed]] = []
        cursor = self.cursor
        for hotkey in sorted(self.network.peers()):
            ranges, cursor = cursor.take(self.terms.batches)
            order = self._order(hotkey, ranges)
            planned.append((order, self.network.seal(order)))
            logger.debug("round %d: %s gets %s on %s", self.round, hotkey[:8], list(ranges), order.version[:12])
        await asyncio.to_thread(self.store.open_round, self.round, [signed for _, signed in planned])
        return planned

    def _order(self, hotkey: Hotkey, ranges: tuple[Range, ...]) -> Order:
        return Order(
            run=self.terms.run,
            round=self.round,
            hotkey=hotkey,
            version=self.learner.version,
            update=self.learner.update,
            state_digest=None,
            task=self.task.spec(),
            data=self.task.data_spec,
            ranges=ranges,
            deadline_s=self.terms.deadline_s,
            staleness=0,
            codec_up=self.terms.codec_up,
            codec_down=self.terms.codec_down,
        )

    async def _exchange(self, opened: Opened, hotkey: Hotkey, received: Received | None) -> Delivery | Faulted:
        """2 to 4. One miner's part: order out, reply and payload in, verified. A fault is an outcome, not an error."""
        order, signed = opened.orders[hotkey], opened.signed[hotkey]
        try:
            if received is None or received.reply.order != signed.digest:
                path = await asyncio.to_thread(self.store.payload_path, opened.round, hotkey)
                blobs = {**self.blobs, self.learner.blob_digest: self.learner.blob}
                received = await self.network.exchange(order, signed, blobs, path, self.largest)
                if all(task.done() for other, task in opened.exchanges.items() if other != hotkey):
                    opened.last = received
                else:
                    opened.sealing.append(self._seal(received))
            arrived = self.network.now()
            contribution = await self._compute(self._verify, order, received)
            logger.debug(
                "round %d: %s sent %d bytes after %.3f s, norm %.4g, verified in %.3f s",
                *(opened.round, hotkey[:8], received.reply.payload_bytes, arrived - opened.started),
                *(contribution.norm, self.network.now() - arrived),
            )
            return Delivery(received, contribution)
        except ProtocolError as error:
            return Faulted(error.fault, str(error))
        except Faulted as fault:
            return fault

    def _verify(self, order: Order, received: Received) -> Contribution:
        payload = self.store.payload(order.round, order.hotkey)
        return verify(order, received.reply, payload, codec=self.codec, specs=self.specs, count=self.task.count)

    async def _collect(self, opened: Opened) -> dict[Hotkey, Delivery | Faulted]:
        """3. Every exchange ends by itself: with a reply, a fault, or its deadline."""
        return dict(zip(opened.exchanges, await asyncio.gather(*opened.exchanges.values()), strict=True))

    async def _learn(self, accepted: Sequence[Contribution], settings: Settings) -> None:
        """5 and 6. With no good reply the model stays as it was, and so does its version."""
        if self.before_step is not None:
            await self.before_step
        if accepted:
            await self._compute(self._apply, accepted, settings)

    def _apply(self, accepted: Sequence[Contribution], settings: Settings) -> None:
        self.learner.step(self.aggregate(accepted), settings)
        self.learner.advance()
        logger.debug("%d contributions make version %s, %s", len(accepted), self.learner.version[:12], dict(settings))

    def _score(
        self, opened: Opened, outcomes: Mapping[Hotkey, Delivery | Faulted], metrics: Mapping[str, float]
    ) -> RoundRecord:
        """7. What was not accepted goes back to the cursor; each order gets a receipt that says why it was paid."""
        evidence: list[Evidence] = []
        undone: list[Range] = []
        for hotkey, order in opened.orders.items():
            outcome = outcomes[hotkey]
            ordered = sum(map(self.task.count, indices(order.ranges)))
            if isinstance(outcome, Delivery):
                evidence.append(Evidence(hotkey, None, outcome.contribution.count, ordered))
                undone += subtract(order.ranges, outcome.contribution.done)
            else:
                evidence.append(Evidence(hotkey, outcome.fault, 0, ordered))
                undone += order.ranges
        self.cursor = self.cursor.give_back(undone)
        scores, weights = self.ranker.update(evidence), dict(self.ranker.weights())
        receipts = [
            self._receipt(opened, e, outcomes[e.hotkey], scores[e.hotkey], weights.get(e.hotkey, 0.0)) for e in evidence
        ]
        return RoundRecord(
            round=opened.round,
            version=self.learner.version,
            cursor=self.cursor.dumps(),
            receipts=tuple(self.network.seal(r) for r in receipts),
            weights=weights,
            ranker=json.dumps(self.ranker.state_dict()),
            metrics={**self._summary(opened, outcomes), **metrics},
        )

    def _receipt(
        self, opened: Opened, e: Evidence, outcome: Delivery | Faulted, scores: Mapping[str, float], weight: float
    ) -> Receipt:
        reason = outcome.reason if isinstance(outcome, Faulted) else f"{e.work} of {e.ordered} {self.task.unit}"
        return Receipt(
            run=self.terms.run,
            round=opened.round,
            hotkey=e.hotkey,
            order=opened.signed[e.hotkey].digest,
            verdict=e.fault or "ACCEPTED",
            reason=reason[:1000],
            done=outcome.contribution.done if isinstance(outcome, Delivery) else (),
            work=e.work,
            scores=dict(scores),
            weight=weight,
        )

    def _summary(self, opened: Opened, outcomes: Mapping[Hotkey, Delivery | Faulted]) -> dict[str, float]:
        """The round's row of metrics. `loss` is the miners' own mean, weighted by accepted work: for display."""
        good = [o for o in outcomes.values() if isinstance(o, Delivery)]
        work = sum(d.contribution.count for d in good)
        seconds = self.network.now() - opened.started
        row = {
            "round": opened.round,
            "miners": len(good),
            "faults": len(outcomes) - len(good),
            "work": work,
            "seconds": seconds,
            f"{self.task.unit}_per_s": work / seconds if seconds else 0.0,
            "compute_s": max((d.received.reply.seconds for d in good), default=0.0),
            "bytes_up": sum(d.received.bytes_up for d in good),
            "bytes_down": sum(d.received.bytes_down for d in good),
        }
        if good:
            row["loss"] = sum(d.received.reply.loss * d.contribution.count for d in good) / work
        return row

    async def _commit(self, opened: Opened, record: RoundRecord) -> None:
        """8. What the transaction names is durable before it."""
        if opened.last is not None:
            opened.sealing.append(self._seal(opened.last))
        await asyncio.gather(*opened.sealing)
        await asyncio.to_thread(self.store.commit, record)

    def _seal(self, received: Received) -> asyncio.Future[None]:
        return asyncio.ensure_future(asyncio.to_thread(self.store.seal, received))

    async def _announce(self, record: RoundRecord) -> None:
        """Receipts, once committed; who was late also stops. For a miner that is away the ledger keeps its copy."""
        told = []
        for signed in record.receipts:
            r = Receipt.parse(signed.body)
            if r.verdict == Fault.LATE:
                stop = Stop(run=r.run, round=r.round, hotkey=r.hotkey, order=r.order)
                told.append(self.network.tell(r.hotkey, self.network.seal(stop)))
            told.append(self.network.tell(r.hotkey, signed))
        await asyncio.gather(*told)

    # --- restart --------------------------------------------------------------------------------------------------

    async def replay(self, since: int) -> None:
        """Apply the committed rounds after a snapshot again, from the spooled payloads: the same versions, bit for bit.

        Raises ValueError where this machine computes another version than the ledger says.
        """
        for record in self.store.committed(since):
            await self._compute(self._replay_round, record)
        head = self.store.head()
        if head is not None:
            self.round = head.round + 1
            self.cursor = Cursor.loads(head.cursor)
            self.ranker.load_state_dict(json.loads(head.ranker))

    def _replay_round(self, record: RoundRecord) -> None:
        receipts = [Receipt.parse(s.body) for s in record.receipts]
        accepted = {r.hotkey for r in receipts if r.verdict == "ACCEPTED"}
        received = {r.reply.hotkey: r for r in self.store.received(record.round)}
        orders = [Order.parse(s.body) for s in self.store.orders(record.round)]
        if missing := accepted - received.keys():
            raise ValueError(f"round {record.round}: the payload of {min(missing)} is gone from the spool")
        contributions = [self._verify(order, received[order.hotkey]) for order in orders if order.hotkey in accepted]
        if contributions:
            self._apply(contributions, kept_settings(record.metrics))
        if self.learner.version != record.version:
            raise ValueError(
                f"round {record.round} replays to version {self.learner.version[:12]}, the ledger says "
                f"{record.version[:12]}: resume on the machine, --device and --threads that the run was started with"
            )

    async def _compute(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *arguments)

    # --- once in a while ------------------------------------------------------------------------------------------

    async def evaluate(self) -> dict[str, float]:
        """The task's metrics of the exact parameters."""
        return await self._compute(self.task.evaluate, self.learner.model)

    def save_snapshot(self, save: Callable[[int, Mapping[str, str], Mapping[str, torch.Tensor]], object]) -> None:
        """Writes the state with `round` rounds applied, from the parameters themselves: the next step waits for it."""
        header, tensors = self.learner.state()
        self.before_step = asyncio.ensure_future(asyncio.to_thread(save, self.round, header, tensors))

    async def finish(self) -> None:
        if self.before_step is not None:
            await self.before_step
