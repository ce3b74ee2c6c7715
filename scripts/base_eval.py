"""Evaluate a checkpoint of nanochat's GPT: bits per byte, the CORE metric, samples. Of a GPT-2: samples.

    python scripts/base_eval.py --checkpoint runs/d4 --data books_val.parquet --core-data core_eval/

The text and the tasks are read, and the tokenizer compared with the checkpoint's, before anything is evaluated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "base_eval.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM)

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pilot.app import cli
from pilot.common.files import replacing
from pilot.common.flags import arg
from pilot.common.paths import naming
from tasks.data.reading import Reading

if TYPE_CHECKING:
    import torch

    from nanochat.checkpoint_manager import Checkpoint
    from nanochat.core_eval import CoreData, CoreResult
    from nanochat.engine import Sampling
    from nanochat.gpt import GPT
    from nanochat.packing import PackingIndex
    from nanochat.tokenizer import Tokenizer
    from tasks.data.folders import TextFile

KINDS = ("bpb", "core", "sample")
REDRAW_S = 0.1
LINE_S = 5.0  # between two lines without a terminal
MEGABYTE = 1 << 20  # characters encoded at a time


@dataclass(frozen=True)
class BaseEvalConfig(Reading):
    """Evaluate a checkpoint of nanochat's GPT: bits per byte, the CORE metric, samples."""

    checkpoint: Path | None = None
    """Folder of a checkpoint, or of several, of which it takes the newest."""

    step: int | None = None
    """Evaluate the checkpoint of this step. None: the newest."""

    eval: tuple[str, ...] = KINDS
    """What to evaluate: any of bpb, core, sample."""

    tokenizer: Path | None = None
    """The tokenizer's file, where the checkpoint does not hold it; it must be the one of the training."""

    data: Path | None = None
    """Text for bits per byte: a .txt, .jsonl or .parquet file, or a folder of them, of which those named for validation
    are taken, or else the last one, that training keeps for it. None: the shards in NANOCHAT_BASE_DIR."""

    max_tokens: int = 1 << 20
    """Tokens of the text to take. 0: all of it."""

    core_data: Path | None = None
    """Folder or archive of the CORE tasks' .jsonl files. None: eval_bundle in NANOCHAT_BASE_DIR."""

    max_per_task: int = 500
    """Examples of each CORE task. 0: all of them."""

    prompts: tuple[str, ...] = (
        "The capital of France is",
        "The opposite of hot is",
        "If yesterday was Friday, then tomorrow will be",
        "It was the best of times, it was",
    )
    """Prompts that the samples continue."""

    num_samples: int = 2
    """Samples of each prompt, besides the likeliest continuation."""

    max_new_tokens: int = 32
    """Tokens in a sample."""

    temperature: float = 0.8
    """Temperature of the samples; below 1 likely tokens become likelier."""

    top_k: int = 50
    """Sample among this many of the likeliest tokens. 0: all of them."""

    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""

    seed: int = 42
    """Seed of the samples."""

    batch_tokens: int = 16_384
    """Tokens in a batch; less takes less memory."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the activations. auto: as in training."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    threads: int = 0
    """CPU threads of torch. 0: torch's own choice."""

    json: Path | None = arg(None, path="write")
    """File for the results, as JSON."""

    config: Path | None = None
    """JSON file of flags, like {"max_per_task": 100}; flags given as well come after it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"--eval {unknown[0]}: unknown; known: {', '.join(KINDS)}")
        for flag, least in (("max_tokens", 0), ("max_per_task", 0), ("top_k", 0), ("seed", 0)):
            self._check(flag, least)
        for flag in ("num_samples", "max_new_tokens", "batch_tokens"):
            self._check(flag, 1)

    def _check(self, flag: str, least: int) -> None:
        if getattr(self, flag) < least:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: must be {least} or more")

    @property
    def kinds(self) -> list[str]:
        """Return the values of --eval, which may have commas, as in nanochat."""
        return [kind for given in self.eval for kind in given.split(",") if kind]


@dataclass(frozen=True)
class Wired:
    """The parts of an evaluation; text, tasks and prompts only if asked for."""

    checkpoint: Checkpoint
    model: GPT
    tokenizer: Tokenizer
    text: tuple[str, PackingIndex] | None
    tasks: CoreData | None
    prompts: tuple[list[list[int]], Sampling] | None


@cli.program(PROGRAM, BaseEvalConfig)
def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(BaseEvalConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    with cli.mistakes(PROGRAM):
        if config.checkpoint is None:
            raise ValueError("--checkpoint: name the folder of a checkpoint; base_train.py makes them")
        if config.checkpoint.expanduser().is_file():
            raise ValueError(
                f"--checkpoint {config.checkpoint}: a file of weights alone; name the folder of a checkpoint, such as "
                "base_checkpoints/d4, which holds the model's shape and tokenizer as well"
            )
        hub = is_hub_model(config.checkpoint.expanduser())
        wired = None if hub else wire(config, config.checkpoint.expanduser())
        results = sample_hub_model(config, config.checkpoint.expanduser()) if wired is None else evaluate(config, wired)
    if config.json is not None:
        write(config.json, results)


def evaluate(config: BaseEvalConfig, wired: Wired) -> dict[str, Any]:
    shape, checkpoint = wired.checkpoint.config, wired.checkpoint
    size = f"{shape.parameter_counts()['total'] / 1e6:,.1f} M parameters, {shape.n_layer} layers"
    reads = f"context {shape.sequence_len:,}, vocabulary {shape.vocab_size:,}"
    print(f"{checkpoint.path}: step {checkpoint.step:,}, {size}, {reads}", flush=True)
    results: dict[str, Any] = {"checkpoint": str(checkpoint.path), "step": checkpoint.step}
    if wired.prompts is not None:
        results["samples"] = sample(config, wired, *wired.prompts)
    with Progress() as progress:
        if wired.text is not None:
            results["bpb"] = bits_per_byte(config, wired, wired.text[1], progress)
        core = core_metric(config, wired, wired.tasks, progress) if wired.tasks is not None else None
    if wired.text is not None:
        path, index = wired.text
        print(f"bits per byte: {results['bpb']:.4f} on {index.total:,} tokens of {path}")
        if kept := checkpoint.meta.get("validation"):  # a fraction, unless it was a file of its own
            print(f"  this run kept {kept:.0%} of its text for validation: of that text, this is on all")
    if core is not None:
        report(core)
        results["core"] = {"core": core.core, **dataclasses.asdict(core)}
    return results


# --- the three evaluations --------------------------------------------------------------------------------------------


def bits_per_byte(config: BaseEvalConfig, wired: Wired, index: PackingIndex, progress: Progress) -> float:
    import numpy as np
    import torch

    from nanochat.loss_eval import evaluate_bpb

    rows_each = max(1, config.batch_tokens // wired.checkpoint.config.sequence_len)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first in range(0, len(index), rows_each):
            rows = torch.from_numpy(index.rows(np.arange(first, min(first + rows_each, len(index)))))
            rows = rows.to(wired.model.device)
            yield rows[:, :-1], rows[:, 1:]
            progress.show("bits per byte", min(first + rows_each, len(index)), len(index), "rows")

    return evaluate_bpb(wired.model, batches(), wired.tokenizer.token_bytes())


def core_metric(config: BaseEvalConfig, wired: Wired, tasks: CoreData, progress: Progress) -> CoreResult:
    from nanochat.core_eval import evaluate_core

    return evaluate_core(
        wired.model,
        wired.tokenizer,
        tasks,
        max_per_task=config.max_per_task,
        batch_tokens=config.batch_tokens,
        progress=lambda name, done, total: progress.show(name, done, total, "examples"),
    )


def report(core: CoreResult) -> None:
    width = max(len(task.name) for task in core.tasks)
    print(f"{'task':{width}}  examples  accuracy  centred")
    for task in core.tasks:
        print(f"{task.name:{width}}  {task.examples:8,}  {task.accuracy:8.4f}  {task.centred:7.4f}")
    for task in core.stand_ins:
        print(f"{task.name}: {task.file} stands in for the whole of it")
    print(f"{core.title}: {core.core:.4f}")


def sample(config: BaseEvalConfig, wired: Wired, prompts: list[list[int]], how: Sampling) -> list[dict[str, Any]]:
    """Print for each prompt the likeliest continuation and some sampled ones."""
    from nanochat.engine import Engine, Sampling

    engine = Engine(wired.model, wired.tokenizer)
    length, seed = config.max_new_tokens, config.seed
    likeliest = engine.generate_batch(prompts, max_tokens=length, how=Sampling(temperature=0))
    drawn = engine.generate_batch(prompts, config.num_samples, max_tokens=length, how=how, seed=seed)
    found = []
    for prompt, (first,), others in zip(config.prompts, likeliest, drawn, strict=True):
        found.append(show_samples(prompt, [wired.tokenizer.decode(each.tokens) for each in (first, *others)]))
    return found


def show_samples(prompt: str, texts: Sequence[str]) -> dict[str, Any]:
    """Print the continuations of a prompt, the likeliest first, and return them for --json."""
    print(f"{prompt!r} goes on")
    print(f"  likeliest: {texts[0]!r}")
    for text in texts[1:]:
        print(f"  drawn:     {text!r}")
    return {"prompt": prompt, "likeliest": texts[0], "drawn": texts[1:]}


def is_hub_model(path: Path) -> bool:
    """Return whether the checkpoint is in Hugging Face's form, as a GPT-2's is."""
    from nanochat.checkpoint_manager import steps

    newest = [path / f"step_{step:06d}" for step in steps(path)[-1:]]
    return any((folder / "config.json").is_file() for folder in (path, *newest))


def sample_hub_model(config: BaseEvalConfig, path: Path) -> dict[str, Any]:
    """Print samples of a model in Hugging Face's form; the other evaluations are of nanochat's models."""
    from nanochat.engine import Sampling
    from tasks.generation import continuation, load_text_model

    if "sample" not in config.kinds:
        raise ValueError(
            f"--eval {' '.join(config.eval)}: {path} is no nanochat model; --eval sample is for every model"
        )
    if config.kinds != ["sample"]:
        print("bits per byte and CORE are evaluated of nanochat's models only")
    cli.set_threads(config.threads)
    try:
        model = load_text_model(path, cli.pick_device(config.device), config.step)
    except ValueError as error:
        raise ValueError(f"--checkpoint {error}") from None
    drawn = sampling(config)
    found = []
    for number, prompt in enumerate(config.prompts):
        ids, length = model.encode(prompt), config.max_new_tokens
        ways = [Sampling(temperature=0), *[drawn] * config.num_samples]
        seeds = [config.seed, *(config.seed + number + i * len(config.prompts) for i in range(config.num_samples))]
        texts = [
            "".join(continuation(model, ids, max_tokens=length, how=how, seed=seed))
            for how, seed in zip(ways, seeds, strict=True)
        ]
        found.append(show_samples(prompt, texts))
    return {"checkpoint": str(path), "samples": found}


# --- set-up -----------------------------------------------------------------------------------------------------------


def wire(config: BaseEvalConfig, path: Path) -> Wired:
    """Load all parts. Raises ValueError for anything that is missing or does not fit together."""
    from nanochat.checkpoint_manager import load, load_model

    device = cli.pick_device(config.device)
    cli.set_threads(config.threads)
    cli.reuse_memory()
    try:
        checkpoint = load(path, config.step, parts={"model"})
        shape = checkpoint.config
    except (ValueError, OSError) as error:
        raise ValueError(f"--checkpoint: {error}") from None
    tokenizer = load_tokenizer(config, checkpoint)
    text = pack(config, tokenizer, shape.sequence_len) if "bpb" in config.kinds else None
    tasks = load_tasks(config) if "core" in config.kinds else None
    prompts = encode_prompts(config, tokenizer, shape.rotary_len) if "sample" in config.kinds else None
    model = load_model(checkpoint, device, dtype_of(config, checkpoint, device)).eval()
    return Wired(checkpoint, model, tokenizer, text, tasks, prompts)


def dtype_of(config: BaseEvalConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    import torch

    name = checkpoint.meta.get("dtype", "fp32") if config.dtype == "auto" else config.dtype
    if config.dtype == "auto" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def load_tokenizer(config: BaseEvalConfig, checkpoint: Checkpoint) -> Tokenizer:
    """Return the checkpoint's tokenizer, from its folder or from --tokenizer."""
    from nanochat.checkpoint_manager import check_tokenizer
    from nanochat.tokenizer import Tokenizer

    name, file = f"--checkpoint {checkpoint.path}", "tokenizer.json"
    if config.tokenizer is not None:
        name = f"--tokenizer {config.tokenizer}"
        tokenizer = Tokenizer.load(config.tokenizer.expanduser())
    elif file in checkpoint.files:
        tokenizer = Tokenizer.from_bytes(checkpoint.read(file))
    else:
        raise ValueError(f"{name}: holds no {file}; give its --tokenizer")
    try:
        check_tokenizer(checkpoint, tokenizer.digest)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if tokenizer.get_vocab_size() != checkpoint.config.vocab_size:
        sizes = f"{tokenizer.get_vocab_size()} tokens, the model knows {checkpoint.config.vocab_size}"
        raise ValueError(f"{name}: the tokenizer has {sizes}")
    return tokenizer


