"""Every registered task keeps the contract of tasks.Task. A new task is tested here by its line in TASKS."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.app.miner_flags import MinerConfig
from pilot.app.training_flags import TrainingConfig
from pilot.app.validator_flags import ValidatorConfig
from pilot.common.flags import flags_of
from pilot.interfaces import Refused
from protocol import (
    MAX_SERVED_BYTES,
    BlobRef,
    Fault,
    Order,
    ProtocolError,
    Range,
    TaskSpec,
    Update,
    VersionStep,
    digest,
    next_version,
)
from tasks import TASKS, OpenBlob, Task, load_task
from tasks.optimizer import apply_settings, optimizer_from_order
from tests.tiny import MINERS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    cls = load_task(request.param)
    return cls.prepare(cls.Config(**cls.example), seed=3, cache=tmp_path_factory.mktemp(request.param), device=CPU)


@pytest.fixture
def miner(task: Task, tmp_path: Path) -> Task:
    """The same task at a miner, which has only the order's JSON and the blobs that the validator sends."""
    order = ordered(task)
    return load_task(order.task.name).from_spec(order.task, order.data, received(task, tmp_path))


def ordered(task: Task, **parameters: Any) -> Order:
    """An order for the task, as a miner reads it from the wire."""
    spec = TaskSpec(name=task.spec().name, parameters={**task.spec().parameters, **parameters})
    step = VersionStep(kind="state", codec="fp32", digest="a" * 64, bytes=1)
    order = Order(
        run="conformance",
        round=0,
        hotkey=MINERS[0].ss58_address,
        version=next_version(None, step.digest),
        update=Update(base=None, steps=(step,)),
        state_digest=None,
        task=spec,
        data=task.data_spec,
        ranges=(Range(0, 1),),
        deadline_s=60.0,
        staleness=0,
        codec_up="fp32",
        codec_down="fp32",
    )
    return Order.parse(order.text())


def received(task: Task, folder: Path) -> OpenBlob:
    blobs = task.blobs()

    def open_blob(name: str) -> Path:
        path = folder / name
        path.write_bytes(blobs[task.data_spec.blobs[name].digest])
        return path

    return open_blob


