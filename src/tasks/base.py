"""The parts of a task that most tasks share: an order's specification, its data, epochs, AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from pilot.interfaces import Blobs, Refused
from protocol import MAX_SERVED_BYTES, DataSpec, Digest, TaskSpec
from tasks import OpenBlob
from tasks.language import EpochOrders, Shape
from tasks.optimizer import AdamWConfig, Settings, adamw, adamw_settings
from tasks.tokens import Tokens

if TYPE_CHECKING:
    import torch
    from torch import nn

S = TypeVar("S", bound=Shape)


class BaseTask(Generic[S]):
    """Implement the parts of `tasks.Task` that follow from a shape and a token file.

    A subclass sets `shape`, `_data`, `_tokens` and `_orders`, and overrides whatever differs.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    Optimizer: ClassVar[type] = AdamWConfig

    shape: S
    _data: DataSpec
    _tokens: Tokens
    _orders: EpochOrders

    def spec(self) -> TaskSpec:
        return TaskSpec(name=self.name, parameters=self.shape.model_dump())

    @property
    def data_spec(self) -> DataSpec:
        return self._data

    @property
    def data_digest(self) -> Digest:
        return self._data.blobs["tokens"].digest

    @property
    def _vocabulary_blob(self) -> bytes | None:
        """Return the vocabulary that the validator sends, if there is one."""
        return None

    def blobs(self) -> Blobs:
        blobs: dict[Digest, Any] = {}
        if self._tokens.bytes <= MAX_SERVED_BYTES:
            blobs[self.data_digest] = self._tokens.buffer
        if "vocabulary" in self._data.blobs and self._vocabulary_blob:
            blobs[self._data.blobs["vocabulary"].digest] = self._vocabulary_blob
        return blobs

    @classmethod
    def make_blob(cls, name: str, data: DataSpec, open_blob: OpenBlob, local: Path | None, cache: Path) -> Path:
        raise Refused(409, f"the order's {name} is not here", missing=[data.blobs[name]])

    @property
    def batches_per_epoch(self) -> int:
        return self._orders.windows // self.shape.batch_size

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return dict(sorted(model.named_parameters()))

    def buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {}

    def optimizer(self, model: nn.Module, config: Any) -> torch.optim.Optimizer:
        return adamw(model, config)

    def settings(self, config: Any, step: int, steps: int, units: int) -> Settings:
        return adamw_settings(config, step, steps)
