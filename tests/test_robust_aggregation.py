"""Robust rules against their definitions, computed naively in fp64, and against liars."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from pilot.aggregation.coordinatewise import comparators, coordinate_median, trimmed_mean
from pilot.aggregation.gram import gram, squared_distances, squared_distances_to
from pilot.aggregation.linear import centered_clipping, geometric_median, krum, mean, multi_krum
from pilot.aggregation.mixers import arc, bucketing, nnm
from pilot.aggregation.robust import Mixer, coordinate_aggregator, linear_aggregator, votes
from pilot.codec import load_codec

Tensors = dict[str, torch.Tensor]
SHAPES = {"b": (7,), "none": (0,), "scale": (), "w": (40, 5)}
SIZE = 208


@dataclass(frozen=True)
class Given:
    tensors: Tensors
    norm: float
    count: int = 1

    @property
    def specs(self) -> dict[str, torch.Size]:
        return {name: t.shape for name, t in self.tensors.items()}

    def add(self, into: Tensors, weight: float) -> None:
        for name, t in self.tensors.items():
            into[name] += t * weight

    def read(self, start: int, stop: int) -> torch.Tensor:
        return flat(self.tensors)[start:stop]


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def given(row: torch.Tensor, count: int = 1) -> Given:
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    parts = row.float().split(sizes)
    tensors = {name: part.view(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}
    return Given(tensors, float(row.double().norm()), count)


def cloud(n: int, seed: int = 0) -> torch.Tensor:
    """Return n vectors [n, SIZE] around a common one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, SIZE, generator=generator) + torch.randn(SIZE, generator=generator)


# --- by definition, in fp64 -------------------------------------------------------------------------------------------


def naive_krum_order(rows: torch.Tensor, f: int) -> list[int]:
    scores = []
    for i, x in enumerate(rows):
        others = sorted(float((x - y).square().sum()) for j, y in enumerate(rows) if j != i)
        scores.append(sum(others[: len(rows) - f - 1]))
    return sorted(range(len(rows)), key=lambda i: scores[i])


def naive_krum(rows: torch.Tensor, f: int) -> torch.Tensor:
    return rows[naive_krum_order(rows, f)[0]]


def naive_multi_krum(rows: torch.Tensor, f: int) -> torch.Tensor:
    return rows[naive_krum_order(rows, f)[: len(rows) - f]].mean(0)


def naive_trimmed_mean(rows: torch.Tensor, f: int) -> torch.Tensor:
    return rows.sort(0).values[f : len(rows) - f].mean(0)


def naive_median(rows: torch.Tensor, f: int) -> torch.Tensor:
    return rows.quantile(0.5, dim=0)


def naive_centered_clipping(rows: torch.Tensor, f: int) -> torch.Tensor:
    centre = torch.zeros(rows.shape[1], dtype=rows.dtype)
    for _ in range(10):
        apart = [float((x - centre).norm()) for x in rows]
        radius = float(torch.tensor(apart).double().quantile(0.5))
        factors = [1.0 if a <= radius else radius / a for a in apart]
        centre = centre + sum((x - centre) * factor for x, factor in zip(rows, factors, strict=True)) / len(rows)
    return centre


def naive_nnm(rows: torch.Tensor, f: int) -> torch.Tensor:
    mixed = []
    for x in rows:
        order = sorted(range(len(rows)), key=lambda j: float((x - rows[j]).norm()))
        mixed.append(rows[order[: len(rows) - f]].mean(0))
    return torch.stack(mixed)


def naive_arc(rows: torch.Tensor, f: int) -> torch.Tensor:
    norms = [float(x.norm()) for x in rows]
    clipped = math.floor(2 * f / len(rows) * (len(rows) - f))
    limit = sorted(norms)[len(rows) - clipped - 1]
    return torch.stack([x * min(1.0, limit / norm) for x, norm in zip(rows, norms, strict=True)])


