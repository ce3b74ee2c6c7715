"""Loss against bytes: GPT-2 nano on books, four miners, every byte of every message counted. An hour on two cores.

    python -m bench.wire                     # the four runs that the figures are of, on three seeds; then the curves
    python -m bench.wire --only figures      # or curves
    python -m bench.wire --fresh             # all of them anew
    python -m bench.wire --known             # none: the figures of those runs that bench/wire.jsonl has

Market, miners, messages and codecs are the real ones, on a loopback network; not counted are the books, which each
miner gets once. Each run is of 4.1 million tokens of a byte each. In gradient mode it is 1,000 steps of 4 x 16 x 64;
DiLoCo, and the synchronous run beside it, are 2,667 steps of 4 x 6 x 64: 267 gradient rounds, a tenth, then 80 rounds
of 30 inner steps. So small a batch is mostly noise, of which quantised gradients add more: `small_batch` says how
much.

The learning rate is the better for the dense run of 3e-3 and 6e-3 (1.556 and 1.552 nats), on seed 0; codecs, that the
miners' inner optimizers keep their state, and that there is no error feedback, were chosen on seed 0 too, and the
larger batch of gradient mode after the small one's run on seed 1. The figures are of seeds 1, 2 and 3, each run
against the dense one of its seed. Losses are of the validator's exact parameters, on 32,768 bytes never trained on,
after the run.

What was measured stays in bench/wire.jsonl, a run a line; a run that is there is not made again, and those made by
other code are named. The curves of the other codecs are of an eighth of the tokens and seed 1, with a schedule of
their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Literal

from bench import Figure

SEEDS = (1, 2, 3)
MINERS, TAU, STEPS = 4, 30, 2667
DILOCO_ROUNDS = 347  # 267 of gradients, 80 of DiLoCo: 2,667 steps
REACHED = 1.75  # nats a byte that the dense run must get below
RUNS = Path(__file__).with_name("wire.jsonl")
DOCS = Path(__file__).resolve().parent.parent / "docs"
FP32 = ("fp32", "fp32")


@dataclass(frozen=True)
class Variant:
    """One run: how, by which codecs, and of how many steps."""

    mode: str
    up: str
    down: str
    steps: int = STEPS
    seed: int = 0
    inner: Literal["keep", "reset"] = "keep"  # state of the miners' own optimizers
    feedback: float = 0.0
    batch: int = 6  # sequences of 64 in a micro-batch, of which each miner does one a step

    @property
    def name(self) -> str:
        feedback = f", feedback {self.feedback:g}" if self.feedback else ""
        return f"{self.mode} {self.up}/{self.down}{feedback}{'' if self.inner == 'keep' else ', ' + self.inner}"

    @property
    def rounds(self) -> int:
        return self.steps if self.mode == "gradient" else DILOCO_ROUNDS * self.steps // STEPS


DENSE = Variant("gradient", *FP32, steps=1000, batch=16)
GRADIENT = Variant("gradient", "ternary-rc", "2bit", steps=1000, batch=16)
SYNC, SMALL = Variant("gradient", *FP32), Variant("gradient", "ternary-rc", "2bit", seed=SEEDS[0])
DENSE_DILOCO, DILOCO = Variant("diloco", *FP32), Variant("diloco", "2bit", "2bit")
SHORT = STEPS // 8
OTHERS = (
    *(("gradient", up, "2bit") for up in ("bf16", "int4", "ternary-rc", "2bit", "1bit", "topk64")),
    ("gradient", *FP32),
    ("gradient", "ternary-rc", "1bit"),
    *(("diloco", codec, "2bit") for codec in ("2bit", "ternary-rc", "topk64")),
    ("diloco", *FP32),
)
CURVES = [Variant(mode, up, down, SHORT, SEEDS[0]) for mode, up, down in OTHERS]
CURVES.append(Variant("diloco", *FP32, SHORT, SEEDS[0], "reset"))
FIGURES = [SMALL, *(replace(v, seed=s) for s in SEEDS for v in (DENSE, GRADIENT, SYNC, DENSE_DILOCO, DILOCO))]


@dataclass(frozen=True)
class Outcome:
    """A run's. Bytes are of all miners together, of all messages, from the first order to the last receipt."""

    variant: Variant
    parameters: int
    curve: list[tuple[int, int, int, float]]  # steps done, bytes up, bytes down, validation loss
    diloco: tuple[int, int, int] | None  # rounds of inner steps, and their bytes up and down
    code: str = ""  # digest of what made it

    @property
    def loss(self) -> float:
        return self.curve[-1][3]

    @property
    def key(self) -> str:
        return json.dumps(asdict(self.variant))


