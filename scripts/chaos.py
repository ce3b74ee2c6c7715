"""A small marketplace of real processes, in which everything goes wrong by a seed; then proof that nothing was lost.

python scripts/chaos.py --seed 1 --rounds 200
python scripts/chaos.py --check runs/demo            # only the proof, of any run

Processes are killed, paused, told to end and started again; their lines stall and reset; clocks are wrong by an hour;
disks are full. Afterwards the checker (pilot/storage/checker.py) proves from the ledger, the spool and the miners' receipts
that the marketplace kept its word, and the loss is compared with that of a calm run. Exit code 1 where it did not.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.app import cli

if TYPE_CHECKING:
    from pilot.simulation.chaos.processes import Place
    from pilot.simulation.chaos.schedule import Event

PROGRAM = "chaos.py"
MOST_LOSS_RATIO = 1.03
LOOK_S = 0.1


@dataclass(frozen=True)
class ChaosConfig:
    """Runs a marketplace in which everything goes wrong, and proves that it kept its word."""

    seed: int = 1
    """The same seed makes the same schedule of events."""
    rounds: int = 200
    """Rounds of the run."""
    miners: int = 4
    """Miners. Of three and more the last pulls its orders, of four and more another one announces itself."""
    events: int | None = None
    """Things that go wrong. None: one in two rounds."""
    kinds: tuple[str, ...] = ()
    """Only these kinds of them, such as kill pause; empty: all."""
    calm: int = 10
    """Rounds at the end in which nothing goes wrong."""
    batches: int = 4
    """Micro-batches a miner and round."""
    round_seconds: float = 0.0
    """Time budget of a round, in place of --batches."""
    deadline: float = 4.0
    """Seconds from an order to its reply."""
    mode: Literal["gradient", "diloco"] = "gradient"
    """diloco: rounds of two inner steps, with --deadline auto, so that what is late is carried into the next round."""
    overlap: Literal[0, 1] = 0
    """1: miners compute on the last version while the validator applies their replies."""
    coverage: Literal["stream", "once"] = "stream"
    """once: an epoch begins when the last one is accepted."""
    latency: float = 0.02
    """Seconds that each line delays each direction."""
    patience: float = 300.0
    """Seconds without a new round after which the run has failed."""
    folder: Path | None = None
    """An empty one, for all that the run leaves behind. None: a temporary one, kept where something failed."""
    check: Path | None = None
    """Only check this run's folder, such as runs/demo, with the receipts of the miners that --local has in it."""
    caches: tuple[Path, ...] = ()
    """--check: folders of other miners' caches, each with a receipts.jsonl."""
    replay: bool = True
    """Also replay the run from its second-newest snapshot, and compare the version that this makes."""
    compare: bool = True
    """Also make a calm run of as many rounds, and compare the losses."""


