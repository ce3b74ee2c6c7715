"""The CORE metric of DataComp-LM (Li et al. 2024, arXiv 2406.11794): the mean centred accuracy of 22 in-context tasks.

The data are JSON lines in the schemas of mosaicml's llm-foundry, anywhere below a folder or in a tar or zip archive of
it. The result names the tasks without a file; the mean is then over the others.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import random
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Example = dict[str, Any]

SHUFFLE_SEED = 1337
SHOTS_SEED = 1234  # plus the example's number
CHUNK = 256  # examples tokenized at a time
MAX_LOGITS = 1 << 27  # held at a time to find the likeliest tokens: 512 MB
ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".zip")


@dataclass(frozen=True)
class Task:
    """One of the 22 tasks. If the first of `files` is missing, the next replaces it."""

    name: str
    files: tuple[str, ...]
    kind: Kind
    shots: int = 0
    chance: float = 0.0  # accuracy of guessing, as the metric's authors state it
    delimiter: str = " "  # between a question and its answer


MC: Final = "multiple_choice"
LM: Final = "language_modeling"
ANSWER: Final = "\nAnswer: "
HELLASWAG: Final = ("hellaswag.jsonl", "hellaswag_val_1000_core.jsonl")

TASKS: Final[tuple[Task, ...]] = (
    Task("hellaswag_zeroshot", HELLASWAG, MC, 0, 0.25),
    Task("jeopardy", ("jeopardy_all.jsonl",), LM, 10, 0.0, ANSWER),
    Task("bigbench_qa_wikidata", ("bigbench_qa_wikidata.jsonl",), LM, 10),
    Task("arc_easy", ("arc_easy.jsonl",), MC, 10, 0.25, ANSWER),
    Task("arc_challenge", ("arc_challenge.jsonl",), MC, 10, 0.25, ANSWER),
    Task("copa", ("copa.jsonl",), MC, 0, 0.5),
    Task("commonsense_qa", ("commonsense_qa.jsonl",), MC, 10, 0.2),
    Task("piqa", ("piqa.jsonl",), MC, 10, 0.5, ANSWER),
    Task("openbook_qa", ("openbook_qa.jsonl",), MC, 0, 0.25),
    Task("lambada_openai", ("lambada_openai.jsonl",), LM),
    Task("hellaswag", HELLASWAG, MC, 10, 0.25),
    Task("winograd", ("winograd_wsc.jsonl",), "schema", 0, 0.5),
    Task("winogrande", ("winogrande.jsonl",), "schema", 0, 0.5),
    Task("bigbench_dyck_languages", ("bigbench_dyck_languages.jsonl",), LM, 10),
    Task("agi_eval_lsat_ar", ("agi_eval_lsat_ar.jsonl",), MC, 3, 0.2),
    Task("bigbench_cs_algorithms", ("bigbench_cs_algorithms.jsonl",), LM, 10),
    Task("bigbench_operators", ("bigbench_operators.jsonl",), LM, 10),
    Task("bigbench_repeat_copy_logic", ("bigbench_repeat_copy_logic.jsonl",), LM, 10),
    Task("squad", ("squad.jsonl",), LM, 10),
    Task("coqa", ("coqa.jsonl",), LM),
    Task("boolq", ("boolq.jsonl",), MC, 10, 0.62, ANSWER),
    Task("bigbench_language_identification", ("bigbench_language_identification.jsonl",), MC, 10, 0.091),
)


class Model(Protocol):
    """The part of nanochat.gpt.GPT that is used here."""

    @property
    def config(self) -> Any: ...  # with sequence_len and vocab_size
    @property
    def device(self) -> torch.device: ...
    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, reduction: str = "mean"
    ) -> torch.Tensor: ...


class Encoder(Protocol):
    """The part of nanochat.tokenizer.Tokenizer that is used here."""

    def get_bos_token_id(self) -> int: ...
    def encode(self, text: list[str], /) -> list[list[int]]: ...


class Row(NamedTuple):
    """One sequence for the model, beginning with BOS; the tokens from `start` are scored."""

    tokens: list[int]
    start: int  # at least 1


class CoreData(NamedTuple):
    tasks: tuple[tuple[Task, str, list[Example]], ...]  # with the name of the file that the examples are from
    missing: tuple[str, ...]  # names of the tasks without a file


@dataclass(frozen=True)
class TaskResult:
    name: str
    file: str
    examples: int
    accuracy: float
    centred: float  # 0 at chance, 1 if all are correct


@dataclass(frozen=True)
class CoreResult:
    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]  # names of the tasks without a file

    @property
    def core(self) -> float:
        return sum(task.centred for task in self.tasks) / len(self.tasks)

    @property
    def stand_ins(self) -> tuple[TaskResult, ...]:
        """Return the tasks whose examples come from a replacement file, which holds a part of their own."""
        own = {task.name: task.files[0] for task in TASKS}
        return tuple(task for task in self.tasks if task.file != own[task.name])

    @property
    def title(self) -> str:
        """Return the metric's name: `CORE`, or with the tasks that are missing."""
        if not self.missing:
            return "CORE"
        return f"CORE over {len(self.tasks)} of {len(TASKS)} tasks (missing: {', '.join(self.missing)})"


