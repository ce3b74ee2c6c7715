"""Schedule faults by a seed: the same seed, rounds and miners give the same schedule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

VALIDATOR = "validator"

# Relative frequency, and the least and most seconds that it lasts.
KINDS: dict[str, tuple[int, float, float]] = {
    "kill": (6, 0.0, 3.0),  # SIGKILL to a miner, which is restarted after that time
    "kill-validator": (3, 0.0, 2.0),  # the same, with --resume
    "stop-validator": (1, 0.0, 1.0),  # SIGTERM, then --resume
    "pause": (5, 0.2, 3.0),  # SIGSTOP to a miner, then SIGCONT
    "pause-validator": (1, 0.2, 2.0),
    "reset": (5, 0.0, 2.0),  # RST to every connection of a miner; new ones live for `amount` bytes
    "stall": (4, 0.5, 4.0),  # a miner's proxy accepts everything and relays nothing
    "skew": (2, 0.0, 0.5),  # a miner is killed, and restarted with its clock wrong by `amount` seconds
    "skew-validator": (1, 0.0, 0.5),
    "disk": (1, 0.5, 3.0),  # a miner's disk is full
    "disk-validator": (1, 0.5, 3.0),  # the validator's disk is full: it may exit, and is resumed once there is space
    "spool": (1, 0.0, 1.0),  # for some rounds the spool has room for `amount` percent of a round's payloads
    "leave": (4, 0.0, 3.0),  # a miner gets SIGTERM, and joins again later
}


@dataclass(frozen=True)
class Event:
    """A fault that begins once `round` rounds are committed, and lasts `seconds`."""

    round: int
    kind: str
    target: str  # a miner's name, or VALIDATOR
    seconds: float
    amount: float = 0.0


def schedule(
    seed: int, rounds: int, miners: Sequence[str], events: int, quiet_rounds: int, kinds: Sequence[str] = ()
) -> list[Event]:
    """Spread `events` faults over all rounds but the first three and the last `quiet_rounds`.

    Kinds are drawn without replacement from a deck that holds each as often as KINDS says, so that a long schedule has
    every kind. With `kinds`, only these are drawn.
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
                round=3 + (rounds - quiet_rounds - 3) * number // max(1, events),
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
