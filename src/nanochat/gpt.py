"""The model: a GPT with rotary positions, QK norm, squared ReLU, value embeddings and a soft-capped, untied head."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanochat.attention import CausalSelfAttention, Rotary, norm, rotary_tables
from nanochat.config import SMEAR_CHANNELS, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.linear import Linear
from nanochat.loss import Reduction, softcapped_cross_entropy, softcapped_logits

__all__ = ["GPT", "KVCache"]

EMBEDDING_STD = 0.8
HEAD_STD = 0.001
GATE_BOUND = 0.02
FC_SCALE = 0.4
BACKOUT = 0.2
RESIDUAL = (1.15, 1.05)  # at the first and the last layer, like the next
FROM_X0 = (0.20, 0.05)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, device)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, device)
        self.mlp = MLP(config, device)

    def forward(
        self, x: torch.Tensor, value_embed: torch.Tensor | None, rotary: Rotary, cache: KVCache | None
    ) -> torch.Tensor:
        x = x + self.attn(norm(x), value_embed, rotary, cache)
        out: torch.Tensor = x + self.mlp(norm(x))
        return out


class Embedding(nn.Module):
    def __init__(self, rows: int, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=torch.float32))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return F.embedding(idx, self.weight)


class GPT(nn.Module):
    """The model. Parameters are fp32, and uninitialized before `init_weights` or `load_state_dict`.

    `dtype` is that of the activations. Logits and loss are fp32.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, config: GPTConfig, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        layers, vocabulary = range(config.n_layer), config.padded_vocab
        self.wte = Embedding(vocabulary, config.n_embd, device)
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): Embedding(vocabulary, config.kv_dim, device)
                for layer in layers
                if config.has_value_embed(layer)
            }
        )
        self.blocks = nn.ModuleList(Block(config, layer, device) for layer in layers)
        self.lm_head = Linear(config.n_embd, vocabulary, device)
        self.resid_lambdas = _scalars(config.n_layer, device)
        self.x0_lambdas = _scalars(config.n_layer, device)
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1, device)
            self.smear_lambda = _scalars(1, device)
        if config.backout:
            self.backout_lambda = _scalars(1, device)
        cos, sin = rotary_tables(config.rotary_len, config.head_dim, device, dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialize from a CPU generator, by default torch's own, so that every device gets the same weights."""
        bound = (3 / self.config.n_embd) ** 0.5  # a uniform distribution of standard deviation n_embd^-0.5
        for name, parameter in self.named_parameters():
            value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            owner = name.removesuffix(".weight").rpartition(".")[2]
            if owner == "wte":
                value.normal_(0, EMBEDDING_STD, generator=generator)
            elif owner == "lm_head":
                value.normal_(0, HEAD_STD, generator=generator)
            elif owner in ("c_q", "c_k", "c_v") or name.startswith("value_embeds."):
                value.uniform_(-bound, bound, generator=generator)
            elif owner == "c_fc":
                value.uniform_(-FC_SCALE * bound, FC_SCALE * bound, generator=generator)
            elif owner in ("ve_gate", "smear_gate"):
                value.uniform_(0, GATE_BOUND, generator=generator)
            elif owner in ("resid_lambdas", "x0_lambdas"):
                value = torch.linspace(*(RESIDUAL if owner == "resid_lambdas" else FROM_X0), self.config.n_layer)
            else:
                value.fill_({"c_proj": 0.0, "smear_lambda": 0.0, "backout_lambda": BACKOUT}[owner])
            parameter.copy_(value)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        reduction: Reduction = "mean",
    ) -> torch.Tensor:
        """Return the logits of idx (B, T), int64: (B, T, vocab_size), or only the last token's, (B, 1, vocab_size).

        With targets (B, T), where -1 is ignored: the loss in nats, a scalar, or (B, T) with reduction "none".
        With a cache, idx continues its tokens. Raises ValueError if the sequence exceeds rotary tables or cache.
        """
        x = self._hidden(idx, cache)
        weight, vocab_size = self.lm_head.weight, self.config.vocab_size
        if targets is None:
            return softcapped_logits(x[:, -1:] if last_only else x, weight[:vocab_size])
        loss = softcapped_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), vocab_size, reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def _hidden(self, idx: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Return the head's input, (B, T, n_embd)."""
        rows, length = idx.shape
        start = cache.position if cache is not None else 0
        if start + length > self.config.rotary_len:
            raise ValueError(
                f"a sequence of {start + length} tokens: the rotary tables of a model of "
                f"{self.config.sequence_len} reach {self.config.rotary_len}"
            )
        if cache is not None:
            cache.check(rows, length)
        rotary = self.cos[start : start + length], self.sin[start : start + length]
        x = x0 = self._smear(norm(self.wte(idx).to(self.dtype)), cache)
        kept = x
        for layer, block in enumerate(self.blocks):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            table = self.value_embeds[str(layer)] if self.config.has_value_embed(layer) else None
            x = block(x, table(idx).to(self.dtype) if table is not None else None, rotary, cache)
            if layer == self.config.backout_layer:
                kept = x
        if self.config.backout:
            x = x - self.backout_lambda.to(x.dtype) * kept
        if cache is not None:
            cache.advance(length)
        return norm(x)

    def _smear(self, x: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Mix a gated part of the previous token's embedding into each token's."""
        if not self.config.smear:
            return x
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        if cache is None:
            return torch.cat([x[:, :1], x[:, 1:] + gate[:, 1:] * x[:, :-1]], dim=1)
        first = torch.zeros_like(x[:, :1]) if cache.previous is None else cache.previous
        cache.previous = x[:, -1:].detach().clone()
        return x + gate * torch.cat([first, x[:, :-1]], dim=1)


def _scalars(count: int, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(count, device=device, dtype=torch.float32))
