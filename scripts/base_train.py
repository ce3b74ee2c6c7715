"""The baseline: the same task, optimizer, schedule and batches as a marketplace, in one process, or one per GPU.

    python scripts/base_train.py --task gpt2 --rounds 20 --batches 8 --out final.safetensors
    python scripts/base_train.py --depth 4 --max-seq-len 512 --num-iterations 20
    torchrun --standalone --nproc_per_node=2 scripts/base_train.py --depth 4 --num-iterations 20

A marketplace of N miners with --batches B walks the same indices as this with --batches N*B.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "base_train.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM, "stopped; nothing was trained yet")

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from pilot.app import cli
from pilot.app.base_train_flags import BaselineConfig
from pilot.common.files import FileLock, replacing
from pilot.common.flags import option
from pilot.common.paths import check_path, check_room, naming
from pilot.interfaces import Diverged
from pilot.training.distributed import RankLost, Ranks

if TYPE_CHECKING:
    import torch

    from pilot.display.console import Console
    from pilot.display.metrics import Metrics
    from pilot.training.learner import Learner
    from protocol import Range
    from tasks import Batch, Task
    from tasks.optimizer import Settings


OPTIMIZER = "--nanochat.optimizer."
SHORT = {  # nanochat's names, and those of nanochat_train.py
    **{f"--{name}": f"--nanochat.{name}" for name in ("depth", "preset", "aspect-ratio", "head-dim", "window-pattern")},
    **{f"--{name}": f"--nanochat.{name}" for name in ("dtype", "text", "tokenizer", "crop", "kv-ratio")},
    **{f"--{name}": OPTIMIZER + name for name in ("matrix-lr", "embedding-lr", "unembedding-lr", "scalar-lr")},
    **{f"--{name}": OPTIMIZER + name for name in ("weight-decay", "warmup-steps", "warmdown-ratio", "final-lr-frac")},
    **dict.fromkeys(("--max-seq-len", "--max-length"), "--nanochat.seq-len"),
    **dict.fromkeys(("--device-batch-size", "--batch-size"), "--nanochat.batch-size"),
    **dict.fromkeys(("--num-iterations", "--num-steps"), "--rounds"),
    "--data": "--nanochat.text",
    "--device-type": "--device",
    "--model-tag": "--run",
    "--wandb-project": "--wandb.project",
}


def parse(argv: Sequence[str], program: str) -> BaselineConfig:
    """Parse the flags. With --resume the flags that the run was started with are the defaults."""
    first, flags = long_names(argv)
    config = cli.parse(BaselineConfig, program, flags, first)
    if not config.resume:
        return config
    from nanochat import checkpoint_manager

    with cli.mistakes(program):
        folder = folder_of(config)
        assert folder is not None  # --resume needs one
        try:
            values = checkpoint_manager.load(folder, parts=()).meta.get("flags", {})
        except ValueError as error:
            raise ValueError(f"--resume: --checkpoints {error}") from None
        return cli.parse(BaselineConfig, program, flags, [*first, *cli.recorded_flags(values, BaselineConfig)])


def long_names(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Translate nanochat's own flag names to ours.

    A name that only nanochat has implies that task, unless another is named; a W&B project turns W&B on.
    """
    flags: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        long = SHORT.get(name.replace("_", "-"))
        flags.append(long + equals + value if long else argument)
    first = []
    if any(flag.startswith("--nanochat.") for flag in flags):
        first += ["--task", "nanochat"]
    if cli.flag_value(argv, "--wandb-project") or cli.flag_value(argv, "--wandb_project"):
        first += ["--wandb.mode", "online"]
    return first, flags


@dataclass
class Run:
    """The parts of a run; `steps_done` is the loop's only state besides the learner's."""

    config: BaselineConfig
    rounds: int
    batches: int
    task: Task
    learner: Learner
    device: torch.device
    folder: Path | None  # holds the checkpoints
    steps_done: int = 0

    def steps(self, ranks: Ranks) -> Iterator[tuple[tuple[Range, ...], Settings]]:
        units = self.task.count(0) * self.batches
        for step in range(self.steps_done, self.rounds):
            settings = self.task.settings(self.config.optimizer_flags, step, self.rounds, units)
            yield ranks.share(step * self.batches, (step + 1) * self.batches), settings

    def loader(self, ranks: Ranks, stack: ExitStack) -> Callable[[int], Batch]:
        """Return a function that gives this rank's micro-batches in order; nanochat's are made ahead."""
        if self.config.task != "nanochat":
            return self.task.batch
        from tasks.nanochat import Nanochat

        assert isinstance(self.task, Nanochat)
        loader = stack.enter_context(self.task.loader(self.device, ranks.rank, ranks.world))
        loader.load_state_dict({**loader.state_dict(), "position": self.steps_done * self.batches})
        return lambda index: next(loader)

    def due(self, every: int) -> bool:
        return self.steps_done == self.rounds or (every > 0 and self.steps_done % every == 0)


