"""Run a marketplace under a schedule of faults, check what it left, and compare its loss with a run without faults."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pilot.common.flags import arg
from pilot.simulation.chaos.check import baseline_loss, check_and_print, count_faults, final_loss, format_counts
from pilot.simulation.chaos.marketplace import Failure, Marketplace, committed
from pilot.simulation.chaos.schedule import KINDS, Event, schedule

MAX_LOSS_RATIO = 1.03
POLL_S = 0.1


@dataclass(frozen=True)
class ChaosConfig:
    """Run a marketplace under random faults, and check that nothing was lost."""

    seed: int = 1
    """Seed of the schedule of faults."""
    rounds: int = 200
    """Rounds of the run."""
    miners: int = 4
    """Miners. With three or more the last one pulls its orders; with four or more another one announces itself."""
    events: int | None = None
    """Number of faults. None: one for every two rounds."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of faults, such as kill pause. Empty: all."""
    quiet_rounds: int = 10
    """Rounds without faults at the end."""
    batches: int = 4
    """Micro-batches per miner and round."""
    round_seconds: float = 0.0
    """Time budget of a round, in place of --batches."""
    deadline: float = 4.0
    """Seconds from an order to its reply."""
    mode: Literal["gradient", "diloco"] = "gradient"
    """diloco: rounds of two inner steps, with --deadline auto, so that late work is carried into the next round."""
    overlap: Literal[0, 1] = 0
    """1: miners compute on the previous version while the validator applies their replies."""
    coverage: Literal["stream", "once"] = "stream"
    """once: an epoch begins only when all of the previous one is accepted."""
    latency: float = 0.02
    """Seconds that each proxy delays each direction."""
    patience: float = 300.0
    """Seconds without a new round after which the run has failed."""
    folder: Path | None = arg(None, path="folder")
    """An empty folder for all files of the run. None: a temporary one, which is kept if something failed."""
    check: Path | None = None
    """Only check this run's folder, such as runs/demo, with the receipts of the miners that --local has in it."""
    caches: tuple[Path, ...] = ()
    """With --check: the folders of other miners, each with a receipts.jsonl."""
    replay: bool = True
    """Also replay the run from its second-newest snapshot, and compare the resulting version."""
    compare: bool = True
    """Also run as many rounds without faults, and compare the losses."""

    def validate(self) -> None:
        """Raise ValueError, naming the flag, for a mistake that can be seen without starting anything."""
        least = {"rounds": 5, "miners": 1, "quiet_rounds": 1, "batches": 1}
        for name, value in (least | {"deadline": 0.1, "patience": 1.0, "latency": 0.0}).items():
            if getattr(self, name) < value:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {value} or more")
        for cache in self.caches:
            if not (cache / "receipts.jsonl").is_file():
                raise ValueError(f"--caches {cache}: there is no receipts.jsonl in it; name a miner's own folder")
        if self.rounds < self.quiet_rounds + 4:
            raise ValueError(f"--rounds {self.rounds}: must be at least --quiet-rounds {self.quiet_rounds} + 4")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"--kinds {kind}: unknown; known: {', '.join(KINDS)}")
        if (self.events or 0) < 0:
            raise ValueError(f"--events {self.events}: must be 0 or more")

    def validator_flags(self) -> list[str]:
        """Return the flags for both runs: a quadratic of 20,000 parameters, which converges well before the end."""
        timing = ["--deadline", str(self.deadline), "--grace", "2"]
        if self.mode == "diloco":  # a short grace, so that late work is carried over instead of stopped in time
            timing = ["--deadline", "auto", "--grace", "0.2", "--mode", "diloco", "--tau", "2"]
        return [
            *("--task", "quadratic", "--quadratic.dimension", "20000", "--quadratic.samples", "128"),
            *("--optimizer.lr", "0.02", "--rounds", str(self.rounds), "--batches", str(self.batches)),
            *("--round-seconds", str(self.round_seconds), *timing),
            *("--overlap", str(self.overlap), "--coverage", self.coverage),
            *("--eval-every", "0", "--snapshot-every", "20", "--patience", "100000", "--connect-timeout", "5"),
            *("--device", "cpu", "--threads", "1", "--limits.away-s", "2", "--limits.spool-bytes", "0"),
        ]


