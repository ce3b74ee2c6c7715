"""A marketplace computes what plain training computes: fp32 both ways, full broadcast, mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pilot.app.base_train_flags import BaselineConfig
from pilot.interfaces import Diverged
from pilot.simulation.virtual_time import run
from pilot.training.gradient import GradientResult, compute
from pilot.training.learner import Learner
from pilot.training.plain_loop import train
from protocol import Range
from tasks.gpt2 import GPT2
from tests.tiny import CPU, MINERS, OPTIMIZER, ROUNDS, equal, make_place, parameters, play, settings, tiny_task

CONFIG = BaselineConfig(optimizer=OPTIMIZER, rounds=ROUNDS)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


def baseline(task: GPT2, batches: int) -> tuple[Learner, list[float]]:
    learner = Learner(task, CONFIG.optimizer_flags, CPU)
    steps = (((Range(i * batches, (i + 1) * batches),), settings(i)) for i in range(ROUNDS))
    return learner, [work.loss for work in train(learner, steps) if work]


def test_one_miner_is_bitwise_the_baseline(tmp_path: Path, task: GPT2) -> None:
    async def main() -> tuple[dict[str, torch.Tensor], list[object]]:
        place = make_place(tmp_path, task, miners=MINERS[:1], batches=3)
        await play(place.market, ROUNDS)
        return parameters(place.market), [r.metrics["loss"] for r in place.store.committed(0)]

    learner, losses = baseline(task, 3)
    trained, seen = run(main())
    assert equal(trained, {name: p.detach() for name, p in learner.parameters.items()})
    assert seen == losses


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient", "one value"])
def test_plain_training_stops_before_a_step_that_is_not_finite(task: GPT2, where: str, value: float) -> None:
    learner = Learner(task, CONFIG.optimizer_flags, CPU)
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}

    def spoil(work: GradientResult) -> GradientResult:
        if where == "loss":
            return replace(work, loss=value)
        gradient = work.gradient["transformer.wte.weight"]
        (gradient if where == "gradient" else gradient[-1, -1:]).fill_(value)
        return work

    with pytest.raises(Diverged, match="loss is" if where == "loss" else r"gradient is no longer finite"):
        list(train(learner, [((Range(0, 1),), settings(0))], spoil))
    assert equal(before, {name: p.detach() for name, p in learner.parameters.items()})


@pytest.mark.parametrize("miners", [2, 3, 5])
def test_losses_of_many_miners_follow_the_baseline(tmp_path: Path, task: GPT2, miners: int) -> None:
    async def main() -> list[object]:
        place = make_place(tmp_path, task, miners=MINERS[:miners], batches=2)
        await play(place.market, ROUNDS)
        return [r.metrics["loss"] for r in place.store.committed(0)]

    _, losses = baseline(task, 2 * miners)
    assert run(main()) == pytest.approx(losses, abs=1e-3)


@pytest.mark.parametrize("miners", [2, 3, 5])
def test_each_gradient_of_many_miners_is_the_baselines(tmp_path: Path, task: GPT2, miners: int) -> None:
    """From equal parameters, at every step: relative L2 within 1e-5."""
    errors: list[float] = []

    async def main() -> None:
        place = make_place(tmp_path, task, miners=MINERS[:miners], batches=2)
        learner = place.market.learner
        step, taken = learner.step, iter(range(ROUNDS))

        def compared_step(gradient: dict[str, torch.Tensor], *rest: object) -> None:
            """The real step, after the same gradient was computed in one piece from the same parameters."""
            given = {name: g.clone() for name, g in gradient.items()}
            first = next(taken) * 2 * miners
            work = compute(task, learner.model, [Range(first, first + 2 * miners)])
            assert work is not None
            difference = sum(float((given[n] - g).square().sum()) for n, g in work.gradient.items()) ** 0.5
            errors.append(difference / sum(float(g.square().sum()) for g in work.gradient.values()) ** 0.5)
            step(given, *rest)

        learner.step = compared_step
        await play(place.market, ROUNDS)

    run(main())
    assert len(errors) == ROUNDS
    assert max(errors) < 1e-5


def test_comparison_can_fail(tmp_path: Path, task: GPT2) -> None:
    """Gradients rounded to bf16 give other parameters."""

    async def main(codec: str) -> dict[str, torch.Tensor]:
        place = make_place(tmp_path / codec, task, miners=MINERS[:1], batches=3, codec_up=codec)
        await play(place.market, 2)
        return parameters(place.market)

    assert not equal(run(main("bf16")), run(main("fp32")))


def test_baseline_keeps_step_with_rounds_that_had_no_good_reply(task: GPT2) -> None:
    learner = Learner(task, CONFIG.optimizer_flags, CPU)
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    steps = iter([((), {"lr": 0.1}), ((Range(0, 1),), {"lr": 0.1})])
    works = train(learner, steps)
    assert next(works) is None
    assert equal(before, {name: p.detach() for name, p in learner.parameters.items()})
    assert next(works) is not None
    assert not equal(before, {name: p.detach() for name, p in learner.parameters.items()})
