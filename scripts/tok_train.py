"""Train a tokenizer, a byte-pair vocabulary, on a text, and compare it with GPT-2's on each kind of text.

python scripts/tok_train.py --data books/ --vocab_size 32768 --out tokenizer.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "tok_train.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM, "stopped; nothing was written")

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

from nanochat.tokenizer import SPECIAL_TOKENS
from pilot.app import cli
from pilot.common.flags import arg
from tasks.data.compression import check_text_limits
from tasks.data.reading import Findings, Reading
from tasks.data.tokenizer import MAX_VOCABULARY

if TYPE_CHECKING:
    from rustbpe import Tokenizer
    from tasks.data.compression import Encode, Samples
    from tasks.data.folders import TextFile

REDRAW_S = 0.1
LINE_S = 5.0  # between two lines without a terminal
LONGEST = 10  # tokens shown


@dataclass(frozen=True)
class TokTrainConfig(Reading):
    """Train a byte-pair vocabulary on a text, and say how it compares with GPT-2's."""

    data: str = arg("auto", path="read")
    """stdlib (Python's own sources), or a .txt, .jsonl or .parquet file, or a folder of them. auto: the shards in
    NANOCHAT_BASE_DIR, or stdlib where there are none."""

    max_chars: int = 2_000_000_000
    """Characters of the text to train on. 0: all of it."""

    doc_cap: int = 10_000
    """Characters to take of a document, so that no long one has more say than many short ones. 0: all of it. A .txt
    file is taken whole, since it may hold many documents."""

    vocab_size: int = 32_768
    """Tokens, the 256 bytes and the special ones among them. More make small models pay more for their embeddings."""

    pattern: str = "nanochat"
    """How text is cut first: nanochat (digits by two), gpt4 (by three), gpt2, or a regular expression."""

    special: tuple[str, ...] = SPECIAL_TOKENS
    """Special tokens, which get the last ids, in this order."""

    out: Path | None = arg(None, path="write")
    """File for the tokenizer. None: tokenizer.json in NANOCHAT_BASE_DIR, where nanochat's programs look for it."""

    gpt2_vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: gpt2_ in PILOT_DATA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_limits(self.max_chars, self.doc_cap)
        least = 256 + len(self.special)
        if not least <= self.vocab_size <= MAX_VOCABULARY:
            raise ValueError(
                f"--vocab-size {self.vocab_size}: must lie between {least}, for 256 bytes and {len(self.special)} "
                f"special tokens, and {MAX_VOCABULARY}"
            )
        for token in self.special:
            if not token or self.special.count(token) > 1:
                raise ValueError(f"--special {token!r}: must not be empty, nor given twice")


