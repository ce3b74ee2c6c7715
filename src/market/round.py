"""The whole round, in order. `Market.play` is the marketplace in one screen; the rest of the file is its steps.

    plan        ranges from the one cursor, an order a miner: durable before it is sent
    broadcast   orders out; a miner that lacks the version's state or the data says so and gets them
    collect     replies and payloads until all are in, the round is closed, or the deadline; each verified as it arrives
    aggregate   accepted contributions → one gradient, in the order of the hotkeys
    step        the only optimizer; the next version of the model
    score       evidence → scores → weights; a signed receipt for each order
    commit      one ledger transaction, then the receipts go out

The next round's orders leave before this round's commit is on disk (its miners need not wait for a disk), so a restart
may find two rounds open: it finishes the first from what was received, which makes the same version, and the second's
orders hold unchanged. Receipts and weights wait for the commit. With an overlap of 1 there is always one round more in
flight: its orders name the last version, and wait at the miners behind those at work.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import chain
from typing import TYPE_CHECKING

from aggregation import Aggregator
from codec import Codec
from market import score
from market.courier import Courier
from market.coverage import progress
from market.cursor import Cursor, subtract
from market.flight import Flight, Opened
from market.learner import Learner
from market.phases import Charge, Phases
from market.planning import LEAST_BUDGET, ROUNDS_KNOWN, History, Terms, epoch_end, shares
from market.ports import Network, Store
from market.score import Delivery, Outcome
from market.verify import Contribution
from protocol import Fault, Hotkey, Order, Range, Receipt, Signed
from ranking import Ranker
from tasks import Task
from tasks.optimizer import Settings, kept_settings
from values import Faulted, RoundRecord

if TYPE_CHECKING:
    import torch

__all__ = ["Market", "Network", "Store", "Terms"]

logger = logging.getLogger(__name__)


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
        settings: Callable[[int, int], Settings],
        worker: Executor | None = None,
        charge: Charge | None = None,
    ) -> None:
        """`settings`: of a step, over so many units. `worker` is one thread for everything that computes on tensors;
        `charge` is for emulations."""
        self.terms, self.task, self.learner, self.network, self.store = terms, task, learner, network, store
        self.ranker, self.aggregate, self.settings = ranker, aggregate, settings
        self.phases = Phases(worker, network.now, charge)
        self.history = History()
        self.courier = Courier(network, store)
        specs = {name: p.shape for name, p in task.trainable(learner.model).items()}
        self.flight = Flight(terms, task, network, store, self.courier, self.phases, self.history, codec, specs)
        self.blobs = task.blobs()
        learner.keep_before = terms.overlap > 0  # orders that a restart sends again may name it
        self.round = 0  # the oldest that is not committed
        self.empty_rounds = 0
        self.cursor = Cursor()
        self.before_step: asyncio.Future[object] | None = None  # a snapshot still being written from the parameters
        self._closed_at: float | None = None  # the round before
        self._too_short: set[Hotkey] = set()  # told that their micro-batches take longer than a round

    # --- a round --------------------------------------------------------------------------------------------------

    async def play(self, last: int) -> None:
        """Finish the oldest round in flight, down to its commit; the next ones, up to round `last`, are open then."""
        opened = self.flight.rounds[0]
        outcomes = await self.flight.collect(self._admit)
        collected = self.network.now()
        accepted = score.accepted(outcomes)
        settings = self.settings(opened.round, max(1, sum(c.count for c in accepted)))
        await self._learn(accepted, settings)
        self.flight.rounds.popleft()
        seconds = {"collect_s": collected - opened.started, "learn_s": self.network.now() - collected}
        record = self._score(opened, outcomes, {**settings, **seconds})
        self.round = opened.round + 1
        self.empty_rounds = 0 if accepted else self.empty_rounds + 1
        if self.network.peers():  # else there is time to commit
            await self.fill(last)
        await self._commit(opened, record)
        self._announce(opened, record, outcomes)
        await self.fill(last)

    async def fill(self, last: int) -> None:
        """Plan and broadcast: so many rounds in flight as there shall be, none from round `last` on."""
        rounds = self.flight.rounds
        while len(rounds) <= self.terms.overlap and self.round + len(rounds) < last:
            waits = rounds and (self._exhausted or not self.network.peers())
            if self.stopping or self.out_of_patience or waits:
                break
            rounds.append(await self._open(self.round + len(rounds)))

    @property
    def in_flight(self) -> bool:
        """Rounds are open: `play` has something to finish."""
        return bool(self.flight.rounds)

    @property
    def out_of_patience(self) -> bool:
        return self.empty_rounds >= self.terms.patience

    @property
    def stopping(self) -> bool:
        return self.flight.stopping

    def request_stop(self) -> None:
        """Close the rounds in flight: miners are told to stop, what they have done by then counts. No round follows."""
        self.flight.request_stop()

    async def finish(self) -> None:
        """What is under way aside comes to its end, or is given up after the grace."""
        if self.before_step is not None:
            await self.before_step
        stop_by = self.flight.stop_by
        await self.courier.finish(self.terms.grace_s if stop_by is None else max(1.0, stop_by - self.network.now()))

    async def close(self) -> None:
        """Nothing of ours uses the network any more."""
        await self.flight.close()
        await self.courier.close()

    # --- 1 and 2. plan, broadcast ---------------------------------------------------------------------------------

    async def _open(self, round: int) -> Opened:
        """Orders of this round that are on disk already are sent again, unchanged."""
        orders = self._standing_orders(round)
        if not orders:
            await self.flight.wait_for_peer()
            orders = self._plan(round)
            await asyncio.to_thread(self.store.open_round, round, [signed for _, signed in orders])
        opened = Opened(round, self.network.now(), {**self.blobs, **self.learner.blobs})
        received = {r.reply.hotkey: r for r in await asyncio.to_thread(self.store.received, round)}
        self.flight.send(opened, orders, received)
        return opened

    def _standing_orders(self, round: int) -> list[tuple[Order, Signed]]:
        """A round's orders as a killed validator left them, if they are for versions that they may be for."""
        standing = [(Order.parse(s.body), s) for s in self.store.orders(round)]
        fitting = {self.learner.version, self.learner.base if self.terms.overlap else None}
        if any(order.version not in fitting for order, _ in standing):
            return []
        self.cursor = self.cursor.without(chain.from_iterable(order.ranges for order, _ in standing))
        return standing

    def _plan(self, round: int) -> list[tuple[Order, Signed]]:
        """Disjoint ranges for every miner that is there; none at all if nobody came in time."""
        staleness = 1 if self.flight.rounds else 0
        return [
            self._order(round, hotkey, ranges, self.terms.round_s, staleness)
            for hotkey, ranges in self._take(self.network.peers())
        ]

    async def _admit(self, opened: Opened) -> None:
        """Who came after the round had begun gets what is left of its time."""
        began = opened.started if self._closed_at is None else max(opened.started, self._closed_at)
        left_s = self.terms.round_s - (self.network.now() - began)
        ordered = {hotkey for other in self.flight.rounds for hotkey in other.orders}
        new = [hotkey for hotkey in self.network.peers() if hotkey not in ordered]
        worth = self.terms.round_s and left_s >= LEAST_BUDGET * self.terms.round_s
        if not new or not worth or self.stopping or opened.cut is not None:
            return
        orders = [self._order(opened.round, hotkey, ranges, left_s, 0) for hotkey, ranges in self._take(new)]
        await asyncio.to_thread(self.store.add_orders, opened.round, [signed for _, signed in orders])
        opened.blobs = {**opened.blobs, **self.learner.blobs}
        self.flight.send(opened, orders, {})

    def _take(self, hotkeys: Sequence[Hotkey]) -> list[tuple[Hotkey, tuple[Range, ...]]]:
        limit, taken = self._limit, []
        wanted = self.history.shares(sorted(hotkeys), self.terms)
        for hotkey, count in shares(self.cursor, wanted, limit).items():
            ranges, self.cursor = self.cursor.take(count, limit)
            if ranges:
                taken.append((hotkey, ranges))
        return taken

    @property
    def _limit(self) -> int | None:
        """With --coverage once, the end of the earliest epoch that is not done."""
        if not self.terms.once:
            return None
        return epoch_end(self.cursor, self.flight.outstanding, self.task.batches_per_epoch)

    @property
    def _exhausted(self) -> bool:
        """Nothing may be ordered before something in flight is accepted."""
        return self.cursor.take(1, self._limit)[0] == ()

    def _order(
        self, round: int, hotkey: Hotkey, ranges: tuple[Range, ...], budget_s: float, staleness: int
    ) -> tuple[Order, Signed]:
        order = Order(
            run=self.terms.run,
            round=round,
            hotkey=hotkey,
            version=self.learner.version,
            update=self.learner.update,
            state_digest=None,
            task=self.task.spec(),
            data=self.task.data_spec,
            ranges=ranges,
            deadline_s=self.terms.deadline_s * (1 + staleness),  # it waits behind another
            staleness=staleness,
            codec_up=self.terms.codec_up,
            codec_down=self.terms.codec_down,
            budget_s=budget_s,
        )
        logger.debug("round %d: %s gets %s on %s", round, hotkey[:8], list(ranges), order.version[:12])
        return order, self.network.seal(order)

    # --- 5 and 6. aggregate, step ---------------------------------------------------------------------------------

    async def _learn(self, accepted: Sequence[Contribution], settings: Settings) -> None:
        """With no good reply the model stays as it was, and so does its version."""
        if self.before_step is not None:
            await self.before_step
        if not accepted:
            return
        parameters = sum(4 * p.numel() for p in self.learner.parameters.values()) / 1e6
        gradient = await self.phases.run("aggregate", parameters * len(accepted), self.aggregate, accepted)
        await self.phases.run("step", parameters, self.learner.step, gradient, settings)
        await self.phases.run("encode", parameters, self.learner.advance)
        logger.debug("%d contributions make version %s, %s", len(accepted), self.learner.version[:12], dict(settings))

    # --- 7. score -------------------------------------------------------------------------------------------------

    def _score(self, opened: Opened, outcomes: Mapping[Hotkey, Outcome], metrics: Mapping[str, float]) -> RoundRecord:
        """What was not accepted goes back to the cursor; each order gets a receipt that says why it was paid."""
        evidence = {hotkey: score.evidence(self.task, o, outcomes[hotkey]) for hotkey, o in opened.orders.items()}
        for hotkey, order in opened.orders.items():
            outcome = outcomes[hotkey]
            done = outcome.contribution.done if isinstance(outcome, Delivery) else ()
            self.cursor = self.cursor.give_back(subtract(order.ranges, done))
        scores, weights = self.ranker.update(list(evidence.values())), dict(self.ranker.weights())
        receipts = []
        for hotkey, e in sorted(evidence.items()):
            order, name, outcome = opened.orders[hotkey], opened.signed[hotkey].digest, outcomes[hotkey]
            why = score.reason(self.task, self.terms, order, e, outcome)
            weight = weights.get(hotkey, 0.0)
            receipts.append(score.receipt(order, name, e, why, outcome, scores[hotkey], weight))
            self._warn_if_too_short(receipts[-1], outcome)
        self.history.observe(receipts)
        now, since = self.network.now(), self._closed_at
        seconds = now - (opened.started if since is None else since)
        self._closed_at = now
        row = score.summary(self.task, opened.round, seconds, opened.orders, outcomes)
        coverage = progress(self.cursor, self.flight.outstanding, self.task.batches_per_epoch)
        phases = {f"{phase}_s": s for phase, s in self.phases.take().items()}
        return RoundRecord(
            round=opened.round,
            version=self.learner.version,
            cursor=self.cursor.give_back(self.flight.outstanding).dumps(),  # open rounds may be planned anew
            receipts=tuple(self.network.seal(r) for r in receipts),
            weights=weights,
            ranker=json.dumps(self.ranker.state_dict()),
            metrics={**row, **coverage.metrics(), **phases, **metrics},
        )

    def _warn_if_too_short(self, receipt: Receipt, outcome: Outcome) -> None:
        if "--round-seconds" in receipt.reason and receipt.hotkey not in self._too_short:
            self._too_short.add(receipt.hotkey)
            logger.warning("round %d: %s: %s; raise it", receipt.round, receipt.hotkey, receipt.reason)

    # --- 8. commit ------------------------------------------------------------------------------------------------

    async def _commit(self, opened: Opened, record: RoundRecord) -> None:
        """What the transaction names is durable before it."""
        began = self.network.now()
        await self.flight.sealed(opened)
        await asyncio.to_thread(self.store.commit, record)
        self.phases.passed("commit", self.network.now() - began)

    def _announce(self, opened: Opened, record: RoundRecord, outcomes: Mapping[Hotkey, Outcome]) -> None:
        """Receipts, once committed; who was late also stops, and what it did is noted should it still come."""
        for signed, (hotkey, order) in zip(record.receipts, sorted(opened.orders.items()), strict=True):
            outcome = outcomes[hotkey]
            if isinstance(outcome, Faulted) and outcome.fault is Fault.LATE:
                self.courier.stop(order, opened.signed[hotkey].digest)
                weight = record.weights.get(hotkey, 0.0)
                self.courier.note_late(order, opened.signed[hotkey], opened.started, weight)
            self.courier.tell(hotkey, signed)

    # --- restart --------------------------------------------------------------------------------------------------

    async def replay(self, since: int) -> None:
        """Apply the committed rounds after a snapshot again, from the spooled payloads: the same versions, bit for bit.

        Raises ValueError where this machine computes another version than the ledger says.
        """
        for record in self.store.committed(since):
            await self.phases.run("replay", 1.0, self._replay_round, record)
        head = self.store.head()
        if head is not None:
            self.round = head.round + 1
            self.cursor = Cursor.loads(head.cursor)
            self.ranker.load_state_dict(json.loads(head.ranker))
            for record in self.store.committed(max(0, self.round - ROUNDS_KNOWN)):
                self.history.observe(Receipt.parse(s.body) for s in record.receipts)

    def _replay_round(self, record: RoundRecord) -> None:
        receipts = [Receipt.parse(s.body) for s in record.receipts]
        accepted = {r.hotkey for r in receipts if r.verdict == "ACCEPTED"}
        received = {r.reply.hotkey: r for r in self.store.received(record.round)}
        orders = [Order.parse(s.body) for s in self.store.orders(record.round)]
        if missing := accepted - received.keys():
            raise ValueError(f"round {record.round}: the payload of {min(missing)} is gone from the spool")
        verify = self.flight.verify
        contributions = [verify(order, received[order.hotkey]) for order in orders if order.hotkey in accepted]
        if contributions:
            self.learner.step(self.aggregate(contributions), kept_settings(record.metrics))
            self.learner.advance()
        if self.learner.version != record.version:
            raise ValueError(
                f"round {record.round} replays to version {self.learner.version[:12]}, the ledger says "
                f"{record.version[:12]}: resume on the machine, --device and --threads that the run was started with"
            )

    # --- once in a while ------------------------------------------------------------------------------------------

    async def evaluate(self) -> dict[str, float]:
        """The task's metrics of the exact parameters."""
        return await self.phases.run("evaluate", 1.0, self.task.evaluate, self.learner.model)

    def save_snapshot(self, save: Callable[[int, Mapping[str, str], Mapping[str, torch.Tensor]], object]) -> None:
        """Writes the state with `round` rounds applied, from the parameters themselves: the next step waits for it."""
        header, tensors = self.learner.state()
        self.before_step = asyncio.ensure_future(asyncio.to_thread(save, self.round, header, tensors))
