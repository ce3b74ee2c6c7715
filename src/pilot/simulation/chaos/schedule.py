"""What goes wrong when, by a seed: the same seed, rounds and miners make the same schedule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

VALIDATOR = "validator"

# How often each kind comes up; the seconds that it lasts.
KINDS: dict[str, tuple[int, float, float]] = {
    "kill": (6, 0.0, 3.0),  # SIGKILL of a miner, started again after so long
    "kill-validator": (3, 0.0, 2.0),  # the same, with --resume
    "stop-validator": (1, 0.0, 1.0),  # SIGTERM, and --resume
    "pause": (5, 0.2, 3.0),  # SIGSTOP of a miner, then SIGCONT
    "pause-validator": (1, 0.2, 2.0),
    "reset": (5, 0.0, 2.0),  # RST to every connection of a miner; new ones live for `amount` bytes
    "stall": (4, 0.5, 4.0),  # a miner's line takes everything and passes nothing on
    "skew": (2, 0.0, 0.5),  # a miner is killed, and started again with its clock wrong by `amount` seconds
    "skew-validator": (1, 0.0, 0.5),
    "disk": (1, 0.5, 3.0),  # a miner's disk is full
    "disk-validator": (1, 0.5, 3.0),  # the validator's disk is full: it may end, and is resumed when there is room
    "spool": (1, 0.0, 1.0),  # for some rounds the validator's spool has room for `amount` percent of one's payloads
    "leave": (4, 0.0, 3.0),  # a miner gets SIGTERM, and joins again
}


@dataclass(frozen=True)
class Event:
    """Something that goes wrong once `round` rounds are committed, for so long."""

    round: int
    kind: str
    target: str  # a miner's name, or VALIDATOR
    seconds: float
    amount: float = 0.0


def schedule(
    seed: int, rounds: int, miners: Sequence[str], events: int, calm: int, kinds: Sequence[str] = ()
) -> list[Event]:
    """`events` events, spread over the rounds but the first three and the last `calm` ones.

    Kinds are dealt from a deck that has each as often as KINDS says: with events enough every kind comes up. `kinds`:
    only these.
    """
    rng = random.Random(seed)
    deck: list[str] = []
    planned: list[Event] = []
    for number in range(events):
        if not deck:
            deck = [kind for kind, (weight, _, _) in KINDS.items() for _ in range(weight) if kind in (kinds or KINDS)]
            rng.shuffle(deck)
        kind = deck.pop()
        _, least, most = KINDS[kind]
        on_validator = kind.endswith(VALIDATOR) or kind == "spool"
        planned.append(
            Event(
                round=3 + (rounds - calm - 3) * number // max(1, events),
                kind=kind,
                target=VALIDATOR if on_validator else rng.choice(miners),
                seconds=round(rng.uniform(least, most), 3),
                amount=_amount(kind, rng),
            )
        )
    return planned


def _amount(kind: str, rng: random.Random) -> float:
    if kind.startswith("skew"):
        return rng.choice([-3600.0, 3600.0])
    if kind == "reset":
        return float(rng.choice([200, 2000, 20_000, 200_000]))
    return float(rng.choice([30, 250])) if kind == "spool" else 0.0
