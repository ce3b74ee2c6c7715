"""What came of a run: the table of who did what and earned what, the plain baseline beside it, a summary and a plot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from market.config import TrainingConfig, ValidatorConfig

if TYPE_CHECKING:
    import torch

    from market.learner import Learner
    from records.console import Console
    from records.metrics import Metrics
    from records.store import Store
    from tasks import Task
    from values import RoundRecord

Curve = list[tuple[float, float]]  # (rounds done, validation loss)


def finish(
    config: ValidatorConfig,
    folder: Path,
    task: Task,
    device: torch.device,
    store: Store,
    metrics: Metrics,
    console: Console,
    seconds: float,
) -> None:
    """Everything that is shown at the end. `seconds` is what the training took in this process."""
    from protocol import ProtocolError
    from records.plot import loss_plot

    rounds = store.committed(0)
    work, busy_s = total(rounds, "work"), total(rounds, "seconds")
    curve: Curve = [(done, values["val_loss"]) for done, values in sorted(store.evaluations().items())]
    summary: dict[str, object] = {
        "rounds": len(rounds),
        "seconds": round(seconds, 2),
        f"{task.unit}": int(work),
        f"{task.unit}_per_s": work / busy_s if busy_s else 0.0,
        "val_loss_before": curve[0][1],
        **store.evaluations()[int(curve[-1][0])],
        "bytes_up": int(total(rounds, "bytes_up")),
        "bytes_down": int(total(rounds, "bytes_down")),
    }
    lines: dict[str, Curve] = {"marketplace": curve}
    if config.baseline:
        try:
            lines["plain baseline"], summary[f"baseline_{task.unit}_per_s"] = run_baseline(
                config, task, device, rounds, console
            )
            summary["baseline_val_loss"] = lines["plain baseline"][-1][1]
        except ProtocolError as error:  # no room for another model
            console.say(f"no baseline: {error}")
    totals = store.totals()
    metrics.summary({**summary, "weights": {t.hotkey: t.weight for t in totals}})
    miners = [
        (t.hotkey, t.accepted, ", ".join(f"{n} {fault}" for fault, n in t.faults.items()) or "none", f"{t.work:,}",
         f"{t.weight:.3f}")
        for t in totals
    ]  # fmt: skip
    loss_plot(folder / "loss.png", lines, f"{folder.name}: {config.task}", "round", "validation loss (nats per token)")
    console.table(
        folder.name, ["", "value"], [(name.replace("_", " "), shown(value)) for name, value in summary.items()]
    )
    console.table("miners", ["hotkey", "accepted rounds", "faults", f"{task.unit} accepted", "weight"], miners)
    console.say(f"run folder {folder}, plot {folder / 'loss.png'}")


def run_baseline(
    config: TrainingConfig, task: Task, device: torch.device, rounds: Sequence[RoundRecord], console: Console
) -> tuple[Curve, float]:
    """Plain training on the batches that were accepted: its validation curve by rounds, and its units a second."""
    from market.baseline import new_learner, train
    from market.cursor import merge
    from protocol import Receipt
    from tasks.optimizer import kept_settings

    receipts = [[Receipt.parse(s.body) for s in record.receipts] for record in rounds]
    learner = new_learner(config, task, device)
    curve: Curve = [(0, task.evaluate(learner.model)["val_loss"])]
    work, busy_s, began = 0, 0.0, time.monotonic()
    done_ranges = (merge(d for r in receipt for d in r.done) for receipt in receipts)
    settings = (kept_settings(record.metrics) for record in rounds)
    for done, step in enumerate(train(learner, zip(done_ranges, settings, strict=True)), 1):
        work, busy_s = work + (step.count if step else 0), busy_s + time.monotonic() - began
        if done == len(rounds) or (config.eval_every and done % config.eval_every == 0):
            curve.append((done, task.evaluate(learner.model)["val_loss"]))
            console.say(f"plain baseline: step {done}/{len(rounds)}, validation loss {curve[-1][1]:.3f}")
        began = time.monotonic()
    return curve, work / busy_s if busy_s else 0.0


def save_model(task: Task, learner: Learner, rounds: int, folder: Path) -> Path:
    """The model as a checkpoint in the run's folder, of which base_eval, or Hugging Face's loaders, make use."""
    from nanochat import checkpoint_manager

    meta, files = task.describe()
    tensors = {name: p.detach() for name, p in learner.parameters.items()} | task.buffers(learner.model)
    return checkpoint_manager.save(folder / "model", rounds, tensors={"model": tensors}, meta=meta, files=files, keep=1)


def total(rounds: Sequence[RoundRecord], name: str) -> float:
    return sum(float(r.metrics.get(name, 0)) for r in rounds)


def shown(value: object) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