def evaluate_core(
    model: Model,
    tokenizer: Encoder,
    data: Path | CoreData,
    *,
    max_per_task: int = 0,
    batch_tokens: int = 16_384,
    progress: Callable[[str, int, int], object] = lambda task, done, total: None,
) -> CoreResult:
    """Evaluate every task in the folder (or archive) on its first `max_per_task` shuffled examples, or all of them.

    A batch has up to `batch_tokens` tokens, padding included. `progress(task, done, total)` counts examples. Raises
    ValueError, before anything is evaluated, as `load` does.
    """
    data = load(data) if isinstance(data, Path) else data
    results = []
    for task, file, examples in data.tasks:
        right = total = 0
        for done, total, correct in _grade(model, tokenizer, task, examples, max_per_task, batch_tokens):
            right += correct
            progress(task.name, done, total)
        accuracy = right / total
        results.append(TaskResult(task.name, file, total, accuracy, (accuracy - task.chance) / (1 - task.chance)))
    return CoreResult(tuple(results), data.missing)


# --- data -------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> CoreData:
    """Load all tasks that are below a folder or in an archive.

    Raises ValueError if there are none; if one is damaged, the error names file and line.
    """
    with opened(folder) as below:
        there = find(below)
        paths = {task: next((there[name] for name in task.files if name in there), None) for task in TASKS}
        examples = {path: read(path, task.kind, folder) for task, path in paths.items() if path is not None}
        tasks = tuple((task, path.name, examples[path]) for task, path in paths.items() if path is not None)
    if not tasks:
        raise ValueError(f"{folder}: holds none of the tasks of CORE, such as {TASKS[1].files[0]}")
    return CoreData(tasks, tuple(task.name for task, path in paths.items() if path is None))


def find(folder: Path) -> dict[str, Path]:
    """Return the tasks' files below a folder by name; of several with one name, the first by path."""
    wanted = {name for task in TASKS for name in task.files}
    return {path.name: path for path in sorted(folder.rglob("*.jsonl"), reverse=True) if path.name in wanted}


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Path]:
    """Give the folder, or for an archive a temporary folder with its task files."""
    if folder.is_dir():
        yield folder
    elif not folder.exists():
        raise ValueError(f"{folder}: no such folder or archive")
    elif not folder.name.endswith(ARCHIVES):
        raise ValueError(f"{folder}: neither a folder nor one of {', '.join(ARCHIVES)}")
    else:
        with tempfile.TemporaryDirectory(prefix="core_eval") as temporary:
            try:
                _unpack(folder, Path(temporary))
            except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
                raise ValueError(f"{folder}: cannot be unpacked ({' '.join(str(error).split())})") from None
            yield Path(temporary)


