"""base_eval.py as a user starts it, on a small checkpoint: what it tells is true, and a mistake is one line."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.config import GPTConfig
from nanochat.core_eval import evaluate_core
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPT
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import base_eval
from tests.test_console import Terminal
from tests.test_nanochat_core import CHOICES, FACTS, SCHEMA, write
from tests.test_tok_scripts import PROSE_TEXT, ROOT, mistake, run

rustbpe = pytest.importorskip("rustbpe", reason="rustbpe is not built: no Rust here")
if not hasattr(rustbpe, "Tokenizer"):
    pytest.skip("rustbpe is not built: no Rust here", allow_module_level=True)

LINES = [f"{PROSE_TEXT.strip()} The rain had fallen for {i} days." for i in range(40)]
Mistake = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    inner = rustbpe.Tokenizer()
    inner.train_from_iterator(iter(LINES), 300)
    inner.add_special_tokens(SPECIAL_TOKENS)
    return Tokenizer.from_rustbpe(inner)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    config = GPTConfig(
        sequence_len=48, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=32
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, model: GPT) -> Path:
    """A folder of two checkpoints, the older of other weights, a text and tasks of CORE."""
    place = tmp_path_factory.mktemp("place")
    meta = {"config": asdict(model.config), "tokenizer": tokenizer.digest, "dtype": "fp32"}
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for step, tensors in ((10, zeros), (20, weights)):
        files = {"tokenizer.json": tokenizer.blob}
        checkpoint_manager.save(place / "run", step, tensors={"model": tensors}, meta=meta, files=files)
    checkpoint_manager.save(place / "bare", 5, tensors={"model": weights}, meta=meta)
    tokenizer.save(place / "tokenizer.json")
    Tokenizer.bytewise().save(place / "bytes.json")
    pq.write_table(pa.table({"text": LINES}), place / "books.parquet")
    write(place / "core", copa=CHOICES, winograd_wsc=SCHEMA, lambada_openai=FACTS)
    return place


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(place, tmp_path / "place"))


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_all_three_evaluations_in_a_process_of_their_own(
    place: Path, tokenizer: Tokenizer, model: GPT, tmp_path: Path
) -> None:
    done = run(
        "base_eval.py",
        *("--checkpoint", place / "run", "--data", place / "books.parquet", "--core-data", place / "core"),
        *("--prompts", "It was the best", "the rain", "--max-new-tokens", 12, "--num-samples", 3, "--temperature", 0.9),
        *("--json", "out.json", "--batch-tokens", 100, "--max-per-task", 3, "--threads", 1),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["checkpoint"] == str(place / "run" / "step_000020")
    assert found["step"] == 20

    core = evaluate_core(model, tokenizer, place / "core", max_per_task=3)
    assert found["core"]["core"] == core.core
    assert found["core"]["missing"] == list(core.missing)
    assert [task["accuracy"] for task in found["core"]["tasks"]] == [task.accuracy for task in core.tasks]

    engine, bos = Engine(model, tokenizer), tokenizer.get_bos_token_id()
    prompts = tokenizer.encode(["It was the best", "the rain"], prepend=bos)
    likeliest = engine.generate_batch(prompts, max_tokens=12, how=Sampling(temperature=0))
    drawn = engine.generate_batch(prompts, 3, max_tokens=12, how=Sampling(0.9, top_k=50))
    assert found["samples"] == [
        {
            "prompt": prompt,
            "likeliest": tokenizer.decode(first.tokens),
            "drawn": [tokenizer.decode(each.tokens) for each in others],
        }
        for prompt, (first,), others in zip(("It was the best", "the rain"), likeliest, drawn, strict=True)
    ]

    texts = sum(map(len, tokenizer.encode(LINES)))
    out = done.stdout
    assert f"{place / 'run' / 'step_000020'}: step 20, " in out
    assert f"bits per byte: {found['bpb']:.4f} on {texts:,} tokens of {place / 'books.parquet'}" in out
    assert f"{core.title}: {core.core:.4f}" in out
    assert "CORE over 3 of 22 tasks (missing: hellaswag_zeroshot, jeopardy," in out
    assert f"likeliest: {found['samples'][0]['likeliest']!r}" in out


def test_bits_per_byte_are_those_of_the_text(place: Path, tokenizer: Tokenizer, model: GPT, tmp_path: Path) -> None:
    """Of texts that fill rows of their own: nats by a plain softmax, over the text's bytes."""
    rows = [tokenizer.decode(ids[:48]) for ids in tokenizer.encode(LINES[:5])]
    rows = [text for text in rows if len(tokenizer.encode(text)) == 48]
    assert len(rows) > 2
    nats = 0.0
    for text in rows:
        ids = [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]
        with torch.no_grad():
            chances = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        nats -= sum(float(chances[at, ids[at + 1]]) for at in range(48))
    wanted = nats / math.log(2) / sum(len(text.encode()) for text in rows)
    pq.write_table(pa.table({"body": rows}), tmp_path / "rows.parquet")
    assert bpb(place, tmp_path / "rows.parquet", tmp_path, "--column body") == pytest.approx(wanted, rel=1e-5)


