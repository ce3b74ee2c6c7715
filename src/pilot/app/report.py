"""Report a finished or stopped run: what it reached, who earned what, what the model writes, and a plot."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.app.training_flags import RoundConfig
from pilot.common.units import format_bytes

if TYPE_CHECKING:
    import torch

    from pilot.app.build_validator import Validator
    from pilot.display.console import Console
    from pilot.interfaces import RoundRecord
    from pilot.storage.ledger import Total as MinerTotal
    from pilot.storage.run_store import RunStore
    from tasks import Task

Curve = list[tuple[float, float]]  # (rounds done, validation loss)
Evaluations = Mapping[int, Mapping[str, float]]  # by rounds done
Row = Mapping[str, float | int | str]  # a round's metrics

# From the last round: the codecs, the median link, and the share of a round that it takes (pilot.market.link_budget).
LINKS = ("codec_up", "codec_down", "link_up_mbps", "link_down_mbps", "communication", "utilisation_expected")
OWN = ("verify", "aggregate", "step", "encode", "evaluate", "commit")  # phases that take the validator's own time
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 64
REDRAW_SHARE = 0.02  # of the time may be spent on drawing

logger = logging.getLogger(__name__)


class LossPlot:
    """The plot of a run's validation loss, RUN/loss.png."""

    def __init__(self, folder: Path, task: str) -> None:
        self.path = folder / "loss.png"
        self._title = f"{folder.name}: {task}"
        self._drawing: threading.Thread | None = None
        self._next = 0.0  # on the monotonic clock

    def redraw(self, evaluations: Evaluations) -> None:
        """Draw the curve so far in the background, unless that would take too much of the time."""
        busy = self._drawing is not None and self._drawing.is_alive()
        if busy or len(evaluations) < 2 or time.monotonic() < self._next:
            return

        def draw() -> None:
            began = time.monotonic()
            try:
                self.draw(evaluations, [])
            except OSError as error:
                logger.warning("%s is not drawn: %s", self.path, error.strerror or error)
            self._next = time.monotonic() + (time.monotonic() - began) / REDRAW_SHARE

        self._drawing = threading.Thread(target=draw, name="plot", daemon=True)
        self._drawing.start()

    def finish(self, evaluations: Evaluations, baseline: Curve) -> None:
        """Draw the curves of the end, after what is being drawn."""
        if self._drawing is not None:
            self._drawing.join()
        self.draw(evaluations, baseline)

    def draw(self, evaluations: Evaluations, baseline: Curve) -> None:
        """Draw the curves now."""
        from pilot.display.plots import loss_plot

        done = sorted(evaluations.items())
        lines: dict[str, Curve] = {"plain training": baseline} if baseline else {}
        lines["marketplace"] = [(rounds, values["val_loss"]) for rounds, values in done]
        loss_plot(self.path, lines, self._title, "rounds", "validation loss (nats per token)")


def finish(v: Validator, newest: Evaluations, parameters: int, seconds: float, baseline: bool) -> None:
    """Show and save everything that a run reports at its end.

    `newest` has the evaluation of the last model if the ledger has none of it, `parameters` is the number of the
    model's values, `seconds` the training time in this process. With `baseline` plain training comes first.
    """
    from pilot.interfaces import Diverged
    from protocol import ProtocolError

    config, task, store, console = v.config, v.task, v.store, v.console
    console.end_view()
    rounds, evaluations = store.committed(0), {**store.ledger.evaluations(), **newest}
    summary = summarise(task, store, rounds, evaluations, parameters, seconds)
    curve: Curve = []
    if baseline:
        try:
            curve, rate = run_baseline(config, task, v.device, rounds, console)
            summary |= {f"baseline_{task.unit}_per_s": rate, "baseline_val_loss": curve[-1][1]}
        except (ProtocolError, Diverged) as error:  # no memory for a second model, or NaN in it
            console.say(f"no baseline: {error}")
    totals = store.ledger.totals()
    v.metrics.summary({**summary, "weights": {t.hotkey: t.weight for t in totals}})
    v.plot.finish(evaluations, curve)

    console.heading(v.folder.name)
    for line in verdict(summary, task.unit, config.rounds, config.local, os.cpu_count() or 1):
        console.paragraph(line)
    console.heading("Who earned what, and why")
    console.columns(["miner", "pay", f"{task.unit} accepted", "rounds", "why"], earnings(totals, len(rounds)))
    excerpts = task.excerpts(config.samples, PROMPT_TOKENS)
    if excerpts:
        show_samples(v, excerpts)
    if config.details:
        console.heading("Details")
        console.columns(["figure", "value"], [(label(name), shown(value)) for name, value in summary.items()])
        columns = ["hotkey", "faults", "lost", "late", "utilisation"]
        console.table("miners (lost, late: micro-batches)", columns, miner_rows(totals, [r.metrics for r in rounds]))
        console.paragraph(f"validator's own time: {own_time(r.metrics for r in rounds) or 'not measured'}")
    console.heading("Where it is")
    use = f"; pilot-sample {v.folder} continues a text with it" if excerpts else ""
    console.paragraph(f"model {v.folder / 'model'}{use}")
    more = "" if config.details else "; --details shows them here"
    console.paragraph(f"plot {v.plot.path}, every figure {v.folder / 'summary.json'}{more}")


