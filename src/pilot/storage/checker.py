"""Check from a run's files on disk that its marketplace obeyed every rule in RULES.

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

from pilot.storage.run_reader import MessageVerifier, OrderKey, RunRecords, Violation, copy_of_run, read, receipts_of
from protocol import Digest, Fault, Hotkey, Range, Receipt, Signed, Version

RULES = {
    "signature": "messages are signed by the right key, and recorded under their run, round and miner",
    "row": "every column of the ledger agrees with the signed message",
    "rounds": "rounds are consecutive, each order of a committed one has its receipt or is carried into the next",
    "carried": "an order is settled by its own round, or by the next one if it asks for inner steps",
    "twice": "no micro-batch index was accepted twice",
    "ordered": "only ordered work was accepted, and no faulted reply was credited",
    "late": "no reply was accepted after its deadline, or both accepted and recorded as late",
    "disjoint": "no index was ordered while another open order held it, or after it was accepted",
    "complete": "every index below the cursor is accepted, returned or in an open order, and only one of these",
    "epoch": "--coverage once: no index of an epoch was ordered before all of the previous epoch were accepted",
    "lost": "every ACCEPTED receipt that a miner holds is in the ledger, byte for byte",
    "payload": "every accepted payload that a restart may need is intact in the spool, with its reply",
    "dropped": "no reply that was received whole was treated as missing",
    "chain": "each version follows from the previous one, and only accepted work makes a new one",
    "stale": "each order names the version of its round, or with staleness the previous one",
    "weights": "weights follow from the ranker's state, and receipts agree",
    "work": "the work of a receipt is the sum over its indices",
    "snapshot": "each snapshot holds the version that the ledger names",
}

Indices = np.ndarray[Any, np.dtype[np.int64]]
Held = tuple[OrderKey, Signed, Receipt]  # a receipt that a miner has


class Ranker(Protocol):
    """The part of a `pilot.ranking.Ranker` that recomputes weights."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def weights(self) -> Mapping[Hotkey, float]: ...


@dataclass(frozen=True)
class Report:
    """The violations found, and how many records of each kind were checked (`proved`)."""

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
    """Check a run's folder, which no validator may be using, against RULES.

    `miners` are the folders of miners' caches, with their receipts.jsonl. Weights are recomputed only with `ranker`,
    work only with `count` (units in a micro-batch). `batches_per_epoch` defaults to what the run's metrics say.
    Raises ValueError if there is no run, or a validator is using it.
    """
    with copy_of_run(folder) as copy:
        run = read(copy, verify_message)
    held = [entry for miner in miners for entry in receipts_of(miner, run)]
    recorded = (r.metrics["epoch_total"] for r in run.rounds if "epoch_total" in r.metrics)
    once = json.loads(run.meta.get("coverage", '""')) == "once"
    applied, walked = _walk(run, (batches_per_epoch or next(recorded, 0)) if once else 0)
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
    """Check `twice`, `disjoint` and `epoch` round by round.

    Returns for each index the round that accepted it, or -1, and the violations.
    """
    applied = np.full(_index_limit(run), -1, np.int64)
    held = np.full_like(
        applied, -1
    )  # the last round in which an order held each index; all uncommitted rounds count as one
    finished = 0  # every index below it was accepted in an earlier round
    found: list[Violation] = []
    for key, order in sorted(run.orders.items()):
        round, settled = (min(n, len(run.rounds)) for n in (key[0], run.settled(key)))
        while finished < len(applied) and 0 <= applied[finished] < round:
            finished += 1
        receipt = run.receipts.get(key)
        done = _indices(receipt.done if receipt and receipt.verdict == "ACCEPTED" else (), len(applied))
        twice = done[applied[done] >= 0]
        ordered = _indices(order.ranges, len(applied))
        clash = ordered[((applied[ordered] >= 0) & (applied[ordered] < round)) | (held[ordered] >= round)]
        held[ordered], applied[done] = settled, settled
        found += _named("twice", *key, twice, "accepted before")
        found += _named("disjoint", *key, np.setdiff1d(clash, twice), "ordered or accepted already")
        epoch = (order.ranges[-1].stop - 1) // batches_per_epoch if order.ranges and batches_per_epoch else 0
        if finished < epoch * batches_per_epoch:
            found.append(Violation("epoch", *key, f"epoch {epoch} was ordered, index {finished} was not accepted yet"))
    return applied, found


