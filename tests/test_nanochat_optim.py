"""Muon and AdamW against plain references, the groups by parameter name, and the schedules against known runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from nanochat.config import GPTConfig, MuonAdamWConfig
from nanochat.muon import POLAR_EXPRESS, even_out, muon_step, orthogonalize
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.schedules import auto_batch_tokens, horizon_tokens, lr_multiplier, muon_momentum, settings

torch.set_num_threads(1)

Shape = tuple[int, ...]
CONFIG = MuonAdamWConfig()
SHAPES: dict[str, Shape] = {
    "wte.weight": (128, 192),
    "lm_head.weight": (128, 192),
    "value_embeds.1.weight": (128, 96),
    "resid_lambdas": (2,),
    "x0_lambdas": (2,),
    "smear_gate.weight": (1, 24),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
    **{f"blocks.{i}.attn.{name}.weight": (192, 192) for i in (0, 1) for name in ("c_q", "c_proj")},
    **{f"blocks.{i}.attn.{name}.weight": (96, 192) for i in (0, 1) for name in ("c_k", "c_v")},
    "blocks.1.attn.ve_gate.weight": (1, 12),
    **{f"blocks.{i}.mlp.c_fc.weight": (768, 192) for i in (0, 1)},
    **{f"blocks.{i}.mlp.c_proj.weight": (192, 768) for i in (0, 1)},
}
ADAMW = {  # lr, betas, weight decay at width 192, which is a quarter of 768
    "lm_head.weight": (0.016, (0.8, 0.96), 0.01),
    "wte.weight": (0.6, (0.8, 0.995), 0.001),
    "value_embeds.1.weight": (0.3, (0.8, 0.995), 0.01),
    "resid_lambdas": (0.005, (0.8, 0.95), 0.05),
    "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
    "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
    "smear_lambda": (0.2, (0.8, 0.95), 0.0),
    "backout_lambda": (0.2, (0.8, 0.95), 0.0),
}


def make_model(shapes: dict[str, Shape] = SHAPES, seed: int = 0) -> nn.Module:
    """A model of nothing but parameters with nanochat's names."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(0.1 * torch.randn(shape, generator=generator)))
    return root


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for _, p in sorted(model.named_parameters()):
        p.grad = torch.randn(p.shape, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(model, step)
        for group in optimizer.param_groups:
            for key, value in {"lr": 1 - 0.1 * step, "momentum": 0.85 + 0.01 * step, "weight_decay": 0.9**step}.items():
                if f"{key}_scale" in group:
                    group[key] = value * group[f"{key}_scale"]
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- Muon -------------------------------------------------------------------------------------------------------------

MATRICES = [(48, 48), (128, 32), (32, 128), (1, 12), (12, 1), (3, 12)]


def through_singular_values(x: torch.Tensor, f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u @ torch.diag(f(s)) @ v


def polar_express(s: torch.Tensor) -> torch.Tensor:
    s = s / (1.01 * s.square().sum().sqrt() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


class PlainMuon:
    """Of one matrix in float64: by singular values and loops over rows or columns."""

    def __init__(self, p: torch.Tensor) -> None:
        self.p = p.double().clone()
        self.buffer = torch.zeros_like(self.p)
        rows, cols = p.shape
        self.second = [0.0] * (rows if rows >= cols else cols)

    def step(self, gradient: torch.Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        g = gradient.double()
        self.buffer = momentum * self.buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * self.buffer
        update = torch.stack([row / row.norm() for row in update])
        update = through_singular_values(update, polar_express)
        rows, cols = update.shape
        update = update / update.norm() * math.sqrt(min(rows, cols))
        update = self._evened_out(update if rows >= cols else update.T)
        update = update if rows >= cols else update.T
        decay = weight_decay * torch.where(update * self.p >= 0, self.p, 0.0)
        self.p = self.p - lr * math.sqrt(max(1.0, rows / cols)) * (update + decay)

    def _evened_out(self, update: torch.Tensor) -> torch.Tensor:
        evened = update.clone()
        for i, row in enumerate(update):
            self.second[i] = 0.9 * self.second[i] + 0.1 * float(row.square().mean())
            evened[i] = row / math.sqrt(self.second[i])
        return evened / evened.norm() * update.norm()


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_muon_is_as_the_plain_one(shape: Shape) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = torch.randn(3, *shape, generator=generator)
    plain = [PlainMuon(p) for p in parameters]
    momenta = torch.zeros_like(parameters)
    second = torch.zeros(3, shape[0], 1) if shape[0] >= shape[1] else torch.zeros(3, 1, shape[1])
    for step in range(4):
        gradients = torch.randn(parameters.shape, generator=generator)
        given = {"lr": 0.1 / (step + 1), "momentum": 0.85 + 0.03 * step, "weight_decay": 0.5 - 0.1 * step}
        muon_step(parameters, gradients, momenta, second, **given)
        for one, gradient in zip(plain, gradients, strict=True):
            one.step(gradient, **given)
    expected = torch.stack([one.p for one in plain])
    torch.testing.assert_close(parameters.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256), (1, 12)], ids=str)
def test_an_update_is_nearly_orthogonal(shape: Shape) -> None:
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(2))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag(torch.linspace(5, 0.1, min(shape))) @ v
    o = orthogonalize(x)
    s = torch.linalg.svdvals(o)
    assert 0.7 < float(s.min()) <= float(s.max()) < 1.3
    away = (o - u @ v).norm(dim=(-2, -1)) / min(shape) ** 0.5
    assert float(away.max()) < 0.2


def test_orthogonalize_applies_the_polynomials_to_the_singular_values() -> None:
    x = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.stack([through_singular_values(one, polar_express) for one in x])
    torch.testing.assert_close(orthogonalize(x), expected)
    torch.testing.assert_close(orthogonalize(x.mT), expected.mT)


def test_evening_out_keeps_the_norm() -> None:
    x = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(4)) * torch.arange(1.0, 10.0)[:, None]
    evened = even_out(x, torch.zeros(2, 9, 1), beta2=0.9)
    torch.testing.assert_close(evened.norm(dim=(-2, -1)), x.norm(dim=(-2, -1)))
    lengths = evened.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))