def _unpack(archive: Path, into: Path) -> None:
    """Extract only the tasks' files, by their base names, so that no path in the archive is used."""
    wanted = {name for task in TASKS for name in task.files}

    def copy(member: str, source: IO[bytes] | None) -> None:
        if source is not None:
            with source, (into / Path(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)

    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if Path(info.filename).name in wanted and not info.is_dir():
                    copy(info.filename, packed.open(info))
    else:
        with tarfile.open(archive) as tar:
            for entry in tar:
                if Path(entry.name).name in wanted and entry.isfile():
                    copy(entry.name, tar.extractfile(entry))


def read(path: Path, kind: Kind, folder: Path) -> list[Example]:
    """Return the examples of a file below `folder`. Raises ValueError, with both and the line, if it is damaged."""
    where = f"{folder}: {path.name}"
    examples: list[Example] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: line {number}: not JSON ({error})") from None
            if wrong := _wrong(example, kind):
                raise ValueError(f"{where}: line {number}: {wrong}")
            examples.append(example)
    if not examples:
        raise ValueError(f"{where}: holds no example")
    return examples


def _wrong(example: object, kind: Kind) -> str | None:
    """Return what is wrong with an example, or None."""
    if not isinstance(example, dict):
        return "not a JSON object"
    strings = {MC: ("query",), "schema": ("continuation",), LM: ("context", "continuation")}[kind]
    for key in strings:
        if not isinstance(example.get(key), str):
            return f"{key} must be a string"
    if kind == LM:
        return None
    key = "choices" if kind == MC else "context_options"
    options, gold = example.get(key), example.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        return f"{key} must be a list of two strings or more"
    if type(gold) is not int or not 0 <= gold < len(options):
        return f"gold must be the number of one of the {len(options)} {key}, from 0"
    return None


# --- prompts ----------------------------------------------------------------------------------------------------------


def choose_shots(examples: Sequence[Example], index: int, shots: int) -> list[Example]:
    """Choose the solved examples shown before example `index`: as many others as the task wants, or as there are."""
    others = [i for i in range(len(examples)) if i != index]
    return [examples[i] for i in random.Random(SHOTS_SEED + index).sample(others, min(shots, len(others)))]


def prompts(task: Task, example: Example, shots: Iterable[Example]) -> list[str]:
    """Return the model's inputs: a text per option; for language modeling the text without and with its answer."""
    head = "".join(f"{_solved(task, shot)}\n\n" for shot in shots)
    if task.kind == MC:
        return [f"{head}{example['query']}{task.delimiter}{choice}" for choice in example["choices"]]
    if task.kind == LM:
        asked = f"{head}{example['context'].strip()}{task.delimiter}"
        return [asked.strip(), asked + example["continuation"]]
    return [f"{head}{option}{task.delimiter}{example['continuation']}" for option in example["context_options"]]


def _solved(task: Task, example: Example) -> str:
    if task.kind == MC:
        return f"{example['query']}{task.delimiter}{example['choices'][example['gold']]}"
    if task.kind == LM:
        return f"{example['context'].strip()}{task.delimiter}{example['continuation']}"
    return f"{example['context_options'][example['gold']]}{task.delimiter}{example['continuation']}"


def rows_of(kind: Kind, texts: Sequence[list[int]], length: int) -> list[Row]:
    """Return the sequences of one example from its texts' tokens, BOS first, cropped on the left to `length` tokens.

    Scored are the tokens after the texts' common beginning (multiple choice), their common end (schema), or what the
    second has after the first (language modeling): always at least one token.
    """
    if kind == "schema":
        shared = _common([text[::-1] for text in texts])
        return [_cropped(text, max(1, len(text) - max(1, shared)), length) for text in texts]
    start = min(_common(texts), min(map(len, texts)) - 1 if kind == MC else len(texts[1]) - 1)
    return [_cropped(text, max(1, start), length) for text in (texts if kind == MC else texts[1:])]


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix."""
    shortest = min(map(len, texts))
    return next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)


def _cropped(tokens: list[int], start: int, length: int) -> Row:
    """Crop on the left, but keep BOS, which every row in training began with."""
    extra = max(0, len(tokens) - length)
    return Row(tokens[:1] + tokens[1 + extra :], max(1, start - extra))


# --- grading ----------------------------------------------------------------------------------------------------------


def _grade(
    model: Model, tokenizer: Encoder, task: Task, examples: list[Example], max_per_task: int, batch_tokens: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (examples done, examples in total, correct ones among the newest)."""
    examples = examples.copy()
    random.Random(SHUFFLE_SEED).shuffle(examples)
    total = min(max_per_task, len(examples)) if max_per_task else len(examples)
    for first in range(0, total, CHUNK):
        numbers = range(first, min(first + CHUNK, total))
        texts = [prompts(task, examples[i], choose_shots(examples, i, task.shots)) for i in numbers]
        ids = iter(tokenizer.encode([text for some in texts for text in some]))
        bos = tokenizer.get_bos_token_id()
        rows = [rows_of(task.kind, [[bos, *next(ids)] for _ in some], model.config.sequence_len) for some in texts]
        graded = iter(_scores(model, [row for some in rows for row in some], task.kind == LM, batch_tokens))
        right = 0
        for number, some in zip(numbers, rows, strict=True):
            scores = [next(graded) for _ in some]
            right += scores[0] == 0 if task.kind == LM else scores.index(min(scores)) == examples[number]["gold"]
        yield numbers.stop, total, right


def _scores(model: Model, rows: Sequence[Row], exact: bool, batch_tokens: int) -> list[float]:
    """Return for each row the mean loss of the scored tokens, or with `exact` how many are not the likeliest."""
    import torch

    if exact:
        batch_tokens = min(batch_tokens, max(1, MAX_LOGITS // model.config.vocab_size))
    scores = [0.0] * len(rows)
    for batch in _batches(rows, batch_tokens):
        width = max(len(rows[i].tokens) for i in batch) - 1
        inputs = torch.full((len(batch), width), rows[batch[0]].tokens[0])
        targets = torch.full((len(batch), width), -1)
        for line, i in enumerate(batch):
            tokens, start = rows[i]
            inputs[line, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            targets[line, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        asked = targets != -1
        with torch.no_grad():
            if exact:
                found = (model(inputs).argmax(-1) != targets).mul(asked).sum(-1)
            else:
                found = model(inputs, targets, reduction="none").mul(asked).sum(-1) / asked.sum(-1)
        for i, score in zip(batch, found.tolist(), strict=True):
            scores[i] = score
    return scores


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of rows of similar lengths, longest first, so that a lack of memory shows at once."""
    batch: list[int] = []
    width = 0
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        if batch and (len(batch) + 1) * width > batch_tokens:
            yield batch
            batch = []
        if not batch:
            width = len(rows[i].tokens)
        batch.append(i)
    if batch:
        yield batch
