"""Contribution means against a naive fp64 reference, and what one liar can do to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilot.aggregation import AGGREGATORS, load_aggregator
from pilot.aggregation.means import mean, median_norm_mean
from pilot.codec import load_codec
from pilot.codec.dense import CHUNK, global_norm

SETTINGS = settings(derandomize=True, max_examples=100, deadline=None, database=None)
SHAPES = {"b": (3,), "none": (0,), "scale": (), "w": (4, 5)}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Given:
    count: int
    norm: float
    tensors: Tensors

    @property
    def specs(self) -> dict[str, torch.Size]:
        return {name: t.shape for name, t in self.tensors.items()}

    def add(self, into: Tensors, weight: float) -> None:
        for name, t in self.tensors.items():
            into[name] += t * weight


def contribution(count: int, seed: int, scale: float = 1.0) -> Given:
    """Random tensors of norm `scale`, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = {name: t * (scale / global_norm(tensors)) for name, t in tensors.items()}
    return Given(count, global_norm(tensors), tensors)


contributions = st.lists(
    st.builds(
        contribution,
        count=st.integers(1, 10**6),
        seed=st.integers(0, 1000),
        scale=st.sampled_from([0.0, 1e-20, 0.5, 1.0, 2.0, 1e10]),
    ),
    min_size=1,
    max_size=5,
)


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.flatten().double() for _, t in sorted(tensors.items())])


def naive(given_: list[Given], factors: list[float]) -> torch.Tensor:
    """In fp64, by the definition."""
    total = sum(g.count for g in given_)
    return torch.stack([f * g.count / total * flat(g.tensors) for f, g in zip(factors, given_, strict=True)]).sum(0)


def naive_median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def close(a: Tensors, b: torch.Tensor, given_: list[Given]) -> bool:
    """Within fp32's rounding of the largest summand."""
    return bool((flat(a) - b).abs().max() <= 1e-6 * max(g.norm for g in given_))


@SETTINGS
@given(contributions)
def test_mean_is_the_weighted_mean(given_: list[Given]) -> None:
    assert close(mean(given_), naive(given_, [1.0] * len(given_)), given_)


@SETTINGS
@given(contributions)
def test_median_norm_mean_scales_down_to_the_median_norm(given_: list[Given]) -> None:
    limit = naive_median([g.norm for g in given_])
    factors = [min(1.0, limit / g.norm) if g.norm else 1.0 for g in given_]
    result = median_norm_mean(given_)
    assert close(result, naive(given_, factors), given_)
    assert global_norm(result) <= limit * (1 + 1e-5)


@SETTINGS
@given(contributions)
def test_within_the_median_nothing_is_touched(given_: list[Given]) -> None:
    """Of equal norms, median_norm_mean is the mean, to the bit."""
    level = [Given(g.count, 1.0, g.tensors) for g in given_]
    assert bits(median_norm_mean(level)) == bits(mean(level))


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("aggregate", [mean, median_norm_mean])
@pytest.mark.parametrize("count", [1, 3, 10**15 + 1])
def test_one_contribution_comes_out_bit_identical(aggregate: Callable[..., Tensors], count: int) -> None:
    """Its weight is exactly 1.0, so even subnormals stay; only -0.0, added to 0, does not."""
    one = contribution(count, seed=1)
    one.tensors["b"][:] = torch.tensor([0.0, 1e-45, 3.4e38])
    assert bits(aggregate([one])) == bits(one.tensors)


@pytest.mark.parametrize("aggregate", [mean, median_norm_mean])
def test_weights_are_normalised_before_they_multiply(aggregate: Callable[..., Tensors]) -> None:
    """Counts of any size: what matters is their ratio, and nothing overflows on the way."""
    huge = [Given(g.count * 10**30, g.norm, g.tensors) for g in (contribution(1, 1), contribution(3, 2))]
    small = [contribution(1, 1), contribution(3, 2)]
    assert bits(aggregate(huge)) == bits(aggregate(small))
    largest = torch.full((2,), torch.finfo(torch.float32).max)
    both = [Given(1, 1.0, {"t": largest.clone()}), Given(1, 1.0, {"t": largest.clone()})]
    assert torch.equal(aggregate(both)["t"], largest)


@pytest.mark.parametrize("aggregate", [mean, median_norm_mean])
def test_sums_in_the_order_given_and_changes_no_input(aggregate: Callable[..., Tensors]) -> None:
    """Left to right, one multiplication and one addition each: what a replay repeats."""
    given_ = [contribution(count, seed) for seed, count in enumerate((5, 7, 11, 13))]
    before = [bits(g.tensors) for g in given_]
    limit = naive_median([g.norm for g in given_])
    expected: Tensors = {}
    for g in given_:
        clipped = 1.0 if aggregate is mean or g.norm <= limit else limit / g.norm
        for name, t in g.tensors.items():
            summand = t * (clipped * (g.count / 36))
            expected[name] = expected[name] + summand if name in expected else summand
    assert bits(aggregate(given_)) == bits(expected) == bits(aggregate(given_))
    assert [bits(g.tensors) for g in given_] == before
    assert bits(aggregate(given_[::-1])) != bits(expected)  # so the order is no matter of indifference