@cli.program(PROGRAM, BaselineConfig)
def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    config = parse(sys.argv[1:] if argv is None else argv, program)
    with cli.mistakes(program):
        ranks = Ranks.of_environment()
    try:
        with ranks:
            train(config, ranks, program)
    except RankLost as lost:
        cli.fail(program, f"{lost}; --resume goes on from the newest checkpoint, where there is one", code=1)


def train(config: BaselineConfig, ranks: Ranks, program: str) -> None:
    from pilot.display.console import Console
    from pilot.display.metrics import rows_before

    with ExitStack() as stack:
        with cli.mistakes(program):
            check(config)
            device = cli.pick_device(ranks.device(config.device))
            cli.set_threads(config.threads)
            cli.reuse_memory()
            ranks.start(device, print)
            say = print if ranks.first else _silent
            with ranks.first_before_others():
                task = prepare(config, device, say)
            run = wire(config, task, device, ranks)
            if ranks.first and run.folder:
                lock(run, run.folder, stack)  # before anything is written
            if run.steps_done:
                say(f"resumed after step {run.steps_done} of {run.rounds}")
            console = stack.enter_context(Console(run.rounds)) if ranks.first else None
            figures = config.log if ranks.first and config.log else Path(os.devnull)
            earlier = rows_before(figures, run.steps_done, say)
            check_room_for(run)
            log = stack.enter_context(open_log(figures))
            log.writelines(f"{json.dumps(row)}\n" for row in earlier)
            metrics = stack.enter_context(closing(open_metrics(run))) if ranks.first and run.folder else None
        batch = run.loader(ranks, stack)
        interrupts.says(lambda: f"stopped; {resumable(run)}")
        with ranks.stops():
            try:
                loop(run, ranks, batch, console, metrics, log)
            except Diverged as end:
                advice = f"lower the learning rate, or look for bad text or weights; {resumable(run)}"
                cli.fail(program, f"after {run.steps_done} steps {end}; {advice}", code=1)
            ranks.wait()  # for the first rank's last checkpoint: torchrun ends all ranks when one ends
        if run.steps_done < run.rounds:
            ended = f"stopped after step {run.steps_done}; {resumable(run)}"
            cli.fail(program, ended if ranks.first else "stopped", interrupts.CODE)
    if ranks.first and config.out is not None:
        from nanochat.checkpoint_manager import write_tensors

        with naming("--out", config.out), replacing(Path(os.path.realpath(config.out))) as file:
            write_tensors(file, run.learner.parameters)
        print(f"parameters in {config.out}")


def _silent(line: str) -> None:
    """Print nothing: only the first rank prints."""


def loop(
    run: Run,
    ranks: Ranks,
    batch: Callable[[int], Batch],
    console: Console | None,
    metrics: Metrics | None,
    log: TextIO,
) -> None:
    """Train step by step; once in a while evaluate and save a checkpoint. Raises Diverged before saving NaN."""
    from nanochat.common import peak_flops
    from pilot.training.gradient import check_finite
    from pilot.training.plain_loop import train as trained

    peak = peak_flops(run.device)
    flops = run.task.flops(run.learner.model)
    if console and peak is None and flops:
        console.say(f"no MFU: the peak of {run.device} is not known")
    began = time.monotonic()
    for work in filter(None, trained(run.learner, run.steps(ranks), ranks.combine, batch)):
        seconds = time.monotonic() - began
        per_s = work.count / seconds
        row: dict[str, Any] = {"round": run.steps_done, "loss": work.loss, "seconds": seconds}
        row[f"{run.task.unit}_per_s"] = per_s
        if peak and flops:
            row["mfu"] = per_s * flops / (peak * ranks.world)
        run.steps_done += 1
        if run.due(run.config.eval_every):
            with ranks.watched():
                row |= run.task.evaluate(run.learner.model)
            if not math.isfinite(row["val_loss"]):
                raise Diverged(f"the validation loss is {row['val_loss']}")
        if console:
            console.round(row)
        if metrics:
            metrics.log(row)
        with naming("--log", log.name):
            print(json.dumps(row), file=log, flush=True)
        if ranks.stopping or run.due(run.config.save_every):
            check_finite("the model", run.learner.state()[1])  # all ranks have the same
            if ranks.first and run.folder:
                save(run)
        if ranks.stopping:
            break
        began = time.monotonic()


# --- set-up -----------------------------------------------------------------------------------------------------------


