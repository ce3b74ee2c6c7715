"""rustbpe beside its peers on real text of this machine: training, memory, encoding, decoding, equal merges.

    python -m bench.tokenizer        # some minutes; figures as JSON lines, the rest on stderr

Training: 80 MB, 32,768 tokens, against the published rustbpe 0.1.0, whose module has our crate's name and so lies in a
folder of its own, and Hugging Face's tokenizers; every training is a process of its own, and they take turns. Encoding
and decoding: 10 MB of the same text, a document at a time, against tiktoken with the same merges.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bench import Figure

if TYPE_CHECKING:
    import tiktoken

    from rustbpe import Tokenizer

OURS, PUBLISHED, HUGGINGFACE = TRAINERS = ("ours", "rustbpe 0.1.0", "Hugging Face tokenizers")
TEXT_BYTES = 80_000_000
LARGEST_SHARE = 0.4  # share of the text from one source, as long as there are others
LARGEST_FILE = 2_000_000  # bytes: larger ones are mostly generated
VOCABULARY = 32_768
TRAIN_RUNS = 3
SAMPLE_BYTES = 10_000_000
ENCODE_RUNS = 5
THREADS = 2
CHUNK = 1_000_000  # characters that no pattern cuts
BORDER = "\0"  # between the texts in a file; none holds it


# --- text -------------------------------------------------------------------------------------------------------------


def sources() -> Iterator[tuple[str, Path, str, float]]:
    """Where text is on most machines: name, folder, files, the largest share of the whole."""
    paths = sysconfig.get_paths()
    yield "standard library", Path(paths["stdlib"]), "*.py", LARGEST_SHARE
    yield "/usr/share/doc", Path("/usr/share/doc"), "*", LARGEST_SHARE
    yield "man pages", Path("/usr/share/man"), "*", LARGEST_SHARE
    yield "site-packages", Path(paths["purelib"]), "*.py", 1.0


def gather() -> dict[str, list[str]]:
    """Texts by source, no two the same, TEXT_BYTES in all where there are so many."""
    texts: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    whole = 0
    for source, folder, files, share in sources():
        texts[source] = []
        left = min(TEXT_BYTES - whole, int(share * TEXT_BYTES))
        for path in sorted(folder.rglob(files)):
            if left <= 0:
                break
            if "site-packages" in path.relative_to(folder).parts:
                continue
            data = read(path).encode()
            key = hashlib.sha256(data).digest()
            if data and key not in seen:
                seen.add(key)
                texts[source].append(data.decode())
                left -= len(data)
                whole += len(data)
    found = ", ".join(f"{source} {size(part) / 1e6:.1f}" for source, part in texts.items())
    print(f"{whole / 1e6:.1f} MB of text: {found}", file=sys.stderr)
    return texts


def read(path: Path) -> str:
    """A file's text, also of a gzipped one; empty for what is none."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return ""
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error):
        return ""
    return "" if BORDER in text else text


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def save(path: Path, texts: list[str]) -> Path:
    path.write_bytes(BORDER.join(texts).encode())
    return path


# --- training: each in a process of its own ---------------------------------------------------------------------------


