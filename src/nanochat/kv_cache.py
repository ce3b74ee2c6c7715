"""The keys and values of past tokens, so that each new token is computed only once."""

from __future__ import annotations

import torch

from nanochat.config import GPTConfig


class KVCache:
    """A cache of `batch` sequences of equal length, at most `capacity` tokens each.

    A layer with a window keeps only that window, in a ring buffer: token t is in slot t modulo the number of slots.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = capacity
        self.position = 0  # tokens held, the same for all rows
        self.previous: torch.Tensor | None = None  # (batch, 1, n_embd): the last token's embedding, for smear
        self._windows = config.windows()
        self._layers: list[
            tuple[torch.Tensor, torch.Tensor]
        ] = []  # keys and values, (batch, n_kv_head, slots, head_dim)
        for window in self._windows:
            shape = (batch, config.n_kv_head, min(capacity, window + 1), config.head_dim)
            self._layers.append(
                (torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
            )

    @property
    def batch(self) -> int:
        return self._layers[0][0].size(0)

    def check(self, batch: int, length: int) -> None:
        """Raise ValueError unless `length` more tokens of `batch` rows fit."""
        if batch != self.batch:
            raise ValueError(f"{batch} rows for a cache of {self.batch}")
        if self.position + length > self.capacity:
            raise ValueError(f"{self.position} + {length} tokens for a cache of {self.capacity}")

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values, (batch, n_kv_head, T, head_dim), and return all that their queries see.

        These are in order, the new ones last; for a single new token they are in any order.
        """
        return self._update(layer, 0, k), self._update(layer, 1, v)

    def _update(self, layer: int, which: int, new: torch.Tensor) -> torch.Tensor:
        held, start, length = self._layers[layer][which], self.position, new.size(2)
        slots, end = held.size(2), start + new.size(2)
        if end <= slots or length == 1:
            held[:, :, start % slots : (start % slots) + length] = new
            return held[:, :, : min(end, slots)]
        before = min(start, self._windows[layer])
        seen = torch.cat([held[:, :, self._slots(start - before, start, slots)], new], dim=2)
        kept = min(length, slots)
        held[:, :, self._slots(end - kept, end, slots)] = new[:, :, length - kept :]
        return seen

    def _slots(self, start: int, end: int, slots: int) -> torch.Tensor:
        return torch.arange(start, end, device=self._layers[0][0].device) % slots

    def advance(self, length: int) -> None:
        """Count new tokens, once all layers have been updated."""
        self.position += length

    def select(self, rows: torch.Tensor) -> None:
        """Keep the rows of these indices, in their order and with repetitions, or the rows of a mask."""
        rows = torch.as_tensor(rows, device=self._layers[0][0].device)
        self._layers = [(k[rows], v[rows]) for k, v in self._layers]
        self.previous = None if self.previous is None else self.previous[rows]