def bpb(place: Path, data: Path, into: Path, flags: str = "") -> float:
    base_eval.main(f"--checkpoint {place / 'run'} --eval bpb --data {data} --json {into / 'bpb.json'} {flags}".split())
    found: float = json.loads((into / "bpb.json").read_text())["bpb"]
    return found


def test_all_of_the_text_counts_up_to_the_limit(
    place: Path, tokenizer: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    (tmp_path / "b.txt").write_text("the last one")
    whole = bpb(place, tmp_path / "a.txt", tmp_path)
    assert f"on {len(tokenizer.encode((tmp_path / 'a.txt').read_text())):,} tokens" in capfd.readouterr().out
    part = bpb(place, tmp_path / "a.txt", tmp_path, "--max-tokens 100")
    assert "on 100 tokens" in capfd.readouterr().out
    assert part != whole
    bpb(place, tmp_path, tmp_path)
    assert f"tokens of {tmp_path / 'b.txt'}" in capfd.readouterr().out
    assert bpb(place, tmp_path / "a.txt", tmp_path, "--batch-tokens 48") == pytest.approx(whole, rel=1e-6)


def test_of_several_checkpoints_it_takes_the_newest_or_the_one_asked_for(
    place: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = place / "books.parquet"
    newest = bpb(place, data, tmp_path)
    older = bpb(place, data, tmp_path, "--step 10")
    sizes = sum(len(line.encode()) for line in LINES)
    count = sum(map(len, tokenizer.encode(LINES)))
    even = math.log2(tokenizer.get_vocab_size()) * count / sizes  # a model of zeros says nothing
    assert older == pytest.approx(even, rel=1e-5)
    assert newest != older
    base_eval.main(
        f"--checkpoint {place / 'run' / 'step_000010'} --eval bpb --data {data} --json {tmp_path / 'c.json'}".split()
    )
    assert json.loads((tmp_path / "c.json").read_text())["bpb"] == older


def test_only_what_is_asked_for_is_needed(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No data, no tasks; and the tokenizer from a file."""
    flags = f"--checkpoint {place / 'bare'} --tokenizer {place / 'tokenizer.json'} --eval sample --max-new-tokens 3"
    base_eval.main(flags.split())
    out = capfd.readouterr().out
    assert out.count("likeliest:") == 4
    assert "bits per byte" not in out
    assert "CORE" not in out
    base_eval.main(
        f"--checkpoint {place / 'run'} --core-data {place / 'core'} --eval core,sample --num-samples 1".split()
    )
    out = capfd.readouterr().out
    assert "CORE over 3 of 22" in out
    assert out.count("drawn:") == 4


def test_on_a_terminal_there_are_bars(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "base_eval.py"), "--checkpoint", str(place / "run")]
    command += ["--data", str(place / "books.parquet"), "--core-data", str(place / "core"), "--eval", "bpb", "core"]
    with Terminal([*command, "--threads", "1"], tmp_path / "log", 100, 40) as terminal:
        assert terminal.wait() == 0
    drawn = terminal.raw.decode()
    assert "8 of 8 examples" in drawn
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in drawn
    assert any(line.startswith("CORE over 3 of 22 tasks") for line in terminal.lines())


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "--checkpoint: name the folder of a checkpoint"),
        ("--checkpoint {place}/none", "--checkpoint: {place}/none: no checkpoint here: no such folder"),
        ("--checkpoint {place}/core", "--checkpoint: {place}/core: no checkpoint here"),
        ("--checkpoint {place}/run --step 15", "no checkpoint of step 15; there are 10, 20"),
        ("--checkpoint {place}/bare", "holds no tokenizer.json; give its --tokenizer"),
        ("--checkpoint {place}/run --tokenizer {place}/bytes.json", "--tokenizer {place}/bytes.json: "),
        ("--checkpoint {place}/run --tokenizer {place}/bytes.json", "trained with the tokenizer "),
        ("--checkpoint {place}/run --tokenizer {place}/none.json", "{place}/none.json: No such file"),
        ("--checkpoint {place}/run --tokenizer {place}/books.parquet", "{place}/books.parquet"),
        ("--checkpoint {place}/run --eval bpb", "--data: name a text; there are no shards in"),
        ("--checkpoint {place}/run --eval bpb --data {place}/none", "--data {place}/none: no such file or folder"),
        ("--checkpoint {place}/run --eval bpb --data {place}/run", "--data {place}/run: no .txt, .jsonl"),
        ("--checkpoint {place}/run --eval bpb --data {place}/books.parquet --column body", "has no column body"),
        ("--checkpoint {place}/run --eval core", "--core-data: name the tasks' folder; there is no"),
        ("--checkpoint {place}/run --eval core --core-data {place}/none", "--core-data {place}/none: no such folder"),
        ("--checkpoint {place}/run --eval core --core-data {place}/run", "holds none of the tasks of CORE"),
        ("--checkpoint {place}/run --eval loss", "--eval loss: unknown; known: bpb, core, sample"),
        ("--checkpoint {place}/run --eval sample --temperature -1", "--temperature -1.0: must be 0 or more"),
        ("--checkpoint {place}/run --eval sample --top-p 0", "--top_p 0.0: must lie above 0"),
        ("--checkpoint {place}/run --eval sample --max-new-tokens 9999", "--max-new-tokens 9999: with a prompt of"),
        ("--checkpoint {place}/run --max-per-task -1", "--max-per-task -1: must be 0 or more"),
        ("--checkpoint {place}/run --batch-tokens 0", "--batch-tokens 0: must be 1 or more"),
        (
            "--checkpoint {place}/run --json {place}/none/a.json",
            "--json {place}/none/a.json: must be a file in a folder",
        ),
        ("--checkpoint {place}/run --device cuda:77", "--device cuda:77: this machine has"),
    ],
)
def test_a_mistake_is_one_line(
    flags: str,
    said: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    line = mistake(base_eval.main, flags.format(place=place), capfd)
    assert line.startswith("base_eval.py: ")
    assert said.format(place=place) in line


@pytest.mark.parametrize("file", ["model.safetensors", "meta.json", "tokenizer.json"])
def test_a_checkpoint_that_is_not_whole_is_named(copied: Path, file: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = copied / "run" / "step_000020" / file
    content = path.read_bytes()
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    flags = f"--checkpoint {copied / 'run'} --eval sample"
    for damaged, said in ((content[: len(content) // 2], "cut short"), (bytes(changed), "changed")):
        path.write_bytes(damaged)
        line = mistake(base_eval.main, flags, capfd)
        assert str(path) in line
        assert said in line
    path.unlink()
    assert f"{path}: missing from the checkpoint" in mistake(base_eval.main, flags, capfd)


def test_damaged_tasks_and_text_are_named_before_anything_is_evaluated(
    copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    both = f"--checkpoint {copied / 'run'} --data {copied / 'books.parquet'} --core-data {copied / 'core'}"
    with (copied / "core" / "copa.jsonl").open("a") as file:
        file.write('{"query": "cut sho')
    line = mistake(base_eval.main, both, capfd)
    assert f"--core-data {copied / 'core'}: copa.jsonl: line 9: not JSON" in line
    text = copied / "books.parquet"
    os.truncate(text, text.stat().st_size - 9)
    line = mistake(base_eval.main, both, capfd)
    assert f"--data {text}: " in line
    assert "footer" in line


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (["s0.jsonl", "s1.jsonl", "z_LICENSE.txt", "._s2.jsonl"], ["s1.jsonl"]),
        (
            ["train-0.jsonl", "train-1.jsonl", "val-0.jsonl", "val-1.jsonl", "test.jsonl"],
            ["val-0.jsonl", "val-1.jsonl"],
        ),
    ],
)
def test_the_text_is_what_training_left_out(tmp_path: Path, names: list[str], held_out: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text('{"text": "words"}\n')
    _, files = base_eval.held_out(base_eval.BaseEvalConfig(data=tmp_path))
    assert [file.name for file in files] == held_out