def pack(config: BaseEvalConfig, tokenizer: Tokenizer, length: int) -> tuple[str, PackingIndex]:
    """Return the text's name and its rows, which hold every token of it exactly once."""
    import numpy as np

    from nanochat.packing import PackingIndex
    from tasks.data.compression import read_texts
    from tasks.data.folders import TextError
    from tasks.data.reading import Findings

    data, files = held_out(config)
    findings = Findings()
    bos, found, count = tokenizer.get_bos_token_id(), [], 0
    limit = config.max_tokens or sys.maxsize
    try:
        for texts in batches(read_texts(files, config, findings)):
            for ids in tokenizer.encode(texts, prepend=bos):
                if len(ids) > 1 and count < limit:
                    ids = ids[: limit - count + 1]
                    found.append(np.asarray(ids, dtype=np.uint32))
                    count += len(ids) - 1
            if count >= limit:
                break
    except TextError as error:
        raise ValueError(f"--data {data}: {config.named(error)}") from None
    if not found:
        raise ValueError("; ".join([f"--data {data}: holds no text", *findings.facts()]))
    for fact in findings.facts(config.separator):
        print(f"text: {fact}")
    return data, PackingIndex.build(np.concatenate(found), bos, length + 1, crop="keep", pad=True)


def held_out(config: BaseEvalConfig) -> tuple[str, list[TextFile]]:
    """Return the files for bits per byte, which training leaves out, and their name: the file's, or the folder's."""
    from nanochat.shards import data_dir
    from tasks.data.compression import data_files

    data = (config.data or data_dir()).expanduser()
    if config.data is None and not data.is_dir():
        raise ValueError(f"--data: name a text; there are no shards in {data} (or take bpb out of --eval)")
    found = data_files(str(data))
    files = found.validation or found.train[-1:]
    if found.folder:
        print(found.line({"bits per byte": files}))
    return str(files[0].path if len(files) == 1 else data), files


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if sum(map(len, batch)) >= MEGABYTE or len(batch) == 1024:
            yield batch
            batch = []
    if batch:
        yield batch


