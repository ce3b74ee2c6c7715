"""Products with weights, on the fastest kernels.

On a CPU, fp32 products run as 1x1 convolutions. Those are oneDNN's, which uses AVX-512 where it is available; matmuls
are MKL's, which does not on AMD and takes twice as long. The results are equal up to the order of summation.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

FEW_ROWS = 64  # with fewer, reading the weight dominates
MANY_ROWS = 1024  # enough for images of a good size
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # how torch was built


class Linear(nn.Module):
    """A linear layer without bias; its weight is stored in fp32 and used in the activations' dtype."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x @ weight.T, (..., V), for x (..., C) and weight (V, C)."""
    rows = x.reshape(-1, x.size(-1))
    if not _convolves(rows):
        return F.linear(x, weight)
    out = F.conv2d(_images(rows), weight[:, :, None, None])
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.size(0))


def linear_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of `linear` by x (N, C) and weight (V, C), given the output's (N, V); None if not wanted."""
    if not _convolves(grad):
        return grad @ weight if wanted[0] else None, grad.t() @ x if wanted[1] else None
    kernel, rest = weight[:, :, None, None], (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    dx, dweight, _ = torch.ops.aten.convolution_backward(_images(grad), _images(x), kernel, *rest, [*wanted, False])
    return (
        dx.permute(0, 2, 3, 1).reshape(x.shape) if wanted[0] else None,
        dweight.view(weight.shape) if wanted[1] else None,
    )


def _convolves(rows: torch.Tensor) -> bool:
    few = rows.size(0) < FEW_ROWS
    return ONEDNN and rows.dtype == torch.float32 and rows.device.type == "cpu" and not few


def _images(rows: torch.Tensor) -> torch.Tensor:
    """View (N, C) as pixels, channels last, without a copy. With 16 images torch uses oneDNN even in one thread."""
    count = 16 if rows.size(0) % 16 == 0 and rows.size(0) >= MANY_ROWS else 1
    return rows.reshape(count, -1, 1, rows.size(1)).permute(0, 3, 1, 2)