def test_no_gradient_yet_moves_nothing() -> None:
    """As in the first step for q and k: the projection after them is zero."""
    parameters = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(5))
    before = parameters.clone()
    zeros = torch.zeros_like(parameters)
    muon_step(parameters, zeros, zeros.clone(), torch.zeros(2, 8, 1), lr=1.0, momentum=0.9, weight_decay=0.0)
    assert torch.equal(parameters, before)


def test_weight_decay_is_only_along_the_update() -> None:
    parameters = torch.ones(1, 4, 4)
    gradients = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(6))
    updates = []
    for weight_decay in (0.0, 0.25):
        p = parameters.clone()
        muon_step(
            p,
            gradients,
            torch.zeros(1, 4, 4),
            torch.zeros(1, 4, 1),
            lr=0.5,
            momentum=0.9,
            weight_decay=weight_decay,
        )
        updates.append(parameters - p)
    plain, decayed = updates
    assert 0 < int((plain > 0).sum()) < 16
    torch.testing.assert_close(decayed - plain, 0.5 * 0.25 * (plain >= 0).float())


def test_a_stack_is_as_its_matrices_one_by_one() -> None:
    names = [name for name in SHAPES if name.startswith("blocks.")]
    model, lone = make_model(), make_model()
    train(model, build_optimizer(model, CONFIG), range(3))
    given = build_optimizer(lone, CONFIG).param_groups[-1]
    for name in names:
        p = lone.get_parameter(name)
        other = MuonAdamW([{**given, "params": [p]}])
        for step in range(3):
            give_gradients(lone, step)
            group = other.param_groups[0]
            group["lr"] = (1 - 0.1 * step) * group["lr_scale"]
            group["momentum"] = 0.85 + 0.01 * step
            group["weight_decay"] = 0.9**step * group["weight_decay_scale"]
            other.step()
        torch.testing.assert_close(p, model.get_parameter(name), rtol=1e-4, atol=1e-5)


# --- AdamW and the groups ---------------------------------------------------------------------------------------------


