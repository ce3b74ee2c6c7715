"""nanochat's GPT written plainly: the peer of `bench.model`, and the reference of the tests. Not a part of Pilot.

Parameters have the names of `nanochat.gpt.GPT`'s, so that one's state_dict fits the other. Everything is what a reader
of the description would write: linear layers that cast their fp32 weight to the activations' dtype, a boolean mask for
the windows, the whole logits in fp32, torch's cross-entropy. No cache.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanochat.config import GATE_CHANNELS, SMEAR_CHANNELS, GPTConfig


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.size(-1) // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, -a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.config, self.window = config, config.windows()[layer]
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embed(layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(
        self, x: torch.Tensor, ve: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, distance: torch.Tensor
    ) -> torch.Tensor:
        config, (rows, length, _) = self.config, x.shape
        q = self.c_q(x).view(rows, length, config.n_head, config.head_dim)
        k = self.c_k(x).view(rows, length, config.n_kv_head, config.head_dim)
        v = self.c_v(x).view(rows, length, config.n_kv_head, config.head_dim)
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k = 1.2 * norm(q), 1.2 * norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = config.n_head != config.n_kv_head
        if self.window >= length:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mask = (distance >= 0) & (distance <= self.window)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        out: torch.Tensor = self.c_proj(y.transpose(1, 2).reshape(rows, length, -1))
        return out


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.c_proj(F.relu(self.c_fc(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, ve: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, distance: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.attn(norm(x), ve, cos, sin, distance)
        out: torch.Tensor = x + self.mlp(norm(x))
        return out


class ReferenceGPT(nn.Module):
    cos: torch.Tensor
    sin: torch.Tensor
    distance: torch.Tensor

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd)
        tables = [layer for layer in range(config.n_layer) if config.has_value_embed(layer)]
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(config.padded_vocab, config.kv_dim) for i in tables})
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        positions = torch.arange(config.sequence_len)
        inv_freq = 1.0 / (100_000 ** (torch.arange(0, config.head_dim, 2) / config.head_dim))
        angles = torch.outer(positions.float(), inv_freq)[None, :, None, :]
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.register_buffer("distance", positions[:, None] - positions, persistent=False)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """idx (B, T), T at most the configuration's: the logits, or with targets the mean loss."""
        config, length = self.config, idx.size(1)
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        distance = self.distance[:length, :length]
        x = norm(self.wte(idx).to(self.dtype))
        if config.smear:
            gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
            x = torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)
        x0 = backout = x
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(self.dtype) if config.has_value_embed(i) else None
            x = block(x, ve, cos, sin, distance)
            if i == config.backout_layer:
                backout = x
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * backout
        logits = self.lm_head(norm(x))[..., : config.vocab_size].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
