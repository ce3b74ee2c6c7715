"""Several processes as one trainer: torchrun's ranks, each with its part of every step, gloo on CPUs, NCCL on GPUs.

Without torchrun there is one rank, and nothing of torch.distributed is used.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from pilot.common import interrupts
from protocol import Range

if TYPE_CHECKING:
    import torch

    from pilot.training.gradient import GradientResult


VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
REMEDY = "start all ranks with torchrun, or unset it to train in one process"
JOIN = timedelta(minutes=10)  # for all ranks to be started
SILENCE_S = 5.0  # until a rank says that it waits for others
PATIENCE = timedelta(days=1)  # while the first rank reads the data: a rank that dies is noticed by its connections
OF_PEERS = re.compile("gloo|nccl|connection|socket|peer", re.IGNORECASE)


class RankLost(RuntimeError):
    """Another rank is gone: this one cannot go on. One line that says so."""


@dataclass
class Ranks:
    """This process among those that train together. A context manager around all that they do together."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine
    stop_asked: bool = False  # this rank was asked to stop
    stopping: bool = False  # agreed on by all: none goes on alone

    @classmethod
    def of_environment(cls) -> Ranks:
        """Read what torchrun has set; what is empty counts as not set. Raises ValueError for what cannot be."""
        given = {name: os.environ.get(name, "").strip() or default for name, default in VARIABLES}
        for name, text in given.items():
            if not re.fullmatch(r"[0-9]{1,6}", text):
                raise ValueError(f"{name}={text} in the environment: must be a number from 0; {REMEDY}")
        rank, world, local = map(int, given.values())
        if rank >= world:
            raise ValueError(f"RANK={rank} in the environment: must be below WORLD_SIZE, which is {world}; {REMEDY}")
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if world > 1 and not os.environ.get(name, "").strip():
                raise ValueError(f"WORLD_SIZE={world} in the environment: needs {name} too; {REMEDY}")
        port = os.environ.get("MASTER_PORT", "").strip()
        if world > 1 and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 1 << 16):
            raise ValueError(f"MASTER_PORT={port} in the environment: must be 1 to 65535; {REMEDY}")
        return cls(rank, world, local)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str) -> str:
        """--device for this rank: each its own GPU. ValueError where the name is of one for all."""
        import torch

        if self.world > 1 and name.startswith("cuda:"):
            raise ValueError(f"--device {name}: each rank has a GPU of its own; give cuda")
        if self.world > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return f"cuda:{self.local}"
        return name

    def start(self, device: torch.device, say: Callable[[str], object], join: timedelta = JOIN) -> None:
        """Meet the other ranks. Raises RankLost if they have not all come within `join`."""
        if self.world == 1:
            return
        import torch.distributed as dist

        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        limit = f"{join.total_seconds():g} s"
        line = f"rank {self.rank} of {self.world}: waiting up to {limit} for the other ranks at {where}"
        waits = threading.Timer(min(SILENCE_S, join.total_seconds() / 2), say, [line])
        waits.daemon = True
        waits.start()
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=join))  # type: ignore[attr-defined]
        except dist.DistError as error:
            reason = f"the other ranks have not all come to {where} within {limit}"
            raise RankLost(f"rank {self.rank} of {self.world}: {reason} ({str(error).splitlines()[0]})") from error
        finally:
            waits.cancel()
        with self.watched():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world,
                timeout=PATIENCE,
            )

    @contextmanager
    def stops(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM, a preemption notice, end the loop after its step; a second one at once.

        With several ranks it does not: torchrun tells each of them once more.
        """

        def ask() -> None:
            self.stop_asked = True

        with interrupts.asking(ask, repeats=self.world > 1):
            yield

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """For what is made once and then found: the first rank does it, the others after it."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            import torch.distributed as dist

            with self.watched():
                dist.barrier()

    def share(self, first: int, last: int) -> tuple[Range, ...]:
        """This rank's part of the micro-batches `first` to `last` (without it), in turn: each has as many."""
        return tuple(Range(i, i + 1) for i in range(first + self.rank, last, self.world))

    def combine(self, work: GradientResult) -> GradientResult:
        """The work of all ranks as one, the same on each but for `done`; and whether this step is the last."""
        if self.world == 1:
            self.stopping = self.stop_asked
            return work
        import torch
        import torch.distributed as dist

        device = next(iter(work.gradient.values())).device
        sums = torch.tensor([work.count, work.loss * work.count, self.stop_asked], dtype=torch.float64, device=device)
        for gradient in work.gradient.values():
            gradient.mul_(work.count)
        with self.watched():
            for tensor in (sums, *work.gradient.values()):
                dist.all_reduce(tensor)
            count, loss, asked = sums.tolist()
        self.stopping = asked > 0
        for gradient in work.gradient.values():
            gradient.div_(count)
        return replace(work, count=int(count), loss=loss / count)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around what all ranks do together: where another one's connection ends, RankLost says so in a line."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not OF_PEERS.search(str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise RankLost(f"rank {self.rank} of {self.world}: another rank is gone ({reason})") from error

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world > 1 and kind is None:
            import torch.distributed as dist

            dist.destroy_process_group()