def test_adamw_is_as_torchs_own() -> None:
    model, plain = make_model(), make_model()
    optimizer = build_optimizer(model, CONFIG)
    groups: list[dict[str, Any]] = [
        {"params": [plain.get_parameter(name)], "lr": lr, "lr_scale": lr, "betas": betas, "weight_decay": decay}
        for name, (lr, betas, decay) in ADAMW.items()
    ]
    reference = torch.optim.AdamW(groups, eps=1e-10, foreach=False)
    train(model, optimizer, range(5))
    train(plain, reference, range(5))
    for name in ADAMW:
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name), msg=name)


def test_each_parameter_has_its_group() -> None:
    model = make_model()
    optimizer = build_optimizer(model, CONFIG)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = groups.pop(p)
        if name.startswith("blocks."):
            muon = {"kind": "muon", "lr_scale": 0.02, "momentum_scale": 1.0, "weight_decay_scale": 0.28}
            assert group.items() >= muon.items(), name
        else:
            lr, betas, decay = ADAMW[name]
            assert group["lr_scale"] == pytest.approx(lr), name
            assert group.items() >= {"kind": "adamw", "betas": betas, "eps": 1e-10, "weight_decay": decay}.items(), name
            assert "weight_decay_scale" not in group
            assert "momentum_scale" not in group
    assert not groups


def test_the_models_own_names_have_groups() -> None:
    """What build_optimizer knows is what the model has, in both presets."""
    from nanochat.gpt import GPT

    for preset in ("modern", "classic"):
        shape = GPTConfig.from_depth(2, preset, vocab_size=100, sequence_len=16)
        optimizer = build_optimizer(GPT(shape), CONFIG)
        sizes = {
            kind: sum(p.numel() for g in optimizer.param_groups if g["kind"] == kind for p in g["params"])
            for kind in ("muon", "adamw")
        }
        counts = shape.parameter_counts()
        assert sizes == {"muon": counts["matrices"], "adamw": counts["total"] - counts["matrices"]}


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.attn.c_q.bias", "blocks.0.norm.weight", "module.wte.weight"])
def test_an_unknown_parameter_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"parameter {name}: no group"):
        build_optimizer(make_model({**SHAPES, name: (4, 4)}), CONFIG)


def test_frozen_parameters_stay() -> None:
    model = make_model()
    frozen = ["wte.weight", "resid_lambdas", "blocks.0.attn.c_q.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = values(model)
    train(model, build_optimizer(model, CONFIG), range(2))
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == set(frozen)


def test_parameters_without_gradients_stay_and_gradients_are_not_changed() -> None:
    model = make_model()
    optimizer = build_optimizer(model, CONFIG)
    give_gradients(model, 0)
    without = ["lm_head.weight", "blocks.1.mlp.c_fc.weight"]
    for name in without:
        model.get_parameter(name).grad = None
    before = values(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == set(without)
    for name, gradient in gradients.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name  # type: ignore[arg-type]


# --- state ------------------------------------------------------------------------------------------------------------


def by_torch(old: MuonAdamW, old_model: nn.Module, new: MuonAdamW, new_model: nn.Module) -> None:
    new.load_state_dict(copy.deepcopy(old.state_dict()))  # as a file would: else both share tensors


def by_hand(old: MuonAdamW, old_model: nn.Module, new: MuonAdamW, new_model: nn.Module) -> None:
    """As a learner does it: each parameter's tensors by their names, through safetensors' bytes."""
    kept = {f"{key}/{n}": value for n, p in old_model.named_parameters() for key, value in old.state[p].items()}
    for name, value in load(save(kept)).items():
        key, _, parameter = name.partition("/")
        new.state[new_model.get_parameter(parameter)][key] = value


@pytest.mark.parametrize("way", [by_torch, by_hand])
def test_state_goes_on_bit_equal(way: Callable[..., None]) -> None:
    model = make_model()
    optimizer = build_optimizer(model, CONFIG)
    train(model, optimizer, range(3))
    other = make_model(seed=1)
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, CONFIG)
    way(optimizer, model, resumed, other)
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_equal_gradients_give_bit_equal_steps() -> None:
    one, other = make_model(), make_model()
    train(one, build_optimizer(one, CONFIG), range(3))
    train(other, build_optimizer(other, CONFIG), range(3))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="Muon is for matrices"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "kind": "muon"}])