# --- one run, in a process of its own ---------------------------------------------------------------------------------


def play(variant: Variant, text: str) -> Outcome:
    import torch

    from pilot.app.training_flags import CodecConfig, RoundConfig
    from pilot.simulation.costs import CostConfig
    from pilot.simulation.link_model import LinkSpec
    from pilot.simulation.traces import Interval
    from pilot.simulation.virtual_time import run
    from pilot.simulation.world import Conditions, World
    from tasks import load_task
    from tasks.gpt2 import GPT2Config
    from tasks.optimizer import AdamWConfig

    torch.set_num_threads(1)
    gpt2 = GPT2Config(text=text, batch_size=variant.batch, eval_sequences=512)
    config = RoundConfig(
        optimizer=AdamWConfig(lr=6e-3, warmup=100 * variant.steps // STEPS),
        codec=CodecConfig(variant.up, variant.down, variant.feedback),
        broadcast="full" if variant.down == "fp32" else "delta",
        mode="diloco" if variant.mode == "diloco" else "gradient",
        tau=TAU,
        inner_state=variant.inner,
        rounds=variant.rounds,
        batches=1,
        aggregation="mean",
    )
    costs = CostConfig(batch=1.0, evaluate=0.0, spread=0.0)
    up = [Interval(f"m{number}", 0.0, 1e7) for number in range(MINERS)]

    async def main(folder: Path) -> Outcome:
        task = load_task("gpt2").prepare(
            gpt2, seed=variant.seed, cache=Path(config.cache).expanduser(), device=torch.device("cpu"),
            progress=say,
        )  # fmt: skip
        policy = config.policy("wire", 10)
        conditions = Conditions(costs, LinkSpec(up_bps=1e9, down_bps=1e9, latency_s=0.0), aggregation="mean")
        books = MINERS * task.data_spec.blobs["tokens"].bytes
        world = World(folder, task, config.optimizer, policy, conditions, up, config.rounds)
        curve, first, moment = [], None, None
        steps, every = 0, max(variant.steps // 12, 1)
        async for moment in world.play(1e7, config.rounds):
            before, steps = steps, policy.diloco.step(moment.rounds) if policy.diloco else moment.rounds
            if policy.diloco and moment.rounds == policy.diloco.warmup_rounds:
                first = moment
            if steps // every > before // every or moment.rounds == config.rounds:
                loss = (await world.market.evaluate())["val_loss"]
                curve.append((steps, moment.bytes_up, moment.bytes_down - books, loss))
                say(f"{variant.name}, seed {variant.seed}: step {steps}, loss {loss:.4f}")
        assert moment is not None
        assert not moment.faults, moment
        assert moment.accepted == MINERS * steps, moment
        inner = None
        if first is not None:
            sent = moment.bytes_up - first.bytes_up, moment.bytes_down - first.bytes_down
            inner = (moment.rounds - first.rounds, *sent)
        parameters = sum(p.numel() for p in world.market.learner.parameters.values())
        return Outcome(variant, parameters, curve, inner, code())

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        return run(main(Path(name)))


def code() -> str:
    """Return a digest of the code that a run's losses and bytes depend on."""
    from protocol import Hasher

    hasher, src = Hasher("code"), Path(__file__).resolve().parent.parent / "src"
    for part in ("pilot/codec", "pilot/aggregation", "pilot/market", "tasks"):
        for path in sorted((src / part).glob("*.py")):
            hasher.update(path.read_bytes())
    return hasher.hexdigest()[:12]


# --- all of them ------------------------------------------------------------------------------------------------------


def read() -> dict[str, Outcome]:
    lines = RUNS.read_text().splitlines() if RUNS.is_file() else []
    found = (json.loads(line) for line in lines)
    outcomes = (Outcome(**{**line, "variant": Variant(**line["variant"])}) for line in found)
    return {outcome.key: outcome for outcome in outcomes}


def made(variants: Iterable[Variant]) -> list[Outcome]:
    """Those that are not there yet are made, one a core at a time."""
    known = read()
    missing = [v for v in variants if json.dumps(asdict(v)) not in known]

    def make(variant: Variant) -> None:
        command = [sys.executable, "-m", "bench.wire", "--one", json.dumps(asdict(variant))]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        with open(RUNS, "a") as file:
            file.write(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, missing))
    known = read()
    outcomes, now = [known[json.dumps(asdict(v))] for v in variants], code()
    if others := sum(o.code != now for o in outcomes):
        say(
            f"{others} of {len(outcomes)} runs were made by other code than is here now; --fresh makes all of them anew"
        )
    return outcomes


def figures(outcomes: Iterable[Outcome]) -> None:
    by = {o.variant: o for o in outcomes}

    def each(variant: Variant) -> list[Outcome]:
        return [by[v] for seed in SEEDS if (v := replace(variant, seed=seed)) in by]

    dense, gradient, sync = map(each, (DENSE, GRADIENT, SYNC))
    dense_diloco, diloco = map(each, (DENSE_DILOCO, DILOCO))
    worst = max(o.loss for o in dense + sync)
    if worst >= REACHED:
        raise SystemExit(f"the dense loss is {worst:.3f}, which is not below {REACHED}: the runs are too short")
    full = mean(sum(o.curve[-1][1:3]) for o in sync)  # bytes of the run, both ways
    step = 4 * dense[0].parameters * MINERS  # bytes of fp32 one way, all miners
    for way, place in (("up", 1), ("down", 2)):
        sent = mean(o.curve[-1][place] for o in gradient) / GRADIENT.steps
        fewer(f"wire.gradient.gpt2.{way}_ratio", sent, step, "fp32, bytes a round")
    compare("wire.gradient.gpt2.loss_vs_dense", gradient, dense, "dense")
    compare("wire.gradient.gpt2.loss_vs_dense.small_batch", [by[SMALL]], [by[replace(SYNC, seed=SMALL.seed)]], "dense")
    compare("wire.diloco.gpt2.loss_vs_sync", dense_diloco, sync, "synchronous")
    compare("wire.diloco.gpt2.loss_vs_dense", diloco, dense_diloco, "dense DiLoCo")
    rounds, up, down = (mean(o.diloco[k] for o in diloco if o.diloco) for k in range(3))
    sent = (up + down) / rounds
    fewer("wire.diloco.gpt2.round_ratio", sent, 2 * step, "fp32, bytes a round")
    fewer("wire.diloco.gpt2.token_ratio", sent, 2 * step * TAU, "fp32 each step, bytes")
    whole = mean(sum(o.curve[-1][1:3]) for o in diloco)
    fewer("wire.diloco.gpt2.run_ratio", whole, full, "fp32, bytes of the run")


def fewer(name: str, sent: float, full: float, peer: str) -> None:
    Figure(name, full / sent, "times fewer bytes", peer, full, full / sent)


def compare(name: str, ours: list[Outcome], theirs: list[Outcome], peer: str) -> None:
    """Mean over the seeds of the loss against that of the peer's run of the same seed."""
    of = {o.variant.seed: o.loss for o in theirs}
    pairs = [(o.loss, of[o.variant.seed]) for o in ours if o.variant.seed in of]
    say(f"{name}: {', '.join(f'{a:.4f}/{b:.4f}' for a, b in pairs)}")
    a, b = (mean(losses) for losses in zip(*pairs, strict=True))
    Figure(name, a, "nats/byte", f"{peer}, nats/byte", b, mean(a / b for a, b in pairs))


def plot(outcomes: Iterable[Outcome], path: Path, tokens: str) -> None:
    from pilot.display.plots import loss_plot

    series: Mapping[str, list[tuple[float, float]]] = {
        f"{o.variant.name}, {MINERS * o.variant.batch * 64:,} a step": [
            (sum(point[1:3]) / MINERS / 1e6, point[3]) for point in o.curve
        ]
        for o in outcomes
    }
    title = f"Loss against bytes: GPT-2 nano, {tokens} tokens, seed {SEEDS[0]}"
    loss_plot(path, series, title, "MB a miner, both ways", "validation loss (nats/byte)", logarithmic=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("figures", "curves"))
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--known", action="store_true", help="make no run: figures of those that are there")
    arguments = parser.parse_args()
    if "PILOT_DATA" not in os.environ:
        raise SystemExit("PILOT_DATA: names no folder; the runs need its books_train_30mb.parquet")
    text = str(Path(os.environ["PILOT_DATA"]) / "books_train_30mb.parquet")
    if arguments.one:
        print(json.dumps(asdict(play(Variant(**json.loads(arguments.one)), text))))
        return
    if arguments.fresh:
        RUNS.unlink(missing_ok=True)
    if arguments.only != "curves":
        outcomes = [o for o in read().values() if o.variant in FIGURES] if arguments.known else made(FIGURES)
        plot([o for o in outcomes if o.variant.seed == SEEDS[0]], DOCS / "wire.png", "4.1 million")
        figures(outcomes)
    if arguments.only != "figures":
        outcomes = [o for o in read().values() if o.variant in CURVES] if arguments.known else made(CURVES)
        plot(outcomes, DOCS / "wire_codecs.png", "0.5 million")


if __name__ == "__main__":
    main()
