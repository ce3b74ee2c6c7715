"""Muon for the blocks' matrices, AdamW for the tables, the head and the scalars, as one optimizer.

A parameter's group follows from its name; its state is in `optimizer.state[p]`, plain tensors only. A schedule sets a
group's "lr" to its value times the group's "lr_scale", and "momentum" and "weight_decay" likewise: see
`schedules.settings`. AdamW's weight decay is fixed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nanochat.adamw import adamw_step, new_state
from nanochat.config import MuonAdamWConfig
from nanochat.muon import muon_step, second_moment_shape

EPS = 1e-10
GATE_LR = 0.2  # learning rate of smear and backout
STACK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # elements in one batched call; on a CPU these fit in its cache

_MATRIX = re.compile(r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|c_proj|ve_gate)|mlp\.(c_fc|c_proj))\.weight")
_OTHERS = {
    "lm_head.weight": "lm_head",
    "wte.weight": "wte",
    "resid_lambdas": "resid_lambdas",
    "x0_lambdas": "x0_lambdas",
    "smear_gate.weight": "gates",
    "smear_lambda": "gates",
    "backout_lambda": "gates",
}
_TABLE = re.compile(r"value_embeds\.\d+\.weight")

State = dict[str, Any]


class MuonAdamW(torch.optim.Optimizer):
    """Steps groups of two kinds, "muon" and "adamw". Equal gradients give bit-equal steps on one machine."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        for group in self.param_groups:
            if group["kind"] == "muon" and (wrong := [p.shape for p in group["params"] if p.ndim != 2]):
                raise ValueError(f"Muon is for matrices: a parameter has the shape {tuple(wrong[0])}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one step. Skips parameters without a gradient, and does not change gradients."""
        assert closure is None, "no closures"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["kind"] == "muon":
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)

    def _adamw(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        states: list[State] = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state.update(new_state(p))
        adamw_step(
            list(parameters),
            [_gradient(p) for p in parameters],
            states,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _muon(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        for stack in _stacks(parameters):
            states: list[State] = [self.state[p] for p in stack]
            for p, state in zip(stack, states, strict=True):
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                    state["second_moment"] = p.new_zeros(second_moment_shape(p.shape))
            parts: list[list[torch.Tensor]] = [
                list(stack),
                [state["momentum"] for state in states],
                [state["second_moment"] for state in states],
            ]
            values, momenta, second_moments = stacked = [torch.stack(part) for part in parts]
            gradients = torch.stack([_gradient(p) for p in stack])
            muon_step(
                values,
                gradients,
                momenta,
                second_moments,
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
            )
            for part, new in zip(parts, stacked, strict=True):
                for tensor, value in zip(part, new, strict=True):
                    tensor.copy_(value)


def build_optimizer(model: nn.Module, config: MuonAdamWConfig) -> MuonAdamW:
    """Make the optimizer of all trained parameters. Raises ValueError for a name that belongs to no group.

    Learning rates of tables and head scale with width ** -0.5, relative to depth 12. The schedule's factor of "lr"
    accounts for the batch size, in all groups.
    """
    members: defaultdict[str, list[nn.Parameter]] = defaultdict(list)
    for name, p in sorted(model.named_parameters()):
        group = _group_of(name)
        if p.requires_grad:
            members[group].append(p)
    width = model.get_parameter("wte.weight").shape[1]
    groups = [{**settings, "params": members[name]} for name, settings in _groups(config, width) if members[name]]
    return MuonAdamW(groups)


def _groups(config: MuonAdamWConfig, width: int) -> list[tuple[str, dict[str, Any]]]:
    wide = (width / 768) ** -0.5
    muon = {
        "kind": "muon",
        "lr_scale": config.matrix_lr,
        "lr": config.matrix_lr,
        "momentum_scale": 1.0,
        "momentum": 0.95,
        "weight_decay_scale": config.weight_decay,
        "weight_decay": config.weight_decay,
    }
    return [
        ("lm_head", _adamw_group(config.unembedding_lr * wide, (0.8, 0.96), 0.01)),
        ("wte", _adamw_group(config.embedding_lr * wide, (0.8, 0.995), 0.001)),
        ("value_embeds", _adamw_group(config.embedding_lr / 2 * wide, (0.8, 0.995), 0.01)),
        ("resid_lambdas", _adamw_group(config.scalar_lr * 0.01, (0.8, 0.95), 0.05)),
        ("x0_lambdas", _adamw_group(config.scalar_lr, (0.96, 0.95), 0.0)),
        ("gates", _adamw_group(GATE_LR, (0.8, 0.95), 0.0)),
        ("matrices", muon),
    ]


def _adamw_group(lr: float, betas: tuple[float, float], weight_decay: float) -> dict[str, Any]:
    return {"kind": "adamw", "lr_scale": lr, "lr": lr, "betas": betas, "eps": EPS, "weight_decay": weight_decay}


def _group_of(name: str) -> str:
    if _MATRIX.fullmatch(name):
        return "matrices"
    if _TABLE.fullmatch(name):
        return "value_embeds"
    if name not in _OTHERS:
        raise ValueError(f"parameter {name}: no group of the optimizer is for it")
    return _OTHERS[name]


def _stacks(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Yield parameters of one shape together, as many as one batched call should take."""
    by_shape: defaultdict[tuple[torch.Size, torch.device], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        by_shape[p.shape, p.device].append(p)
    for (shape, device), alike in by_shape.items():
        count = max(1, STACK_ELEMENTS.get(device.type, 1 << 24) // shape.numel())
        yield from (alike[i : i + count] for i in range(0, len(alike), count))


def _gradient(p: nn.Parameter) -> torch.Tensor:
    assert p.grad is not None
    return p.grad
