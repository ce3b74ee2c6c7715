"""Run rounds at the validator. `Market.run_round` is the marketplace in one screen; the rest of the file is its steps.

    plan        takes ranges from the one cursor, and makes an order for each miner: durable before it is sent
    broadcast   sends the orders; a miner that lacks the version's state or the data says so and gets them
    collect     receives replies and payloads until all are in, the round is closed, or the deadline is over
    verify      checks each reply as it arrives, and refuses those of a norm that is far beyond the usual one
    measure     computes what the ranker wants to know of the contributions, before the step
    aggregate   makes one gradient of the accepted contributions, in the order of the hotkeys
    step        runs the only optimizer, and makes the next version of the model
    score       turns evidence into scores and weights
    commit      writes one ledger transaction, with a signed receipt for each order; then the receipts go out

The next round's orders leave before this round's commit is on disk (its miners need not wait for a disk), so a restart
may find two rounds open: it finishes the first from what was received, which makes the same version, and the second's
orders hold unchanged. Receipts and weights wait for the commit. With an overlap of 1 one more round is always open:
its orders name the last version, and wait at the miners behind those at work. Inner steps (DiLoCo) that are under way
when their round is closed are carried into the next: see `dispatch`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from pilot.aggregation import Aggregator
from pilot.aggregation.buffers import merge_buffers
from pilot.codec import Codec
from pilot.common.units import fp32_megabytes
from pilot.interfaces import Diverged, Faulted, Network, ReceivedReply, RoundRecord, Store
from pilot.market import receipts
from pilot.market.dispatch import Assignment, Dispatcher, OpenRound
from pilot.market.link_budget import LinkWatch
from pilot.market.measures import load_measures, measure
from pilot.market.norm_bound import NormBound
from pilot.market.notifications import Notifier
from pilot.market.receipts import AssignmentKey, Outcome, VerifiedReply
from pilot.market.scheduling import (
    HISTORY_ROUNDS,
    MIN_BUDGET,
    CodecFallback,
    History,
    RoundPolicy,
    epoch_end,
    epoch_progress,
    shares,
)
from pilot.market.verify import Contribution
from pilot.ranking import Evidence, Ranker, Ranking, rank
from pilot.training.executor import Charge, TimedExecutor
from pilot.training.learner import Learner
from pilot.training.ranges import Cursor, subtract
from protocol import Digest, Fault, Hotkey, Order, Range, Receipt, Signed
from tasks import Task
from tasks.optimizer import Settings

if TYPE_CHECKING:
    import torch

__all__ = ["Market", "Network", "RoundPolicy", "Store"]

logger = logging.getLogger(__name__)

MOST_PAUSE_S = 10.0  # between rounds without a good reply


class ReplayError(ValueError):
    """A committed round cannot be applied again. The text says why, in one line."""

    def __init__(self, round: int, reason: str) -> None:
        super().__init__(f"round {round}: {reason}")
        self.round = round


@dataclass(frozen=True)
class Step:
    """The settings and codecs of a round's step."""

    settings: Settings
    codec_up: str
    codec_down: str


@dataclass(frozen=True)
class Aggregate:
    """The aggregated gradient of a round, and its buffers."""

    gradient: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    largest: float  # norm of a contribution


@dataclass(frozen=True)
class Scored:
    """A round's evidence, and what the ranker made of it."""

    evidence: Mapping[AssignmentKey, Evidence]
    ranking: Ranking


