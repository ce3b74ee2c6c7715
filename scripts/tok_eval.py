"""Check a tokenizer on a text: exact round trips, bytes per token on each kind of text, speed.

    python scripts/tok_eval.py --tokenizer tokenizer.json --data books_val.parquet

Exit code 1 if a document does not decode to what it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pilot.common import interrupts

PROGRAM = "tok_eval.py"
if __name__ == "__main__":
    interrupts.catch(PROGRAM)

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pilot.app import cli
from pilot.common.flags import arg
from tasks.data.compression import check_text_limits
from tasks.data.reading import Findings, Reading

if TYPE_CHECKING:
    from rustbpe import Tokenizer
    from tasks.data.compression import Encode

BATCH = 4 << 20  # characters encoded at a time


@dataclass(frozen=True)
class TokEvalConfig(Reading):
    """Check a tokenizer on a text: whether it decodes every document exactly, how well it compresses, its speed."""

    tokenizer: Path | None = None
    """File that tok_train wrote. None: tokenizer.json in NANOCHAT_BASE_DIR."""

    data: str = arg("stdlib", path="read")
    """stdlib (Python's own sources), or a .txt, .jsonl or .parquet file, or a folder of them."""

    max_chars: int = 100_000_000
    """Characters of the text to take. 0: all of it."""

    doc_cap: int = 0
    """Characters to take of a document. 0: all of it. A .txt file is taken whole."""

    gpt2_vocabulary: Path | None = None
    """Folder of GPT-2's encoder.json and vocab.bpe, or the prefix of the two paths. None: gpt2_ in PILOT_DATA."""

    tiktoken: Path | None = None
    """A .tiktoken file of cl100k, GPT-4's, to compare with that too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_limits(self.max_chars, self.doc_cap)


@dataclass
class Totals:
    texts: int = 0
    bytes: int = 0
    tokens: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    broken: list[int] = field(default_factory=list)  # the numbers, from 1, of the texts that did not decode exactly


@cli.program(PROGRAM, TokEvalConfig)
def main(argv: Sequence[str] | None = None) -> None:
    config = cli.parse(TokEvalConfig, PROGRAM, sys.argv[1:] if argv is None else argv)
    from tasks.data.compression import Samples, comparison, data_files, encode_with, read_texts
    from tasks.data.folders import TextError

    with cli.mistakes(PROGRAM):
        from nanochat.common import base_dir

        path = config.tokenizer or base_dir() / "tokenizer.json"
        tokenizer = load(path)
        others = peers(config)
        totals, samples, findings = Totals(), Samples(), Findings()
        files = data_files(config.data)
        held_out = files.validation or files.train
        try:
            texts = read_texts(held_out, config, findings, doc_cap=config.doc_cap, max_chars=config.max_chars)
            for batch in batches(texts):
                check(tokenizer, batch, totals)
                for text in batch:
                    samples.add(text)
        except TextError as error:
            raise ValueError(f"--data {config.data}: {config.named(error)}") from None
        if not totals.texts:
            raise ValueError("; ".join([f"--data {config.data}: holds no text", *findings.facts()]))
    if files.folder:
        print(files.line({"the check": held_out}))
    for fact in findings.facts(config.separator):
        print(f"text: {fact}")
    print(f"{path}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.special_tokens())} of them special")
    per_token = totals.bytes / totals.tokens
    print(f"{config.data}: {totals.bytes:,} bytes, {totals.tokens:,} tokens, {per_token:.3f} bytes a token")
    encode, decode = (totals.bytes / 1e6 / seconds for seconds in (totals.encode_s, totals.decode_s))
    print(f"encoded at {encode:.1f} MB/s with all threads, decoded at {decode:.1f} MB/s with one")
    for line in comparison(samples, encode_with(tokenizer), others):
        print(line)
    if "GPT-2" not in others:
        print("GPT-2's tokenizer is not here to compare with; give --gpt2-vocabulary")
    if totals.broken:
        first = ", ".join(map(str, totals.broken[:5]))
        cli.fail(PROGRAM, f"{len(totals.broken)} of {totals.texts} texts do not come back as they were: {first}", 1)
    print(f"all {totals.texts:,} texts come back as they were")


def load(path: Path) -> Tokenizer:
    """Load the tokenizer. Raises ValueError if the file is missing or damaged."""
    from tasks.data.compression import tokenizer_class

    cls = tokenizer_class()
    try:
        return cls.load(path)
    except OSError as error:
        raise ValueError(f"--tokenizer {path}: {error.strerror or error}; tok_train.py makes one") from None
    except ValueError as error:
        raise ValueError(f"--tokenizer {path}: {error}") from None


def peers(config: TokEvalConfig) -> dict[str, Encode]:
    """Return the tokenizers to compare with, by name."""
    from tasks.data.compression import encode_with, gpt2_encode, tokenizer_class

    gpt2 = gpt2_encode(config.gpt2_vocabulary)
    found = {} if gpt2 is None else {"GPT-2": gpt2}
    if config.tiktoken is not None:
        cls = tokenizer_class()
        from rustbpe import CL100K_PATTERN

        try:
            found["cl100k"] = encode_with(cls.from_tiktoken(config.tiktoken, CL100K_PATTERN))
        except (OSError, ValueError) as error:
            raise ValueError(f"--tiktoken {config.tiktoken}: {error}") from None
    return found


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def check(tokenizer: Tokenizer, texts: list[str], totals: Totals) -> None:
    """Encode and decode the texts, and add the results to the totals."""
    began = time.perf_counter()
    ids = tokenizer.encode_batch(texts, disallowed_special=())
    encoded = time.perf_counter()
    back = [tokenizer.decode(text_ids) for text_ids in ids]
    totals.encode_s += encoded - began
    totals.decode_s += time.perf_counter() - encoded
    for text, text_ids, again in zip(texts, ids, back, strict=True):
        totals.texts += 1
        totals.bytes += len(text.encode())
        totals.tokens += len(text_ids)
        if again != text:
            totals.broken.append(totals.texts)


if __name__ == "__main__":
    main()