def load_tasks(config: BaseEvalConfig) -> CoreData:
    from nanochat.common import base_dir
    from nanochat.core_eval import load

    folder = config.core_data or base_dir() / "eval_bundle"
    if config.core_data is None and not folder.is_dir():
        raise ValueError(f"--core-data: name the tasks' folder; there is no {folder} (or take core out of --eval)")
    try:
        return load(folder.expanduser())
    except ValueError as error:
        raise ValueError(f"--core-data {error}") from None


def encode_prompts(config: BaseEvalConfig, tokenizer: Tokenizer, reach: int) -> tuple[list[list[int]], Sampling]:
    prompts = tokenizer.encode(list(config.prompts), prepend=tokenizer.get_bos_token_id())
    longest = max(map(len, prompts), default=0)
    if longest + config.max_new_tokens > reach:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens}: with a prompt of {longest} tokens that is more than the "
            f"{reach} that the model's rotary tables reach"
        )
    return prompts, sampling(config)


def sampling(config: BaseEvalConfig) -> Sampling:
    from nanochat.engine import Sampling

    try:
        return Sampling(config.temperature, config.top_k, config.top_p)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


def write(path: Path, results: dict[str, Any]) -> None:
    with naming("--json", path), replacing(Path(os.path.realpath(path))) as file:
        file.write(json.dumps(results, indent=2, ensure_ascii=False).encode(errors="replace") + b"\n")
    print(f"results in {path}")


class Progress:
    """Show the progress of each evaluation: bars on a terminal, otherwise a line now and then. A context manager."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(highlight=False)
        self._live = console.is_terminal and console.file.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        self._bars = Bars(*columns, TimeRemainingColumn(), console=console, disable=not self._live, transient=True)
        self._tasks: dict[str, Any] = {}
        self._next = time.monotonic() + LINE_S

    def show(self, step: str, done: int, total: int, unit: str) -> None:
        line = f"{done:,} of {total:,} {unit}"
        if self._live:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, done="")
            self._bars.update(self._tasks[step], completed=done, total=total, done=line)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_S
            print(f"{step}: {line}", flush=True)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


if __name__ == "__main__":
    main()
