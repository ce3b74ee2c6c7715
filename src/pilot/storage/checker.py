"""Proves, from what a run left on disk, that its marketplace kept its word: RULES says what is proved.

report = check_run(Path("runs/demo"), unseal=pilot.transport.auth.unseal, miners=[Path("M1/wallet.hotkey")])
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pilot.storage.run_reader import MessageVerifier, Place, RunRecords, Violation, copy_of_run, read, receipts_of
from protocol import Digest, Fault, Hotkey, Range, Receipt, Signed, Version

RULES = {
    "signature": "every order, reply and receipt is signed by the right key, and lies in its own round's place",
    "row": "every column of the ledger says what the signed message says",
    "rounds": "rounds are consecutive, and each order of a committed one has its receipt, or is carried into the next",
    "carried": "an order is settled by its own round, or, of inner steps, by the next one",
    "twice": "no micro-batch index was accepted twice",
    "ordered": "nothing was accepted that had not been ordered, nothing credited with a fault",
    "late": "nothing was accepted after its deadline, nothing both accepted and noted as late",
    "disjoint": "no index was ordered while another order of the round held it, or after it was accepted",
    "complete": "every index below the cursor is accepted, returned or in an open order, and only one of them",
    "epoch": "--coverage once: no index of an epoch was ordered before all of the last one were accepted",
    "lost": "every ACCEPTED receipt that a miner holds is in the ledger, word for word",
    "payload": "every accepted payload that a restart may need is in the spool, whole, with its reply",
    "dropped": "no whole reply was treated as if it had never come",
    "chain": "each version follows from the one before it, and only accepted work makes a new one",
    "stale": "each order names the version of its round, or with staleness the one before",
    "weights": "weights are what the ranker's state says, and receipts say the same",
    "work": "the work of a receipt is the count of its indices",
    "snapshot": "each snapshot is of the version that the ledger names",
}

Indices = np.ndarray[Any, np.dtype[np.int64]]
Held = tuple[Place, Signed, Receipt]  # a receipt that a miner has


class Ranker(Protocol):
    """What the weights are recomputed with (ranking.Ranker)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def weights(self) -> Mapping[Hotkey, float]: ...


@dataclass(frozen=True)
class Report:
    """`proved`: how many of each kind were looked at."""

    violations: list[Violation]
    proved: dict[str, int]


def check_run(
    folder: Path,
    *,
    verify_message: MessageVerifier,
    miners: Sequence[Path] = (),
    ranker: Callable[[], Ranker] | None = None,
    count: Callable[[int], int] | None = None,
    batches_per_epoch: int | None = None,
) -> Report:
    """Holds a run's folder, which no validator may be using, to RULES.

    `miners` are folders of miners' caches, with their receipts.jsonl. Without `ranker` weights are not recomputed,
    without `count` (units in a micro-batch) work is not; `batches_per_epoch` is else what the run's metrics say.
    Raises ValueError where there is no run, or a validator uses it.
    """
    with copy_of_run(folder) as copy:
        run = read(copy, verify_message)
    held = [entry for miner in miners for entry in receipts_of(miner, run)]
    told = (r.metrics["epoch_total"] for r in run.rounds if "epoch_total" in r.metrics)
    once = json.loads(run.meta.get("coverage", '""')) == "once"
    applied, walked = _walk(run, (batches_per_epoch or next(told, 0)) if once else 0)
    found = [
        *(*run.wrong, *walked, *_rounds(run), *_carried(run), *_ordered(run), *_late(run), *_complete(run, applied)),
        *(*_lost(run, held), *_payloads(run), *_dropped(run), *_chain(run), *_stale(run)),
        *(*_weights(run, ranker), *_work(run, count), *_snapshots(run)),
    ]
    proved = {
        "rounds": len(run.rounds),
        "orders": len(run.orders),
        "receipts": len(run.receipts),
        "replies accepted": sum(1 for _ in run.accepted()),
        "micro-batches accepted": int((applied >= 0).sum()),
        "late notes": len(run.late),
        "payloads in the spool": len(run.spooled),
        "snapshots": len(run.snapshots),
        "receipts that miners hold": len(held),
        "signatures": run.signatures,
    }
    return Report(sorted(found, key=lambda v: (v.round is None, v.round or 0, v.rule)), proved)


