"""The link budget: what a round's bytes cost on a miner's link, and which codecs would make them cost less.

    LinkBudget   sizes, seconds and shares of a round, from names and numbers alone
    LinkWatch    the same as the run goes on: warns once, and for `auto` chooses the codecs by the miners' links

Sizes are nominal (`codec.bits`): what is on the wire has some hundred bytes more, and what entropy coding
saves depends on the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

from pilot.codec import bits
from pilot.common.units import format_bytes, format_mbps
from pilot.interfaces import MinerState

if TYPE_CHECKING:
    pass

MOST_SHARE = 1 / 5  # of a round that communication may take
LEAST_SHARE = 1 / 20  # below which it may well take more
WORTH = 0.9  # of what communication takes: codecs that would leave more are not suggested
NEARLY = 0.98  # of it: where nothing fits, `auto` does not compress more for less than that
TRIPS = 5  # there and back in a round: the order, the update, the order again, the reply, the payload
FIRST_ROUNDS = 3  # with measured links, before `auto` chooses, or anything is warned of
PATIENT_ROUNDS = 20  # in a row that ask for another choice
TYPICAL_BPS = 100e6  # of a link that was not measured

Row = Mapping[str, float | int | str]

# From the least compression to the most that training stands well.
LADDERS_UP = {
    "gradient": ("bf16", "int8", "int4", "ternary-rc"),
    "diloco": ("bf16", "int8", "int4", "2bit"),
}
LADDERS_DOWN = {"delta": ("int8", "int4", "2bit"), "full": ("fp32", "bf16")}


@dataclass(frozen=True)
class Rate:
    """What a link carries, in bits a second, and the seconds of a short request there and back."""

    up_bps: float
    down_bps: float
    latency_s: float = 0.0

    def __str__(self) -> str:
        return f"{format_mbps(self.up_bps)} Mbit/s up, {format_mbps(self.down_bps)} down"


TYPICAL = Rate(TYPICAL_BPS, TYPICAL_BPS)


def median_rate(links: Iterable[MinerState]) -> Rate | None:
    """Each direction's median over the links where it was measured; None where one was at none."""
    known = list(links)
    up = [link.up_bps for link in known if link.up_bps]
    down = [link.down_bps for link in known if link.down_bps]
    if not up or not down:
        return None
    return Rate(median(up), median(down), median([link.latency_s for link in known if link.latency_s] or [0.0]))


