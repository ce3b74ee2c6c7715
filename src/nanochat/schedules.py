"""The settings of each step (learning rate, momentum, weight decay), and the sizes of steps and runs.

Pure functions of the model's shape and the step, without torch.
"""

from __future__ import annotations

import math

from nanochat.config import GPTConfig, MuonAdamWConfig, Preset

REFERENCE_DEPTH = 12  # the learning rates were tuned for it, with steps of REFERENCE_TOKENS
REFERENCE_TOKENS = 2**19
RATIO = 12.0  # training tokens per scaling parameter
BATCH_EXPONENT = 0.383  # how the best step size grows with the run's tokens
MOMENTUM = (0.85, 0.97, 0.90)  # at the start, after the warm-up, and at the end
MOMENTUM_STEPS = 400  # from the first to the second, at most a third of the run


def settings(
    config: MuonAdamWConfig, shape: GPTConfig, step: int, steps: int, tokens_per_step: int
) -> dict[str, float]:
    """Return the settings of step `step` of 0 … steps - 1; a group multiplies each by its "<key>_scale".

    Later steps have the settings of the last. "lr" scales with the root of the tokens in a step. "weight_decay" makes
    weights be forgotten over a constant fraction of the run, so it is smaller for the longer run of a larger model.
    """
    batches = math.sqrt(tokens_per_step / REFERENCE_TOKENS)
    longer = shape.scaling_parameters / _reference(shape).scaling_parameters
    progress = min(step / max(steps - 1, 1), 1.0)
    return {
        "lr": batches * lr_multiplier(config, step, steps),
        "momentum": muon_momentum(config, step, steps),
        "weight_decay": batches / longer * 0.5 * (1 + math.cos(math.pi * progress)),
    }


def lr_multiplier(config: MuonAdamWConfig, step: int, steps: int) -> float:
    """Return the factor that rises linearly to 1, stays, and falls linearly to `final_lr_frac` in the last step."""
    warmup = min(config.warmup_steps, steps // 10)
    warm = (step + 1) / warmup if step < warmup else 1.0
    cold = _warmdown(config, step, steps)
    return min(warm, 1 - cold * (1 - config.final_lr_frac))


def muon_momentum(config: MuonAdamWConfig, step: int, steps: int) -> float:
    """Return the momentum: it rises linearly early in the run, stays, and falls linearly as the learning rates do."""
    first, warm, last = MOMENTUM
    rise = min(MOMENTUM_STEPS, steps // 3)
    young = 1 - step / rise if step < rise else 0.0
    return min(warm - young * (warm - first), warm - _warmdown(config, step, steps) * (warm - last))


def _warmdown(config: MuonAdamWConfig, step: int, steps: int) -> float:
    """Return the progress of the warm-down: 0 until it begins, 1 in the last step."""
    warmdown = round(config.warmdown_ratio * steps)
    left = max(steps - 1 - step, 0)
    return 1 - left / warmdown if left < warmdown else 0.0


def auto_batch_tokens(shape: GPTConfig) -> int:
    """Return the best number of tokens in a step for a model of this shape, a power of two."""
    longer = shape.scaling_parameters / _reference(shape).scaling_parameters
    return int(2 ** round(math.log2(REFERENCE_TOKENS * longer**BATCH_EXPONENT)))


def horizon_tokens(shape: GPTConfig, ratio: float = RATIO) -> int:
    """Return the tokens of a run with `ratio` tokens per scaling parameter."""
    return round(ratio * shape.scaling_parameters)


def _reference(shape: GPTConfig) -> GPTConfig:
    """Return the model that the settings were tuned for, with this one's vocabulary."""
    preset: Preset = "modern" if shape.value_embeds else "classic"
    return GPTConfig.from_depth(REFERENCE_DEPTH, preset, vocab_size=shape.vocab_size, sequence_len=shape.sequence_len)