RULES = {
    "krum": (partial(linear_aggregator, krum), naive_krum),
    "multi_krum": (partial(linear_aggregator, multi_krum), naive_multi_krum),
    "centered_clipping": (partial(linear_aggregator, centered_clipping), naive_centered_clipping),
    "trimmed_mean": (partial(coordinate_aggregator, trimmed_mean), naive_trimmed_mean),
    "coordinate_median": (partial(coordinate_aggregator, coordinate_median), naive_median),
}
MIXERS: dict[str, tuple[list[Mixer], Callable[[torch.Tensor, int], torch.Tensor]]] = {
    "": ([], lambda rows, f: rows),
    "nnm": ([nnm], naive_nnm),
    "arc": ([arc], naive_arc),
    "arc+nnm": ([arc, nnm], lambda rows, f: naive_nnm(naive_arc(rows, f), f)),
}


@pytest.mark.parametrize("block", [1 << 17, 13])
@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (7, 2), (10, 3), (16, 4)])
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_definition(rule: str, mixer: str, n: int, f: int, block: int) -> None:
    build, naive = RULES[rule]
    mixers, naive_mix = MIXERS[mixer]
    rows = cloud(n)
    rows[n - f :] *= -3
    result = flat(build(mixers, f, block)([given(row) for row in rows])).double()
    expected = naive(naive_mix(rows.double(), f), f)
    assert float((result - expected).norm() / expected.norm()) < 1e-5


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    """At the optimum the unit vectors to all points, weighted by the votes, sum to nothing."""
    rows, counts = cloud(9), [1, 2, 1, 2, 1, 1, 2, 1, 1]
    result = flat(linear_aggregator(geometric_median)([given(r, c) for r, c in zip(rows, counts, strict=True)]))
    apart = rows.double() - result.double()
    pull = (apart / apart.norm(dim=1, keepdim=True) * torch.tensor(counts)[:, None]).sum(0)
    assert float(pull.norm()) < 1e-3 * sum(counts)


@pytest.mark.parametrize("n", range(1, 11))
def test_comparators_move_the_ranks_for_every_input_of_zeros_and_ones(n: int) -> None:
    """The 0-1 principle: a network that is right for all of these is right for all inputs."""
    inputs = torch.tensor(list(itertools.product((0.0, 1.0), repeat=n))).T  # [n, 2^n]
    for start, stop in itertools.combinations(range(n + 1), 2):
        rows = list(inputs.clone())
        for low, high, needed in comparators(n, start, stop):
            smaller, larger = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
            nothing = torch.full_like(smaller, math.nan)
            rows[low] = smaller if needed in ("low", "both") else nothing
            rows[high] = larger if needed in ("high", "both") else nothing
        assert torch.equal(torch.stack(rows[start:stop]).sum(0), inputs.sort(0).values[start:stop].sum(0))


def test_buckets_are_of_all_contributions_and_follow_from_them_alone() -> None:
    products = gram([given(row) for row in cloud(7)])
    matrix = bucketing(products, 2, size=2)
    assert matrix.shape == (4, 7)
    assert torch.equal(matrix, bucketing(products.clone(), 2, size=2))
    assert sorted((matrix > 0).sum(1).tolist()) == [1, 2, 2, 2]
    assert torch.equal((matrix > 0).sum(0), torch.ones(7, dtype=torch.long))
    assert torch.allclose(matrix.sum(1), torch.ones(4, dtype=torch.float64))
    others = gram([given(row) for row in cloud(7, seed=1)])
    assert not torch.equal(matrix, bucketing(others, 2, size=2))


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_distances_follow_from_inner_products_at_any_scale(scale: float) -> None:
    rows = cloud(5) * scale
    rows[1] = rows[0]
    rows[2] = 0.0
    products = gram([given(row) for row in rows])
    wide = rows.double()
    expected = torch.cdist(wide, wide)
    largest = float(expected.max())
    assert float((squared_distances(products).sqrt() - expected).abs().max()) < 1e-3 * largest
    weights = torch.tensor([0.5, 0.0, 0.2, 0.2, 0.1], dtype=torch.float64)
    apart = (wide - weights @ wide).norm(dim=1)
    assert float((squared_distances_to(products, weights).sqrt() - apart).abs().max()) < 1e-3 * largest


