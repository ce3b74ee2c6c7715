"""Refuse orders that this machine cannot do, by their numbers alone: before anything is allocated or received."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property

import torch

from pilot.common.limits import Limits
from pilot.common.units import format_bytes
from pilot.interfaces import Refused
from protocol import Fault, Order
from tasks import load_task

INNER_COPIES = 4  # DiLoCo: the version, two moments of the optimizer, and the pseudo-gradient
FEEDBACK_COPIES = 2  # the residual, and what is subtracted from it
CPU = torch.device("cpu")


class NeedChecker:
    """Compares what an order needs of memory and time with what the limits allow on a device."""

    def __init__(
        self,
        device: torch.device,
        limits: Limits,
        memory: Callable[[torch.device], int | None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`memory` returns the bytes that this process can have on a device, or None if unknown."""
        self._device, self._limits, self._memory, self._clock = device, limits, memory, clock

    def check(self, order: Order, received: int) -> None:
        """Raise Refused if the order needs more than is allowed.

        `received` counts the bytes of states and deltas that it brings. Raises ProtocolError for a bad task.
        """
        need = load_task(order.task.name).need(order.task, order.data)
        state = 4 * need.parameters
        on_device = state * (2 + (INNER_COPIES if order.inner_steps else 0)) + need.working
        payloads = state * (1 + order.staleness)
        on_host = need.data + received + payloads + (state * FEEDBACK_COPIES if order.feedback else 0)
        if self._device.type == "cpu":
            self._check_memory(CPU, on_device + on_host)
        else:
            self._check_memory(self._device, on_device)
            self._check_memory(CPU, on_host)
        seconds, most = need.flops / self.flops_per_s, self._limits.batch_s
        if seconds > most:
            raise Refused(
                409, f"a micro-batch takes {seconds:.3g} s here at least; this miner allows {most:g} s", Fault.MALFORMED
            )

    def _check_memory(self, device: torch.device, need: int) -> None:
        there, allowed = self._memory(device), self._limits.memory
        most = allowed if allowed > 1 else None if there is None else allowed * there
        if most is not None and need > most:
            raise Refused(
                409,
                f"needs {format_bytes(need)} of {device.type} memory; this miner allows {format_bytes(most)}",
                Fault.MALFORMED,
            )

    @cached_property
    def flops_per_s(self) -> float:
        """Measure products of large matrices: nothing is faster, so what an order needs is never overestimated."""
        fast = self._device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if fast else (512, torch.float32)
        a, best = torch.ones(size, size, dtype=dtype, device=self._device), float("inf")
        for _ in range(3):
            began = self._clock()
            float((a @ a)[0, 0])  # waits for the device
            best = min(best, self._clock() - began)
        return 2.0 * size**3 / max(best, 1e-9)
