"""Find receipts that a validator cannot have signed in good faith: the miner keeps them all, as evidence."""

from __future__ import annotations

from collections.abc import Iterable

from pilot.training.ranges import size
from protocol import Fault, Receipt, Reply

# A late reply has two receipts: the first when its round was closed, the second when it came.
UNSETTLED = frozenset({Fault.SILENT, Fault.LEAVING, Fault.LATE})


def contradiction(receipt: Receipt, others: Iterable[Receipt], reply: Reply | None) -> str | None:
    """Return what a receipt contradicts; None if it contradicts nothing.

    `others` are from the same validator, and `reply` is what was sent for the order, if that is known still.
    """
    for other in others:
        if other.order != receipt.order or other == receipt:
            continue
        verdicts = {receipt.verdict, other.verdict}
        if not (Fault.LATE in verdicts and verdicts <= UNSETTLED):
            return f"another one for the same order says {_figures(other)}"
    if reply is not None and receipt.verdict == "ACCEPTED" and receipt.done != reply.done:
        return f"{size(reply.done)} micro-batches were sent, from {reply.done[0].start if reply.done else 0} on"
    return None


def _figures(receipt: Receipt) -> str:
    done = f"{size(receipt.done)} micro-batches, work {receipt.work}"
    return f"{receipt.verdict}, {done}, weight {receipt.weight:.3f}"