def verdict(summary: Mapping[str, object], unit: str, planned: int, local: int, cores: int) -> list[str]:
    """Return what a run reached in up to three sentences: its loss, its bytes, its speed.

    `summary` is as `summarise` returns it, with the baseline's figures if there was one. `local` miners shared this
    machine's cores.
    """
    figures = {name: float(value) for name, value in summary.items() if isinstance(value, int | float)}
    done = f"{summary['rounds']:,}" + ("" if summary["rounds"] == planned else f" of {planned:,}")
    lines = [f"Loss: {figures['val_loss']:.3f} after {done} rounds, from {figures['val_loss_before']:.3f}"]
    if "baseline_val_loss" in figures:
        lines[0] += f"; plain training on the same batches reached {figures['baseline_val_loss']:.3f}"
    if figures["bytes_up"]:
        ways = [(figures[f"bytes_{way}"], figures[f"fp32_bytes_{way}"], way) for way in ("up", "down")]
        lines.append("Bytes: " + " and ".join(f"{format_bytes(sent)} {way}" for sent, _, way in ways))
        if all(dense > sent for sent, dense, _ in ways):
            lines[-1] += f"; fp32 would take {format_bytes(ways[0][1])} and {format_bytes(ways[1][1])}"
    rate, plain = figures[f"{unit}_per_s"], figures.get(f"baseline_{unit}_per_s", 0.0)
    lines.append(f"Speed: {rate:,.0f} {unit}/s")
    if plain:
        lines[-1] += f"; plain training {plain:,.0f}"
    if plain > rate and local:
        lines[-1] += f". {local} miners and the validator share this machine's {cores} cores"
        share = figures.get("utilisation_expected")
        if share:
            lines[-1] += (
                f"; {local} machines like it, with links as fast as these, would make about "
                f"{local * plain * share:,.0f}"
            )
    return [f"{line}." for line in lines]


def earnings(totals: Iterable[MinerTotal], rounds: int) -> list[tuple[str, ...]]:
    """Return a row per miner, the best paid first: miner, share of the pay, work, rounds, why."""
    rows: list[tuple[str, ...]] = []
    for t in sorted(totals, key=lambda t: -t.weight):
        faults = [f"{count} {fault}" for fault, count in t.faults.items()]
        lost = [f"{t.lost:,} micro-batches lost"] if t.lost else []
        why = ", ".join([*faults, *lost]) or "all that it was ordered was accepted"
        rows.append((t.hotkey[:8], f"{t.weight:.1%}", f"{t.work:,}", f"{t.accepted:,} of {rounds:,}", why))
    return rows


