"""Aggregate the buffers that came with the contributions of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pilot.codec import Tensors


def merge_buffers(
    counts: Sequence[int], found: Sequence[Mapping[str, torch.Tensor]], own: Mapping[str, torch.Tensor]
) -> Tensors:
    """Return the mean of each buffer, weighted by the validator's counts and summed in the order given.

    A buffer that is of integers in the model (`own`), such as a count of batches, becomes the largest instead.
    """
    import torch

    total, merged = sum(counts), {}
    for name, buffer in own.items():
        values = [buffers[name] for buffers in found]
        if buffer.dtype.is_floating_point:
            merged[name] = torch.zeros(buffer.shape)
            for count, value in zip(counts, values, strict=True):
                merged[name] += count / total * value
        else:
            merged[name] = torch.stack(values).amax(0)
    return merged
