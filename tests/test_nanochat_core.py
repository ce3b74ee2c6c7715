"""The CORE metric: prompts written out by hand, a model with known answers, batches against rows, the real tasks."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nanochat.config import GPTConfig
from nanochat.core_eval import TASKS, Kind, Row, _scores, choose_shots, evaluate_core, load, prompts, rows_of
from nanochat.gpt import GPT

BOS = 256
CONFIG = GPTConfig(sequence_len=64, vocab_size=257, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
BY_NAME = {task.name: task for task in TASKS}
MEMORY = 8  # characters before the one that the oracle says

CHOICES = [
    {
        "query": f"Question {i}: the colour of box {i * 7919}?",
        "choices": ["red", "green", "blue", "black"],
        "gold": i % 4,
    }
    for i in range(8)
]
SCHEMA = [
    {
        "context_options": [f"Ann{i} met Bob{i} and Ann{i}", f"Ann{i} met Bob{i} and Bob{i}"],
        "continuation": "laughed.",
        "gold": 1,
    }
    for i in range(4)
]
FACTS = [{"context": f"the capital of land {i * 7919} is ", "continuation": f"{'abcde'[i]}-town"} for i in range(5)]


class Bytes:
    """A tokenizer of bytes."""

    def get_bos_token_id(self) -> int:
        return BOS

    def encode(self, text: list[str]) -> list[list[int]]:
        return [list(each.encode()) for each in text]


class Oracle:
    """A model that says what follows each of some texts, by the last characters before it."""

    device = torch.device("cpu")

    def __init__(self, said: Sequence[str], length: int = 4096) -> None:
        self.config = GPTConfig(sequence_len=length, vocab_size=257)
        self.follows: dict[tuple[int, ...], int] = {}
        self.calls: list[tuple[int, int]] = []
        for text in said:
            tokens = list(text.encode())
            for i in range(1, len(tokens)):
                self.follows[tuple(tokens[max(0, i - MEMORY) : i])] = tokens[i]

    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, reduction: str = "mean"
    ) -> torch.Tensor:
        self.calls.append((idx.size(0), idx.size(1)))
        logits = torch.zeros(*idx.shape, 257)
        for row, tokens in enumerate(idx.tolist()):
            for at in range(len(tokens)):
                said = self.follows.get(tuple(tokens[max(0, at + 1 - MEMORY) : at + 1]))
                if said is not None:
                    logits[row, at, said] = 9.0
        if targets is None:
            return logits
        assert reduction == "none"
        return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="none")


def write(folder: Path, **files: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_22_tasks() -> None:
    assert len(TASKS) == len(BY_NAME) == 22
    shots = {task.name: task.shots for task in TASKS if task.shots != 10}
    zero = ("hellaswag_zeroshot", "copa", "openbook_qa", "lambada_openai", "winograd", "winogrande", "coqa")
    assert shots == {**dict.fromkeys(zero, 0), "agi_eval_lsat_ar": 3}
    assert {task.name for task in TASKS if task.kind == "schema"} == {"winograd", "winogrande"}
    assert all(task.chance == 0 for task in TASKS if task.kind == "language_modeling")
    assert {task.name for task in TASKS if task.delimiter != " "} == {
        "jeopardy",
        "arc_easy",
        "arc_challenge",
        "piqa",
        "boolq",
    }


def test_prompts_of_multiple_choice() -> None:
    first = {"query": "Q: 1?", "choices": ["a", "b"], "gold": 1}
    asked = {"query": "Q: 2? ", "choices": ["c", "d"], "gold": 0}
    assert prompts(BY_NAME["arc_easy"], asked, [first]) == [
        "Q: 1?\nAnswer: b\n\nQ: 2? \nAnswer: c",
        "Q: 1?\nAnswer: b\n\nQ: 2? \nAnswer: d",
    ]
    assert prompts(BY_NAME["copa"], asked, []) == ["Q: 2?  c", "Q: 2?  d"]


def test_prompts_of_a_schema() -> None:
    first = {"context_options": ["a", "b"], "continuation": "ran", "gold": 1}
    asked = {"context_options": ["c", "d"], "continuation": "sat", "gold": 0}
    assert prompts(BY_NAME["winograd"], asked, [first, asked]) == ["b ran\n\nc sat\n\nc sat", "b ran\n\nc sat\n\nd sat"]


def test_prompts_of_language_modeling() -> None:
    first, asked = {"context": " one ", "continuation": "two"}, {"context": "three ", "continuation": "four"}
    assert prompts(BY_NAME["jeopardy"], asked, [first]) == [
        "one\nAnswer: two\n\nthree\nAnswer:",
        "one\nAnswer: two\n\nthree\nAnswer: four",
    ]
    assert prompts(BY_NAME["lambada_openai"], asked, []) == ["three", "three four"]


def test_shots_are_drawn_as_nanochat_draws_them() -> None:
    examples: list[dict[str, Any]] = [{"number": i} for i in range(30)]
    for index in (0, 7, 29):
        others = [i for i in range(30) if i != index]
        wanted = random.Random(1234 + index).sample(others, 10)
        assert [shot["number"] for shot in choose_shots(examples, index, 10)] == wanted
    assert sorted(shot["number"] for shot in choose_shots(examples[:4], 2, 10)) == [0, 1, 3]
    assert choose_shots(examples[:1], 0, 10) == []


def tokens(*texts: str) -> list[list[int]]:
    return [[BOS, *text.encode()] for text in texts]


@pytest.mark.parametrize(
    ("kind", "texts", "asked"),
    [
        ("multiple_choice", ["q: red", "q: blue"], ["red", "blue"]),
        ("multiple_choice", ["q: be", "q: blue"], ["e", "lue"]),
        ("multiple_choice", ["q: no", "q: none"], ["o", "one"]),  # one is the beginning of the other
        ("multiple_choice", ["q", "q"], ["q", "q"]),
        ("schema", ["Ann sat", "Bob sat"], [" sat", " sat"]),
        ("schema", ["Ann a", "Bob b"], ["a", "b"]),
        ("schema", ["same", "same"], ["same", "same"]),
        ("language_modeling", ["the sky is", "the sky is blue"], [" blue"]),
        ("language_modeling", ["a b", "ax"], ["x"]),  # tokens that join across the border
        ("language_modeling", ["a", "a"], ["a"]),
    ],
)
def test_what_is_asked_of_each_row(kind: Kind, texts: list[str], asked: list[str]) -> None:
    rows = rows_of(kind, tokens(*texts), 100)
    assert [bytes(row.tokens[row.start :]).decode() for row in rows] == asked
    assert [row.tokens for row in rows] == tokens(*texts)[-len(rows) :]


def test_what_is_too_long_is_cropped_on_the_left_behind_bos() -> None:
    (row,) = rows_of("language_modeling", tokens("0123456789", "0123456789abc"), 6)
    assert row == Row([BOS, *b"89abc"], 3)
    (row,) = rows_of("language_modeling", tokens("0123456789", "0123456789abc"), 3)
    assert row == Row([BOS, *b"bc"], 1)
    assert rows_of("multiple_choice", tokens("0123a", "0123bcd"), 5) == [
        Row([BOS, *b"123a"], 4),
        Row([BOS, *b"3bcd"], 2),
    ]


# --- the metric -------------------------------------------------------------------------------------------------------


def known() -> list[str]:
    """Right answers to 6 of the 8 choices, 3 of the 4 schemas and 4 of the 5 facts, and wrong ones to the others."""
    said = []
    for i, row in enumerate(CHOICES):
        said.append(f"{row['query']} {row['choices'][(row['gold'] + (i in (2, 5))) % 4]}")
    for i, row in enumerate(SCHEMA):
        said.append(f"{row['context_options'][row['gold'] if i != 1 else 0]} laughed.")
    for i, row in enumerate(FACTS):
        said.append(f"{row['context']}{row['continuation'] if i != 3 else 'sea'}")
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "core", copa=CHOICES, winograd_wsc=SCHEMA, lambada_openai=FACTS)


@pytest.mark.parametrize("batch_tokens", [1, 200, 1 << 20])
def test_known_answers_give_known_figures(folder: Path, batch_tokens: int) -> None:
    oracle = Oracle(known())
    seen: list[tuple[str, int, int]] = []
    result = evaluate_core(
        oracle, Bytes(), folder, batch_tokens=batch_tokens, progress=lambda *figures: seen.append(figures)
    )
    assert [(task.name, task.file, task.examples, task.accuracy) for task in result.tasks] == [
        ("copa", "copa.jsonl", 8, 0.75),
        ("lambada_openai", "lambada_openai.jsonl", 5, 0.8),
        ("winograd", "winograd_wsc.jsonl", 4, 0.75),
    ]
    assert [task.centred for task in result.tasks] == pytest.approx([0.5, 0.8, 0.5])
    assert result.core == pytest.approx(0.6)
    assert seen == [("copa", 8, 8), ("lambada_openai", 5, 5), ("winograd", 4, 4)]
    assert max(rows * width for rows, width in oracle.calls) <= max(batch_tokens, 200)
    assert batch_tokens > 1 or {rows for rows, _ in oracle.calls} == {1}


def test_missing_tasks_are_named(folder: Path) -> None:
    result = evaluate_core(Oracle(known()), Bytes(), folder)
    assert len(result.missing) == 19
    assert {"squad", "coqa", "arc_easy", "hellaswag", "hellaswag_zeroshot"} < set(result.missing)
    assert not {"copa", "winograd", "lambada_openai"} & set(result.missing)
    assert result.title == f"CORE over 3 of 22 tasks (missing: {', '.join(result.missing)})"


def test_with_all_tasks_it_is_core(tmp_path: Path) -> None:
    rows = {"multiple_choice": CHOICES, "schema": SCHEMA, "language_modeling": FACTS}
    write(tmp_path, **{task.files[0].removesuffix(".jsonl"): rows[task.kind] for task in TASKS})
    result = evaluate_core(Oracle(known()), Bytes(), tmp_path, max_per_task=2)
    assert result.title == "CORE"
    assert [task.name for task in result.tasks] == [task.name for task in TASKS]
    assert result.core == pytest.approx(sum(task.centred for task in result.tasks) / 22)
    boolq = next(task for task in result.tasks if task.name == "boolq")
    assert boolq.centred == pytest.approx((boolq.accuracy - 0.62) / 0.38)


def test_a_part_of_a_task_has_the_prompts_of_the_whole(folder: Path) -> None:
    """Its first examples as they are shuffled; also where there are fewer of them than shots."""
    write(folder, piqa=CHOICES, squad=FACTS)  # of ten shots each
    asked: list[set[tuple[int, ...]]] = []
    for few in (1, 3, 0):
        oracle = Oracle(known())
        spoken = Recorder(oracle)
        result = evaluate_core(spoken, Bytes(), folder, max_per_task=few)
        assert {task.name: task.examples for task in result.tasks}["piqa"] == (few or 8)
        asked.append(spoken.rows)
    assert asked[0] < asked[1] < asked[2]
    texts = [bytes(row[1:]).decode() for row in asked[0]]
    assert max(text.count("Question") for text in texts) == len(CHOICES)  # all others are its shots
    shuffled = FACTS.copy()
    random.Random(1337).shuffle(shuffled)
    assert [text for text in texts if text.endswith(shuffled[0]["continuation"].removesuffix("n"))]  # an input's end


class Recorder:
    """A model that keeps the rows that it was given, without their padding."""

    def __init__(self, inner: Oracle) -> None:
        self.inner, self.config, self.device = inner, inner.config, inner.device
        self.rows: set[tuple[int, ...]] = set()

    def __call__(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, *, reduction: str = "mean"
    ) -> torch.Tensor:
        for row in idx.tolist():
            end = next((i for i in range(1, len(row)) if row[i] == BOS), len(row))
            self.rows.add(tuple(row[:end]))
        return self.inner(idx, targets, reduction=reduction)


def test_batches_give_what_single_rows_give(model: GPT) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(23):
        ids = [BOS, *(draw.randrange(256) for _ in range(draw.randrange(1, 63)))]
        rows.append(Row(ids, draw.randrange(1, len(ids))))
    single, naive = [_scores(model, [row], False, 1)[0] for row in rows], []
    for ids, start in rows:
        with torch.no_grad():
            chances = model(torch.tensor([ids]))[0].log_softmax(-1)
        naive.append(-sum(float(chances[at - 1, ids[at]]) for at in range(start, len(ids))) / (len(ids) - start))
    for batch_tokens in (1, 150, 10_000):
        torch.testing.assert_close(_scores(model, rows, False, batch_tokens), single, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single, naive, rtol=1e-4, atol=1e-5)


def test_exact_answers_count_the_tokens_that_are_not_the_likeliest(model: GPT) -> None:
    rows = []
    for wrong in range(3):
        ids = [BOS, 1, 2, 3]
        for _ in range(5):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        rows.append(Row(ids + [0] * wrong, 4))
        with torch.no_grad():
            assert not wrong or int(model(torch.tensor([ids]))[0, -1].argmax()) != 0
    found = _scores(model, rows, True, 10_000)
    assert found[:2] == [0, 1]
    assert found[2] in (1, 2)
    assert found == [_scores(model, [row], True, 1)[0] for row in rows]


# --- the real data ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("PILOT_DATA")
    if folder is None or not Path(folder, "core_eval.tar.xz").exists():
        pytest.skip("PILOT_DATA names no folder with core_eval.tar.xz")
    return Path(folder, "core_eval.tar.xz")


def test_the_real_tasks_run(real: Path, model: GPT) -> None:
    data = load(real)
    assert data.missing == ("squad", "coqa")
    sizes = {task.name: len(examples) for task, _, examples in data.tasks}
    assert sizes["bigbench_qa_wikidata"] == 20_321
    assert sizes["winograd"] == 273
    result = evaluate_core(model, Bytes(), data, max_per_task=2)
    assert result.title == "CORE over 20 of 22 tasks (missing: squad, coqa)"
    assert -1 < result.core < 1
    assert {task.examples for task in result.tasks} == {2}


def test_what_the_real_tasks_ask(real: Path) -> None:
    """Of language modeling the answer as it follows the text, of schemas the common end, of choices what differs."""
    encoder = Bytes()
    for task, _, examples in load(real).tasks:
        for index, example in enumerate(examples[:20]):
            texts = prompts(task, example, choose_shots(examples, index, task.shots))
            rows = rows_of(task.kind, [[BOS, *ids] for ids in encoder.encode(texts)], 1 << 20)
            assert len(rows) == (1 if task.kind == "language_modeling" else len(texts))
            for row, text in zip(rows, texts[-len(rows) :], strict=True):
                asked = bytes(row.tokens[row.start :]).decode()
                assert text.endswith(asked)
                if task.kind == "language_modeling":
                    assert asked == " " + example["continuation"]
                elif task.kind == "schema":
                    assert asked.endswith(example["continuation"])
            assert texts[-1].count("\n\n") >= task.shots
