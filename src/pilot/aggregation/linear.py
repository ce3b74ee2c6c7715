"""Rules that weigh whole contributions: their result is sum_i w_i x_i, with weights that follow from inner products.

Each takes the inner products [n, n] (pilot.aggregation.gram), the votes [n], which are the shares of the work and sum
to 1, and `f`, the number of liars to withstand. It returns the weights [n]. "Withstands f < n/2" says that no f liars
can move the result arbitrarily far.
"""

from __future__ import annotations

import torch

from pilot.aggregation.gram import squared_distances, squared_distances_to

CONVERGED = 1e-12  # change of the weights below which an iteration ends
FAR = 1000.0  # times the median norm


def mean(products: torch.Tensor, votes: torch.Tensor, f: int) -> torch.Tensor:
    """Return the votes: the mean by work. A single liar moves it arbitrarily far."""
    return votes


def krum(products: torch.Tensor, votes: torch.Tensor, f: int) -> torch.Tensor:
    """Return all weight for the contribution that is closest to its n - f - 1 nearest ones. Withstands f < n/2.

    score_i = sum of the n - f - 1 smallest |x_i - x_j|^2; the first of equal scores wins. Blanchard et al. 2017
    (NeurIPS) sum n - f - 2; we count as ByzFL does, where a contribution is one of its own n - f neighbours.
    """
    weights = torch.zeros_like(votes)
    weights[_krum_order(products, f)[0]] = 1.0
    return weights


def multi_krum(products: torch.Tensor, votes: torch.Tensor, f: int) -> torch.Tensor:
    """Return the votes of the n - f contributions with the best score of `krum`. Withstands f < n/2."""
    chosen = _krum_order(products, f)[: len(votes) - f]
    weights = torch.zeros_like(votes)
    weights[chosen] = votes[chosen] / votes[chosen].sum()
    return weights


def _krum_order(products: torch.Tensor, f: int) -> torch.Tensor:
    nearest = squared_distances(products).sort(dim=1).values[:, 1 : max(2, len(products) - f)]
    return nearest.sum(1).argsort(stable=True)


def geometric_median(
    products: torch.Tensor, votes: torch.Tensor, f: int, *, iterations: int = 1000, floor: float = 1e-6
) -> torch.Tensor:
    """Return the weights of the point z with the least sum_i v_i |x_i - z|. Withstands liars with under half the votes.

    Weiszfeld's iteration, w_i proportional to v_i / max(|x_i - z|, floor * median distance), from the mean until the
    weights stand still. Pillutla et al. 2022 (IEEE TSP, "RFA") show that the smoothing costs no robustness. A
    contribution of more than FAR times the median norm is scaled down to that: it pulls no less from there, and fp64
    holds its distance beside the others'.
    """
    norms = products.diagonal().sqrt()
    limit = FAR * float(norms.median())
    scales = torch.where(norms > limit, limit / norms, 1.0)
    products = products * scales[:, None] * scales
    weights = votes
    for _ in range(iterations):
        distances = squared_distances_to(products, weights).sqrt()
        pull = votes / distances.clamp_min(max(floor * float(distances.median()), torch.finfo(torch.float64).tiny))
        before, weights = weights, pull / pull.sum()
        if float((weights - before).abs().max()) < CONVERGED:
            break
    return weights * scales


def centered_clipping(
    products: torch.Tensor, votes: torch.Tensor, f: int, *, iterations: int = 10, radius: float | None = None
) -> torch.Tensor:
    """Return the weights of v after v += sum_i v_i (x_i - v) min(1, radius / |x_i - v|), from 0. Withstands f < n/2.

    Without a `radius` it is the median distance from v, anew in each iteration, so it needs no tuning to the scale of
    the gradients. Karimireddy et al. 2021 (ICML); without their momentum.
    """
    weights = torch.zeros_like(votes)
    for _ in range(iterations):
        distances = squared_distances_to(products, weights).sqrt()
        limit = float(distances.quantile(0.5)) if radius is None else radius
        pull = votes * torch.where(distances > limit, limit / distances, 1.0)
        weights = weights * (1 - pull.sum()) + pull
    return weights
