"""Estimate what a round's bytes cost on a miner's link, and which codecs would make them cost less.

    LinkBudget   sizes, seconds and shares of a round, from names and numbers alone
    LinkWatch    the same during a run, from measured links; warns once

Sizes are nominal (`codec.bits`): messages and headers add some hundred bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from statistics import median

from pilot.codec import bits
from pilot.common.units import format_bytes, format_mbps
from pilot.interfaces import MinerState

MAX_SHARE = 1 / 5  # share of a round; if communication takes more, a warning names codecs
WORTH = 0.9  # share of the present communication time; codecs that save less are not suggested
ROUND_TRIPS = 4  # round trips in a round: the update, the order, the reply, the payload
MEASURED_ROUNDS = 3  # before a warning
TYPICAL_BPS = 100e6  # assumed before a link is measured

Row = Mapping[str, float | int | str]

# Suggested codecs, from the least compression to the most that training tolerates well.
CODECS_UP = {
    "gradient": ("bf16", "int8", "int4", "ternary-rc"),
    "diloco": ("bf16", "int8", "int4", "2bit"),
}
CODECS_DOWN = {"delta": ("int8", "int4", "2bit"), "full": ("fp32", "bf16")}


@dataclass(frozen=True)
class Rate:
    """A link's bandwidth in bits a second, and the round trip of a short request in seconds."""

    up_bps: float
    down_bps: float
    latency_s: float = 0.0

    def __str__(self) -> str:
        return f"{format_mbps(self.up_bps)} Mbit/s up, {format_mbps(self.down_bps)} down"


TYPICAL = Rate(TYPICAL_BPS, TYPICAL_BPS)


def median_rate(links: Iterable[MinerState]) -> Rate | None:
    """Return the median of each direction over the links measured so far; None if a direction was measured on none."""
    known = list(links)
    up = [link.up_bps for link in known if link.up_bps]
    down = [link.down_bps for link in known if link.down_bps]
    if not up or not down:
        return None
    return Rate(median(up), median(down), median([link.latency_s for link in known if link.latency_s] or [0.0]))


@dataclass(frozen=True)
class LinkBudget:
    """One miner's communication in a round. With neither `round_s` nor `compute_s` its share of a round is unknown."""

    parameters: int
    buffers: int  # values that travel beside them
    up: str  # codec
    down: str
    round_s: float = 0.0  # the time budget of a round; 0: as long as computing and communication take
    compute_s: float = 0.0  # seconds of computing in a round without a time budget; 0: unknown
    overlap: bool = False  # miners compute while they communicate
    mode: str = "gradient"
    broadcast: str = "delta"

    @property
    def bytes_up(self) -> float:
        return self.parameters * bits(self.up) / 8

    @property
    def bytes_down(self) -> float:
        return (self.parameters + self.buffers) * bits(self.down) / 8

    def communication_s(self, rate: Rate) -> float:
        """Return the seconds that a miner without overlap spends on sending, receiving and waiting for messages."""
        return 8 * self.bytes_up / rate.up_bps + 8 * self.bytes_down / rate.down_bps + ROUND_TRIPS * rate.latency_s

    def share(self, rate: Rate) -> float | None:
        """Return communication as a share of the round; None if the round's length is unknown."""
        communication_s = self.communication_s(rate)
        if self.round_s:
            return communication_s / self.round_s
        if not self.compute_s:
            return None
        whole_s = max(self.compute_s, communication_s) if self.overlap else self.compute_s + communication_s
        return communication_s / whole_s

    def utilisation(self, rate: Rate) -> float | None:
        """Return computing as a share of the round, if nothing but the link limits it."""
        share = self.share(rate)
        if share is None or not self.overlap:
            return None if share is None else max(0.0, 1 - share)
        return min(1.0, (self.round_s or self.compute_s) / max(self.communication_s(rate), 1e-9))

    def describe(self, rate: Rate, link: str) -> str:
        """Return one line with sizes, seconds and shares. `link` names the link, such as "the median link"."""
        share, used = self.share(rate), self.utilisation(rate)
        text = (
            f"{format_bytes(self.bytes_up)} up ({self.up}) and {format_bytes(self.bytes_down)} down ({self.down}) "
            f"a round and miner: {self.communication_s(rate):.3g} s on {link} of {rate}"
        )
        return text if share is None else f"{text}, {share:.0%} of it; computing has {used:.0%}"

    def warning(self, rate: Rate) -> str | None:
        """Return one line that names better flags if communication takes more than MAX_SHARE of a round."""
        share = self.share(rate)
        if share is None or share <= MAX_SHARE:
            return None
        text = f"communication takes {share:.0%} of a round on links of {rate}"
        options = sorted(self._smaller(), key=lambda o: (self._flags(o).count("--"), -o.communication_s(rate)))
        fitting = [option for option in options if (option.share(rate) or 0.0) <= MAX_SHARE]
        best = fitting[0] if fitting else min([self, *options], key=lambda option: option.communication_s(rate))
        then = best.share(rate) or 0.0
        if not fitting and then > WORTH * share:  # latency takes the time, not bytes
            return f"{text}; longer rounds would make it less"
        return f"{text}; {self._flags(best)} would make it {then:.0%}" + ("" if fitting else ", longer rounds less")

    def _smaller(self) -> Iterator[LinkBudget]:
        """Yield what other flags would make of it, with fewer bytes in a direction and more in none."""
        fewer_up = [name for name in CODECS_UP[self.mode] if bits(name) < bits(self.up)]
        fewer_down = [name for name in CODECS_DOWN[self.broadcast] if bits(name) < bits(self.down)]
        for up, down in product([self.up, *fewer_up], [self.down, *fewer_down]):
            if (up, down) != (self.up, self.down):
                yield replace(self, up=up, down=down)
        if self.broadcast == "full":
            for down in CODECS_DOWN["delta"]:
                yield replace(self, down=down, broadcast="delta")

    def _flags(self, other: LinkBudget) -> str:
        flags = [f"--broadcast {other.broadcast}"] if other.broadcast != self.broadcast else []
        flags += [f"--codec.up {other.up}"] if other.up != self.up else []
        flags += [f"--codec.down {other.down}"] if other.down != self.down else []
        return " ".join(flags)


class LinkWatch:
    """The link budget during a run, with the miners' measured links."""

    def __init__(
        self, budget: LinkBudget, links: Callable[[], Iterable[MinerState]], say: Callable[[str], object]
    ) -> None:
        self.budget, self._links, self._say = budget, links, say
        self._measured = 0  # rounds
        self._warned = False

    def introduce(self) -> None:
        """Print the budget for a typical link, before anything is measured."""
        self._say(self.budget.describe(TYPICAL, "a link"))

    def observe(self, row: Row) -> dict[str, float]:
        """Return the metrics of the links after a round, once they are measured; `row` has the round's `compute_s`."""
        rate = median_rate(self._links())
        if compute_s := float(row.get("compute_s", 0.0)):
            self.budget = replace(self.budget, compute_s=compute_s)
        if rate is None or (share := self.budget.share(rate)) is None:
            return {}
        self._measured += 1
        if self._measured >= MEASURED_ROUNDS and not self._warned and (warning := self.budget.warning(rate)):
            self._warned = True
            self._say(warning)
        return {
            "link_up_mbps": rate.up_bps / 1e6,
            "link_down_mbps": rate.down_bps / 1e6,
            "communication": share,
            "utilisation_expected": self.budget.utilisation(rate) or 0.0,
        }
