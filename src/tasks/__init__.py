"""The tasks that can be trained: one file and one line of TASKS each. Importing them does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
Batch = Any  # each task's own; only its `loss` reads one


class Task(Protocol):
    """A model with its data, the same at the validator, at a miner and in the baseline.

    A batch is named by its index alone, so every machine that holds the same data computes the same batch. A task
    holds no model: whoever owns one passes it in.
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
        """What `count` counts, in the plural: `tokens`, `images`."""
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
        """The validator's and the baseline's way in. Raises ValueError, in one line, for what the user can mend."""
        ...

    @classmethod
    def from_spec(cls, spec: TaskSpec, data: DataSpec, open_blob: OpenBlob) -> Self:
        """Make the task of an order at a miner. `open_blob` gives the file of a blob by its name in `data.blobs`.

        Raises ProtocolError, and Refused if a blob cannot be had.
        """
        ...

    @classmethod
    def make_blob(cls, name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
        """Make a blob that is too large to be sent, from the miner's own copy `local` or from `data.source`.

        Raises Refused (WRONG_DATA) if it cannot be made, or has another digest.
        """
        ...

    def spec(self) -> TaskSpec:
        """All that `from_spec` needs besides the data: plain values."""
        ...

    def blobs(self) -> Blobs:
        """What can be handed over to miners that lack it."""
        ...

    def build_model(self, device: torch.device | str, initial: bool) -> nn.Module:
        """The model in fp32. With `initial` its starting weights; without, whatever is fastest."""
        ...

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that travel, by sorted name, shared ones once."""
        ...

    def buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """State that travels and has no gradient, such as a batch norm's."""
        ...

    def optimizer(self, model: nn.Module, config: Any) -> torch.optim.Optimizer:
        """By the task's own optimizer flags, or AdamW's."""
        ...

    def settings(self, config: Any, step: int, steps: int, units: int) -> Settings:
        """What the schedule sets in step `step` of `steps`, each over about `units` units."""
        ...

    def batch(self, index: int) -> Batch:
        """Micro-batch `index`, counted across epochs: a pure function of it and of the data."""
        ...

    def count(self, index: int) -> int:
        """How many units `loss` sums over in that batch: its weight, without reading the data."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The sum, over the batch's units, as a scalar with a gradient."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on data that is never trained on, always with a `val_loss`."""
        ...

    def flops(self, model: nn.Module) -> float:
        """Floating-point operations a unit, forward and backward, for the utilisation of a device; 0 if unknown."""
        ...

    def describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """What a checkpoint holds besides tensors: plain values, and files such as a tokenizer."""
        ...


def load_task(name: str) -> type[Task]:
    """Return the class behind `--task name`, imported now. Raises ValueError for an unknown name."""
    task: type[Task] = load("--task", name, TASKS)
    return task
