"""Report a finished run: a summary, a table of the miners, the plain baseline, and a plot."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pilot.app.training_flags import RoundConfig
from pilot.app.validator_flags import ValidatorConfig

if TYPE_CHECKING:
    import torch

    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.interfaces import RoundRecord
    from pilot.storage.ledger import Total as MinerTotal
    from pilot.storage.run_store import RunStore
    from pilot.training.learner import Learner
    from tasks import Task

Curve = list[tuple[float, float]]  # (rounds done, validation loss)
Row = Mapping[str, float | int | str]  # a round's metrics

# From the last round: the codecs, the median link, and the share of a round that it takes (pilot.market.link_budget).
LINKS = ("codec_up", "codec_down", "link_up_mbps", "link_down_mbps", "communication", "utilisation_expected")
OWN = ("verify", "aggregate", "step", "encode", "evaluate", "commit")  # phases that take the validator's own time


def finish(
    config: ValidatorConfig,
    folder: Path,
    task: Task,
    device: torch.device,
    store: RunStore,
    metrics: Metrics,
    console: Console,
    seconds: float,
) -> None:
    """Show and save everything that a run reports at its end. `seconds` is the training time in this process."""
    from pilot.display.plots import loss_plot
    from pilot.interfaces import Diverged
    from protocol import ProtocolError

    rounds = store.committed(0)
    evaluations = sorted(store.ledger.evaluations().items())
    curve: Curve = [(done, values["val_loss"]) for done, values in evaluations]
    replica: Curve = [
        (done, values["replica_val_loss"]) for done, values in evaluations if "replica_val_loss" in values
    ]
    summary = summarise(task, store, rounds, curve, seconds)
    lines: dict[str, Curve] = {"marketplace": curve, **({"miners' replica": replica} if replica else {})}
    if config.baseline:
        try:
            lines["plain baseline"], summary[f"baseline_{task.unit}_per_s"] = run_baseline(
                config, task, device, rounds, console
            )
            summary["baseline_val_loss"] = lines["plain baseline"][-1][1]
        except (ProtocolError, Diverged) as error:  # no memory for a second model, or NaN in it
            console.say(f"no baseline: {error}")
    totals = store.ledger.totals()
    metrics.summary({**summary, "weights": {t.hotkey: t.weight for t in totals}})
    loss_plot(folder / "loss.png", lines, f"{folder.name}: {config.task}", "round", "validation loss (nats per token)")
    values = [(label(name), shown(value)) for name, value in summary.items()]
    console.table(folder.name, ["", "value"], values)
    columns = ["hotkey", "accepted rounds", "faults", f"{task.unit} accepted", "lost", "late", "utilisation", "weight"]
    console.table("miners (lost, late: micro-batches)", columns, miner_rows(totals, [r.metrics for r in rounds]))
    console.say(f"validator's own time: {own_time(r.metrics for r in rounds) or 'not measured'}")
    console.say(f"run folder {folder}, plot {folder / 'loss.png'}")


def summarise(
    task: Task, store: RunStore, rounds: Sequence[RoundRecord], curve: Curve, seconds: float
) -> dict[str, object]:
    """Return the figures of a run; `pilot.storage.ledger.Accounting` describes those of micro-batches."""
    work, busy_s = total(rounds, "work"), total(rounds, "seconds")
    summary: dict[str, object] = {
        "rounds": len(rounds),
        "seconds": round(seconds, 2),
        f"{task.unit}": int(work),
        f"{task.unit}_per_s": work / busy_s if busy_s else 0.0,
        "val_loss_before": curve[0][1],
        **store.ledger.evaluations()[int(curve[-1][0])],
        "bytes_up": int(total(rounds, "bytes_up")),
        "bytes_down": int(total(rounds, "bytes_down")),
        **{f"batches_{name}": count for name, count in asdict(store.ledger.accounting()).items()},
        "batches_late": store.ledger.late_batches(),
    }
    last = rounds[-1].metrics if rounds else {}
    if "epoch" in last:
        summary |= {"epoch": last["epoch"], "epoch_done": f"{last['epoch_done']}/{last['epoch_total']}"}
    summary |= {name: last[name] for name in LINKS if name in last}
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
        counts = (f"{t.work:,}", f"{t.lost:,}", f"{t.late:,}")
        found.append((t.hotkey, str(t.accepted), faults, *counts, utilisation, f"{t.weight:.3f}"))
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


def save_model(task: Task, learner: Learner, rounds: int, folder: Path) -> Path:
    """Save the model into the run's folder as a checkpoint for base_eval or Hugging Face's loaders.

    They read RUN/model as well as the step's folder in it, which is returned.
    """
    from nanochat import checkpoint_manager

    if (folder / "model").is_file():  # no checkpoint of ours
        (folder / "model").unlink()
    meta, files = task.describe()
    tensors = {name: p.detach() for name, p in learner.parameters.items()} | task.buffers(learner.model)
    place = folder / "model"
    path = checkpoint_manager.save(place, rounds, tensors={"model": tensors}, meta=meta, files=files, keep=1)
    checkpoint_manager.link_newest(place)
    return path


def total(rounds: Sequence[RoundRecord], name: str) -> float:
    return sum(float(r.metrics.get(name, 0)) for r in rounds)


def label(name: str) -> str:
    """Return the label of a figure; those of the miners' replica are marked."""
    text = name.removeprefix("replica_").replace("_", " ")
    return f"{text}, miners' model" if name.startswith("replica_") else text


def shown(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
