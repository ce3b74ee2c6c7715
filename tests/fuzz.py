"""`make fuzz`: more than a million inputs for the parsers of untrusted bytes, each parser in a process of its own.

atheris looks for inputs that reach new code; where it is not installed, the same mutations are drawn at random. Either
way hypothesis adds inputs of odd structure. A finding is written to build/fuzz, with the command that replays it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tests.fuzz_targets import Target

FOUND = Path("build/fuzz")
MAX_BYTES = 8192  # of an input
MAX_GROWTH = 32 << 20  # bytes of memory that one input may add to the most there ever was
INSTRUMENTED = ["protocol", "codec", "pilot.transport.auth", "pilot.transport.client.peer"]


def peak() -> int:
    """The most memory this process ever had, in bytes. By rusage a child starts with what its parent had."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(status.partition(b"VmHWM:")[2].partition(b"kB")[0]) << 10


class Session:
    """Runs a target's check on inputs, counts, and ends the process when enough are done or one is a finding."""

    def __init__(self, name: str, target: Target, runs: int) -> None:
        self.name, self.target, self.runs = name, target, runs
        self.done = self.accepted = 0
        for seed in target.seeds:  # loads what loads late
            assert target.check(seed), f"{name}: a valid input is refused"
        self.start_s, self.base = time.monotonic(), peak()

    def run(self, data: bytes) -> None:
        before = peak()
        try:
            self.accepted += self.target.check(data)
            assert peak() < before + MAX_GROWTH, "memory out of proportion"
        except BaseException:  # ends the process: what it was is printed, the input kept
            FOUND.mkdir(parents=True, exist_ok=True)
            path = FOUND / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            self.end(f"{traceback.format_exc()}replay: {sys.executable} -m tests.fuzz {self.name} --replay {path}")
        self.done += 1

    def end(self, finding: str = "") -> NoReturn:
        seconds = time.monotonic() - self.start_s
        result = {"done": self.done, "accepted": self.accepted, "seconds": seconds, "finding": finding}
        print(json.dumps(result | {"grown": peak() - self.base}), flush=True)
        os._exit(1 if finding else 0)  # libFuzzer and hypothesis would both go on


# --- engines ----------------------------------------------------------------------------------------------------------


def by_hypothesis(session: Session, runs: int, seed: int) -> None:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.fuzz_targets import inputs

    chosen = settings(
        max_examples=runs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seeded(seed)(chosen(given(inputs(session.target))(lambda data: session.run(data))))()


def by_chance(session: Session, seed: int) -> None:
    from tests.fuzz_targets import spoil

    rng = random.Random(seed)
    while session.done < session.runs:
        session.run(spoil(rng.choice(session.target.seeds), session.target, rng)[:MAX_BYTES])


def by_coverage(session: Session, seed: int) -> None:
    import atheris

    from tests.fuzz_targets import spoil

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.2:
            return bytes(atheris.Mutate(data, max_size))
        start = (
            rng.choice(session.target.seeds) if rng.random() < 0.5 else data
        )  # what is spoilt already gets no better
        return spoil(start, session.target, rng)[:max_size]

    def test_one(data: bytes) -> None:
        session.run(data)
        if session.done >= session.runs:
            session.end()

    corpus = FOUND / f"seeds-{session.name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, valid in enumerate(session.target.seeds):
        (corpus / str(number)).write_bytes(valid)
    options = [f"-max_len={MAX_BYTES}", f"-seed={seed}", "-verbosity=0", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={FOUND}/", str(corpus)], test_one, custom_mutator=mutate)
    atheris.Fuzz()


def work(name: str, runs: int, structured: int, seed: int, engine: str) -> None:
    """One target in this process, to the end."""
    instrumented: Any = nullcontext()
    if engine == "atheris":
        import atheris

        instrumented = atheris.instrument_imports(include=INSTRUMENTED)
    with instrumented:
        from tests.fuzz_targets import TARGETS
    if name not in TARGETS:
        sys.exit(f"no such parser; known: {', '.join(TARGETS)}")
    session = Session(name, TARGETS[name], runs)
    by_hypothesis(session, structured, seed)
    run = by_coverage if engine == "atheris" else by_chance
    run(session, seed)
    session.end()


def replay(name: str, path: Path) -> None:
    from tests.fuzz_targets import TARGETS

    accepted = TARGETS[name].check(path.read_bytes())
    print(f"{name}: {path}: {'accepted' if accepted else 'refused'}, as it should be")


# --- all of them ------------------------------------------------------------------------------------------------------


def start(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One target in a process of its own: what it counted, and what it found."""
    numbers = (f"--{option}={getattr(args, option)}" for option in ("runs", "structured", "seed"))
    command = [sys.executable, "-m", "tests.fuzz", name, f"--engine={args.engine}", "--one", *numbers]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=args.timeout_s)
    except subprocess.TimeoutExpired:
        return {"done": 0, "finding": f"not done within {args.timeout_s} s: {' '.join(command)}"}
    for line in reversed(ended.stdout.splitlines()):
        if line.startswith('{"done"'):
            result: dict[str, Any] = json.loads(line)
            return result
    return {"done": 0, "finding": f"ended with {ended.returncode}: {' '.join(command)}\n{ended.stderr[-3000:]}"}


def outcome(result: dict[str, Any]) -> str:
    if result["finding"]:
        return f"FOUND\n{result['finding']}"
    accepted, grown = result["accepted"], result["grown"] >> 20
    return f"{accepted:>7,} accepted, {result['done'] - accepted:>9,} refused, {grown} MB of memory more"


def fuzz_all(names: list[str], args: argparse.Namespace) -> int:
    if args.engine != "atheris":
        print(
            "atheris is not used (not installed, or --engine=chance): mutations are drawn at random, without coverage"
        )
    begin, total, findings = time.monotonic(), 0, 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, result in zip(names, pool.map(lambda name: start(name, args), names), strict=True):
            total += result["done"]
            findings += bool(result["finding"])
            print(
                f"{name:12}{result['done']:>9,} inputs {result.get('seconds', 0):>6.1f} s  {outcome(result)}",
                flush=True,
            )
    seconds = time.monotonic() - begin
    print(f"{'in all':12}{total:>9,} inputs {seconds:>6.1f} s  {findings or 'no'} findings, by {args.engine}")
    return 1 if findings else 0


def known() -> list[str]:
    from tests.fuzz_targets import TARGETS

    return list(TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n\n")[0])
    parser.add_argument("targets", nargs="*", help="parsers to test; all where none is named")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs for each")
    parser.add_argument("--structured", type=int, default=4_000, help="of them by hypothesis")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--engine", choices=["atheris", "chance"], default="atheris" if find_spec("atheris") else "chance"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--timeout-s", type=float, default=900, help="for one parser")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a finding, for the one parser named")
    parser.add_argument("--one", action="store_true", help="the one parser named, in this process")
    args = parser.parse_args()
    if args.replay:
        replay(args.targets[0], args.replay)
    elif args.one:
        work(args.targets[0], args.runs, args.structured, args.seed, args.engine)
    else:
        sys.exit(fuzz_all(args.targets or known(), args))


if __name__ == "__main__":
    main()
