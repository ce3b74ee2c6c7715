"""Evidence → scores → weights. One file a ranker in the literal dict; `package.module:Class` is one of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from protocol import Fault, Hotkey


@dataclass(frozen=True)
class Evidence:
    """What one round showed of one miner. Only what the validator checked itself: nothing here is self-reported."""

    hotkey: Hotkey
    fault: Fault | None  # None: accepted
    work: int  # examples or tokens accepted, 0 with a fault
    ordered: int  # examples or tokens that were ordered; with a time budget, which orders none, as `work`


@runtime_checkable
class Ranker(Protocol):
    """Pure state: no clock, no randomness. Its state is JSON and is part of a round's commit."""

    def update(self, evidence: Sequence[Evidence]) -> Mapping[Hotkey, Mapping[str, float]]:
        """One round's evidence; returns each miner's named scores, which its receipt shows."""
        ...

    def weights(self) -> Mapping[Hotkey, float]:
        """Non-negative, summing to 1; empty while nobody has earned anything."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


RANKERS: dict[str, str] = {
    "accepted_work": "pilot.ranking.accepted_work:AcceptedWork",
}


def load_ranker(name: str) -> Ranker:
    """The ranker of that name, or a user's own `package.module:Class`. ValueError where there is none."""
    target = RANKERS.get(name, name)
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ValueError(f"--ranking {name}: unknown; known: {', '.join(RANKERS)}, or your own package.module:Class")
    try:
        ranker = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:  # TypeError: no class, or one that takes arguments
        raise ValueError(f"--ranking {name}: {error}; it must name an importable class") from None
    if not isinstance(ranker, Ranker):
        raise ValueError(f"--ranking {name}: a {type(ranker).__name__} has not all methods of ranking.Ranker")
    return ranker