def install_published(folder: Path) -> bool:
    """The published package into a folder of its own; without a network it is left out."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    ended = subprocess.run([*command, "--target", str(folder), "rustbpe==0.1.0"], capture_output=True, text=True)
    if ended.returncode:
        print(f"{PUBLISHED} is left out, it cannot be installed: {ended.stderr.strip()[-300:]}", file=sys.stderr)
    return ended.returncode == 0


def trained(name: str, texts: Path, published: Path, out: Path | None = None) -> dict[str, Any]:
    """What a process that trains on the file's texts says: `seconds`, `peak_mb` and the `merges`' digest."""
    paths = [str(published)] * (name == PUBLISHED) + [path for path in [os.environ.get("PYTHONPATH")] if path]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.tokenizer", name, str(texts), str(out or "")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "true"},
        stdout=subprocess.PIPE,
        check=True,
    )
    said: dict[str, Any] = json.loads(ended.stdout)
    line = f"{name}, {texts.stat().st_size / 1e6:.0f} MB: {said['seconds']:.2f} s, {said['peak_mb']:.0f} MB"
    print(line, file=sys.stderr, flush=True)
    return said


def train(name: str, path: str, out: str) -> dict[str, Any]:
    """In the process of its own. Memory is the most that was used beyond what the texts and the modules hold."""
    texts = Path(path).read_bytes().decode().split(BORDER)
    trainer = huggingface_trainer() if name == HUGGINGFACE else rustbpe_trainer(out)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = status_mb("VmRSS")
    began = time.perf_counter()
    merges = trainer(texts)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mb": status_mb("VmHWM") - before, "merges": merges()}


def status_mb(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


Merges = Callable[[], str]  # their digest, asked for when the clock stands


def rustbpe_trainer(out: str) -> Callable[[list[str]], Merges]:
    """Ours or the published: whichever is found under the name."""
    from rustbpe import Tokenizer

    def run(texts: list[str]) -> Merges:
        tokenizer = Tokenizer()
        tokenizer.train_from_iterator(iter(texts), VOCABULARY)

        def digest() -> str:
            if out:
                tokenizer.save(out)
            merges = [(bytes(token), rank) for token, rank in tokenizer.get_mergeable_ranks()]
            return hashlib.sha256(repr((tokenizer.get_pattern(), merges)).encode()).hexdigest()

        return digest

    return run


def huggingface_trainer() -> Callable[[list[str]], Merges]:
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Peer

    from rustbpe import DEFAULT_PATTERN

    def run(texts: list[str]) -> Merges:
        tokenizer = Peer(models.BPE())
        split = pre_tokenizers.Split(Regex(DEFAULT_PATTERN), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator(iter(texts), trainer)
        return lambda: str(tokenizer.get_vocab_size())

    return run


def training(folder: Path, by_source: dict[str, list[str]], saved: Path) -> None:
    """The figures of training; leaves our tokenizer of the whole text in `saved`."""
    published = folder / "published"
    names = [name for name in TRAINERS if name != PUBLISHED or install_published(published)]
    whole = save(folder / "texts", list(chain.from_iterable(by_source.values())))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(TRAIN_RUNS):
        for name in names:
            runs[name].append(trained(name, whole, published, saved if name == OURS else None))
    seconds = {name: median(run["seconds"] for run in runs[name]) for name in names}
    memory = {name: median(run["peak_mb"] for run in runs[name]) for name in names}
    faster, leaner = (min(names[1:], key=lambda name: of[name]) for of in (seconds, memory))
    ratio = seconds[faster] / seconds[OURS]
    Figure("tokenizer.train_s", seconds[OURS], "s", f"{faster}, s", seconds[faster], ratio)
    ratio = memory[OURS] / memory[leaner]
    Figure("tokenizer.train_peak_mb", memory[OURS], "MB", f"{leaner}, MB", memory[leaner], ratio)
    if PUBLISHED not in names:
        return
    equal = [len({run["merges"] for name in (OURS, PUBLISHED) for run in runs[name]}) == 1]
    for source in sorted(by_source, key=lambda source: size(by_source[source]))[-2:]:
        texts = save(folder / "part", by_source[source])
        equal.append(len({trained(name, texts, published)["merges"] for name in (OURS, PUBLISHED)}) == 1)
    Figure("tokenizer.merges_equal", float(all(equal)), f"with {PUBLISHED}, on {len(equal)} texts")


# --- encoding and decoding --------------------------------------------------------------------------------------------


def sample(texts: list[str]) -> list[str]:
    """SAMPLE_BYTES of them, or somewhat less, from everywhere."""
    picked, left = [], SAMPLE_BYTES
    for text in random.Random(0).sample(texts, len(texts)):
        if (length := len(text.encode())) <= left:
            picked.append(text)
            left -= length
    return picked


def load(saved: Path) -> tuple[Tokenizer, tiktoken.Encoding]:
    """The trained tokenizer, which has seen no text yet, and tiktoken with the same merges."""
    import tiktoken

    from rustbpe import Tokenizer

    tokenizer = Tokenizer.load(saved)
    return tokenizer, tiktoken.Encoding(**tokenizer.to_tiktoken())


def encoding(saved: Path, texts: list[str]) -> None:
    """The figures of encoding and decoding. Exits where a result differs from tiktoken's."""
    ids = load(saved)[0].encode_batch(texts, disallowed_special=())
    steps: dict[str, tuple[Callable[[Tokenizer], Any], Callable[[tiktoken.Encoding], Any]]] = {
        "encode": (
            lambda ours: [ours.encode_ordinary(text) for text in texts],
            lambda peer: [peer.encode_ordinary(text) for text in texts],
        ),
        "encode_batch": (
            lambda ours: ours.encode_batch(texts, num_threads=THREADS, disallowed_special=()),
            lambda peer: peer.encode_ordinary_batch(texts, num_threads=THREADS),
        ),
        "decode": (
            lambda ours: [ours.decode(one) for one in ids],
            lambda peer: [peer.decode(one) for one in ids],
        ),
    }
    for step, works in steps.items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ENCODE_RUNS):
            results = []
            for work, tokenizer, times in zip(works, load(saved), seconds, strict=True):
                began = time.perf_counter()
                results.append(work(tokenizer))
                times.append(time.perf_counter() - began)
            if results[0] != results[1]:
                sys.exit(f"{step}: not what tiktoken makes of it")
        value, other = (size(texts) / 1e6 / median(times) for times in seconds)
        Figure(f"tokenizer.{step}_mb_s", value, "MB/s", "tiktoken, MB/s", other, value / other)


def worst_chunk(saved: Path) -> None:
    """The slowest of some long chunks; tiktoken's is that of those which it survives, the letters."""
    tokenizer, peer = load(saved)
    letters = "".join(random.Random(0).choices(string.ascii_lowercase, k=CHUNK))
    ours: list[float] = []
    theirs: list[float] = []
    for text in ("a" * CHUNK, "ab" * (CHUNK // 2), letters, " " * CHUNK, "\n" * CHUNK, "-" * CHUNK):
        began = time.perf_counter()
        ids = tokenizer.encode_ordinary(text)
        ours.append(time.perf_counter() - began)
        print(f"{CHUNK:,} characters {text[:4]!r}…: {ours[-1]:.4f} s", file=sys.stderr)
        if text.isalpha():
            began = time.perf_counter()
            expected = peer.encode_ordinary(text)
            theirs.append(time.perf_counter() - began)
            if ids != expected:
                sys.exit(f"{text[:4]!r}…: other ids than tiktoken's")
    Figure("tokenizer.worst_chunk_s", max(ours), "s", "tiktoken, s", max(theirs), max(ours) / max(theirs))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(train(*sys.argv[1:4])))
        return
    try:
        from rustbpe import Tokenizer  # noqa: F401
    except ImportError:
        print("rustbpe is not built: no figures of it", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="pilot-bench-", dir=os.environ.get("PILOT_BENCH_DIR")) as name:
        folder = Path(name)
        saved = folder / "tokenizer.json"
        by_source = gather()
        training(folder, by_source, saved)
        encoding(saved, sample(list(chain.from_iterable(by_source.values()))))
        worst_chunk(saved)


if __name__ == "__main__":
    main()
