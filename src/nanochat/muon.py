"""Muon: momentum whose matrix is made orthogonal, so that an update turns all directions of a weight alike.

Functions of stacks (n, rows, cols): parameters of one shape take one batched call. The steps, in order, are Nesterov
momentum; rows of one length (MuonEq); Newton-Schulz with the coefficients of Polar Express; one Frobenius norm (Muon+);
a running second moment a row or column (NorMuon); and decoupled weight decay where it goes along with the update.
"""

from __future__ import annotations

import torch

# Each triple is one odd polynomial a x + b x^3 + c x^5 on the singular values; the five take [1e-3, 1] close to 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BETA2 = 0.9  # of the second moment
MARGIN = 1.01  # above the Frobenius norm, so that in bf16 too no singular value begins beyond 1
TINY = 1e-7


def second_moment_shape(shape: torch.Size) -> tuple[int, int]:
    """One number a row of a tall or square matrix, one a column of a wide one."""
    rows, cols = shape
    return (rows, 1) if rows >= cols else (1, cols)


def muon_step(
    parameters: torch.Tensor,  # (n, rows, cols) fp32, changed in place
    gradients: torch.Tensor,  # (n, rows, cols)
    momenta: torch.Tensor,  # (n, rows, cols), changed in place; zero at first
    second_moments: torch.Tensor,  # (n, rows, 1) or (n, 1, cols), changed in place; zero at first
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    beta2: float = BETA2,
) -> None:
    """One step. A tall matrix's rate is lr * sqrt(rows / cols)."""
    rows, cols = parameters.shape[-2:]
    momenta.lerp_(gradients, 1 - momentum)
    update = torch.lerp(gradients, momenta, momentum)
    # The polynomials' matrix products are most of the step: tensor cores take them in bf16, a CPU in fp32.
    dtype = torch.bfloat16 if update.is_cuda else torch.float32
    update = orthogonalize(equalize_rows(update).to(dtype)).float()
    update *= min(rows, cols) ** 0.5 / _norm(update).clamp_min(TINY)
    update = even_out(update, second_moments, beta2)
    if weight_decay:
        update.add_(parameters * (update * parameters >= 0), alpha=weight_decay)
    parameters.sub_(update, alpha=lr * max(1.0, rows / cols) ** 0.5)


def equalize_rows(x: torch.Tensor) -> torch.Tensor:
    """(n, rows, cols): each row divided by its length; a row of zeros stays."""
    return x / _norm(x, (-1,)).clamp_min(TINY)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """(n, rows, cols) to about the nearest matrix whose rows, or columns if it is tall, are orthonormal.

    Singular values above a thousandth of the Frobenius norm come to lie around 1, zeros stay zero.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x / (_norm(x) * MARGIN + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def even_out(x: torch.Tensor, second_moments: torch.Tensor, beta2: float) -> torch.Tensor:
    """(n, rows, cols), each row (column) divided by the root of its running mean square; each matrix's norm stays.

    `second_moments` is changed in place.
    """
    over = -1 if second_moments.shape[-1] == 1 else -2
    mean_square = x.square().mean(dim=over, keepdim=True)
    second_moments.lerp_(mean_square, 1 - beta2)
    scale = second_moments.clamp_min(1e-10).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return x * (scale * (before.sqrt() / after.sqrt().clamp_min(1e-10)))


def _norm(x: torch.Tensor, dim: tuple[int, ...] = (-2, -1)) -> torch.Tensor:
    """(n, 1, 1), the Frobenius norms; over the last dimension (n, rows, 1), the rows' lengths."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm
