"""Load batches of packed rows ahead of time, by rank, and resume exactly.

tokens ─▶ PackingIndex (packing.py) ─▶ Loader ─▶ inputs and targets
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from nanochat.packing import Packing, PackingIndex
from protocol import Digest, digest

__all__ = ["Batch", "Loader", "Packing", "PackingIndex"]

Batch = tuple[torch.Tensor, torch.Tensor]


class Loader:
    """An endless iterator over batches: each epoch's whole ones, in `order(epoch)`, a permutation of the rows.

    Batches are numbered across epochs, whatever the number of ranks: this rank gets rank, rank + world_size, and so on.
    A thread makes the next `ahead` of them. `state_dict` covers the batches returned so far, so a loader that loads it
    continues with exactly the next one, also with another number of ranks. A context manager.
    """

    def __init__(
        self,
        index: PackingIndex,
        order: Callable[[int], NDArray[Any]],  # epoch -> (len(index),) row numbers
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        ahead: int = 4,
        tokenizer: Digest | None = None,
    ) -> None:
        """Raises ValueError if the rows make no batch, or if `tokenizer` (a digest) did not make the tokens."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if not 1 <= batch_size <= len(index):
            wanted = f"a batch of {batch_size} sequences of {index.packing.row_len - 1} tokens"
            raise ValueError(f"{wanted}: the data make {len(index)}; give more data, or a smaller batch or sequence")
        if tokenizer is not None:
            index.check_tokenizer(tokenizer)
        self.batches_per_epoch = len(index) // batch_size
        self._index, self._order, self._batch_size = index, order, batch_size
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._ahead = max(1, ahead)
        self._position = 0  # the number of the first rank's next batch
        self._epoch_order: tuple[int, NDArray[Any]] = (-1, np.empty(0))
        first = np.ascontiguousarray(order(0), dtype="<i8")
        if first.shape != (len(index),):
            raise ValueError(f"an order of {len(first)} rows for an index of {len(index)}")
        self._identity = {"index": index.digest, "order": digest("packing", first.tobytes())}
        self._made: deque[Future[torch.Tensor]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return inputs and targets, each (batch_size, T) int64, on the device. Raises the thread's error."""
        while len(self._made) < self._ahead:
            number = self._position + self._rank + self._world_size * len(self._made)
            self._made.append(self._thread.submit(self._make, number))
        ids = self._made[0].result()
        self._made.popleft()
        self._position += self._world_size
        ids = ids.to(self._device, non_blocking=True)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _make(self, number: int) -> torch.Tensor:
        """Make batch `number`, (batch_size, T + 1), in pinned memory for a GPU."""
        epoch, at = divmod(number, self.batches_per_epoch)
        chosen = self._of_epoch(epoch)[at * self._batch_size : (at + 1) * self._batch_size]
        ids = torch.from_numpy(self._index.rows(chosen))
        if self._device.type != "cuda":
            return ids
        with torch.cuda.device(self._device):
            return ids.pin_memory()

    def _of_epoch(self, epoch: int) -> NDArray[Any]:
        """Return the order of an epoch. Called by the thread only."""
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._order(epoch))
        return self._epoch_order[1]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, the same on all ranks."""
        return {"position": self._position, "batch_size": self._batch_size, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last batch. Raises ValueError if it is of other data, batches or order."""
        own = self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != own.keys():
            raise ValueError("no state of a data loader")
        what = {"index": "data, tokenizer or sequence length", "order": "seed", "batch_size": "batch size"}
        for key, name in what.items():
            if state[key] != own[key]:
                short = [str(value)[:12] for value in (state[key], own[key])]
                raise ValueError(f"cannot resume with another {name}: {key} was {short[0]}, is {short[1]}")
        if not isinstance(state["position"], int) or state["position"] < 0:
            raise ValueError(f"a data loader's state with position {state['position']!r}")
        self._forget()
        self._position = state["position"]

    def _forget(self) -> None:
        for future in self._made:
            future.cancel()
        self._made.clear()

    def close(self) -> None:
        """Stop the thread."""
        self._forget()
        self._thread.shutdown(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