# --- liars ------------------------------------------------------------------------------------------------------------

ROBUST = {
    **{name: build for name, (build, _) in RULES.items()},
    "geometric_median": partial(linear_aggregator, geometric_median),
}


@pytest.mark.parametrize("scale", [-1e3, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("mixer", [[], [nnm], [arc], [arc, nnm]], ids=["", "nnm", "arc", "arc+nnm"])
@pytest.mark.parametrize("rule", ROBUST)
def test_three_of_ten_liars_do_not_carry_the_result_away(rule: str, mixer: list[Mixer], scale: float) -> None:
    honest = cloud(7)
    lies = torch.ones(3, SIZE) * scale
    result = flat(ROBUST[rule](mixer, 3)([given(row) for row in [*lies, *honest]]))
    spread = float((honest - honest.mean(0)).norm(dim=1).max())
    assert float((result - honest.mean(0)).norm()) < 1.5 * spread


def test_the_mean_is_carried_away() -> None:
    honest = [given(row) for row in cloud(7)]
    liar = given(torch.ones(SIZE) * 1e6)
    assert float(flat(linear_aggregator(mean)([*honest, liar])).norm()) > 1e5


def test_more_work_than_twice_the_medians_adds_no_votes() -> None:
    assert votes([1, 1, 1]).tolist() == pytest.approx([1 / 3] * 3)
    assert votes([1, 2, 3]).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert votes([4, 4, 4, 4_000_000]).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert votes([10**18, 10**18]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rule", ROBUST)
def test_one_contribution_is_its_own_result_and_none_is_a_value_error(rule: str) -> None:
    [row] = cloud(1)
    assert torch.equal(flat(ROBUST[rule]()([given(row)])), row)
    for nothing in ([], [given(row * math.nan)]):
        with pytest.raises(ValueError, match="nothing to aggregate"):
            ROBUST[rule]()(nothing)


def test_more_liars_than_a_number_allows_are_lowered_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = cloud(4)
    with caplog.at_level(logging.WARNING):
        result = flat(coordinate_aggregator(trimmed_mean, f=3)([given(row) for row in rows]))
    assert torch.allclose(result, naive_trimmed_mean(rows, 1), atol=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "4 contributions withstand 1 liars at most: f is 1, not 3"
    ]


@pytest.mark.parametrize("rule", ROBUST)
def test_the_same_contributions_give_the_same_bits_and_stay_as_they_were(rule: str) -> None:
    contributions = [given(row) for row in cloud(6)]
    before = [flat(c.tensors).clone() for c in contributions]
    first, second = (flat(ROBUST[rule]([nnm])(contributions)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(flat(c.tensors), b) for c, b in zip(contributions, before, strict=True))


@pytest.mark.parametrize("rule", ROBUST)
def test_mixed_codecs_are_aligned(rule: str) -> None:
    """What a rule makes of payloads of several codecs is what it makes of their decoded tensors."""
    codecs = ["fp32", "bf16", "int8", "2bit", "ternary-rc", "topk64"]
    sent, dense = [], []
    for name, row in zip(codecs, cloud(6), strict=True):
        codec, one = load_codec(name), given(row)
        payload = memoryview(codec.encode(one.tensors))
        decoded = codec.decode(payload, one.specs)
        norm = codec.check(payload, one.specs)
        dense.append(Given(decoded, norm))
        sent.append(Sent(payload, name, norm, one.specs))
    assert torch.allclose(flat(ROBUST[rule](f=1)(sent)), flat(ROBUST[rule](f=1)(dense)), atol=1e-6)


@dataclass(frozen=True)
class Sent:
    """A contribution as it arrived: bytes, which are decoded a block at a time."""

    payload: memoryview
    codec: str
    norm: float
    specs: dict[str, torch.Size]
    count: int = 1

    def add(self, into: Tensors, weight: float) -> None:
        load_codec(self.codec).add(self.payload, into, weight)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return load_codec(self.codec).read(self.payload, self.specs, start, stop)
