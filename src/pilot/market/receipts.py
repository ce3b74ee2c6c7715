"""Turn a round's outcomes into evidence for the ranking, a receipt for each order, and a row of metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

from pilot.interfaces import Faulted, ReceivedReply
from pilot.market.scheduling import RoundPolicy
from pilot.market.verify import Contribution
from pilot.ranking import Evidence
from pilot.training.ranges import indices, size
from protocol import Digest, Fault, Hotkey, Order, Receipt
from tasks import Task

SHOWN = 64  # miners whose utilisation has a metric of its own


@dataclass(frozen=True)
class VerifiedReply:
    """A verified contribution, and the reply that brought it."""

    received: ReceivedReply
    contribution: Contribution


Outcome = VerifiedReply | Faulted
AssignmentKey = tuple[
    Hotkey, int
]  # an order by its miner and its own round: contributions are summed in the order of these


def evidence(task: Task, order: Order, outcome: Outcome, measures: Mapping[str, float]) -> Evidence:
    """Return what an order's outcome shows. A time budget orders no amount: there `ordered` is the work done."""
    work = outcome.contribution.count if isinstance(outcome, VerifiedReply) else 0
    ordered = work if order.budget_s else sum(map(task.count, indices(order.ranges)))
    return Evidence(order.hotkey, outcome.fault if isinstance(outcome, Faulted) else None, work, ordered, measures)


def by_miner(evidence: Iterable[Evidence]) -> list[Evidence]:
    """Join each miner's order of this round with one that was carried into it. A fault is a fault of both.

    Measures are means weighted by work.
    """
    found: dict[Hotkey, Evidence] = {}
    for e in evidence:
        before = found.get(e.hotkey)
        if before is None:
            found[e.hotkey] = e
            continue
        work = before.work + e.work
        measures = {**before.measures, **e.measures}
        for name in before.measures.keys() & e.measures.keys():
            measures[name] = (before.work * before.measures[name] + e.work * e.measures[name]) / work
        found[e.hotkey] = Evidence(e.hotkey, before.fault and e.fault, work, before.ordered + e.ordered, measures)
    return list(found.values())


def reason(task: Task, policy: RoundPolicy, order: Order, e: Evidence, outcome: Outcome) -> str:
    """Return the receipt's reason in one line."""
    if isinstance(outcome, Faulted):
        return outcome.reason[:1000]
    if not order.budget_s:
        return f"{e.work} of {e.ordered} {task.unit}"
    batches, seconds = size(outcome.contribution.done), outcome.received.reply.seconds
    text = f"{e.work} {task.unit} in {batches} micro-batches"
    if batches == 1 and seconds > policy.round_s:
        text += f"; one takes {seconds:.1f} s, --round-seconds gives {policy.round_s:g}"
    return text


def receipt(
    round: int,
    order: Order,
    name: Digest,
    e: Evidence,
    why: str,
    outcome: Outcome,
    scores: Mapping[str, float],
    weight: float,
) -> Receipt:
    """Make the receipt of an order with digest `name`, which round `round` settles."""
    good = outcome if isinstance(outcome, VerifiedReply) else None
    return Receipt(
        run=order.run,
        round=round,
        hotkey=order.hotkey,
        order=name,
        verdict=e.fault or "ACCEPTED",
        reason=why if order.round == round else f"{why}; carried from round {order.round}",
        done=good.contribution.done if good else (),
        work=e.work,
        scores=dict(scores),
        measures=dict(e.measures),
        weight=weight,
        seconds=max(0.0, good.received.seconds) if good else 0.0,
    )


def late_receipt(order: Order, name: Digest, done: int, seconds: float, weight: float) -> Receipt:
    """Make the receipt for a reply that came after its round was closed: recorded, not applied."""
    return Receipt(
        run=order.run,
        round=order.round,
        hotkey=order.hotkey,
        order=name,
        verdict=Fault.LATE,
        reason=f"{done} micro-batches came {seconds:.1f} s after the order, when the round was closed: not applied",
        done=(),
        work=0,
        scores={},
        weight=weight,
        seconds=seconds,
    )


def summary(
    task: Task,
    round: int,
    seconds: float,
    orders: Mapping[AssignmentKey, Order],
    outcomes: Mapping[AssignmentKey, Outcome],
) -> dict[str, float | int | str]:
    """Return the round's row of metrics over its `seconds`. `loss` is the miners' own mean, weighted by accepted work.

    Utilisation is a miner's seconds of computing, as it says, in a second of the round: for display, never for pay.
    `compute_s` is the median over the miners, and of each no more than the validator's own clock saw, so that a miner
    that lies does not change it much.
    """
    good = {part: o for part, o in sorted(outcomes.items()) if isinstance(o, VerifiedReply)}
    work = sum(d.contribution.count for d in good.values())
    used: dict[Hotkey, float] = {}
    computed: dict[Hotkey, float] = {}
    for (hotkey, _), d in good.items():
        computed[hotkey] = max(computed.get(hotkey, 0.0), min(d.received.reply.seconds, d.received.seconds))
        used[hotkey] = used.get(hotkey, 0.0) + (d.received.reply.seconds / seconds if seconds else 0.0)
    row: dict[str, float | int | str] = {
        "round": round,
        "miners": len(used),
        "faults": len(outcomes) - len(good),
        "work": work,
        "seconds": seconds,
        f"{task.unit}_per_s": work / seconds if seconds else 0.0,
        "compute_s": median(computed.values() or [0.0]),
        "bytes_up": sum(d.received.bytes_up for d in good.values()),
        "bytes_down": sum(d.received.bytes_down for d in good.values()),
        "utilisation": sum(used.values()) / len({h for h, _ in outcomes}) if outcomes else 0.0,
        "batches_done": sum(size(d.contribution.done) for d in good.values()),
        "batches_lost": sum(size(o.ranges) for part, o in orders.items() if not o.budget_s and part not in good),
    }
    if len(outcomes) <= SHOWN:
        row |= {f"utilisation.{hotkey[:8]}": value for hotkey, value in used.items()}
    if carried := sum(of < round for _, of in good):
        row["carried"] = carried
    if good:
        row["loss"] = sum(d.received.reply.loss * d.contribution.count for d in good.values()) / work
    return row
