"""Task gpt2: pure batches, a loss against a naive reference, weights, a spec that makes the same task, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from protocol import MAX_SERVED_BYTES, DataSpec, Fault, ProtocolError, TaskSpec
from tasks import OpenBlob, Task
from tasks.data.tokens import Tokens, write
from tasks.gpt2 import GPT2, PRESETS, GPT2Config
from tasks.optimizer import AdamWConfig, schedule

TEXT = "".join(f"{i}: {'abcdefg'[i % 7] * (i % 5)} and {i * i}\n" for i in range(400))
T, B = 16, 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


def prepare(text: Path, seed: int = 3, **flags) -> GPT2:
    config = GPT2Config(text=str(text), **({"seq_len": T, "batch_size": B, "validation": 0.1} | flags))
    return GPT2.prepare(config, seed=seed, cache=text.parent / "cache")


@pytest.fixture
def task(text: Path) -> GPT2:
    return prepare(text)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_its_index_alone(text: Path, task: GPT2) -> None:
    indices = [0, 5, task.batches_per_epoch, 10**9, 1, 5]
    first = [task.batch(index) for index in indices]
    other = prepare(text)
    for index, (inputs, targets) in reversed(list(zip(indices, first, strict=True))):
        again = other.batch(index)
        assert torch.equal(inputs, again[0])
        assert torch.equal(targets, again[1])
        assert inputs.shape == targets.shape == (B, T)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert task.count(index) == inputs.numel()


def windows(task: GPT2, epoch: int) -> list[tuple[int, ...]]:
    batches = range(epoch * task.batches_per_epoch, (epoch + 1) * task.batches_per_epoch)
    return [tuple(row) for index in batches for row in task.batch(index)[0].tolist()]


def test_each_epoch_visits_each_window_once_in_its_own_order(text: Path, task: GPT2) -> None:
    data = text.read_bytes()
    train = data[: len(data) - int(len(data) * 0.1)]
    there = (len(train) - 1) // T
    cut = {tuple(train[w * T : (w + 1) * T]) for w in range(there)}
    epochs = [windows(task, epoch) for epoch in (0, 1, 2)]
    for seen in epochs:
        assert len(seen) == len(set(seen)) == task.batches_per_epoch * B > there - B
        assert set(seen) <= cut
    assert epochs[0] != epochs[1] != epochs[2]
    assert windows(prepare(text, seed=4), 0) != epochs[0]


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_over_the_tokens(task: GPT2) -> None:
    model = task.build_model("cpu", initial=True)
    inputs, targets = task.batch(2)
    logits = model(input_ids=inputs).logits.detach().double()
    naive = 0.0
    for row in range(B):
        for position in range(T):
            scores = logits[row, position]
            naive -= float(scores[targets[row, position]] - scores.logsumexp(0))
    loss = task.loss(model, (inputs, targets))
    assert float(loss.detach()) == pytest.approx(naive, rel=1e-6)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None for p in task.trainable(model).values())


def test_the_first_loss_is_that_of_a_guess(task: GPT2) -> None:
    values = task.evaluate(task.build_model("cpu", initial=True))
    assert values["val_loss"] == pytest.approx(math.log(256), abs=0.4)


def test_evaluation_is_deterministic_and_over_evenly_spread_windows(text: Path) -> None:
    task = prepare(text, eval_sequences=6)
    model = task.build_model("cpu", initial=True)
    data = text.read_bytes()
    part = np.frombuffer(data, np.uint8)[len(data) - int(len(data) * 0.1) :].astype(np.int64)
    there = (len(part) - 1) // T
    total = 0.0
    for w in (i * there // 6 for i in range(6)):
        window = torch.from_numpy(part[w * T : w * T + T + 1])[None]
        total += float(task.loss(model, (window[:, :-1], window[:, 1:])).detach())
    first = task.evaluate(model)
    assert first == task.evaluate(model)
    assert first["val_loss"] == pytest.approx(total / (6 * T), rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_initial_weights_come_from_the_seed_and_leave_the_global_generator_alone(text: Path, task: GPT2) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    state = task.build_model("cpu", initial=True).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    same = task.build_model("cpu", initial=True).state_dict()
    other = prepare(text, seed=4).build_model("cpu", initial=True).state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    assert not torch.equal(state["transformer.wte.weight"], other["transformer.wte.weight"])


def test_an_empty_model_becomes_the_same_by_its_trainable_tensors(task: GPT2) -> None:
    """What a miner does: nothing but these travels, so nothing else may matter."""
    source, target = (task.build_model("cpu", initial=initial) for initial in (True, False))
    tensors = task.trainable(source)
    assert list(tensors) == sorted(tensors) == list(task.trainable(target))
    assert len({p.data_ptr() for p in task.trainable(target).values()}) == len(tensors)
    assert (task.buffers(source), list(target.buffers())) == ({}, [])
    with torch.no_grad():
        for name, p in task.trainable(target).items():
            p.copy_(tensors[name])
    assert torch.equal(task.loss(source, task.batch(0)), task.loss(target, task.batch(0)))
    assert target.training
    assert {p.dtype for p in tensors.values()} == {torch.float32}


def test_nano_has_about_a_million_parameters(task: GPT2) -> None:
    assert 0.7e6 < sum(p.numel() for p in task.trainable(task.build_model("cpu", initial=False)).values()) < 1.1e6


@pytest.mark.parametrize("model", [name for name in PRESETS if name != "nano"])
def test_the_large_presets_are_gpt2s(text: Path, model: str) -> None:
    task = prepare(text, model=model, tokenizer="byte")
    parameters = sum(p.numel() for p in task.trainable(task.build_model("meta", initial=False)).values())
    published = {"small": 124.44e6, "medium": 354.82e6, "large": 774.03e6, "xl": 1557.61e6}[model]
    width = task.shape.n_embd
    assert parameters + (50257 - 256) * width == pytest.approx(published, rel=1e-3)


def test_a_folder_gives_its_weights(text: Path, tmp_path: Path) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": 300, "n_inner": 48}
    config = transformers.GPT2Config(
        **sizes, activation_function="relu", reorder_and_upcast_attn=True, tie_word_embeddings=False
    )
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path / "saved")
    task = prepare(text, model=str(tmp_path / "saved"), tokenizer="byte", seq_len=0)
    model = task.build_model("cpu", initial=True)
    assert all(torch.equal(p, saved.state_dict()[name]) for name, p in task.trainable(model).items())
    assert "lm_head.weight" in task.trainable(model)
    assert task.shape.model_dump(include=set(sizes)) == sizes
    assert (task.shape.seq_len, task.shape.activation_function) == (24, "relu")
    inputs, targets = task.batch(0)
    saved.eval()  # the task has no dropout
    reference = torch.nn.functional.cross_entropy(
        saved(inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert float(task.loss(model, (inputs, targets)).detach()) == pytest.approx(float(reference), rel=1e-5)
    assert "saved" not in str(task.spec())  # an order names no path


# --- the order's way --------------------------------------------------------------------------------------------------


def by_order(task: GPT2, tmp_path: Path) -> tuple[TaskSpec, DataSpec, OpenBlob]:
    """The spec, the data and the token file as they arrive at a miner."""
    (tmp_path / "received").write_bytes(task.blobs()[task.data_digest])
    spec = TaskSpec.model_validate_json(task.spec().model_dump_json())
    data = DataSpec.model_validate_json(task.data_spec.model_dump_json())
    return spec, data, lambda name: tmp_path / {"tokens": "received"}[name]


def test_a_miner_computes_the_same_from_the_order(task: GPT2, tmp_path: Path) -> None:
    miner: Task = GPT2.from_spec(*by_order(task, tmp_path))
    model, replica = task.build_model("cpu", initial=True), miner.build_model("cpu", initial=True)
    for index in (0, 7, 10**6):
        assert torch.equal(task.batch(index)[0], miner.batch(index)[0])
        assert torch.equal(task.loss(model, task.batch(index)), miner.loss(replica, miner.batch(index)))
    assert task.evaluate(model) == miner.evaluate(replica)
    assert (miner.spec(), miner.data_digest, miner.unit) == (task.spec(), task.data_digest, "tokens")
    assert set(miner.blobs()) == {task.data_digest}
    assert len(memoryview(task.blobs()[task.data_digest])) <= MAX_SERVED_BYTES


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("n_layer", 0),
        ("n_layer", "4"),
        ("n_layer", 4.5),
        ("n_layer", True),
        ("n_head", 3),
        ("n_embd", 1 << 20),
        ("vocab_size", 1 << 40),
        ("activation_function", "os.system"),
        ("layer_norm_epsilon", float("nan")),
        ("scale_attn_weights", 1),
        ("seq_len", 129),
        ("batch_size", 1 << 20),
        ("eval_sequences", -1),
        ("seed", -1),
        ("model", "/etc"),
        ("n_layer", None),
    ],
)
def test_an_order_with_bad_parameters_is_refused(task: GPT2, tmp_path: Path, parameter: str, value) -> None:
    spec, data, open_blob = by_order(task, tmp_path)
    parameters = {**spec.parameters, parameter: value}
    if value is None:
        del parameters[parameter]
    with pytest.raises(ProtocolError) as error:
        GPT2.from_spec(TaskSpec.model_construct(name="gpt2", parameters=parameters), data, open_blob)
    assert "\n" not in str(error.value)


def test_an_order_for_other_tokens_is_refused(task: GPT2, tmp_path: Path) -> None:
    spec, data, open_blob = by_order(task, tmp_path)
    write(tmp_path / "other", [np.arange(2000) % 300], [np.arange(200)], np.uint16)
    other = Tokens.open(tmp_path / "other")
    with pytest.raises(ProtocolError) as error:
        GPT2.from_spec(spec, data, lambda name: tmp_path / "other")
    assert error.value.fault is Fault.WRONG_DATA
    few = TaskSpec(name="gpt2", parameters={**spec.parameters, "vocab_size": 50})
    with pytest.raises(ProtocolError, match="do not fit in a vocabulary of 50"):
        GPT2.from_spec(few, data, open_blob)
    data = data.model_copy(update={"blobs": {"tokens": other.ref()}})
    with pytest.raises(ProtocolError, match="do not fit in a vocabulary of 256"):
        GPT2.from_spec(spec, data, lambda name: tmp_path / "other")


# --- optimizer --------------------------------------------------------------------------------------------------------


def test_the_schedule_rises_then_falls() -> None:
    config = AdamWConfig(warmup=10, final_lr=0.1)
    values = [schedule(config, step, 100) for step in range(101)]
    assert values[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert values[10] == 1.0
    assert values[10:100] == sorted(values[10:100], reverse=True)
    assert values[99] == values[100] == pytest.approx(0.1)
    assert [schedule(AdamWConfig(warmup=5), step, 1) for step in (0, 9)] == pytest.approx([1 / 6, 0.1])


def test_adamw_is_the_published_update_with_decay_on_matrices_only(task: GPT2) -> None:
    model = task.build_model("cpu", initial=True)
    config = AdamWConfig(lr=1e-3, weight_decay=0.2)
    before = {name: p.detach().double() for name, p in task.trainable(model).items()}
    optimizer = task.optimizer(model, config)
    task.loss(model, task.batch(0)).backward()
    optimizer.step()
    for name, p in task.trainable(model).items():
        assert p.grad is not None
        gradient = p.grad.double()
        decay = 1e-3 * 0.2 if p.ndim >= 2 else 0.0
        expected = before[name] * (1 - decay) - 1e-3 * gradient / (gradient.abs() + config.eps)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_bad_optimizer_flags() -> None:
    for flag, value in (
        ("lr", -1.0),
        ("lr", float("nan")),
        ("beta1", 1.0),
        ("clip", -0.1),
        ("warmup", -1),
        ("final_lr", 2),
    ):
        with pytest.raises(ValueError, match=rf"^--optimizer\.{flag} {value}"):
            AdamWConfig(**{flag: value})


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"model": "/no/such/folder"}, r"--gpt2\.model /no/such/folder: not nano, small"),
        ({"seq_len": 256}, r"--gpt2\.seq_len 256: the model has 128 positions"),
        ({"batch_size": 10_000}, r"--gpt2\.text: \d+ tokens for training are less than a micro-batch of 10000 x 16"),
        ({"max_bytes": 10}, r"--gpt2\.text: 9 tokens"),
        ({"validation": 0.0005}, r"--gpt2\.validation: \d+ tokens for validation are less than a sequence"),
    ],
)
def test_bad_flags_are_one_line(text: Path, flags: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}") as error:
        prepare(text, **flags)
    assert "\n" not in str(error.value)


def test_other_models_are_refused(text: Path, tmp_path: Path) -> None:
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"^--gpt2\.model .*llama, not a gpt2"):
        prepare(text, model=str(tmp_path / "llama"), tokenizer="byte")
    transformers.GPT2Config(vocab_size=100).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match=r"^--gpt2\.tokenizer byte: 256 tokens, .* knows 100"):
        prepare(text, model=str(tmp_path / "few"), tokenizer="byte")
    transformers.GPT2Config(activation_function="tanh").save_pretrained(tmp_path / "tanh")
    with pytest.raises(ValueError, match=r"^--gpt2\.model .*activation_function tanh"):
        prepare(text, model=str(tmp_path / "tanh"), tokenizer="byte")
    transformers.GPT2Config(vocab_size=256).save_pretrained(tmp_path / "no weights")
    with pytest.raises(ValueError, match=r"^--gpt2\.model .*no weights"):
        prepare(text, model=str(tmp_path / "no weights"), tokenizer="byte").build_model("cpu", initial=True)