# --- indices ----------------------------------------------------------------------------------------------------------


def _walk(run: RunRecords, batches_per_epoch: int) -> tuple[Indices, list[Violation]]:
    """Round by round: `twice`, `disjoint`, `epoch`. Also the round that accepted each index, or -1."""
    applied = np.full(_room(run), -1, np.int64)
    held = np.full_like(applied, -1)  # the last round in which an order had each index; those not committed are one
    whole = 0  # every index below it was accepted in a round before this one
    found: list[Violation] = []
    for place, order in sorted(run.orders.items()):
        round, settled = (min(n, len(run.rounds)) for n in (place[0], run.settled(place)))
        while whole < len(applied) and 0 <= applied[whole] < round:
            whole += 1
        receipt = run.receipts.get(place)
        done = _indices(receipt.done if receipt and receipt.verdict == "ACCEPTED" else (), len(applied))
        twice = done[applied[done] >= 0]
        ordered = _indices(order.ranges, len(applied))
        clash = ordered[((applied[ordered] >= 0) & (applied[ordered] < round)) | (held[ordered] >= round)]
        held[ordered], applied[done] = settled, settled
        found += _named("twice", *place, twice, "accepted before")
        found += _named("disjoint", *place, np.setdiff1d(clash, twice), "ordered or accepted already")
        epoch = (order.ranges[-1].stop - 1) // batches_per_epoch if order.ranges and batches_per_epoch else 0
        if whole < epoch * batches_per_epoch:
            found.append(Violation("epoch", *place, f"epoch {epoch} was ordered, index {whole} was not accepted yet"))
    return applied, found


def _room(run: RunRecords) -> int:
    """As many indices as there can be below the cursor, whatever a damaged ledger says."""
    ranges = [r for order in run.orders.values() for r in order.ranges]
    return min(max((stop for _, stop in ranges), default=0), sum(stop - start for start, stop in ranges))


def _indices(ranges: Iterable[Range], room: int) -> Indices:
    spans = [np.arange(start, min(stop, room)) for start, stop in ranges]
    return np.concatenate(spans) if spans else np.zeros(0, np.int64)


def _named(rule: str, round: int, hotkey: Hotkey | None, indices: Indices, what: str) -> Iterator[Violation]:
    if len(indices):
        yield Violation(rule, round, hotkey, f"{len(indices)} indices, {indices[0]} the first, were {what}")


def _complete(run: RunRecords, applied: Indices) -> Iterator[Violation]:
    """At the newest commit. Its cursor may or may not know of the orders that are open."""
    if not run.rounds:
        return
    head, room = run.rounds[-1], len(applied)
    if head.next > room:
        yield Violation("complete", head.round, None, f"the cursor is at {head.next}, {room} were ordered")
    ordered = [r for place, order in run.orders.items() if run.settled(place) > head.round for r in order.ranges]
    accepted, returned = np.flatnonzero(applied >= 0), _indices(head.returned, room)
    known = np.concatenate([accepted, returned, _indices(ordered, room)])
    lost = np.setdiff1d(np.arange(min(head.next, room)), known)
    yield from _named("complete", head.round, None, lost, "lost: not accepted, not returned, in no open order")
    both = np.intersect1d(accepted, returned)
    yield from _named("complete", head.round, None, both, "accepted, and returned to be ordered again")
    beyond = accepted[accepted >= head.next]
    yield from _named("complete", head.round, None, beyond, "accepted, and the cursor says that they were not ordered")