class Market:
    """The validator's side of a round. Its state is the learner, the cursor, the ranker and the round's number."""

    def __init__(
        self,
        policy: RoundPolicy,
        task: Task,
        learner: Learner,
        network: Network,
        store: Store,
        ranker: Ranker,
        aggregate: Aggregator,
        codec: Callable[[str], Codec],
        settings: Callable[[int, int], Settings],
        worker: Executor | None = None,
        charge: Charge | None = None,
    ) -> None:
        """Build the market.

        `codec` loads a codec by name. `settings` gives the settings of a round's step over so many units. `worker` is
        one thread for everything that computes on tensors; `charge` is for simulations.
        """
        self.policy, self.task, self.learner, self.network, self.store = policy, task, learner, network, store
        self.ranker, self.aggregate, self.settings = ranker, aggregate, settings
        self.executor = TimedExecutor(worker, network.now, charge)
        self.measures = load_measures(ranker)
        self.history = History()
        self.bound = NormBound(policy)
        self.notifier = Notifier(network, store)
        self.codec_fallback = CodecFallback(network.known_codecs)
        specs = {name: p.shape for name, p in task.trainable(learner.model).items()}
        buffers = {name: b.shape for name, b in task.buffers(learner.model).items()}
        self.dispatcher = Dispatcher(
            policy, task, network, store, self.notifier, self.executor, self.history, codec, specs, buffers
        )
        self.blobs = task.blobs()
        learner.history.keep_previous |= policy.overlap > 0  # a restart may send orders of that version again
        self.watch: LinkWatch | None = None  # measures what communication costs
        self._megabytes = fp32_megabytes(p.shape for p in learner.parameters.values())
        self.round = 0  # the oldest that is not committed
        self.empty_rounds = 0  # in a row, without a good reply
        self._last_good = network.now()  # when there was one
        self.undone = 0  # steps in a row that were undone
        self.cursor = Cursor()
        self.before_step: asyncio.Future[object] | None = (
            None  # writes a snapshot from the parameters; the next step waits for it
        )
        self._closed_at: float | None = None  # when the previous round was closed
        self._too_short: set[Hotkey] = set()  # miners warned that a micro-batch takes longer than a round

    # --- a round --------------------------------------------------------------------------------------------------

    async def run_round(self, last: int) -> None:
        """Run the oldest open round to its commit; the rounds after it, up to round `last`, are open then."""
        opened = self.dispatcher.rounds[0]
        outcomes = await self.dispatcher.collect(self._admit, carries=opened.round + 1 < last)
        if self.learner.replica is None:  # with deltas blobs are files, and miners of carried orders may need them
            opened.blobs.clear()  # frees memory for the next version
            opened.blobs.update(self.blobs)  # for miners at work for the next round
        began = self.network.now()
        accepted = {part: o.contribution for part, o in sorted(outcomes.items()) if isinstance(o, VerifiedReply)}
        refused, norms = self.bound.judge(opened.round, accepted)
        outcomes |= {part: Faulted(Fault.OUTLIER, why) for part, why in refused.items()}
        accepted = {part: c for part, c in accepted.items() if part not in refused}
        step = self._plan_step(opened.round, accepted)
        measures = await self._measure(accepted)
        if undone := await self._aggregate_and_step(accepted, step):
            outcomes |= {part: Faulted(Fault.VALIDATOR_FAILED, f"the step was undone: {undone}") for part in accepted}
            accepted, measures, norms = {}, {}, self.bound.judge(opened.round, {})[1]
        scored = await self._score(opened, outcomes, measures)
        self.dispatcher.pop()
        seconds = {"collect_s": began - opened.started, "learn_s": self.network.now() - began}
        record = self._record(opened, outcomes, step, scored, {**seconds, **norms})
        self.bound.observe(opened.round, norms)
        self.round = opened.round + 1
        if accepted:
            self.empty_rounds, self._last_good = 0, self.network.now()
        else:
            self.empty_rounds += 1
        if self.network.peers() and accepted:  # without miners there is time to commit first
            await self.open_rounds(last)
        await self._commit(opened, record)
        self._announce(opened, record, outcomes)
        await self.open_rounds(last)

    async def open_rounds(self, last: int) -> None:
        """Plan and broadcast until the policy's number of rounds is in flight; none from round `last` on."""
        rounds = self.dispatcher.rounds
        while len(rounds) <= self.policy.overlap and self.round + len(rounds) < last:
            waits = rounds and (self._exhausted or not self.network.peers())
            if waits or (self._over and not self.dispatcher.carried):
                break
            rounds.append(await self._open(self.round + len(rounds)))

    @property
    def in_flight(self) -> bool:
        """Return whether rounds are open."""
        return bool(self.dispatcher.rounds)

    @property
    def out_of_patience(self) -> bool:
        waited_s = self.network.now() - self._last_good
        return self.empty_rounds >= self.policy.patience and waited_s >= self.policy.patience_s

    @property
    def stopping(self) -> bool:
        return self.dispatcher.stopping

    @property
    def _over(self) -> bool:
        """Return whether nothing more is ordered; a round may still be opened for carried orders."""
        return self.stopping or self.out_of_patience

    def request_stop(self) -> None:
        """Close the rounds in flight: miners are told to stop, and their work so far counts. No round follows."""
        self.dispatcher.request_stop()

    async def finish(self) -> None:
        """Wait for background work, at most for the grace period."""
        if self.before_step is not None:
            await self.before_step
        stop_by = self.dispatcher.stop_by
        await self.notifier.finish(self.policy.grace_s if stop_by is None else max(1.0, stop_by - self.network.now()))

    async def close(self) -> None:
        """Cancel every exchange and notification."""
        await self.dispatcher.close()
        await self.notifier.close()

    # --- 1 and 2. plan, broadcast ---------------------------------------------------------------------------------

    async def _open(self, round: int) -> OpenRound:
        """Open a round. Its orders that are on disk already are sent again, unchanged."""
        orders = self._standing_orders(round)
        if not orders:
            if self.empty_rounds and self.policy.patience_s:  # whoever refuses an order refuses the next one, too
                await self.dispatcher.pause(min(MOST_PAUSE_S, 0.5 * 2 ** min(self.empty_rounds, 10)))
            if not self._over:
                await self.dispatcher.wait_for_peer()
            await self._make_ready(round, self.network.peers())
            orders = self._plan(round)
            await asyncio.to_thread(self.store.open_round, round, [signed for _, signed in orders])
        out = [order for order, _ in orders] + [s.order for s in self.dispatcher.carried if s.reply_task is None]
        blobs = await asyncio.to_thread(self.learner.find, {order.update for order in out})
        opened = OpenRound(round, self.network.now(), {**self.blobs, **blobs})
        rounds = {round, *(order.round for order in out)}
        received = [r for n in sorted(rounds) for r in await asyncio.to_thread(self.store.received, n)]
        self.dispatcher.send(opened, orders, {r.reply.order: r for r in received})
        return opened

    def _standing_orders(self, round: int) -> list[tuple[Order, Signed]]:
        """Return a round's orders that a killed validator left, if their versions still fit."""
        standing = [(Order.parse(s.body), s) for s in self.store.orders(round)]
        fitting = {self.learner.version, self.learner.base if self.policy.overlap else None}
        if any(order.version not in fitting for order, _ in standing):
            return []
        if any((order.inner_steps is not None) != self.policy.inner(round) for order, _ in standing):
            return []  # --rounds changed, and so did the rounds of DiLoCo
        self.cursor = self.cursor.without(chain.from_iterable(order.ranges for order, _ in standing))
        return standing

    def _plan(self, round: int) -> list[tuple[Order, Signed]]:
        """Disjoint ranges for every miner that is there, and keeps no more replies than it can: none at all if nobody
        came in time."""
        staleness = 1 if self.dispatcher.rounds else 0
        at_work = Counter(order.hotkey for order in self.dispatcher.unsettled)
        free = () if self._over else [h for h in self.network.peers() if at_work[h] <= self.policy.overlap]
        return [
            self._order(round, hotkey, ranges, self.policy.round_s, staleness)
            for hotkey, ranges in self._take(round, free)
        ]

    async def _admit(self, opened: OpenRound) -> None:
        """Order what is left of the round's time from miners that came after it began."""
        began = opened.started if self._closed_at is None else max(opened.started, self._closed_at)
        left_s = self.policy.round_s - (self.network.now() - began)
        ordered = {order.hotkey for order in self.dispatcher.unsettled}
        new = [hotkey for hotkey in self.network.peers() if hotkey not in ordered]
        worth = self.policy.round_s and left_s >= MIN_BUDGET * self.policy.round_s
        if not new or not worth or self.stopping or opened.closes_at is not None:
            return
        await self._make_ready(opened.round, new)
        taken = self._take(opened.round, new)
        orders = [self._order(opened.round, hotkey, ranges, left_s, 0) for hotkey, ranges in taken]
        await asyncio.to_thread(self.store.add_orders, opened.round, [signed for _, signed in orders])
        opened.blobs.update(self.learner.blobs)
        self.dispatcher.send(opened, orders, {})

    def _take(self, round: int, hotkeys: Sequence[Hotkey]) -> list[tuple[Hotkey, tuple[Range, ...]]]:
        """Take each miner's share from the cursor. What a miner left undone goes to another one, if there is one."""
        limit, taken = self._limit, []
        wanted = self.history.shares(hotkeys, self.policy, round)
        undone = self.history.left_undone() if self.cursor.returned and len(wanted) > 1 else {}
        for hotkey, count in shares(self.cursor, wanted, limit).items():
            ranges, self.cursor = self.cursor.take(count, limit, undone.get(hotkey, ()))
            if ranges:
                taken.append((hotkey, ranges))
        return taken

    @property
    def _limit(self) -> int | None:
        """Return the end of the earliest unfinished epoch with --coverage once, else None."""
        if not self.policy.once:
            return None
        return epoch_end(self.cursor, self.dispatcher.outstanding, self.task.batches_per_epoch)

    @property
    def _exhausted(self) -> bool:
        """Return whether nothing can be ordered before something in flight is accepted."""
        return self.cursor.take(1, self._limit)[0] == ()

    def _order(
        self, round: int, hotkey: Hotkey, ranges: tuple[Range, ...], budget_s: float, staleness: int
    ) -> tuple[Order, Signed]:
        whole = self.codec_fallback.needs_state(hotkey, self.learner.update)
        up = self.codec_fallback.up(hotkey, self.policy.codec_up)
        down = self.codec_fallback.down(hotkey, self.policy.codec_down)
        order = Order(
            run=self.policy.run,
            round=round,
            hotkey=hotkey,
            version=self.learner.version,
            update=self.learner.snapshot_now() if whole else self.learner.update,
            state_digest=self.learner.state_digest() if self._proves(round) else None,
            task=self.task.spec(),
            data=self.task.data_spec,
            ranges=ranges,
            deadline_s=self.policy.deadline_s * (1 + staleness),  # it waits behind another order
            staleness=staleness,
            codec_up=up,
            codec_down=down,
            budget_s=budget_s,
            inner_steps=self.policy.diloco.ordered(round) if self.policy.diloco else None,
            feedback=0.0 if up == "fp32" else self.policy.feedback,
        )
        logger.debug("round %d: %s gets %s on %s", round, hotkey[:8], list(ranges), order.version[:12])
        return order, self.network.sign(order)

    async def _make_ready(self, round: int, hotkeys: Sequence[Hotkey]) -> None:
        """Compute what orders name: the state's digest, and a whole state for miners that cannot read deltas."""
        if self._proves(round):
            await self.executor.run("digest", self._megabytes, self.learner.state_digest)
        if any(self.codec_fallback.needs_state(hotkey, self.learner.update) for hotkey in hotkeys):
            await self.executor.run("encode", self._megabytes, self.learner.snapshot_now)

    def _proves(self, round: int) -> bool:
        """Return whether the round's orders carry the state's digest, which proves the miners' models."""
        return self.policy.digest_every > 0 and round % self.policy.digest_every == 0

    # --- measure, aggregate, step ---------------------------------------------------------------------------------

    def _plan_step(self, round: int, accepted: Mapping[AssignmentKey, Contribution]) -> Step:
        """Return the settings and codecs of the round's step. All of it goes into the record, for replays."""
        up, down = self.policy.codec_up, self.policy.codec_down
        return Step(self.settings(round, max(1, sum(c.count for c in accepted.values()))), up, down)

    async def _measure(self, accepted: Mapping[AssignmentKey, Contribution]) -> dict[AssignmentKey, dict[str, float]]:
        """Measure what the ranker asks for, from the parameters before the step and the contributions."""
        if not self.measures or not accepted:
            return {}
        found = await self.executor.run(
            "measure",
            self._megabytes * len(accepted),
            measure,
            self.measures,
            self.learner.parameters,
            list(accepted.values()),
        )
        return dict(zip(accepted, found, strict=True))

    async def _aggregate_and_step(self, accepted: Mapping[AssignmentKey, Contribution], step: Step) -> str:
        """Make the next version of the model. With no good reply the model stays, and so does its version.

        A step by which the model diverges is undone, up to --rollback times in a row: then return why. Raises Diverged.
        """
        if self.before_step is not None:
            await self.before_step
        self.learner.codec = step.codec_down
        if not accepted:
            return ""
        size, contributions = self._megabytes, list(accepted.values())
        found = await self.executor.run("aggregate", size * len(accepted), self._aggregate, contributions)
        try:
            await self.executor.run("step", size, self._step, found, step.settings)
            await self.executor.run("encode", size, self.learner.advance)
        except Diverged as why:
            self.undone += 1
            if self.undone > self.policy.rollback or not await self.executor.run("load", size, self._load_committed):
                raise
            logger.warning("%s: the step is undone, %d of --rollback %d", why, self.undone, self.policy.rollback)
            return str(why)
        self.undone = 0
        logger.debug("%d contributions make version %s, %s", len(accepted), self.learner.version[:12], step.settings)
        return ""

    def _step(self, found: Aggregate, settings: Settings) -> None:
        self.learner.step(found.gradient, settings, found.buffers)
        self.learner.check_step(found.largest)

    def _load_committed(self) -> bool:
        """Load the state after the last committed round again, from a snapshot; False if there is none."""
        since = self.store.load_snapshot(self.learner.load_state)
        if since is None:
            return False
        for record in self.store.committed(since):
            self._replay_round(record)
        self.learner.mend()
        return True

    def _aggregate(self, contributions: Sequence[Contribution]) -> Aggregate:
        buffers = self.task.buffers(self.learner.model)
        merged: Mapping[str, torch.Tensor] = {}
        if buffers:
            merged = merge_buffers([c.count for c in contributions], [c.buffers() for c in contributions], buffers)
        return Aggregate(self.aggregate(contributions), merged, max(c.norm for c in contributions))

    # --- score ----------------------------------------------------------------------------------------------------

    async def _score(
        self,
        opened: OpenRound,
        outcomes: Mapping[AssignmentKey, Outcome],
        measures: Mapping[AssignmentKey, Mapping[str, float]],
    ) -> Scored:
        """Give the ranker the round's evidence: one entry a miner."""
        evidence = {
            part: receipts.evidence(self.task, sent.order, outcomes[part], measures.get(part, {}))
            for part, sent in sorted(opened.sent.items())
        }

        joined = receipts.by_miner(evidence.values())
        return Scored(evidence, await self.executor.run("score", len(evidence), rank, self.ranker, joined))

    def _record(
        self,
        opened: OpenRound,
        outcomes: Mapping[AssignmentKey, Outcome],
        step: Step,
        scored: Scored,
        figures: Mapping[str, float],
    ) -> RoundRecord:
        """Return undone work to the cursor, and make the round's record, with a receipt for each order."""
        ranking, orders = scored.ranking, {part: sent.order for part, sent in sorted(opened.sent.items())}
        made: list[Receipt] = []
        for part, order in orders.items():
            outcome, e = outcomes[part], scored.evidence[part]
            done = outcome.contribution.done if isinstance(outcome, VerifiedReply) else ()
            self.cursor = self.cursor.give_back(subtract(order.ranges, done))
            name, weight = opened.sent[part].signed.digest, ranking.weights.get(e.hotkey, 0.0)
            why = receipts.reason(self.task, self.policy, order, e, outcome)
            scores = ranking.scores[e.hotkey]
            made.append(receipts.receipt(opened.round, order, name, e, why, outcome, scores, weight))
            self._warn_if_too_short(made[-1], outcome)
        self.history.observe(made, {sent.signed.digest: sent.order for sent in opened.sent.values()})
        now, since = self.network.now(), self._closed_at
        passed_s = now - (opened.started if since is None else since)
        self._closed_at = now
        row = receipts.summary(self.task, opened.round, passed_s, orders, outcomes)
        coverage = epoch_progress(self.cursor, self.dispatcher.outstanding, self.task.batches_per_epoch)
        executor = {f"{phase}_s": s for phase, s in self.executor.take().items()}
        links = self.watch.observe(row) if self.watch else {}
        codecs = {"codec_up": step.codec_up, "codec_down": step.codec_down}
        return RoundRecord(
            round=opened.round,
            version=self.learner.version,
            settings=step.settings,
            codec_up=step.codec_up,
            codec_down=step.codec_down,
            cursor=self.cursor.give_back(self.dispatcher.outstanding).dumps(),  # open rounds may be planned again
            receipts=tuple(self.network.sign(r) for r in made),
            weights=ranking.weights,
            ranker=ranking.state,
            metrics={**row, **coverage.metrics(), **executor, **step.settings, **figures, **codecs, **links},
        )

    def _warn_if_too_short(self, receipt: Receipt, outcome: Outcome) -> None:
        if "--round-seconds" in receipt.reason and receipt.hotkey not in self._too_short:
            self._too_short.add(receipt.hotkey)
            logger.warning("round %d: %s: %s; raise it", receipt.round, receipt.hotkey, receipt.reason)

    # --- 8. commit ------------------------------------------------------------------------------------------------

    async def _commit(self, opened: OpenRound, record: RoundRecord) -> None:
        """Commit the round in one transaction, after everything that it names is durable."""
        began = self.network.now()
        await self.dispatcher.make_durable(opened)
        await asyncio.to_thread(self.store.commit, record)
        self.executor.passed("commit", self.network.now() - began)

    def _announce(self, opened: OpenRound, record: RoundRecord, outcomes: Mapping[AssignmentKey, Outcome]) -> None:
        """Deliver the receipts. Late miners are told to stop, and their replies are recorded if they still come."""
        for signed, (part, sent) in zip(record.receipts, sorted(opened.sent.items()), strict=True):
            outcome, hotkey = outcomes[part], sent.order.hotkey
            if isinstance(outcome, Faulted) and outcome.fault is Fault.LATE:
                self.notifier.stop(sent.order, sent.signed.digest)
                self.notifier.expect_late_reply(sent.order, sent.signed, sent.at, record.weights.get(hotkey, 0.0))
            self.notifier.deliver(hotkey, signed)

    # --- restart --------------------------------------------------------------------------------------------------

    async def replay(self, since: int, rounds: int | None = None) -> None:
        """Apply the committed rounds after a snapshot again, from the spooled payloads, to the same versions bitwise.

        With `rounds`, only the first so many are kept; all others are given up. Raises ReplayError where a file is
        damaged or this machine computes another version than the ledger says; then nothing is given up.
        """
        for record in self.store.committed(since):
            if rounds is None or record.round < rounds:
                await self.executor.run("replay", 1.0, self._replay_round, record)
        if rounds is not None:
            await asyncio.to_thread(self.store.give_up, rounds)
        self.learner.mend()
        head = self.store.head()
        if head is not None:
            self.round = head.round + 1
            self.cursor = Cursor.loads(head.cursor)
            self.ranker.load_state_dict(json.loads(head.ranker))
            for record in self.store.committed(max(0, self.round - HISTORY_ROUNDS)):
                self.history.observe([Receipt.parse(s.body) for s in record.receipts], self._orders_of(record))
                self.bound.observe(record.round, record.metrics)
            self.notifier.add_undelivered(head.receipts)
            for signed in self.store.unsettled():
                order = Order.parse(signed.body)
                self.dispatcher.carried.append(Assignment(order, signed, self.network.now()))
                self.cursor = self.cursor.without(order.ranges)

    def _replay_round(self, record: RoundRecord) -> None:
        verdicts = [Receipt.parse(s.body) for s in record.receipts]
        accepted = [r.order for r in verdicts if r.verdict == "ACCEPTED"]  # in the order of summation
        orders = self._orders_of(record)
        replies = [(orders[name], self._reply(record, orders[name], name)) for name in accepted]
        contributions = [self.dispatcher.verify(order, received) for order, received in replies]
        if contributions:
            self.learner.codec = record.codec_down
            found = self._aggregate(contributions)
            self._step(found, record.settings)
            self.learner.advance()
        if self.learner.version != record.version:
            raise ReplayError(
                record.round,
                f"replays to version {self.learner.version[:12]}, the ledger says {record.version[:12]}: resume on "
                "the machine, --device and --threads that the run was started with",
            )

    def _orders_of(self, record: RoundRecord) -> dict[Digest, Order]:
        """Return the orders that a committed round may settle: its own, and those of the round before."""
        signed = [s for n in (record.round - 1, record.round) for s in self.store.orders(n)]
        return {s.digest: Order.parse(s.body) for s in signed}

    def _reply(self, record: RoundRecord, order: Order, name: Digest) -> ReceivedReply:
        try:
            return self.store.reply(order.round, order.hotkey, name)
        except ValueError as error:
            raise ReplayError(record.round, str(error)) from None

    # --- once in a while ------------------------------------------------------------------------------------------

    async def evaluate(self) -> dict[str, float]:
        """Return the task's metrics of the exact parameters, and with deltas those of the replica as "replica_…"."""
        found = await self.executor.run("evaluate", 1.0, self.task.evaluate, self.learner.model)
        if self.learner.replica is None:
            return found
        with self.learner.replica_model() as model:
            replica = await self.executor.run("evaluate", 1.0, self.task.evaluate, model)
        return {**found, **{f"replica_{name}": value for name, value in replica.items()}}

    def save_snapshot(self, save: Callable[[int, Mapping[str, str], Mapping[str, torch.Tensor]], object]) -> None:
        """Write a snapshot after `round` rounds, from the parameters themselves; the next step waits for it."""
        header, tensors = self.learner.state()
        self.before_step = asyncio.ensure_future(asyncio.to_thread(save, self.round, header, tensors))
