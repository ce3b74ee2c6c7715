"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and its schedule, for the validator and the baseline.

A schedule gives each step its `Settings`, which the ledger keeps with the round: "lr", and others that a task's
optimizer has, such as Muon's "momentum".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pilot.common.flags import arg
from protocol import ProtocolError

if TYPE_CHECKING:
    import torch
    from torch import nn

Settings = Mapping[str, float]
LARGEST = 1e30  # for values in an order: fp32 still holds their product with a schedule's and a width's factor


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its schedule; with --mode diloco also of the miners' inner steps. Some tasks have their own."""

    lr: float = arg(3e-3, short=True)
    """Peak learning rate."""

    beta1: float = arg(0.9, resume="fixed")
    """Decay of the gradient's running mean, per round or inner step."""

    beta2: float = arg(0.95, resume="fixed")
    """Decay of the squared gradient's running mean, per round or inner step."""

    eps: float = arg(1e-8, resume="fixed")
    """Added to the root of the squared gradient's mean."""

    weight_decay: float = arg(0.1, resume="fixed")
    """Decoupled weight decay, on matrices only."""

    clip: float = arg(1.0, resume="fixed")
    """Largest global L2 norm of the gradient. 0: no clipping."""

    warmup: int = 10
    """Rounds of linear warm-up; with --mode diloco the inner steps of a round count each."""

    final_lr: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for flag in ("lr", "eps", "weight_decay", "clip", "warmup"):
            if not 0 <= getattr(self, flag) < float("inf"):
                raise ValueError(f"--optimizer.{flag} {getattr(self, flag)}: must be 0 or more, and finite")
        for flag in ("beta1", "beta2"):
            if not 0 <= getattr(self, flag) < 1:
                raise ValueError(f"--optimizer.{flag} {getattr(self, flag)}: must be at least 0 and below 1")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"--optimizer.final_lr {self.final_lr}: must lie between 0 and 1")


def apply_settings(optimizer: torch.optim.Optimizer, settings: Settings) -> None:
    """Set each key in the groups that have its scale: group["lr"] = settings["lr"] * group["lr_scale"]."""
    for group in optimizer.param_groups:
        for key, value in settings.items():
            if f"{key}_scale" in group:
                group[key] = value * group[f"{key}_scale"]


def optimizer_from_order(task: str, cls: type[Any], parameters: Mapping[str, object]) -> Any:
    """Return the flags of a task's optimizer, `cls` (`Task.Optimizer`), from the parameters of an order.

    Raises ProtocolError unless they are exactly its fields, each of its type.
    """
    defaults = {f.name: f.default for f in fields(cls)}
    values: dict[str, Any] = {}
    try:
        if wrong := defaults.keys() ^ parameters.keys():
            raise ValueError(f"{min(wrong)} is {'missing' if min(wrong) in defaults else 'unknown'}")
        for name, value in parameters.items():
            kind = int if isinstance(defaults[name], int) else float
            if not isinstance(value, kind | int) or isinstance(value, bool) or not abs(value) <= LARGEST:
                raise ValueError(f"{name} {value}: not {kind.__name__}, or too large")
            values[name] = kind(value)
        return cls(**values)
    except ValueError as error:
        raise ProtocolError(f"optimizer of task {task}: {error}") from None


def adamw_settings(config: AdamWConfig, step: int, steps: int) -> dict[str, float]:
    return {"lr": config.lr * schedule(config, step, steps)}


def schedule(config: AdamWConfig, step: int, steps: int) -> float:
    """Return the factor of the learning rate in step `step` of 0 … steps - 1.

    It rises linearly over `warmup` steps to 1, reached in the step after them, then falls along half a cosine to
    `final_lr` in the last step, and stays there.
    """
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(steps - 1 - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.final_lr + (1 - config.final_lr) * cosine


def adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """Make an AdamW with weight decay on matrices and embeddings, but not on biases and norms."""
    import torch

    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay, "lr_scale": 1.0},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