# --- schedules --------------------------------------------------------------------------------------------------------

# depth: log2 of the tokens a step, steps, multiplier of lr, weight decay
RUNS = {
    4: (18, 528, 0.707, 1.8899),
    6: (18, 1062, 0.707, 0.9396),
    8: (18, 1920, 0.707, 0.5197),
    12: (19, 2520, 1.000, 0.2800),
    16: (19, 5376, 1.000, 0.1313),
    20: (20, 4980, 1.414, 0.1002),
    24: (20, 8352, 1.414, 0.0597),
    26: (20, 10510, 1.414, 0.0475),
    32: (21, 9600, 2.000, 0.0368),
}


@pytest.mark.parametrize("depth", RUNS)
def test_runs_have_the_known_sizes(depth: int) -> None:
    log_batch, steps, lr, weight_decay = RUNS[depth]
    shape = GPTConfig.from_depth(depth, vocab_size=32_768, sequence_len=2048)
    batch = auto_batch_tokens(shape)
    assert batch == 2**log_batch
    assert horizon_tokens(shape) // batch == steps
    middle = settings(CONFIG, shape, steps // 5, steps, batch)
    assert middle["lr"] == pytest.approx(lr, abs=5e-4)
    first = settings(CONFIG, shape, 0, steps, batch)
    assert CONFIG.weight_decay * first["weight_decay"] == pytest.approx(weight_decay, abs=5e-5)


def test_a_ratio_sets_the_horizon() -> None:
    shape = GPTConfig.from_depth(12, vocab_size=32_768, sequence_len=2048)
    assert horizon_tokens(shape, 8) == 8 * shape.scaling_parameters


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = [lr_multiplier(CONFIG, step, 1000) for step in range(1000)]
    assert rates[0] == 1 / 40
    assert rates[39:350] == [1.0] * 311
    assert rates[:40] == sorted(rates[:40])
    assert rates[349:] == sorted(rates[349:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)
    halfway = 999 - 325  # of the 650 steps of the warm-down half are left
    assert rates[halfway] == pytest.approx((1 + 0.05) / 2)
    assert lr_multiplier(CONFIG, 5000, 1000) == pytest.approx(0.05)


def test_a_short_run_warms_up_for_a_tenth() -> None:
    assert [lr_multiplier(CONFIG, step, 20) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert lr_multiplier(CONFIG, 0, 1) == pytest.approx(0.05)  # its only step is its last


def test_momentum_rises_stays_and_falls() -> None:
    momenta = [muon_momentum(CONFIG, step, 10_000) for step in range(10_000)]
    assert momenta[0] == pytest.approx(0.85)
    assert momenta[200] == pytest.approx(0.91)
    assert momenta[400:3500] == pytest.approx([0.97] * 3100)
    assert momenta[-1] == pytest.approx(0.90)
    short = [muon_momentum(CONFIG, step, 40) for step in range(40)]
    assert short[0] == pytest.approx(0.85)
    assert short[13] == pytest.approx(0.97)
    assert short[-1] == pytest.approx(0.90)


def test_weight_decay_falls_to_zero_along_a_cosine() -> None:
    shape = GPTConfig.from_depth(12, vocab_size=1000, sequence_len=64)
    decays = [settings(CONFIG, shape, step, 101, 2**19)["weight_decay"] for step in (0, 25, 50, 100, 500)]
    assert decays == pytest.approx([1.0, 0.5 + 2**-1.5, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60])
@pytest.mark.parametrize("ratio", [0.0, 0.65, 1.0])
def test_settings_are_sound_in_runs_of_any_length(steps: int, ratio: float) -> None:
    config = MuonAdamWConfig(warmdown_ratio=ratio)
    shape = GPTConfig.from_depth(2, vocab_size=300, sequence_len=64)
    for step in range(steps + 3):
        given = settings(config, shape, step, steps, 2**19)
        assert 0 < given["lr"] <= 1
        assert 0.85 <= given["momentum"] <= 0.97 + 1e-12
        assert given["weight_decay"] >= 0