def check(config: BaselineConfig) -> None:
    """Raise ValueError for mistakes that can be found before anything is read."""
    from nanochat.checkpoint_manager import steps
    from pilot.display.metrics import allowed_mode

    for flag, least in (("rounds", 1), ("batches", 1), ("eval_every", 0), ("save_every", 0), ("save_keep", 1)):
        if getattr(config, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(config, flag)}: must be {least} or more")
    if allowed_mode(config.wandb.mode) != "disabled" and folder_of(config) is None:
        raise ValueError(f"--wandb.mode {config.wandb.mode}: needs --checkpoints, a folder for W&B's files")
    ratio = config.target_param_data_ratio
    if not 0 <= ratio < math.inf:
        raise ValueError(f"--target-param-data-ratio {ratio}: must be 0 or more")
    if ratio and config.task != "nanochat":
        raise ValueError(f"--target-param-data-ratio {ratio}: is nanochat's; task {config.task} takes --rounds")
    if config.compile:
        cli.check_compiler()
    config.check_task()
    folder = folder_of(config)
    if folder:
        check_path("--checkpoints", folder, "folder")  # the folder of nanochat's by default, too
    if config.overwrite and config.resume:
        raise ValueError("--overwrite: deletes what --resume goes on from; leave one of them out")
    if folder and not (config.resume or config.overwrite) and (done := steps(folder)):
        named = f"--run {config.run}" if config.checkpoints is None else f"--checkpoints {folder}"
        raise ValueError(
            f"{named}: {folder} holds a run up to step {done[-1]}; go on with --resume, delete it with --overwrite, or "
            f"give another {named.split()[0]}"
        )


def check_room_for(run: Run) -> None:
    """Raise ValueError if the files of the end do not fit on their disks, as far as that is known now."""
    if run.config.out is not None:
        check_room("--out", run.config.out, sum(p.nbytes for p in run.learner.parameters.values()))
    if run.folder is not None:
        check_room("--checkpoints", run.folder, sum(tensor.nbytes for tensor in run.learner.state()[1].values()))


def prepare(config: BaselineConfig, device: torch.device, say: Any) -> Task:
    from tasks import load_task

    with naming("--cache", config.cache):
        return load_task(config.task).prepare(
            getattr(config, config.task), seed=config.seed, cache=config.cache, device=device, progress=say
        )


def wire(config: BaselineConfig, task: Task, device: torch.device, ranks: Ranks) -> Run:
    from pilot.training.learner import Learner

    batches = batches_of(config, task, ranks)
    rounds = rounds_of(config, task, batches)
    run = Run(config, rounds, batches, task, Learner(task, config.optimizer_flags, device), device, folder_of(config))
    if run.folder:
        restore(run)
    if config.compile:
        run.learner.model.compile()
    return run


def batches_of(config: BaselineConfig, task: Task, ranks: Ranks) -> int:
    """Return the number of micro-batches in a step, over all ranks."""
    batches, each, total = config.batches, task.count(0), config.total_batch_size
    if total == -1:
        if config.task != "nanochat":
            raise ValueError(f"--total-batch-size -1: is nanochat's rule; for task {config.task} give a number")
        from nanochat.schedules import auto_batch_tokens
        from tasks.nanochat import Nanochat

        assert isinstance(task, Nanochat)
        total = auto_batch_tokens(task.config)
    if total:
        batches, rest = divmod(total, each)
        if rest or batches < 1:
            raise ValueError(f"--total-batch-size {total}: must be a multiple of a micro-batch's {each} {task.unit}")
    if batches % ranks.world:
        flag = f"--total-batch-size {config.total_batch_size}" if total else f"--batches {batches}"
        raise ValueError(f"{flag}: {batches} micro-batches a step are no multiple of the {ranks.world} ranks")
    return batches


def rounds_of(config: BaselineConfig, task: Task, batches: int) -> int:
    if not config.target_param_data_ratio:
        return config.rounds
    from nanochat.schedules import horizon_tokens
    from tasks.nanochat import Nanochat

    assert isinstance(task, Nanochat)  # see check
    return max(1, round(horizon_tokens(task.config, config.target_param_data_ratio) / (batches * task.count(0))))


def folder_of(config: BaselineConfig) -> Path | None:
    """Return the folder of the run's checkpoints, if it keeps any."""
    if config.checkpoints is not None:
        return config.checkpoints.expanduser()
    if config.task != "nanochat":
        if config.resume or config.save_every:
            flag = "--resume" if config.resume else f"--save-every {config.save_every}"
            raise ValueError(f"{flag}: needs --checkpoints, the folder of the checkpoints")
        return None
    from nanochat.common import base_dir

    place = base_dir() / "base_checkpoints"
    return place / (config.run or unused_name(place, f"d{getattr(config, config.task).depth}", config))


def unused_name(place: Path, name: str, config: BaselineConfig) -> str:
    """Return the name, with a number if its folder holds a run; with --resume and --overwrite the last that does."""
    from nanochat.checkpoint_manager import steps

    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    free = next(i for i, each in enumerate(names) if not steps(place / each))
    return names[max(0, free - 1)] if config.resume or config.overwrite else names[free]