def _ordered(run: RunRecords) -> Iterator[Violation]:
    for place, receipt in run.receipts.items():
        accepted = receipt.verdict == "ACCEPTED"
        order = run.orders.get(place)
        if accepted and order and not all(_within(r, order.ranges) for r in receipt.done):
            yield Violation("ordered", *place, f"accepted {list(receipt.done)}, ordered {list(order.ranges)}")
        if accepted != bool(receipt.done) or (receipt.work and not accepted):
            credit = f"{list(receipt.done)}, {receipt.work} units"
            yield Violation("ordered", *place, f"{receipt.verdict}, with {credit} to its credit")


def _within(done: Range, ordered: Iterable[Range]) -> bool:
    """`ordered` may touch each other, never overlap."""
    inside = (min(done.stop, r.stop) - max(done.start, r.start) for r in ordered)
    return sum(max(0, size) for size in inside) == done.stop - done.start


# --- time, and what was not to be lost --------------------------------------------------------------------------------


def _rounds(run: RunRecords) -> Iterator[Violation]:
    for expected, row in enumerate(run.rounds):
        if row.round != expected:
            yield Violation("rounds", row.round, None, f"it is the committed round number {expected}")
    newest = run.rounds[-1].round if run.rounds else -1
    for place in sorted(run.orders.keys() | run.receipts.keys()):
        if place not in run.receipts and run.settled(place) <= newest:
            yield Violation("rounds", *place, "its order has no receipt")
        elif place in run.receipts and run.receipts[place].order != run.names.get(place):
            yield Violation("rounds", *place, "its receipt is for another order")


def _carried(run: RunRecords) -> Iterator[Violation]:
    for place, receipt in run.receipts.items():
        order = run.orders.get(place)
        latest = place[0] + (order is not None and order.inner_steps is not None)
        if not place[0] <= receipt.round <= latest:
            yield Violation("carried", *place, f"its receipt is of round {receipt.round}")


def _late(run: RunRecords) -> Iterator[Violation]:
    for place, receipt in run.accepted():
        if place in run.orders and receipt.seconds > (limit := run.orders[place].deadline_s):
            yield Violation(
                "late", *place, f"accepted {receipt.seconds:g} s after the order, the deadline was {limit:g} s"
            )
        if place in run.late:
            yield Violation("late", *place, "accepted, and noted as late too")
    for place, (reply, receipt) in run.late.items():
        if receipt.verdict != Fault.LATE or {reply.order, receipt.order} != {run.names.get(place)}:
            yield Violation(
                "late", *place, f"noted as late with a receipt {receipt.verdict} that does not fit its order"
            )


def _lost(run: RunRecords, held: Iterable[Held]) -> Iterator[Violation]:
    """What a miner was told about work that is not in the model may have been found out of date by a restart."""
    for place, signed, receipt in held:
        if receipt.verdict == "ACCEPTED" and run.signed.get(place) != signed:
            kept = run.receipts.get(place)
            text = f"its ledger says {kept.verdict}" if kept else "the ledger has none"
            yield Violation("lost", *place, f"the miner holds a receipt ACCEPTED, and {text}")


def _payloads(run: RunRecords) -> Iterator[Violation]:
    """The spool goes back to the second-newest snapshot."""
    since = sorted(run.snapshots)[-2] if len(run.snapshots) >= 2 else 0
    for place, receipt in run.accepted():
        if receipt.round >= since:
            received = run.spooled.get(place)
            if received is None:
                yield Violation("payload", *place, "accepted, but no whole payload and reply are in the spool")
            elif (received.reply.order, received.reply.done) != (receipt.order, receipt.done):
                yield Violation("payload", *place, f"the reply in the spool did {list(received.reply.done)}")