def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(ChaosConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        check(config)
        if config.check is not None:
            from pilot.simulation.chaos.proof import caches_below, prove

            folder = config.check.expanduser().absolute()
            caches = [*caches_below(folder), *config.caches]
            raise SystemExit(1 if prove(folder, caches, config.replay) else 0)
        folder = make_folder(config)
    try:
        good = asyncio.run(run(config, folder))
    except KeyboardInterrupt:
        cli.fail(PROGRAM, f"stopped; what there is lies in {folder}", code=130)
    if good and config.folder is None:
        shutil.rmtree(folder)
    elif not good:
        print(f"everything is in {folder}")
    raise SystemExit(0 if good else 1)


def check(config: ChaosConfig) -> None:
    """Mistakes that can be seen without starting anything."""
    least = {"rounds": 5, "miners": 1, "calm": 1, "batches": 1, "deadline": 0.1, "patience": 1.0, "latency": 0.0}
    for flag, value in least.items():
        if getattr(config, flag) < value:
            raise ValueError(f"--{flag} {getattr(config, flag)}: must be {value} or more")
    for cache in config.caches:
        if not (cache / "receipts.jsonl").is_file():
            raise ValueError(f"--caches {cache}: there is no receipts.jsonl in it; name a miner's own folder")
    if config.rounds < config.calm + 4:
        raise ValueError(f"--rounds {config.rounds}: must be 4 more than --calm {config.calm}, or more")
    from pilot.simulation.chaos.schedule import KINDS

    for kind in config.kinds:
        if kind not in KINDS:
            raise ValueError(f"--kinds {kind}: unknown; known: {', '.join(KINDS)}")
    if (config.events or 0) < 0:
        raise ValueError(f"--events {config.events}: must be 0 or more")


def make_folder(config: ChaosConfig) -> Path:
    if config.folder is None:
        return Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = config.folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--folder {config.folder}: is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def validator_flags(config: ChaosConfig) -> list[str]:
    """What the chaotic run and the calm one share: a quadratic of 20,000 parameters, converged well before the end."""
    closing = ["--deadline", str(config.deadline), "--grace", "2"]
    if config.mode == "diloco":  # what is late shall be carried, not stopped in time
        closing = ["--deadline", "auto", "--grace", "0.2", "--mode", "diloco", "--tau", "2"]
    return [
        *("--task", "quadratic", "--quadratic.dimension", "20000", "--quadratic.samples", "128"),
        *("--optimizer.lr", "0.02", "--rounds", str(config.rounds), "--batches", str(config.batches)),
        *("--round-seconds", str(config.round_seconds), *closing),
        *("--overlap", str(config.overlap), "--coverage", config.coverage),
        *("--eval-every", "0", "--snapshot-every", "20", "--patience", "100000", "--connect-timeout", "5"),
        *("--device", "cpu", "--threads", "1", "--limits.away-s", "2", "--limits.spool-bytes", "0"),
    ]


# --- the run ----------------------------------------------------------------------------------------------------------


async def run(config: ChaosConfig, folder: Path) -> bool:
    """The chaotic run, the proof, the calm run. True where all is as it should be."""
    from pilot.simulation.chaos.processes import Failure, Place
    from pilot.simulation.chaos.proof import calm_loss, counted, faults, loss, prove
    from pilot.simulation.chaos.schedule import schedule

    flags = [*validator_flags(config), "--cache", str(folder / "cache")]
    began = time.monotonic()
    async with Place(folder, config.miners, flags, config.latency) as place:
        count = config.rounds // 2 if config.events is None else config.events
        events = schedule(config.seed, config.rounds, place.names, count, config.calm, config.kinds)
        chaos = Chaos(config, place, events)
        try:
            await place.start()
            await chaos.play()
            await place.stop_miners()
        except Failure as failure:
            place.problems.append(str(failure))
    seconds = time.monotonic() - began
    if not chaos.done:
        print("\n".join(place.problems))
        return False
    violations = await asyncio.to_thread(prove, place.run, place.caches, config.replay)
    good = not violations and not place.problems
    print(f"{chaos.done} of {config.rounds} rounds in {seconds:.0f} s; events: {counted(chaos.happened)}")
    print(f"faults: {counted(faults(place.run))}")
    for problem in place.problems:
        print(f"problem: {problem}")
    print(f"{len(violations)} violations, {len(place.problems)} problems")
    if config.compare and not place.problems:
        own, calm = loss(place.run), await asyncio.to_thread(calm_loss, folder, config.miners, flags)
        print(f"loss {own:.4f}, of a calm run {calm:.4f}, ratio {own / calm:.4f}, at most {MOST_LOSS_RATIO}")
        good = good and own / calm <= MOST_LOSS_RATIO
    return good


class Chaos:
    """Plays a schedule: each event when its round is reached, one at a time at each process."""

    def __init__(self, config: ChaosConfig, place: Place, events: Sequence[Event]) -> None:
        self.config, self.place, self.events = config, place, list(events)
        self.done = 0  # rounds committed
        self.happened: Counter[str] = Counter()
        self._under_way: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()

    async def play(self) -> None:
        """To the last round, and to the end of every event. Raises Failure."""
        try:
            await self._play()
            await asyncio.gather(*self._under_way)
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _play(self) -> None:
        from pilot.simulation.chaos.processes import Failure

        moved = time.monotonic()
        with Progress(self) as progress:
            while self.place.validator.code != 0 or self.done < self.config.rounds:
                await asyncio.sleep(LOOK_S)
                self._look_for_failures()
                before, self.done = self.done, self._committed()
                moved = time.monotonic() if self.done != before else moved
                if time.monotonic() - moved > self.config.patience:
                    words = "\n".join(program.last_words(5) for program in self.place.programs)
                    raise Failure(f"no new round in {self.config.patience:g} s\n{words}")
                self.place.calm = self.done >= self.config.rounds - self.config.calm
                while self.events and self.events[0].round <= self.done:
                    self._under_way.add(asyncio.create_task(self._suffer(self.events.pop(0))))
                self.place.slow_down(len(self._under_way))
                progress.show()

    def _committed(self) -> int:
        from pilot.simulation.chaos.processes import committed

        return max(self.done, committed(self.place.run))

    def _look_for_failures(self) -> None:
        from pilot.simulation.chaos.processes import Failure

        for task in self._under_way:
            if task.done():
                task.result()
        self._under_way = {task for task in self._under_way if not task.done()}
        for program in self.place.programs:
            finished = program is self.place.validator and program.code == 0
            if program.ended_alone.done() and not finished:
                raise Failure(program.ended_alone.result())

    async def _suffer(self, event: Event) -> None:
        began = time.monotonic()
        effect = await self.place.suffer(event)
        self.happened[event.kind] += 1
        row = {"kind": event.kind, "target": event.target, "seconds": event.seconds, "amount": event.amount}
        times = {"began_s": round(began - self._began, 3), "ended_s": round(time.monotonic() - self._began, 3)}
        with (self.place.folder / "events.jsonl").open("a") as file:
            print(json.dumps({**times, "round": event.round, "rounds": self.done, **row, "effect": effect}), file=file)

    def status(self) -> str:
        under_way = len(self._under_way)
        return (
            f"round {self.done}/{self.config.rounds}, {sum(self.happened.values())} events over, {under_way} under way"
        )


class Progress:
    """A line that is drawn again on a terminal, a line now and then elsewhere."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos, self._terminal = chaos, sys.stderr.isatty()
        self._next = 0.0

    def show(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + (0.5 if self._terminal else 20.0)
            print(("\r\x1b[K" if self._terminal else "") + self._chaos.status(), end="" if self._terminal else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
