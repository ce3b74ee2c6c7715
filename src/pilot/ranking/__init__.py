"""Rankers turn evidence into scores and weights. One file each; `package.module:Class` is a user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Protocol, runtime_checkable

from pydantic import Field, TypeAdapter, ValidationError

from pilot.common.registry import load
from protocol import Fault, Hotkey, Name, Number, one_line

SCORES: Final = TypeAdapter(dict[Hotkey, dict[Name, Number]])
WEIGHTS: Final = TypeAdapter(dict[Hotkey, Annotated[float, Field(ge=0, allow_inf_nan=False)]])
TOLERANCE = 1e-6  # of the weights' sum
SHOWN = 40  # characters of a wrong value


class BadRanker(ValueError):
    """Report what a user's ranker or measure returned and may not. The text says in one line what to change."""


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


@dataclass(frozen=True)
class Ranking:
    """What a ranker says after a round."""

    scores: Mapping[Hotkey, Mapping[str, float]]  # of each miner that the round showed
    weights: Mapping[Hotkey, float]
    state: str  # JSON


def rank(ranker: Ranker, evidence: Sequence[Evidence]) -> Ranking:
    """Give a ranker one round's evidence. Raises BadRanker unless scores, weights and state are as they must be."""
    scores = _checked(ranker, "update()", SCORES, ranker.update(evidence))
    if missing := {e.hotkey for e in evidence} - scores.keys():
        raise _bad(ranker, f"update() gave no scores to {min(missing)}, which was in the evidence")
    weights = _checked(ranker, "weights()", WEIGHTS, ranker.weights())
    total = sum(weights.values())
    if total and abs(total - 1) > TOLERANCE:
        raise _bad(ranker, f"weights() sum to {total:.6g}, they must sum to 1")
    try:
        state = json.dumps(ranker.state_dict(), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(ranker, f"state_dict() is not JSON ({error})") from None
    return Ranking(scores, weights, state)


def _checked(ranker: Ranker, method: str, shape: TypeAdapter[dict[str, Any]], value: Any) -> dict[str, Any]:
    """Return what a ranker's method returned as dictionaries of floats."""
    try:
        return shape.validate_python({key: value[key] for key in value}, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = " ".join(str(part) for part in first["loc"] if part != "[key]")
        raise _bad(ranker, f"{method} {where}: {first['msg']}, it is {first['input']!r:.{SHOWN}}") from None
    except (TypeError, KeyError, IndexError):
        raise _bad(ranker, f"{method} returned {type(value).__name__}, it must return a dict by hotkey") from None


def _bad(ranker: Ranker, what: str) -> BadRanker:
    cls = type(ranker)
    return BadRanker(one_line(f"--ranking {cls.__module__}:{cls.__qualname__}: {what}; the round is not committed"))


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
