"""Products with weights, on the kernels that are fast for them.

On a CPU, fp32 products take the way of 1x1 convolutions. Those are oneDNN's, which uses AVX-512 wherever it is there;
matmuls are MKL's, which does not on AMD and takes twice as long. The results are the same but for the order of sums.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

FEW_ROWS = 64  # a product of fewer is bound by reading the weight
MANY_ROWS = 1024  # enough to be cut into images of a good size
ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # how torch was built


class Linear(nn.Module):
    """No bias; the weight is held in fp32 and used in the activations' dtype."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype))


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., C) and weight (V, C): x @ weight.T, (..., V)."""
    rows = x.reshape(-1, x.size(-1))
    if not _convolves(rows):
        return F.linear(x, weight)
    out = F.conv2d(_images(rows), weight[:, :, None, None])
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.size(0))


def linear_gradients(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What `linear` of x (N, C) hands on to x and to the weight (V, C) for a gradient (N, V); None where not wanted."""
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
    """(N, C) as pixels, channels last: nothing is copied. For 16 images torch takes oneDNN even in a single thread."""
    count = 16 if rows.size(0) % 16 == 0 and rows.size(0) >= MANY_ROWS else 1
    return rows.reshape(count, -1, 1, rows.size(1)).permute(0, 3, 1, 2)
