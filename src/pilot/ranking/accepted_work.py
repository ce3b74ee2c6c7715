"""Pay miners for the examples or tokens that were verified and went into the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pilot.ranking import Evidence
from protocol import Hotkey

KEPT = 1024  # miners: strangers that bring new keys in each round must not make every record longer


class AcceptedWork:
    """Score the accepted work, halved every `half_life` rounds: old work fades, and newcomers catch up.

    The miners with the most work are remembered, KEPT of them.

    Not covered: whether accepted work was useful. A miner whose gradients pass the checks is paid by volume.
    """

    def __init__(self, half_life: float = 100.0) -> None:
        self.decay = 0.5 ** (1.0 / half_life)
        self.work: dict[Hotkey, float] = {}

    def update(self, evidence: Sequence[Evidence]) -> Mapping[Hotkey, Mapping[str, float]]:
        self.work = {hotkey: work * self.decay for hotkey, work in self.work.items()}
        for e in evidence:
            self.work[e.hotkey] = self.work.get(e.hotkey, 0.0) + e.work
        done = sum(e.work for e in evidence)
        scores = {
            e.hotkey: {
                "accepted_work": self.work[e.hotkey],
                "share_of_round": e.work / done if done else 0.0,
                "share_of_order": e.work / e.ordered if e.ordered else 0.0,
            }
            for e in evidence
        }
        if len(self.work) > KEPT:
            most = sorted(self.work, key=lambda hotkey: (-self.work[hotkey], hotkey))[:KEPT]
            self.work = {hotkey: self.work[hotkey] for hotkey in most}
        return scores

    def weights(self) -> Mapping[Hotkey, float]:
        total = math.fsum(self.work.values())  # exact, so the same in any order: a restart sorts them
        return {hotkey: work / total for hotkey, work in sorted(self.work.items())} if total > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        return {"work": dict(sorted(self.work.items()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.work = {str(hotkey): float(work) for hotkey, work in state["work"].items()}
