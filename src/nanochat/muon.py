"""Muon: momentum with its matrix made orthogonal, so that an update moves all directions of a weight equally.

All functions take stacks (n, rows, cols), so parameters of one shape take one batched call. A step, in order:

1. Nesterov momentum.
2. Rows scaled to one length: MuonEq (Chang et al. 2026, arXiv 2603.28254).
3. Orthogonalization by Newton-Schulz iterations: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/),
   with the coefficients of Polar Express (Amsel et al. 2025, arXiv 2505.16932).
4. One Frobenius norm for all updates: Muon+ (Zhang et al. 2026, arXiv 2602.21545).
5. A running second moment for each row or column: NorMuon (Li et al. 2025, arXiv 2510.05491).
6. Decoupled weight decay, only where it has the update's direction.
"""

from __future__ import annotations

import torch

# Each triple is one odd polynomial a x + b x^3 + c x^5 of the singular values; all five map [1e-3, 1] close to 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BETA2 = 0.9  # decay of the second moment
MARGIN = 1.01  # above the Frobenius norm, so that no singular value starts above 1, even in bf16
TINY = 1e-7


def second_moment_shape(shape: torch.Size) -> tuple[int, int]:
    """Return the second moment's shape: one number per row of a tall or square matrix, per column of a wide one."""
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
    """Make one step. The learning rate of a tall matrix is lr * sqrt(rows / cols)."""
    rows, cols = parameters.shape[-2:]
    momenta.lerp_(gradients, 1 - momentum)
    update = torch.lerp(gradients, momenta, momentum)
    # Most of the step is matrix products: in bf16 on tensor cores, in fp32 on a CPU.
    dtype = torch.bfloat16 if update.is_cuda else torch.float32
    update = orthogonalize(equalize_rows(update).to(dtype)).float()
    update *= min(rows, cols) ** 0.5 / _norm(update).clamp_min(TINY)
    update = even_out(update, second_moments, beta2)
    if weight_decay:
        update.add_(parameters * (update * parameters >= 0), alpha=weight_decay)
    parameters.sub_(update, alpha=lr * max(1.0, rows / cols) ** 0.5)


def equalize_rows(x: torch.Tensor) -> torch.Tensor:
    """Divide each row of (n, rows, cols) by its length. Rows of zeros stay zero."""
    return x / _norm(x, (-1,)).clamp_min(TINY)


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Return approximately the nearest matrices with orthonormal rows, or columns if tall, for (n, rows, cols).

    Singular values above a thousandth of the Frobenius norm become about 1; zeros stay zero.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x / (_norm(x) * MARGIN + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if tall else x @ x.mT  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, polynomial, beta=a) if tall else torch.baddbmm(x, polynomial, x, beta=a)
    return x


def even_out(x: torch.Tensor, second_moments: torch.Tensor, beta2: float) -> torch.Tensor:
    """Divide each row (column) of (n, rows, cols) by the root of its running mean square; keep each matrix's norm.

    Changes `second_moments` in place.
    """
    over = -1 if second_moments.shape[-1] == 1 else -2
    mean_square = x.square().mean(dim=over, keepdim=True)
    second_moments.lerp_(mean_square, 1 - beta2)
    scale = second_moments.clamp_min(1e-10).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True)
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return x * (scale * (before.sqrt() / after.sqrt().clamp_min(1e-10)))


def _norm(x: torch.Tensor, dim: tuple[int, ...] = (-2, -1)) -> torch.Tensor:
    """Return the Frobenius norms, (n, 1, 1), or over the last dimension the rows' lengths, (n, rows, 1)."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm
