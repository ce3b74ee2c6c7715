"""The quadratic task: what it says of its optimum, its gradients and its data holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pilot.training.gradient import compute
from protocol import Fault, ProtocolError, Range, TaskSpec
from tasks.optimizer import AdamWConfig, adamw_settings, apply_settings
from tasks.quadratic import BYTE_DEVIATION, Quadratic, QuadraticConfig

torch.set_num_threads(1)
CONFIG = QuadraticConfig(dimension=48, samples=32, batch_size=4, condition=50.0, noise=0.3)


def prepared(folder: Path, seed: int = 0, **changes: Any) -> Quadratic:
    return Quadratic.prepare(replace(CONFIG, **changes), seed=seed, cache=folder)


def at(task: Quadratic, x: torch.Tensor) -> torch.nn.Module:
    model = task.build_model("cpu", initial=True)
    with torch.no_grad():
        next(model.parameters()).copy_(x)
    return model


def centres(task: Quadratic) -> torch.Tensor:
    """(samples, d), in fp64, from the token file itself."""
    noise = np.frombuffer(task._tokens.buffer[32:], np.uint8).reshape(CONFIG.samples, -1)  # after the header
    return task.optimum.double() + CONFIG.noise * (torch.from_numpy(noise.astype(np.float64)) - 127.5) / BYTE_DEVIATION


def test_loss_and_gradient_are_those_of_the_definition(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    x = torch.linspace(-1, 1, CONFIG.dimension)
    h = torch.logspace(-np.log10(CONFIG.condition), 0, CONFIG.dimension, dtype=torch.float64)
    for index in (0, 3, 8, 21):
        samples = centres(task)[torch.from_numpy(task._orders.batch(index, CONFIG.batch_size))]
        apart = x.double() - samples
        work = compute(task, at(task, x), [Range(index, index + 1)])
        assert work is not None
        assert work.loss == pytest.approx(float((0.5 / CONFIG.dimension * h * apart**2).sum(1).mean()), rel=1e-5)
        expected = (h / CONFIG.dimension * apart).mean(0)
        torch.testing.assert_close(work.gradient["x"].double(), expected, rtol=1e-4, atol=1e-7)


def test_the_mean_over_an_epoch_is_what_evaluation_says_and_least_at_the_optimum(tmp_path: Path) -> None:
    task = prepared(tmp_path)
    epoch = [Range(0, task.batches_per_epoch)]
    for x in (torch.zeros(CONFIG.dimension), torch.ones(CONFIG.dimension), task.optimum):
        model = at(task, x)
        work = compute(task, model, epoch)
        assert work is not None
        assert task.evaluate(model)["val_loss"] == pytest.approx(work.loss, rel=1e-5)
    best = task.evaluate(at(task, task.optimum))
    assert best == {"val_loss": task.floor, "excess_loss": 0.0}
    assert work is not None
    assert work.gradient["x"].abs().max() < 1e-7  # the last one was at the optimum
    assert task.evaluate(at(task, task.optimum + 0.01))["val_loss"] > task.floor


def test_the_usual_optimizer_finds_the_optimum(tmp_path: Path) -> None:
    task, config = prepared(tmp_path), AdamWConfig(lr=0.01)
    model = task.build_model("cpu", initial=True)
    optimizer = task.optimizer(model, config)
    before = task.evaluate(model)["excess_loss"]
    for step in range(300):
        work = compute(task, model, [Range(4 * step, 4 * step + 4)])
        assert work is not None
        next(model.parameters()).grad = work.gradient["x"]
        apply_settings(optimizer, adamw_settings(config, step, 300))
        optimizer.step()
    assert task.evaluate(model)["excess_loss"] < 0.01 * before


def test_a_miner_makes_the_same_task_from_the_order(tmp_path: Path) -> None:
    ours = prepared(tmp_path, seed=7)
    theirs = Quadratic.from_spec(ours.spec(), ours.data_spec, lambda name: ours._tokens.path)
    for index in (0, 5, 100):
        assert all(np.array_equal(a, b) for a, b in zip(ours.batch(index), theirs.batch(index), strict=True))
    assert torch.equal(ours.optimum, theirs.optimum)
    assert list(ours.blobs()) == [ours.data_digest]
    other = prepared(tmp_path, seed=8)
    assert other.data_digest != ours.data_digest
    assert not torch.equal(other.optimum, ours.optimum)
    with pytest.raises(ProtocolError) as caught:
        Quadratic.from_spec(ours.spec(), other.data_spec, lambda name: ours._tokens.path)
    assert caught.value.fault is Fault.WRONG_DATA


@pytest.mark.parametrize(
    "wrong", [{"dimension": 0}, {"batch_size": 1000}, {"condition": 0.5}, {"noise": -1.0}, {"colour": 1}, {"seed": 0.5}]
)
def test_an_order_with_other_parameters_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    task = prepared(tmp_path)
    spec = TaskSpec(name="quadratic", parameters={**task.spec().parameters, **wrong})
    with pytest.raises(ProtocolError):
        Quadratic.from_spec(spec, task.data_spec, lambda name: task._tokens.path)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"samples": 3}, "--quadratic.samples 3: must be even"),
        ({"samples": 1 << 20, "dimension": 1 << 20}, "--quadratic.samples 1048576: must be even"),
        ({"dimension": 0}, "--quadratic.dimension 0: must lie between"),
        ({"condition": 0.0}, "--quadratic.condition 0.0: must lie between"),
        ({"noise": float("nan")}, "--quadratic.noise nan: must lie between"),
        ({"samples": 2}, "--quadratic.samples 2: less than a micro-batch"),
    ],
)
def test_a_users_mistake_names_the_flag(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepared(tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"--seed -1: must lie between"):
        prepared(tmp_path, seed=-1)