def _index_limit(run: RunRecords) -> int:
    """Return an upper bound on the cursor, which holds for a damaged ledger too."""
    ranges = [r for order in run.orders.values() for r in order.ranges]
    return min(max((stop for _, stop in ranges), default=0), sum(stop - start for start, stop in ranges))


def _indices(ranges: Iterable[Range], room: int) -> Indices:
    spans = [np.arange(start, min(stop, room)) for start, stop in ranges]
    return np.concatenate(spans) if spans else np.zeros(0, np.int64)


def _named(rule: str, round: int, hotkey: Hotkey | None, indices: Indices, what: str) -> Iterator[Violation]:
    if len(indices):
        yield Violation(rule, round, hotkey, f"{len(indices)} indices, {indices[0]} the first, were {what}")


def _complete(run: RunRecords, applied: Indices) -> Iterator[Violation]:
    """Check `complete` at the newest commit, whose cursor may or may not include the open orders."""
    if not run.rounds:
        return
    head, room = run.rounds[-1], len(applied)
    if head.next > room:
        yield Violation("complete", head.round, None, f"the cursor is at {head.next}, {room} were ordered")
    ordered = [r for key, order in run.orders.items() if run.settled(key) > head.round for r in order.ranges]
    accepted, returned = np.flatnonzero(applied >= 0), _indices(head.returned, room)
    known = np.concatenate([accepted, returned, _indices(ordered, room)])
    lost = np.setdiff1d(np.arange(min(head.next, room)), known)
    yield from _named("complete", head.round, None, lost, "lost: neither accepted, nor returned, nor in an open order")
    both = np.intersect1d(accepted, returned)
    yield from _named("complete", head.round, None, both, "accepted, and returned to be ordered again")
    beyond = accepted[accepted >= head.next]
    yield from _named("complete", head.round, None, beyond, "accepted, but not ordered according to the cursor")


def _ordered(run: RunRecords) -> Iterator[Violation]:
    for key, receipt in run.receipts.items():
        accepted = receipt.verdict == "ACCEPTED"
        order = run.orders.get(key)
        if accepted and order and not all(_within(r, order.ranges) for r in receipt.done):
            yield Violation("ordered", *key, f"accepted {list(receipt.done)}, ordered {list(order.ranges)}")
        if accepted != bool(receipt.done) or (receipt.work and not accepted):
            credit = f"{list(receipt.done)}, {receipt.work} units"
            yield Violation("ordered", *key, f"{receipt.verdict}, credited with {credit}")


def _within(done: Range, ordered: Iterable[Range]) -> bool:
    """Return whether the ordered ranges, which may touch but not overlap, contain `done`."""
    inside = (min(done.stop, r.stop) - max(done.start, r.start) for r in ordered)
    return sum(max(0, size) for size in inside) == done.stop - done.start


# --- time, and what must not be lost ----------------------------------------------------------------------------------


def _rounds(run: RunRecords) -> Iterator[Violation]:
    for expected, row in enumerate(run.rounds):
        if row.round != expected:
            yield Violation("rounds", row.round, None, f"round {expected} was expected here")
    newest = run.rounds[-1].round if run.rounds else -1
    for key in sorted(run.orders.keys() | run.receipts.keys()):
        if key not in run.receipts and run.settled(key) <= newest:
            yield Violation("rounds", *key, "its order has no receipt")
        elif key in run.receipts and run.receipts[key].order != run.order_digests.get(key):
            yield Violation("rounds", *key, "its receipt is for another order")


def _carried(run: RunRecords) -> Iterator[Violation]:
    for key, receipt in run.receipts.items():
        order = run.orders.get(key)
        latest = key[0] + (order is not None and order.inner_steps is not None)
        if not key[0] <= receipt.round <= latest:
            yield Violation("carried", *key, f"its receipt is of round {receipt.round}")


def _late(run: RunRecords) -> Iterator[Violation]:
    for key, receipt in run.accepted():
        if key in run.orders and receipt.seconds > (limit := run.orders[key].deadline_s):
            yield Violation(
                "late", *key, f"accepted {receipt.seconds:g} s after the order, the deadline was {limit:g} s"
            )
        if key in run.late:
            yield Violation("late", *key, "accepted, and recorded as late too")
    for key, (reply, receipt) in run.late.items():
        if receipt.verdict != Fault.LATE or {reply.order, receipt.order} != {run.order_digests.get(key)}:
            yield Violation(
                "late", *key, f"recorded as late with a receipt {receipt.verdict} that does not fit its order"
            )