@contextmanager
def open_log(path: Path) -> Iterator[TextIO]:
    with naming("--log", path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below, where a full disk is seen again
    try:
        yield file
    finally:
        with naming("--log", path):
            file.close()


def open_metrics(run: Run) -> Metrics:
    from pilot.display.metrics import Metrics, rows_before

    assert run.folder is not None
    wandb = run.config.wandb
    metrics = Metrics(run.folder, wandb.mode, wandb.project, run.config.run or run.folder.name)
    metrics.rewrite(rows_before(run.folder / "metrics.jsonl", run.steps_done, print))
    return metrics


def lock(run: Run, folder: Path, stack: ExitStack) -> None:
    """Keep others from writing to the folder, and empty it with --overwrite.

    Raises ValueError if another process is writing to it, or has since it was read.
    """
    from nanochat.checkpoint_manager import clear, steps

    other = f"--checkpoints {folder}: another base_train.py"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        stack.callback(FileLock(folder / "lock").release)
    except BlockingIOError as holder:
        raise ValueError(f"{other} (pid {holder}) is using it; wait for it, or name another folder") from None
    if run.config.overwrite:
        clear(folder)
    if (steps(folder) or [0])[-1] != run.steps_done:
        raise ValueError(f"{other} has gone on with it; start again with --resume, or name another folder")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Save everything that the next step depends on."""
    from nanochat import checkpoint_manager

    assert run.folder is not None
    meta, files = run.task.describe()
    tensors: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for key, tensor in run.learner.state()[1].items():
        part, _, name = key.partition("/")
        tensors["optimizer" if part == "optimizer" else "model"][name] = tensor
    meta |= {"run": identity(run), "flags": cli.flatten(run.config)}
    with naming("--checkpoints", run.folder):
        checkpoint_manager.save(
            run.folder, run.steps_done, tensors=tensors, meta=meta, files=files, keep=run.config.save_keep
        )


def resumable(run: Run) -> str:
    """Return what a user can do with a run that was stopped."""
    from nanochat.checkpoint_manager import steps

    saved = steps(run.folder) if run.folder else []
    if not saved:
        return "no checkpoint was saved, so there is nothing to resume"
    return "--resume goes on from there" if saved[-1] == run.steps_done else f"--resume goes on from step {saved[-1]}"


def restore(run: Run) -> None:
    """Load the newest checkpoint, with --resume. Raises ValueError if it is of another run."""
    from nanochat import checkpoint_manager

    assert run.folder is not None
    if not run.config.resume:
        return
    try:
        checkpoint = checkpoint_manager.load(run.folder)
        check_identity(run, checkpoint.meta)
        keys = {key.partition("/")[2]: key for key in run.learner.state()[1]}  # a buffer's is not model/…
        tensors = {keys.get(name, name): tensor for name, tensor in checkpoint.tensors().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.tensors("optimizer").items()}
        run.learner.load_tensors(tensors)
    except ValueError as error:
        flag = "" if str(error).startswith("--") else f"--resume: --checkpoints {run.folder}: "
        raise ValueError(f"{flag}{error}") from None
    if checkpoint.step > run.rounds:
        raise ValueError(f"--rounds {run.rounds}: the run in {run.folder} is at step {checkpoint.step} already")
    run.steps_done = checkpoint.step


def check_identity(run: Run, meta: Mapping[str, Any]) -> None:
    """Raise ValueError if the checkpoint is of another run: name the flags that changed, or what else did."""
    found, began_with = meta.get("run", {}), meta.get("flags", {})
    changed = [key for key, value in identity(run).items() if found.get(key) != value]
    if not changed:
        return
    config, task = cli.flatten(run.config), run.config.task
    kept = ("task", "seed", "batches", "total_batch_size", f"{task}.", "optimizer.")
    flags = [
        f"{option(name)} {value} (was {began_with[name]})"
        for name, value in config.items()
        if name.startswith(kept) and began_with.get(name, value) != value
    ]
    if flags:
        reason = f"{', '.join(flags)}: the run in --checkpoints {run.folder} keeps what it was started with"
        raise ValueError(f"{reason}; leave that out, or name another folder")
    what = "the text or the tokenizer" if "data" in changed else f"the {changed[0]}, or a file that it is made from,"
    raise ValueError(f"{what} has changed since the run was started; restore it, or name another folder")


def identity(run: Run) -> dict[str, Any]:
    """Return what a resumed run must keep so that its steps equal those of an uninterrupted run, as JSON values."""
    kept: dict[str, Any] = {
        "task": run.task.spec().model_dump(mode="json"),
        "data": run.task.data_digest,
        "micro-batches a step": run.batches,
        "optimizer": cli.flatten(run.config.optimizer_flags),
    }
    return kept


if __name__ == "__main__":
    main()