async def run(config: ChaosConfig, folder: Path) -> bool:
    """Run the marketplace with faults, check it, run the baseline. Returns whether all is as it should be."""
    flags = [*config.validator_flags(), "--cache", str(folder / "cache")]
    began = time.monotonic()
    async with Marketplace(folder, config.miners, flags, config.latency) as market:
        count = config.rounds // 2 if config.events is None else config.events
        events = schedule(config.seed, config.rounds, market.names, count, config.quiet_rounds, config.kinds)
        chaos = _Chaos(config, market, events)
        try:
            await market.start()
            await chaos.play()
            await market.stop_miners()
        except Failure as failure:
            market.problems.append(str(failure))
    seconds = time.monotonic() - began
    if not chaos.rounds_done:
        print("\n".join(market.problems))
        return False
    violations = await asyncio.to_thread(check_and_print, market.run, market.caches, config.replay)
    good = not violations and not market.problems
    print(
        f"{chaos.rounds_done} of {config.rounds} rounds in {seconds:.0f} s; events: {format_counts(chaos.events_done)}"
    )
    print(f"faults: {format_counts(count_faults(market.run))}")
    for problem in market.problems:
        print(f"problem: {problem}")
    print(f"{len(violations)} violations, {len(market.problems)} problems")
    if config.compare and not market.problems:
        loss = final_loss(market.run)
        baseline = await asyncio.to_thread(baseline_loss, folder, config.miners, flags)
        print(f"loss {loss:.4f}, without faults {baseline:.4f}, ratio {loss / baseline:.4f}, at most {MAX_LOSS_RATIO}")
        good = good and loss / baseline <= MAX_LOSS_RATIO
    return good


class _Chaos:
    """Plays a schedule: begins each event when its round is reached, one at a time per process."""

    def __init__(self, config: ChaosConfig, market: Marketplace, events: Sequence[Event]) -> None:
        self.config, self.market, self.events = config, market, list(events)
        self.rounds_done = 0
        self.events_done: Counter[str] = Counter()
        self._open: set[asyncio.Task[None]] = set()  # events that have begun and not ended
        self._began = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._show_at = 0.0

    async def play(self) -> None:
        """Play until the last round is committed and every event has ended. Raises Failure."""
        try:
            await self._play()
            await asyncio.gather(*self._open)
        finally:
            for task in self._open:
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            if self._terminal:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    async def _play(self) -> None:
        progressed = time.monotonic()
        while self.market.validator.code != 0 or self.rounds_done < self.config.rounds:
            await asyncio.sleep(POLL_S)
            self._raise_failures()
            before, self.rounds_done = self.rounds_done, max(self.rounds_done, committed(self.market.run))
            progressed = time.monotonic() if self.rounds_done != before else progressed
            if time.monotonic() - progressed > self.config.patience:
                logs = "\n".join(program.log_tail(5) for program in self.market.programs)
                raise Failure(f"no new round in {self.config.patience:g} s\n{logs}")
            self.market.quiet = self.rounds_done >= self.config.rounds - self.config.quiet_rounds
            while self.events and self.events[0].round <= self.rounds_done:
                self._open.add(asyncio.create_task(self._inject(self.events.pop(0))))
            self.market.slow_down(len(self._open))
            self._show_progress()

    def _raise_failures(self) -> None:
        for task in self._open:
            if task.done():
                task.result()
        self._open = {task for task in self._open if not task.done()}
        for program in self.market.programs:
            finished = program is self.market.validator and program.code == 0
            if program.unexpected_exit.done() and not finished:
                raise Failure(program.unexpected_exit.result())

    async def _inject(self, event: Event) -> None:
        began = time.monotonic()
        effect = await self.market.inject(event)
        self.events_done[event.kind] += 1
        times = {"began_s": round(began - self._began, 3), "ended_s": round(time.monotonic() - self._began, 3)}
        with (self.market.folder / "events.jsonl").open("a") as file:
            print(json.dumps({**times, **asdict(event), "rounds": self.rounds_done, "effect": effect}), file=file)

    def _show_progress(self) -> None:
        """Redraw a line on a terminal; elsewhere print one now and then."""
        if time.monotonic() < self._show_at:
            return
        self._show_at = time.monotonic() + (0.5 if self._terminal else 20.0)
        events = f"{self.events_done.total()} events over, {len(self._open)} under way"
        line = f"round {self.rounds_done}/{self.config.rounds}, {events}"
        print(
            f"\r\x1b[K{line}" if self._terminal else line,
            end="" if self._terminal else "\n",
            file=sys.stderr,
            flush=True,
        )
