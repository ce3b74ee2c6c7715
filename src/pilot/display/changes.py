"""Notice what a person should hear of: miners that go or come back, refusals, nobody left, a slow round."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from pilot.interfaces import MinerState
from protocol import Hotkey, Receipt

NAME = 8  # characters of a hotkey that are shown
AGAIN_S = (60.0, 300.0, 900.0, 3600.0)  # a state that lasts is said again after these times; then every hour
SLOW_S, SLOW_TIMES = 30.0, 4.0  # a round is slow that lasts so long, and so many times the usual
USUAL = 20  # rounds that "usual" is the median of
NAMED = 5  # miners named in one line


class Changes:
    """Turns the state of the miners, looked at now and then, into one line for each change.

    Times are seconds of any steady clock.
    """

    def __init__(self) -> None:
        self._away: dict[str, float] = {}  # since when, by where the miner is
        self._seen: set[str] | None = None  # miners that have been there; None before the first look
        self._nobody_since: float | None = None
        self._said = 0  # how often that has been said
        self._verdicts: dict[Hotkey, str] = {}
        self._round_since: float | None = None
        self._lasted: list[float] = []
        self._said_slow = False

    def look(self, miners: Sequence[MinerState], now: float) -> Iterator[str]:
        """Yield a line for each change since the last look."""
        first, seen = self._seen is None, self._seen or set()
        self._seen = seen
        for miner in miners:
            name, place = _name(miner), miner.endpoint
            if miner.state == "away":
                if place in seen and place not in self._away:
                    self._away[place] = now
                    yield f"miner {name} at {place} is away" + (f": {miner.problem}" if miner.problem else "")
            elif place in self._away:
                yield f"miner {name} at {place} is back after {now - self._away.pop(place):.0f} s"
            elif place not in seen and not first:
                yield f"miner {name} at {place} has joined"
            if miner.state != "away":
                seen.add(place)
        yield from self._nobody(miners, now)
        yield from self._slow(miners, now)

    def _nobody(self, miners: Sequence[MinerState], now: float) -> Iterator[str]:
        if any(miner.state != "away" for miner in miners):
            if self._nobody_since is not None and self._said:
                yield f"miners are there again, after {now - self._nobody_since:.0f} s"
            self._nobody_since, self._said = None, 0
            return
        if self._nobody_since is None:
            self._nobody_since = now
        waited = now - self._nobody_since
        if self._said == 0:
            self._said = 1
            yield "waiting for miners: none is there"
        elif waited >= AGAIN_S[min(self._said, len(AGAIN_S)) - 1] + max(0, self._said - len(AGAIN_S)) * AGAIN_S[-1]:
            self._said += 1
            yield f"waiting for miners: none is there since {waited / 60:.0f} min"

    def _slow(self, miners: Sequence[MinerState], now: float) -> Iterator[str]:
        if self._round_since is None:
            self._round_since = now
        lasts = now - self._round_since
        if self._said_slow or len(self._lasted) < 3 or lasts < max(SLOW_S, SLOW_TIMES * median(self._lasted)):
            return
        late = [f"{_name(m)} ({m.state})" for m in miners if m.state not in ("away", "idle", "done")]
        if late:
            self._said_slow = True
            more = f" and {len(late) - NAMED} more" if len(late) > NAMED else ""
            usual = f"usually {median(self._lasted):.3g} s"
            yield f"this round has taken {lasts:.0f} s, {usual}: waiting for {', '.join(late[:NAMED])}{more}"

    def committed(self, round: int, receipts: Iterable[Receipt], now: float) -> Iterator[str]:
        """Yield a line for each miner whose verdict, or whose reason for it, is another than in its round before."""
        if self._round_since is not None:
            self._lasted = [*self._lasted, now - self._round_since][-USUAL:]
        self._round_since, self._said_slow = now, False
        for receipt in receipts:
            good = receipt.verdict == "ACCEPTED"
            said = "" if good else re.sub(r"[\d.,]+", "#", f"{receipt.verdict}: {receipt.reason}")
            before = self._verdicts.get(receipt.hotkey, "")
            self._verdicts[receipt.hotkey] = said
            if said == before:
                continue
            what = "accepted again" if good else f"{receipt.verdict}, {receipt.reason}"
            yield f"round {round + 1}: miner {receipt.hotkey[:NAME]} {what}"


def _name(miner: MinerState) -> str:
    return miner.hotkey[:NAME] if miner.hotkey else "?"
