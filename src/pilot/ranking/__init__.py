"""Rankers turn evidence into scores and weights. One file each; `package.module:Class` is a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pilot.common.registry import load
from protocol import Fault, Hotkey


@dataclass(frozen=True)
class Evidence:
    """What one round showed of one miner. The validator has checked all of it; nothing here is self-reported."""

    hotkey: Hotkey
    fault: Fault | None  # None: accepted
    work: int  # examples or tokens accepted, 0 with a fault
    ordered: int  # examples or tokens that were ordered; with a time budget, which orders none, as `work`
    measures: Mapping[str, float] = field(
        default_factory=dict
    )  # by the names that the ranker asks for; {} with a fault


@runtime_checkable
class Ranker(Protocol):
    """A ranker is pure state without clock or randomness. Its state is JSON and is committed with the round.

    An attribute `measures: tuple[str, ...]` names what it wants to see in `Evidence.measures`, out of
    `pilot.market.measures.MEASURES` or as "package.module:function". Methods run in the compute thread.
    """

    def update(self, evidence: Sequence[Evidence]) -> Mapping[Hotkey, Mapping[str, float]]:
        """Take one round's evidence, and return each miner's named scores, which its receipt shows."""
        ...

    def weights(self) -> Mapping[Hotkey, float]:
        """Return weights that are non-negative and sum to 1; empty while nobody has earned anything."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


RANKERS: dict[str, str] = {
    "accepted_work": "pilot.ranking.accepted_work:AcceptedWork",
}


def load_ranker(name: str) -> Ranker:
    """Make the ranker of that name, or a user's own `package.module:Class`. Raises ValueError where there is none."""
    cls = load("--ranking", name, RANKERS, own=True)
    try:
        ranker = cls()
    except TypeError as error:  # not a class, or one that takes arguments
        raise ValueError(f"--ranking {name}: {error}; it must name an importable class") from None
    if not isinstance(ranker, Ranker):
        raise ValueError(f"--ranking {name}: a {type(ranker).__name__} lacks methods of pilot.ranking.Ranker")
    return ranker
