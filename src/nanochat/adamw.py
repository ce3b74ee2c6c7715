"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass of torch's fused kernel, on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


def new_state(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter's optimizer state before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.zeros_like(p),
    }


def adamw_step(
    parameters: list[torch.Tensor],  # changed in place
    gradients: list[torch.Tensor],
    states: list[dict[str, Any]],  # from `new_state`, changed in place
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Make one step, with decoupled weight decay: p -= lr * weight_decay * p."""
    adamw(
        parameters,
        [g.contiguous() for g in gradients],  # the kernel reads memory in the parameter's order
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
