"""Mixers make contributions more alike before a rule sees them. Each returns a matrix [m, n]: row i mixes the n to one.

The mixed ones are never stored: a rule sees `matrix @ products @ matrix.T`, or mixes a block of coordinates at a time.
"""

from __future__ import annotations

import hashlib

import torch

from pilot.aggregation.gram import squared_distances


def nnm(products: torch.Tensor, f: int) -> torch.Tensor:
    """Replace each contribution by the mean of its n - f nearest ones, itself among them. [n, n].

    Nearest-neighbour mixing, Allouah et al. 2023 (AISTATS, "Fixing by Mixing"): with it trimmed mean, Krum and the
    geometric median reach the best error possible for f < n/2 liars, also where miners' data differ.
    """
    n = len(products)
    nearest = squared_distances(products).argsort(dim=1, stable=True)[:, : n - f]
    return torch.zeros_like(products).scatter_(1, nearest, 1 / (n - f))


def bucketing(products: torch.Tensor, f: int, *, size: int = 2) -> torch.Tensor:
    """Replace the contributions by the means of random groups of `size`. [ceil(n / size), n].

    Karimireddy et al. 2022 (ICLR): the variance falls by `size`, while f liars still spoil f groups at most, so the
    rule behind it withstands f < n / (2 size). The permutation follows from all the contributions' inner products: a
    replay finds it again, and no miner can choose it without knowing all the others' gradients.
    """
    seed = hashlib.sha256(products.numpy().tobytes()).digest()
    order = sorted(range(len(products)), key=lambda i: hashlib.sha256(seed + i.to_bytes(4, "big")).digest())
    groups = [order[first : first + size] for first in range(0, len(order), size)]
    matrix = products.new_zeros(len(groups), len(products))
    for row, members in zip(matrix, groups, strict=True):
        row[members] = 1 / len(members)
    return matrix


def arc(products: torch.Tensor, f: int) -> torch.Tensor:
    """Scale the floor(2 (f / n) (n - f)) contributions of largest norm down to the largest norm of the others. [n, n].

    Adaptive robust clipping, Allouah et al. 2024 (arXiv 2405.14432): keeps the guarantees of the rule behind it.
    """
    n = len(products)
    norms = products.diagonal().sqrt()
    limit = norms.sort().values[n - 1 - int(2 * f / n * (n - f))]
    return torch.diag(torch.where(norms > limit, limit / norms, 1.0))