def _lost(run: RunRecords, held: Iterable[Held]) -> Iterator[Violation]:
    """Check `lost`. Only ACCEPTED receipts count: a restart may have replaced others."""
    for key, signed, receipt in held:
        if receipt.verdict == "ACCEPTED" and run.signed.get(key) != signed:
            kept = run.receipts.get(key)
            text = f"its ledger says {kept.verdict}" if kept else "the ledger has none"
            yield Violation("lost", *key, f"the miner holds a receipt ACCEPTED, but {text}")


def _payloads(run: RunRecords) -> Iterator[Violation]:
    """Check `payload` back to the second-newest snapshot, as far as the spool goes."""
    since = sorted(run.snapshots)[-2] if len(run.snapshots) >= 2 else 0
    for key, receipt in run.accepted():
        if receipt.round >= since:
            received = run.spooled.get(key)
            if received is None:
                yield Violation("payload", *key, "accepted, but the spool lacks its intact payload and reply")
            elif (received.reply.order, received.reply.done) != (receipt.order, receipt.done):
                yield Violation("payload", *key, f"the reply in the spool did {list(received.reply.done)}")


def _dropped(run: RunRecords) -> Iterator[Violation]:
    """Check `dropped`. A reply to another order answers an order that a restart replaced."""
    for key, received in run.spooled.items():
        receipt = run.receipts.get(key)
        if (
            receipt
            and received.reply.order == receipt.order
            and receipt.verdict in (Fault.SILENT, Fault.LEAVING, Fault.LATE)
        ):
            yield Violation(
                "dropped", *key, f"its reply is intact in the spool, but its receipt says {receipt.verdict}"
            )


# --- versions, weights ------------------------------------------------------------------------------------------------


def _versions(run: RunRecords) -> list[Version]:
    """Return the version before each committed round, and the one after the last."""
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
                "a new version, but nothing was accepted"
                if row.version != before
                else "no new version, but work was accepted"
            )
            yield Violation("chain", row.round, None, text)
    distinct = list(dict.fromkeys(versions))
    base_of: dict[Version | None, Version | None] = dict(zip(distinct[1:], distinct, strict=False))
    proofs: dict[Version, Digest] = {}
    for key, order in run.orders.items():
        path = order.update.versions
        if path[-1] != order.version:
            yield Violation("chain", *key, "the order's version does not follow from its base and its update")
        elif any(base_of.get(version, before) != before for before, version in pairwise(path)):
            yield Violation("chain", *key, "the path to the order's version does not follow the run's versions")
        if order.state_digest and proofs.setdefault(order.version, order.state_digest) != order.state_digest:
            yield Violation("chain", *key, "its version has another state digest than in an earlier order")


def _stale(run: RunRecords) -> Iterator[Violation]:
    versions = _versions(run)
    for key, order in run.orders.items():
        newest = min(key[0], len(versions) - 1)
        allowed = versions[max(0, newest - order.staleness) : newest + 1]
        ahead = (
            key[0] > newest and order.update.versions[-2] == versions[-1]
        )  # ordered while the commit of its round was under way
        if order.version not in allowed and not ahead:
            yield Violation("stale", *key, f"ordered on version {order.version[:12]}, not {allowed[-1][:12]}")


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
            kept = {receipt.hotkey for receipt in receipts[row.round]}  # older rounds keep those of their own miners
            due = expected.keys() if row is run.rounds[-1] else expected.keys() & kept
            fits = due <= weights.keys() <= expected.keys()
            if not fits or not all(math.isclose(w, expected[k]) for k, w in weights.items()):
                yield Violation(
                    "weights", row.round, None, f"recorded {weights}, the ranker's state gives {dict(expected)}"
                )
        for receipt in receipts[row.round]:
            if receipt.weight != weights.get(receipt.hotkey, 0.0):
                said = f"the receipt says {receipt.weight:g}, the round {weights.get(receipt.hotkey, 0.0):g}"
                yield Violation("weights", row.round, receipt.hotkey, said)


def _work(run: RunRecords, count: Callable[[int], int] | None) -> Iterator[Violation]:
    if count is None:
        return
    for key, receipt in run.accepted():
        work = sum(count(index) for r in receipt.done for index in range(*r))
        if work != receipt.work:
            yield Violation("work", *key, f"credited with {receipt.work} units, its indices hold {work}")


def _snapshots(run: RunRecords) -> Iterator[Violation]:
    versions = _versions(run)
    for round, version in run.snapshots.items():
        expected = versions[round] if round < len(versions) else None
        if version != expected:
            yield Violation(
                "snapshot", round, None, f"it is of version {version[:12]}, the ledger says {str(expected)[:12]}"
            )