def _dropped(run: RunRecords) -> Iterator[Violation]:
    """A reply to another order is one to an order that a restart replaced."""
    for place, received in run.spooled.items():
        receipt = run.receipts.get(place)
        if (
            receipt
            and received.reply.order == receipt.order
            and receipt.verdict in (Fault.SILENT, Fault.LEAVING, Fault.LATE)
        ):
            yield Violation(
                "dropped", *place, f"its whole reply is in the spool, and its receipt says {receipt.verdict}"
            )


# --- versions, weights ------------------------------------------------------------------------------------------------


def _versions(run: RunRecords) -> list[Version]:
    """Before each committed round, and after the last."""
    first = min(run.orders, default=None)
    return [
        *([run.orders[first].version] if first else [r.version for r in run.rounds[:1]]),
        *(r.version for r in run.rounds),
    ]


def _chain(run: RunRecords) -> Iterator[Violation]:
    versions = _versions(run)
    accepted = {receipt.round for _, receipt in run.accepted()}
    for before, row in zip(versions, run.rounds, strict=False):
        if (row.version != before) != (row.round in accepted):
            text = (
                "a new version, and nothing was accepted"
                if row.version != before
                else "no new version of what was accepted"
            )
            yield Violation("chain", row.round, None, text)
    distinct = list(dict.fromkeys(versions))
    base_of: dict[Version | None, Version | None] = dict(zip(distinct[1:], distinct, strict=False))
    proofs: dict[Version, Digest] = {}
    for place, order in run.orders.items():
        way = order.update.versions
        if way[-1] != order.version:
            yield Violation("chain", *place, "the order's version does not follow from its base and its update")
        elif any(base_of.get(version, before) != before for before, version in pairwise(way)):
            yield Violation("chain", *place, "the way to the order's version is not by the versions before it")
        if order.state_digest and proofs.setdefault(order.version, order.state_digest) != order.state_digest:
            yield Violation("chain", *place, "its version's state has another digest than in another order")


def _stale(run: RunRecords) -> Iterator[Violation]:
    versions = _versions(run)
    for place, order in run.orders.items():
        newest = min(place[0], len(versions) - 1)
        allowed = versions[max(0, newest - order.staleness) : newest + 1]
        ahead = place[0] > newest and order.update.versions[-2] == versions[-1]  # of a round whose commit was under way
        if order.version not in allowed and not ahead:
            yield Violation("stale", *place, f"ordered on version {order.version[:12]}, not {allowed[-1][:12]}")


def _weights(run: RunRecords, make: Callable[[], Ranker] | None) -> Iterator[Violation]:
    receipts: dict[int, list[Receipt]] = defaultdict(list)
    for receipt in run.receipts.values():
        receipts[receipt.round].append(receipt)
    for row in run.rounds:
        weights = run.weights.get(row.round, {})
        if make is not None:
            ranker = make()
            ranker.load_state_dict(row.ranker)
            expected = ranker.weights()
            if weights.keys() != expected.keys() or not all(math.isclose(weights[k], w) for k, w in expected.items()):
                yield Violation("weights", row.round, None, f"{weights}, by the ranker's state {dict(expected)}")
        for receipt in receipts[row.round]:
            if receipt.weight != weights.get(receipt.hotkey, 0.0):
                said = f"the receipt says {receipt.weight:g}, the round {weights.get(receipt.hotkey, 0.0):g}"
                yield Violation("weights", row.round, receipt.hotkey, said)


def _work(run: RunRecords, count: Callable[[int], int] | None) -> Iterator[Violation]:
    if count is None:
        return
    for place, receipt in run.accepted():
        work = sum(count(index) for r in receipt.done for index in range(*r))
        if work != receipt.work:
            yield Violation("work", *place, f"{receipt.work} units were credited, its indices hold {work}")


def _snapshots(run: RunRecords) -> Iterator[Violation]:
    versions = _versions(run)
    for round, version in run.snapshots.items():
        expected = versions[round] if round < len(versions) else None
        if version != expected:
            yield Violation(
                "snapshot", round, None, f"it is of version {version[:12]}, the ledger says {str(expected)[:12]}"
            )