@cli.program(PROGRAM, TokTrainConfig)
def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(TokTrainConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    from tasks.data.compression import data_files, gpt2_encode, tokenizer_class

    with cli.mistakes(PROGRAM):
        tokenizer, out = tokenizer_class()(), config.out or default_out()
        gpt2 = gpt2_encode(config.gpt2_vocabulary)
        config = replace(config, data=text_of(config.data))
        files = data_files(config.data)
        try:
            with Progress(config.max_chars) as progress:
                texts = train(tokenizer, config, files.train, progress)
            tokenizer.save(out)
        except OSError as error:
            raise ValueError(f"--out {out}: cannot write it ({error.strerror or error})") from None
    interrupts.says(f"stopped; the tokenizer is in {out}")
    print(f"tokenizer in {out}")
    if files.folder:
        print(files.line({"training": files.train}))
    report(tokenizer, config, texts, gpt2)


def default_out() -> Path:
    """Return the file in nanochat's folder, which is made if need be. Raises ValueError if that is not possible."""
    from nanochat.common import base_dir
    from pilot.common.files import make_folder

    folder = base_dir()
    try:
        return make_folder(folder) / "tokenizer.json"
    except OSError as error:
        raise ValueError(f"NANOCHAT_BASE_DIR {folder}: {error.strerror or error}; name another, or an --out") from None


def text_of(data: str) -> str:
    """Return what --data auto stands for, and say so."""
    from nanochat.shards import data_dir, list_shards

    if data != "auto":
        return data
    shards = list_shards()
    if not shards:
        print(
            f"text: the standard library, for there are no shards in {data_dir()}; python -m nanochat.dataset gets some"
        )
        return "stdlib"
    print(f"text: {len(shards)} shards in {data_dir()}")
    return str(data_dir())


class Texts:
    """Count the texts that are trained on, and keep samples of each kind."""

    def __init__(self, texts: Iterator[str], progress: Progress, samples: Samples, findings: Findings) -> None:
        self.chars = 0
        self.ended = False
        self.seconds = 0.0
        self.samples = samples
        self.findings = findings
        self._texts = texts
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.chars += len(text)
            self.samples.add(text)
            self._progress.read(self.chars)
            yield text
        self.ended = True
        self._progress.read(self.chars, last=True)


def train(tokenizer: Tokenizer, config: TokTrainConfig, files: list[TextFile], progress: Progress) -> Texts:
    """Train the tokenizer. Raises ValueError, with the flag, for an unusable text or pattern."""
    from tasks.data.compression import Samples, pattern_of, read_texts
    from tasks.data.folders import TextError

    findings = Findings()
    read = read_texts(files, config, findings, doc_cap=config.doc_cap, max_chars=config.max_chars)
    texts = Texts(read, progress, Samples(), findings)
    size, pattern = config.vocab_size - len(config.special), pattern_of(config.pattern)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # text too small for the vocabulary: the report says it
            tokenizer.train_from_iterator(iter(texts), size, pattern=pattern, progress=progress.merged)
    except TextError as error:
        raise ValueError(f"--data {config.data}: {config.named(error)}") from None
    except ValueError as error:
        if texts.ended and not texts.chars:
            raise ValueError("; ".join([f"--data {config.data}: holds no text", *findings.facts()])) from None
        raise ValueError(f"--pattern: {error}") from None
    texts.seconds = time.perf_counter() - began
    tokenizer.add_special_tokens(config.special)
    return texts


def report(tokenizer: Tokenizer, config: TokTrainConfig, texts: Texts, gpt2: Encode | None) -> None:
    from tasks.data.compression import comparison, encode_with

    took = f"{texts.seconds:.1f} s, {texts.chars / 1e6 / texts.seconds:.1f} million a second"
    print(f"trained on {texts.chars:,} characters of {config.data} in {took}")
    for fact in texts.findings.facts(config.separator):
        print(f"text: {fact}")
    if capped := texts.findings.capped:
        print(f"of {capped:,} longer documents only the first {config.doc_cap:,} characters; --doc-cap 0 takes all")
    reached, special = tokenizer.vocab_size, len(config.special)
    print(f"vocabulary: {reached:,} tokens: 256 bytes, {reached - special - 256:,} merges, {special} special")
    if reached < config.vocab_size:
        what = "what was taken of the text" if texts.findings.capped or not texts.ended else "the text"
        print(f"{what} has no more to merge: that is {config.vocab_size - reached:,} tokens fewer than asked for")
    print("on the text that it was trained on, which flatters it; tok_eval.py compares on another:")
    for line in comparison(texts.samples, encode_with(tokenizer), {} if gpt2 is None else {"GPT-2": gpt2}):
        print(line)
    if gpt2 is None:
        print("GPT-2's tokenizer is not here to compare with; give --gpt2-vocabulary")
    longest = sorted(tokenizer.get_mergeable_ranks(), key=lambda item: (-len(item[0]), item[1]))[:LONGEST]
    print("longest tokens:")
    for token, rank in longest:
        text = repr(token.decode(errors="backslashreplace"))
        print(f"  {len(token):4} bytes, id {rank}: {text if len(text) <= 80 else text[:77] + '...'}")
    print(f"tokenizer in {config.out}")


class Progress:
    """Show characters read, then merges made: bars on a terminal, otherwise a line now and then. A context manager."""

    def __init__(self, max_chars: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(highlight=False)
        self._live = console.is_terminal and console.file.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        self._bars = Bars(*columns, TimeRemainingColumn(), console=console, disable=not self._live)
        self._limit = max_chars
        self._next = time.monotonic() + (0 if self._live else LINE_S)

    def read(self, chars: int, last: bool = False) -> None:
        if self._due() or (self._live and last):
            limit = f" of at most {self._limit / 1e6:,.1f}" if self._limit and not last else ""
            self._show("read", f"{chars / 1e6:,.1f}{limit} million characters", None, None)

    def merged(self, done: int, wanted: int) -> None:
        if self._due() or (self._live and done == wanted):
            self._show("merge", f"{done:,} of {wanted:,} merges", done, wanted)

    def _due(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + (REDRAW_S if self._live else LINE_S)
        return True

    def _show(self, step: str, line: str, done: int | None, total: int | None) -> None:
        if not self._live:
            print(f"{step}: {line}", flush=True)
            return
        task = next((task.id for task in self._bars.tasks if task.description == step), None)
        if task is None:
            for earlier in self._bars.tasks:
                self._bars.update(earlier.id, total=1, completed=1)
            task = self._bars.add_task(step, total=total, done="")
        self._bars.update(task, completed=done, total=total, done=line)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


if __name__ == "__main__":
    main()
