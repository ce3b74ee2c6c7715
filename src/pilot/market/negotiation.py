"""Which codec an order to each miner names: the round's, or what a miner knows that does not know that one.

Miners of other releases take part all the same. What they say of themselves costs bytes: their own, up, and a whole
state a version, down, which the validator makes before it sends the round's orders.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from protocol import Hotkey, Update, one_line

FALLBACKS = ("bf16", "fp32")
SHOWN = 200  # characters of what a miner says it knows

logger = logging.getLogger(__name__)


class Negotiation:
    """`known`: the codecs that a miner has named; None where it was not heard yet."""

    def __init__(self, known: Callable[[Hotkey], Sequence[str] | None]) -> None:
        self._known = known
        self._said: set[tuple[Hotkey, str]] = set()

    def up(self, hotkey: Hotkey, codec: str) -> str:
        """Of its payload, where the others' is `codec`; fp32 where it knows none of ours."""
        known = self._known(hotkey)
        if known is None or codec in known:
            return codec
        found = next((name for name in FALLBACKS if name in known), FALLBACKS[-1])
        self._say(hotkey, codec, known, f"sends {found}")
        return found

    def needs_state(self, hotkey: Hotkey, update: Update) -> bool:
        """Whether it may find a delta on the way to a version that it cannot read."""
        known = self._known(hotkey)
        return known is not None and any(step.codec not in known for step in update.steps)

    def down(self, hotkey: Hotkey, codec: str) -> str:
        """Of the next update, as its order says."""
        known = self._known(hotkey)
        if known is None or codec in known:
            return codec
        self._say(hotkey, codec, known, "gets whole states")
        return FALLBACKS[-1]

    def _say(self, hotkey: Hotkey, codec: str, known: Sequence[str], instead: str) -> None:
        """Once."""
        if (hotkey, instead) not in self._said:
            self._said.add((hotkey, instead))
            knows = one_line(", ".join(known))[:SHOWN] or "none"
            logger.warning("%s does not know codec %s (it knows: %s): it %s", hotkey, codec, knows, instead)