def equal(a: Any, b: Any) -> bool:
    """Compare two batches of any task, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# --- batches, model, loss ---------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_its_index(task: Task, miner: Task) -> None:
    assert task.batches_per_epoch == miner.batches_per_epoch > 1
    for index in (0, 1, task.batches_per_epoch, 10**6):
        first = task.batch(index)
        task.batch(index + 1)
        assert equal(first, task.batch(index))
        assert equal(first, miner.batch(index))
        assert task.count(index) == miner.count(index) > 0
    assert not equal(task.batch(0), task.batch(1))


def test_the_initial_model_is_deterministic(task: Task) -> None:
    state = torch.random.get_rng_state()
    one, two = (task.build_model(CPU, initial=True).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)  # and leaves torch's generator alone
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trainable_and_buffers_are_what_travels(task: Task, miner: Task) -> None:
    model, replica = task.build_model(CPU, initial=True), miner.build_model(CPU, initial=False)
    for which in ("trainable", "buffers"):
        ours, theirs = getattr(task, which)(model), getattr(miner, which)(replica)
        assert list(ours) == sorted(ours)
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    parameters = task.trainable(model)
    assert parameters
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters.values())
    assert len({p.data_ptr() for p in parameters.values()}) == len(parameters)
    assert not parameters.keys() & task.buffers(model).keys()


def test_validator_and_miner_compute_the_same_loss_and_gradient(task: Task, miner: Task) -> None:
    model, replica = task.build_model(CPU, initial=True), miner.build_model(CPU, initial=False)
    travels = {**miner.trainable(replica), **miner.buffers(replica)}
    with torch.no_grad():
        for name, tensor in {**task.trainable(model), **task.buffers(model)}.items():
            travels[name].copy_(tensor)
    for index in (0, task.batches_per_epoch + 1):
        ours, theirs = task.loss(model, task.batch(index)), miner.loss(replica, miner.batch(index))
        assert ours.ndim == 0
        assert torch.equal(ours, theirs)
        ours.backward()
        theirs.backward()
    gradients = [{n: p.grad for n, p in t.trainable(m).items()} for t, m in ((task, model), (miner, replica))]
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradient, gradients[1][name])


def test_evaluation_has_a_val_loss_and_changes_nothing(task: Task, miner: Task) -> None:
    model = task.build_model(CPU, initial=True)
    before, training = {n: t.clone() for n, t in model.state_dict().items()}, model.training
    values = task.evaluate(model)
    assert values == task.evaluate(model)
    assert miner.evaluate(model)["val_loss"] == values["val_loss"] > 0
    assert model.training is training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert task.flops(model) >= 0


def test_a_few_steps_of_its_own_optimizer_lower_the_loss(task: Task) -> None:
    model = task.build_model(CPU, initial=True)
    config = optimizer_from_order(task.name, task.Optimizer, asdict(task.Optimizer()))
    optimizer = task.optimizer(model, config)
    before = task.evaluate(model)["val_loss"]
    for step in range(20):
        apply_settings(optimizer, task.settings(config, step, 20, task.count(step)))
        optimizer.zero_grad()
        (task.loss(model, task.batch(step)) / task.count(step)).backward()
        optimizer.step()
    assert task.evaluate(model)["val_loss"] < before


# --- orders and data --------------------------------------------------------------------------------------------------


def test_an_order_carries_the_task_and_names_its_blobs(task: Task, miner: Task) -> None:
    assert task.spec().name == task.name
    assert ordered(task).task == task.spec() == miner.spec()
    assert ordered(task).data == task.data_spec == miner.data_spec
    assert task.data_digest == miner.data_digest
    assert task.unit == miner.unit
    blobs = task.blobs()
    for ref in task.data_spec.blobs.values():
        assert ref.bytes <= MAX_SERVED_BYTES
        assert digest(ref.kind, blobs[ref.digest]) == ref.digest


@pytest.mark.parametrize("change", ["missing", "unknown", "path", "text", "negative", "huge", "fraction", "flag"])
def test_hostile_parameters_are_refused(task: Task, tmp_path: Path, change: str) -> None:
    """Every parameter by itself: each becomes one ProtocolError on one line, whatever the order says."""
    good = task.spec().parameters
    values = {
        "text": "import os",
        "negative": -1,
        "huge": 1 << 52,
        "fraction": 0.5,
        "flag": True,
        "path": "/etc/passwd",
    }
    for name in good:
        parameters = dict(good)
        if change == "missing":
            del parameters[name]
        elif change == "unknown":
            parameters[f"{name}_"] = 1
        elif change == "flag" and isinstance(good[name], bool):
            continue
        elif name == "seed" and change == "huge":
            continue  # a seed may be that large
        elif isinstance(good[name], float) and change == "fraction":
            continue
        else:
            parameters[name] = values[change]
        with pytest.raises(ProtocolError) as error:
            type(task).from_spec(
                TaskSpec(name=task.name, parameters=parameters), task.data_spec, received(task, tmp_path)
            )
        assert "\n" not in str(error.value)


def test_other_data_than_the_orders_is_refused(task: Task, tmp_path: Path) -> None:
    for name, ref in task.data_spec.blobs.items():
        if ref.digest != task.data_digest:
            continue  # what a miner makes the data from, not the data
        raw = bytearray(received(task, tmp_path)(name).read_bytes())
        raw[-1] ^= 1
        (tmp_path / "other").write_bytes(raw)
        with pytest.raises(ProtocolError) as error:
            type(task).from_spec(task.spec(), task.data_spec, lambda _: tmp_path / "other")
        assert error.value.fault is Fault.WRONG_DATA


def test_what_an_order_needs_follows_from_its_numbers(task: Task) -> None:
    """The parameters exactly, the rest at least what the tensors of a micro-batch take."""
    model, spec = task.build_model(CPU, initial=False), task.spec()
    need = type(task).need(spec, task.data_spec)
    assert need.parameters == sum(p.numel() for p in task.trainable(model).values())
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, task.batch(0))
    assert sum(saved.values()) <= 4 * need.parameters + need.working
    assert need.flops == pytest.approx(task.flops(model) * task.count(0), rel=1e-6)
    twice = spec.model_copy(update={"parameters": {**spec.parameters, "batch_size": 2 * task.shape.batch_size}})
    assert type(task).need(twice, task.data_spec).flops == pytest.approx(2 * need.flops)
    with pytest.raises(ProtocolError):
        type(task).need(spec.model_copy(update={"parameters": {"code": "import os"}}), task.data_spec)


def test_an_order_without_blobs_is_refused(task: Task, tmp_path: Path) -> None:
    data = task.data_spec.model_copy(update={"blobs": {"else": BlobRef(kind="data", digest="b" * 64, bytes=1)}})
    with pytest.raises(ProtocolError):
        type(task).from_spec(task.spec(), data, received(task, tmp_path))


def test_a_blob_that_a_miner_cannot_make_is_refused(task: Task, tmp_path: Path) -> None:
    for name in task.data_spec.blobs:
        with pytest.raises(Refused) as refused:
            type(task).make_blob(name, task.data_spec, received(task, tmp_path), None, tmp_path / "cache")
        assert refused.value.fault is Fault.WRONG_DATA or refused.value.missing


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_one_line_registers_a_task_with_its_flags(name: str) -> None:
    cls = load_task(name)
    assert cls.name == name
    assert is_dataclass(cls.Config)
    assert cls.example.keys() <= {field.name for field in fields(cls.Config)}
    assert isinstance(getattr(TrainingConfig(), name), cls.Config)
    assert name in MinerConfig().tasks
    TrainingConfig(task=name).check_task()
    config = TrainingConfig(task=name)
    assert isinstance(config.optimizer_flags, cls.Optimizer)
    other = next(task for task in TASKS if task != name)
    with pytest.raises(ValueError, match=rf"^--{name}\.…: --task is {other}"):
        TrainingConfig(task=other, **{name: cls.Config(**cls.example)}).check_task()


@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_keeps_the_tasks_flags(name: str) -> None:
    """What the committed rounds' arithmetic depends on. Free is what each round's record holds, and where the data are.

    A text may move: the digest of its tokens tells whether it is the same.
    """
    flags = {key: flag for key, flag in flags_of(ValidatorConfig).items() if key.startswith(f"{name}.")}
    assert flags
    free = {key for key, flag in flags.items() if flag.resume != "fixed"}
    places = {f"{name}.{place}" for place in ("text", "tokenizer", "vocabulary")}
    assert all(key.startswith(f"{name}.optimizer.") or key in places for key in free)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--task gpt3: unknown; known: gpt2, nanochat, quadratic$"):
        load_task("gpt3")


def test_the_flags_of_all_tasks_are_known_without_torch() -> None:
    program = (
        "import sys, tasks; [tasks.load_task(name).Config for name in tasks.TASKS]\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "set()\n", ended.stderr
