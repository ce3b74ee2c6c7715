"""The tasks that can be trained: one file and one line of TASKS each. Importing them does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pilot.common.registry import load
from pilot.interfaces import Blobs
from protocol import DataSpec, Digest, TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tasks.optimizer import Settings

TASKS: dict[str, str] = {
    "gpt2": "tasks.gpt2:GPT2",
    "nanochat": "tasks.nanochat:Nanochat",
    "quadratic": "tasks.quadratic:Quadratic",
}

OpenBlob = Callable[[str], Path]


@dataclass(frozen=True)
class Need:
    """What an order asks of a miner, at least roughly: follows from its numbers, before anything is allocated."""

    parameters: int
    """Values that travel, of 4 bytes each."""
    working: int
    """Bytes on the device for one micro-batch, besides parameters and their gradients: activations above all."""
    data: int
    """Bytes in the machine's memory for data, such as the order of an epoch."""
    flops: float
    """Floating-point operations of one micro-batch."""


Batch = Any  # each task's own; only its `loss` reads one


class Task(Protocol):
    """A model with its data, the same at the validator, at a miner and in the baseline.

    A batch is named by its index alone, so every machine with the same data computes the same batch. A task holds no
    model; its owner passes it in.
    """

    name: ClassVar[str]
    """The task's key in TASKS."""

    Config: ClassVar[type]
    """The flags: a frozen dataclass, which --help shows as --NAME.… Importing the module must not import torch."""

    Optimizer: ClassVar[type]
    """The flags of the task's optimizer: a frozen dataclass of numbers."""

    example: ClassVar[Mapping[str, Any]]
    """Values of flags for a run of seconds: tests/test_tasks.py trains every registered task with them."""

    @property
    def unit(self) -> str:
        """Return what `count` counts, in the plural: `tokens`, `images`."""
        ...

    @property
    def data_spec(self) -> DataSpec:
        """Return the data of an order: its blobs by name, and where they came from."""
        ...

    @property
    def data_digest(self) -> Digest: ...

    @property
    def batches_per_epoch(self) -> int: ...

    @classmethod
    def prepare(
        cls, config: Any, *, seed: int, cache: Path, device: torch.device, progress: Callable[[str], None]
    ) -> Self:
        """Make the task from its flags, for the validator and the baseline.

        Raises ValueError, in one line, for what the user can correct.
        """
        ...

    @classmethod
    def from_spec(cls, spec: TaskSpec, data: DataSpec, open_blob: OpenBlob) -> Self:
        """Make the task of an order at a miner. `open_blob` gives the file of a blob by its name in `data.blobs`.

        Raises ProtocolError, and Refused if a blob is not available.
        """
        ...

    @classmethod
    def need(cls, spec: TaskSpec, data: DataSpec) -> Need:
        """Return what an order needs, without allocating or reading anything, and in no time. Raises ProtocolError."""
        ...

    @classmethod
    def make_blob(cls, name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
        """Make a blob that is too large to be sent, from the miner's own copy `local` or from `data.source`.

        Raises Refused (WRONG_DATA) if it cannot be made, or has another digest.
        """
        ...

    def spec(self) -> TaskSpec:
        """Return what `from_spec` needs besides the data: plain values."""
        ...

    def blobs(self) -> Blobs:
        """Return what the validator can send to miners that lack it."""
        ...

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        """Build the model in fp32, with its initial weights, or without `initial` whatever is fastest."""
        ...

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that travel, by sorted name, shared ones once."""
        ...

    def buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the state that travels but has no gradient, such as a batch norm's."""
        ...

    def optimizer(self, model: nn.Module, config: Any) -> torch.optim.Optimizer:
        """Make the optimizer from flags of type `Optimizer`."""
        ...

    def settings(self, config: Any, step: int, steps: int, units: int) -> Settings:
        """Return what the schedule sets in step `step` of `steps`, each over about `units` units."""
        ...

    def batch(self, index: int) -> Batch:
        """Return micro-batch `index`, counted across epochs: a pure function of it and of the data."""
        ...

    def count(self, index: int) -> int:
        """Return how many units `loss` sums over in that batch: its weight, without reading the data."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the sum over the batch's units, a scalar with a gradient."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return figures on data that is never trained on, always with a `val_loss`."""
        ...

    def excerpts(self, count: int, length: int) -> list[list[int]]:
        """Return the ids of held-out texts for the model to continue; none if it is no language model."""
        ...

    def flops(self, model: nn.Module) -> float:
        """Return the floating-point operations per unit, forward and backward; 0 if unknown."""
        ...

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return what a checkpoint holds besides tensors: plain values, and files such as a tokenizer."""
        ...


def load_task(name: str) -> type[Task]:
    """Return the class behind `--task name`, imported now. Raises ValueError for an unknown name."""
    task: type[Task] = load("--task", name, TASKS)
    return task