def show_samples(v: Validator, excerpts: Sequence[Sequence[int]]) -> None:
    """Let the saved model continue these beginnings of held-out texts."""
    from nanochat.engine import Sampling
    from tasks.generation import continuation, load_text_model

    try:
        model = load_text_model(v.folder, v.device)
    except ValueError as error:
        v.console.say(f"no samples: {error}")
        return
    v.console.heading("What it writes (after »; held-out text before it)")
    for number, excerpt in enumerate(excerpts):
        prompt = excerpt[: model.context // 2]
        how, room = Sampling(temperature=0.8, top_k=50), min(SAMPLE_TOKENS, model.context - len(prompt))
        text = "".join(continuation(model, prompt, max_tokens=room, how=how, seed=number))
        for line in f"{model.decode(prompt)}»{text}".strip().splitlines():
            v.console.paragraph(f"  {line}")
        v.console.paragraph("")


def summarise(
    task: Task,
    store: RunStore,
    rounds: Sequence[RoundRecord],
    evaluations: Evaluations,
    parameters: int,
    seconds: float,
) -> dict[str, object]:
    """Return the figures of a run; `pilot.storage.ledger.Accounting` describes those of micro-batches."""
    from protocol import Receipt

    work, busy_s = total(rounds, "work"), total(rounds, "seconds")
    first, last = min(evaluations), max(evaluations)
    receipts = [Receipt.parse(signed.body) for record in rounds for signed in record.receipts]
    summary: dict[str, object] = {
        "rounds": len(rounds),
        "seconds": round(seconds, 2),
        f"{task.unit}": int(work),
        f"{task.unit}_per_s": work / busy_s if busy_s else 0.0,
        "val_loss_before": evaluations[first]["val_loss"],
        **evaluations[last],
        "bytes_up": int(total(rounds, "bytes_up")),
        "bytes_down": int(total(rounds, "bytes_down")),
        "fp32_bytes_up": 4 * parameters * sum(receipt.verdict == "ACCEPTED" for receipt in receipts),
        "fp32_bytes_down": 4 * parameters * len(receipts),
        **{f"batches_{name}": count for name, count in asdict(store.ledger.accounting()).items()},
        "batches_late": store.ledger.late_batches(),
    }
    newest = rounds[-1].metrics if rounds else {}
    if "epoch" in newest:
        summary |= {"epoch": newest["epoch"], "epoch_done": f"{newest['epoch_done']}/{newest['epoch_total']}"}
    summary |= {name: newest[name] for name in LINKS if name in newest}
    if used := [float(r.metrics["utilisation"]) for r in rounds if "utilisation" in r.metrics]:
        summary["utilisation"] = sum(used) / len(used)
    return summary


def miner_rows(totals: Iterable[MinerTotal], rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Return a row per miner. Utilisation is the mean over the rounds in which it was measured."""
    used: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in row:
            if name.startswith("utilisation."):
                used[name.partition(".")[2]].append(float(row[name]))
    found: list[tuple[str, ...]] = []
    for t in totals:
        mine = used[t.hotkey[:8]]
        faults = ", ".join(f"{n} {fault}" for fault, n in t.faults.items()) or "none"
        utilisation = f"{sum(mine) / len(mine):.1%}" if mine else ""
        found.append((t.hotkey, faults, f"{t.lost:,}", f"{t.late:,}", utilisation))
    return found


def own_time(rows: Iterable[Row]) -> str:
    """Return the validator's own seconds by phase in one line; "" if they were not measured."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for phase in OWN:
            if f"{phase}_s" in row:
                seconds[phase] += float(row[f"{phase}_s"])
    return ", ".join(f"{phase} {seconds[phase]:,.3f} s" for phase in OWN if phase in seconds)


def run_baseline(
    config: RoundConfig, task: Task, device: torch.device, rounds: Sequence[RoundRecord], console: Console
) -> tuple[Curve, float]:
    """Train plainly on the accepted batches. Returns the validation loss by round, and units per second."""
    from pilot.training.diloco import plain_steps
    from pilot.training.learner import Learner
    from pilot.training.plain_loop import train
    from protocol import Receipt

    receipts = [[Receipt.parse(s.body) for s in record.receipts] for record in rounds]
    learner = Learner(task, config.optimizer_flags, device)
    curve: Curve = [(0, task.evaluate(learner.model)["val_loss"])]
    work, busy_s, began = 0, 0.0, time.monotonic()
    for done, (record, receipt) in enumerate(zip(rounds, receipts, strict=True), 1):
        parts, settings = [r.done for r in receipt], record.settings
        steps = plain_steps(config.diloco, task, config.optimizer_flags, record.round, parts, settings)
        work += sum(step.count for step in train(learner, steps) if step)
        busy_s += time.monotonic() - began
        if done == len(rounds) or (config.eval_every and done % config.eval_every == 0):
            curve.append((done, task.evaluate(learner.model)["val_loss"]))
            console.say(f"plain baseline: round {done}/{len(rounds)}, validation loss {curve[-1][1]:.3f}")
        began = time.monotonic()
    return curve, work / busy_s if busy_s else 0.0


def total(rounds: Sequence[RoundRecord], name: str) -> float:
    return sum(float(r.metrics.get(name, 0)) for r in rounds)


def label(name: str) -> str:
    """Return the label of a figure; those of the miners' replica are marked."""
    text = name.removeprefix("replica_").replace("_", " ")
    return f"{text}, miners' model" if name.startswith("replica_") else text


def shown(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