@dataclass(frozen=True)
class Sent:
    """A contribution as verified: bytes, and how to add them."""

    count: int
    norm: float
    codec: str
    payload: memoryview
    specs: dict[str, torch.Size]

    def add(self, into: Tensors, weight: float) -> None:
        load_codec(self.codec).add(self.payload, into, weight)


@pytest.mark.parametrize("aggregate", [mean, median_norm_mean])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "2bit", "ternary-rc", "topk64", "1bit"])
def test_payloads_are_summed_as_their_tensors_are(aggregate: Callable[..., Tensors], codec: str) -> None:
    sent, dense = [], []
    for seed in range(3):
        given_ = contribution(1 + seed, seed, scale=1.0 + seed)
        payload = memoryview(load_codec(codec).encode(given_.tensors))
        norm = load_codec(codec).check(payload, given_.specs)
        sent.append(Sent(given_.count, norm, codec, payload, given_.specs))
        dense.append(Given(given_.count, norm, load_codec(codec).decode(payload, given_.specs)))
    assert bits(aggregate(sent)) == bits(aggregate(dense))


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30])
def test_scaled_liar_moves_the_mean_by_no_more_than_its_share_of_the_median(scale: float) -> None:
    honest = [contribution(100, seed) for seed in range(4)]
    liar = contribution(100, seed=9, scale=scale)
    moved = flat(median_norm_mean([*honest, liar])) - flat(median_norm_mean(honest)) * (4 / 5)
    median_norm = naive_median([g.norm for g in [*honest, liar]])
    # the honest ones are at the median themselves, but for a rounding
    assert moved.norm() <= 1.001 * median_norm / 5
    assert (flat(mean([*honest, liar])) - flat(mean(honest)) * (4 / 5)).norm() > 100 * median_norm  # unlike the mean


def test_of_two_the_larger_is_clipped_to_half_way() -> None:
    small, large = contribution(1, 1, scale=1.0), contribution(1, 2, scale=3.0)
    expected = 0.5 * flat(small.tensors) + 0.5 * (2.0 / 3.0) * flat(large.tensors)
    assert close(median_norm_mean([small, large]), expected, [large])


def test_zeros_are_contributions_too() -> None:
    """A zero norm divides nothing; where most are zero, the median is, and so is the result."""
    zero, one = contribution(1, 1, scale=0.0), contribution(1, 2)
    assert zero.norm == 0.0
    assert close(mean([zero, one]), flat(one.tensors) / 2, [one])
    assert close(median_norm_mean([zero, one]), flat(one.tensors) / 4, [one])
    assert not flat(median_norm_mean([zero, zero, one])).any()
    assert not flat(median_norm_mean([zero])).any()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_nothing_to_aggregate_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"nothing to aggregate|no median"):
        load_aggregator(name)([])


def test_unknown_aggregator_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"--aggregation vote: unknown; known: mean, median_norm_mean"):
        load_aggregator("vote")


# --- the norm ---------------------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@SETTINGS
@given(st.lists(st.lists(finite, max_size=5), min_size=1, max_size=3))
def test_norm_is_the_euclidean_one(values: list[list[float]]) -> None:
    """Of any finite fp32 values: their squares overflow fp32, not fp64."""
    tensors = {str(i): torch.tensor(v, dtype=torch.float32) for i, v in enumerate(values)}
    expected = math.hypot(*[float(x) for v in values for x in v])
    assert global_norm(tensors) == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(global_norm(tensors))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (1,), (7, 11), (CHUNK + 1,)])
def test_norm_shows_a_single_value_that_is_not_finite(bad: float, shape: tuple[int, ...]) -> None:
    tensors = {"a": torch.ones(5), "b": torch.ones(shape), "c": torch.zeros(3)}
    tensors["b"].view(-1)[-1] = bad
    assert not math.isfinite(global_norm(tensors))


def test_norm_of_a_large_tensor_is_that_of_all_its_values() -> None:
    t = torch.randn(2 * CHUNK + 5, generator=torch.Generator().manual_seed(0))
    assert global_norm({"t": t}) == pytest.approx(float(t.double().square().sum().sqrt()), rel=1e-12)
    assert global_norm({"t": t[: 2 * CHUNK].view(2, -1).t()}) == pytest.approx(global_norm({"t": t[: 2 * CHUNK]}))


def test_norm_does_not_depend_on_the_order_of_the_names() -> None:
    tensors = contribution(1, 5).tensors
    assert global_norm(tensors) == global_norm(dict(reversed(tensors.items())))
