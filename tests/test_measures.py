"""Measures of contributions: rankers that ask see them, receipts show them, and a restart keeps what they led to."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.codec import load_codec
from pilot.market.measures import MEASURES, cosine_to_mean, load_measures, measure
from pilot.market.receipts import by_miner
from pilot.market.verify import Contribution
from pilot.ranking import BadRanker, Evidence
from pilot.ranking.accepted_work import AcceptedWork
from pilot.simulation.virtual_time import run
from protocol import Range
from tasks.gpt2 import GPT2
from tests.tiny import MINERS, equal, make_place, parameters, play, receipts, tiny_task

HOTKEYS = [keypair.ss58_address for keypair in MINERS[:2]]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    return tiny_task(tmp_path_factory.mktemp("tiny"))


class ByNorm(AcceptedWork):
    """Pays by measures instead of work."""

    measures: tuple[str, ...] = ("norm", "cosine_to_mean")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mapping[str, float]] = []

    def update(self, evidence: Sequence[Evidence]) -> Mapping[str, Mapping[str, float]]:
        self.seen += [dict(e.measures) for e in evidence]
        return super().update([replace(e, work=round(1000 * e.measures["norm"])) for e in evidence])


def slow(parameters: Mapping[str, torch.Tensor], contributions: Sequence[Contribution]) -> list[float]:
    time.sleep(0.3)
    return [sum(float(p.detach().norm()) for p in parameters.values())] * len(contributions)


class Slow(AcceptedWork):
    measures = (f"{__name__}:slow",)


def with_ranker(folder: Path, task: GPT2, ranker: AcceptedWork, **policy: Any) -> Any:
    place = make_place(folder, task, **policy)
    place.market.ranker, place.market.measures = ranker, load_measures(ranker)
    return place


def test_a_ranker_sees_the_measures_it_asks_for_and_receipts_show_them(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        ranker = ByNorm()
        place = with_ranker(tmp_path, task, ranker, codec_up="int8")
        await play(place.market, 2)
        shown = [receipts(place.store, n)[hotkey].measures for n in range(2) for hotkey in sorted(HOTKEYS)]
        assert shown == ranker.seen
        for values in shown:
            assert values["norm"] > 0
            assert 0 < values["cosine_to_mean"] <= 1

    run(main())


def test_a_restart_has_the_same_model_and_weights(tmp_path: Path, task: GPT2) -> None:
    async def until(folder: Path, rounds: int) -> tuple[Any, ...]:
        place = with_ranker(folder, task, ByNorm())
        await place.market.replay(0)
        await play(place.market, rounds)
        weights, p = dict(place.store.head().weights), parameters(place.market)
        place.store.close()
        return weights, p

    async def main() -> None:
        whole = await until(tmp_path / "whole", 3)
        await until(tmp_path / "parts", 2)
        weights, p = await until(tmp_path / "parts", 3)
        assert weights == whole[0]
        assert equal(p, whole[1])

    run(main())


def test_with_the_default_ranker_nothing_is_measured(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = make_place(tmp_path, task)
        assert place.market.measures == {}
        await play(place.market, 1)
        assert [r.measures for r in receipts(place.store, 0).values()] == [{}, {}]
        assert "measure_s" not in place.store.head().metrics

    run(main())


def test_a_slow_measure_does_not_block_the_event_loop(tmp_path: Path, task: GPT2) -> None:
    async def main() -> None:
        place = with_ranker(tmp_path, task, Slow())
        longest, last = 0.0, time.monotonic()

        async def beat() -> None:
            nonlocal longest, last
            while True:
                await asyncio.sleep(0.01)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()

        beating = asyncio.create_task(beat())
        await play(place.market, 1)
        beating.cancel()
        assert receipts(place.store, 0)[HOTKEYS[0]].measures["slow"] > 0
        assert place.store.head().metrics["measure_s"] >= 0.3
        assert longest < 0.25

    asyncio.run(main())  # in real time


# --- the measures -----------------------------------------------------------------------------------------------------


def contribution(codec: str, gradient: dict[str, torch.Tensor], count: int) -> Contribution:
    made, specs = load_codec(codec), {name: t.shape for name, t in gradient.items()}
    payload = made.encode(gradient)
    return Contribution(
        hotkey="5A",
        done=(Range(0, 1),),
        count=count,
        norm=made.check(payload, specs),
        specs=specs,
        add=lambda into, weight: made.add(payload, into, weight),
        read=lambda start, stop: made.read(payload, specs, start, stop),
    )


def test_cosine_to_mean_is_that_of_dense_tensors_for_mixed_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilot.market.measures.BLOCK", 1000)
    torch.manual_seed(0)
    gradients = [{"a": torch.randn(100, 64), "b": torch.randn(33)} for _ in range(3)]
    given = [contribution(c, g, n) for c, g, n in zip(("fp32", "int8", "topk64"), gradients, (1, 2, 5), strict=True)]
    size = 100 * 64 + 33
    flat = [c.read(0, size).double() for c in given]
    mean = sum(c.count * f for c, f in zip(given, flat, strict=True)) / 8
    expected = [float(f @ mean / (f.norm() * mean.norm())) for f in flat]
    assert cosine_to_mean({}, given) == pytest.approx(expected, rel=1e-5)


def test_cosine_of_a_zero_contribution_is_zero() -> None:
    zero = contribution("fp32", {"a": torch.zeros(4, 4)}, 1)
    assert cosine_to_mean({}, [zero, zero]) == [0.0, 0.0]
    assert cosine_to_mean({}, []) == []


def test_measures_of_two_orders_of_one_miner_are_means_weighted_by_work() -> None:
    pair = [Evidence("5A", None, 30, 30, {"norm": 1.0}), Evidence("5A", None, 10, 10, {"norm": 3.0, "other": 2.0})]
    assert by_miner(pair) == [Evidence("5A", None, 40, 40, {"norm": 1.5, "other": 2.0})]


def test_a_measure_that_is_not_finite_is_an_error_that_names_it() -> None:
    given = [contribution("fp32", {"a": torch.ones(2, 2)}, 1)]
    with pytest.raises(ValueError, match="measure bad of 5A: nan is not a finite number"):
        measure({"bad": lambda parameters, contributions: [math.nan]}, {}, given)


@pytest.mark.parametrize("values", [None, 1.0, [], [1.0, 2.0], ["x"], [None], {"5A": 1.0}])
def test_a_measure_of_another_shape_is_an_error_that_names_it(values: Any) -> None:
    given = [contribution("fp32", {"a": torch.ones(2, 2)}, 1)]
    with pytest.raises(BadRanker, match=r"measure bad: this .* is not a number for each of 1 contributions"):
        measure({"bad": lambda parameters, contributions: values}, {}, given)


def test_an_unknown_measure_is_refused_in_one_line() -> None:
    class Wrong(AcceptedWork):
        measures = ("nrom",)

    with pytest.raises(ValueError, match="measure nrom: unknown; known: norm, cosine_to_mean") as caught:
        load_measures(Wrong())
    assert "\n" not in str(caught.value)


def test_every_measure_of_ours_loads() -> None:
    class All(AcceptedWork):
        measures = tuple(MEASURES)

    assert list(load_measures(All())) == list(MEASURES)