@dataclass(frozen=True)
class LinkBudget:
    """A miner's round. What is not known yet is 0: then its seconds are known, but not what they are of a round."""

    parameters: int
    buffers: int  # values that go down with them
    up: str  # codec
    down: str
    round_s: float = 0.0  # a round's time budget; 0: as long as computing and communication take
    compute_s: float = 0.0  # seconds of computing, where there is no such budget
    overlap: bool = False  # communication goes on beside computing
    mode: str = "gradient"
    broadcast: str = "delta"

    @property
    def bytes_up(self) -> float:
        return self.parameters * bits(self.up) / 8

    @property
    def bytes_down(self) -> float:
        return (self.parameters + self.buffers) * bits(self.down) / 8

    def communication_s(self, rate: Rate) -> float:
        """Seconds in which a miner without overlap sends or receives, or waits for a message on its way."""
        return 8 * self.bytes_up / rate.up_bps + 8 * self.bytes_down / rate.down_bps + TRIPS * rate.latency_s

    def share(self, rate: Rate) -> float | None:
        """Communication in a second of the round; None where a round's length is not known."""
        sending_s = self.communication_s(rate)
        if self.round_s:
            return sending_s / self.round_s
        if not self.compute_s:
            return None
        return sending_s / (max(self.compute_s, sending_s) if self.overlap else self.compute_s + sending_s)

    def utilisation(self, rate: Rate) -> float | None:
        """Computing in a second of the round, as far as the link is what keeps it from that."""
        share = self.share(rate)
        if share is None or not self.overlap:
            return None if share is None else max(0.0, 1 - share)
        return min(1.0, (self.round_s or self.compute_s) / max(self.communication_s(rate), 1e-9))

    def line(self, rate: Rate, link: str) -> str:
        """All of it, for display. `link`: whose it is."""
        share, used = self.share(rate), self.utilisation(rate)
        text = f"{format_bytes(self.bytes_up)} up ({self.up}) and {format_bytes(self.bytes_down)} down ({self.down})"
        text += " a round and miner: "
        text += f"{self.communication_s(rate):.3g} s on {link} of {rate}"
        return text if share is None else f"{text}, {share:.0%} of it; computing has {used:.0%}"

    # --- other codecs -------------------------------------------------------------------------------------------------

    def warning(self, rate: Rate) -> str | None:
        """One line where communication takes too much of a round, with what would mend that."""
        share = self.share(rate)
        if share is None or share <= MOST_SHARE:
            return None
        text = f"communication takes {share:.0%} of a round on links of {rate}"
        options = sorted(self._smaller(), key=lambda other: (self._changes(other), -other.communication_s(rate)))
        fitting = [other for other in options if other._fits(rate)]
        best = fitting[0] if fitting else min([self, *options], key=lambda other: other.communication_s(rate))
        then = best.share(rate) or 0.0
        if not fitting and then > WORTH * share:  # it is not the bytes that take so long
            return f"{text}; longer rounds would make it less"
        return f"{text}; {self._flags(best)} would make it {then:.0%}" + ("" if fitting else ", longer rounds less")

    def fitting(self, rate: Rate, up: bool = True, down: bool = True) -> LinkBudget:
        """With the least compression that fits, of those directions that may change: of the two, step by step, more for
        the one that takes longer. Where nothing fits, with what is nearly as good as the most compression."""
        ladders = self._ladders()
        ups = list(ladders[0]) if up else [self.up]
        downs = list(ladders[1]) if down else [self.down]
        most = replace(self, up=ups[-1], down=downs[-1]).share(rate) or 0.0
        enough = max(MOST_SHARE, most / NEARLY)
        found = replace(self, up=ups.pop(0), down=downs.pop(0))
        while (found.share(rate) or 0.0) > enough and (ups or downs):
            up_s, down_s = 8 * found.bytes_up / rate.up_bps, 8 * found.bytes_down / rate.down_bps
            if ups and (up_s >= down_s or not downs):
                found = replace(found, up=ups.pop(0))
            else:
                found = replace(found, down=downs.pop(0))
        return found

    def looser(self, up: bool = True, down: bool = True) -> LinkBudget:
        """With one step less of compression in those directions."""
        ups, downs = self._ladders()
        return replace(
            self, up=_before(ups, self.up) if up else self.up, down=_before(downs, self.down) if down else self.down
        )

    def _fits(self, rate: Rate) -> bool:
        share = self.share(rate)
        return share is not None and share <= MOST_SHARE

    def _ladders(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return LADDERS_UP[self.mode], LADDERS_DOWN[self.broadcast]

    def _smaller(self) -> Iterator[LinkBudget]:
        """What flags could make of it, with fewer bytes in one direction at least and more in none."""
        ups, downs = self._ladders()
        fewer_up = [name for name in ups if bits(name) < bits(self.up)]
        fewer_down = [name for name in downs if bits(name) < bits(self.down)]
        for up, down in product([self.up, *fewer_up], [self.down, *fewer_down]):
            if (up, down) != (self.up, self.down):
                yield replace(self, up=up, down=down)
        if self.broadcast == "full":
            for down in LADDERS_DOWN["delta"]:
                yield replace(self, down=down, broadcast="delta")

    def _changes(self, other: LinkBudget) -> int:
        return self._flags(other).count("--")

    def _flags(self, other: LinkBudget) -> str:
        flags = [f"--broadcast {other.broadcast}"] if other.broadcast != self.broadcast else []
        flags += [f"--codec.up {other.up}"] if other.up != self.up else []
        flags += [f"--codec.down {other.down}"] if other.down != self.down else []
        return " ".join(flags)


class LinkWatch:
    """The budget as the run goes on, by the miners' measured links."""

    def __init__(
        self,
        budget: LinkBudget,
        links: Callable[[], Iterable[MinerState]],
        say: Callable[[str], object],
        auto_up: bool = False,
        auto_down: bool = False,
    ) -> None:
        """`budget` begins with the codecs of the first rounds."""
        self.budget, self._links, self._say = budget, links, say
        self._auto = {"up": auto_up, "down": auto_down}
        self._settled = not (auto_up or auto_down)  # `auto` has chosen
        self._rounds = 0  # in a row that ask for a choice
        self._measured = 0  # rounds
        self._warned = False

    @property
    def codecs(self) -> tuple[str, str]:
        """Up and down, of the rounds that are opened now."""
        return self.budget.up, self.budget.down

    def introduce(self) -> None:
        """Before anything is measured."""
        self._say(self.budget.line(TYPICAL, "a link"))

    def resume(self, row: Row) -> None:
        """Goes on with what the last round's metrics say that it was."""
        if "codec_up" in row and "codec_down" in row and any(self._auto.values()):
            up = str(row["codec_up"]) if self._auto["up"] else self.budget.up
            down = str(row["codec_down"]) if self._auto["down"] else self.budget.down
            self._settled = (up, down) != self.codecs
            self.budget = replace(self.budget, up=up, down=down)

    def observe(self, row: Row) -> dict[str, float]:
        """After a round, of whose metrics `compute_s` is looked at: metrics of the links, once they are measured."""
        rate = median_rate(self._links())
        if compute_s := float(row.get("compute_s", 0.0)):
            self.budget = replace(self.budget, compute_s=compute_s)
        if rate is None or (share := self.budget.share(rate)) is None:
            return {}
        used = self.budget.utilisation(rate)
        assert used is not None  # as the share is not
        self._measured += 1
        if any(self._auto.values()):
            self._choose(rate, share)
        if (
            self._measured >= FIRST_ROUNDS
            and not self._warned
            and (warning := self.budget.fitting(rate, **self._auto).warning(rate))
        ):
            self._warned = True
            self._say(warning)
        return {
            "link_up_mbps": rate.up_bps / 1e6,
            "link_down_mbps": rate.down_bps / 1e6,
            "communication": share,
            "utilisation_expected": used,
        }

    def _choose(self, rate: Rate, share: float) -> None:
        loose = self.budget.looser(**self._auto)
        idle = loose != self.budget and (loose.share(rate) or 0.0) < LEAST_SHARE
        self._rounds = self._rounds + 1 if share > MOST_SHARE or idle or not self._settled else 0
        if self._rounds < (PATIENT_ROUNDS if self._settled else FIRST_ROUNDS):
            return
        before, first = self.budget, not self._settled
        self.budget, self._settled, self._rounds = before.fitting(rate, **self._auto), True, 0
        if first or self.budget != before:
            flags = " ".join(f"--codec.{name} auto" for name, auto in self._auto.items() if auto)
            self._say(f"{flags}: {self.budget.line(rate, 'the median link')}")


def _before(ladder: tuple[str, ...], name: str) -> str:
    """One step less of compression; the same where there is none."""
    more = [other for other in ladder if bits(other) > bits(name)]
    return more[-1] if more else name
