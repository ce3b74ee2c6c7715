"""Causal self-attention: rotary positions, QK norm, grouped heads, sliding windows, gated value embeddings."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nanochat.config import GATE_CHANNELS, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.linear import Linear

ROTARY_BASE = 100_000.0
QK_SCALE = 1.2  # on the normed queries and keys: sharper attention
VALUE_GATE = 3.0  # the gates' upper bound
MOST_PRODUCTS = 1024  # up to this many keys, plain products in bf16 on a CPU are faster than torch's fused kernel

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each (T, 1, head_dim / 2)


def norm(x: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, device: torch.device | str | None, dtype: torch.dtype) -> Rotary:
    """Return the tables of positions 0 to length - 1. They are made on the CPU, so every device gets the same."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), frequencies)[:, None]
    return angles.cos().to(device=device, dtype=dtype), angles.sin().to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate x (B, T, heads, head_dim) by -angle: channel i of the first half pairs with channel i of the second."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attend from q (B, heads, T, head_dim) to k and v (B, kv heads, S, head_dim), whose last T are the queries' own.

    A query sees itself and at most `window` tokens before it. With T = 1 it sees all keys.
    """
    length, seen = q.size(2), k.size(2)
    if length == 1:
        return _attention(q, k, v)
    if length == seen <= window + 1:
        return _attention(q, k, v, causal=True)
    if length == seen:
        return _attend_in_blocks(q, k, v, window)
    return _attention(q, k, v, _visible(seen - length, length, seen, window, q.device))


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """Attend where `mask` (T, S) is true, or causally with T = S."""
    length, seen, groups = q.size(2), k.size(2), q.size(1) // k.size(1)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or length == 1 or seen > MOST_PRODUCTS:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=groups > 1)
    if mask is None:
        mask = _visible(0, length, seen, seen, q.device)
    k, v = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.size(-1) ** -0.5
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).to(q.dtype) @ v


def _visible(first: int, rows: int, columns: int, window: int, device: torch.device) -> torch.Tensor:
    """Return the mask (rows, columns) for queries from position `first` and keys from position 0."""
    query = torch.arange(first, first + rows, device=device)[:, None]
    distance = query - torch.arange(columns, device=device)
    return (distance >= 0) & (distance <= window)


def _attend_in_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Attend in blocks of `window` queries, each to its own keys and those of the block before; skip masked blocks."""
    rows, heads, length, width = q.shape
    if length % window:
        padding = (0, 0, 0, window - length % window)  # at the end, where under causal attention only padding sees it
        q, k, v = (F.pad(part, padding) for part in (q, k, v))
    first = _attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], causal=True)

    def blocks(part: torch.Tensor) -> torch.Tensor:  # (B, heads, T, D) -> (B, blocks, heads, window, D)
        return part.reshape(rows, part.size(1), -1, window, width).transpose(1, 2)

    mask = _visible(window, window, 2 * window, window, q.device)
    k, v = (torch.cat([blocks(part[:, :, :-window]), blocks(part[:, :, window:])], dim=3) for part in (k, v))
    rest = _attention(blocks(q[:, :, window:]).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
    rest = rest.reshape(rows, -1, heads, window, width).transpose(1, 2).reshape(rows, heads, -1, width)
    return torch.cat([first, rest], dim=2)[:, :, :length]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows()[layer]
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd, device)
        self.c_k = Linear(config.n_embd, config.kv_dim, device)
        self.c_v = Linear(config.n_embd, config.kv_dim, device)
        self.c_proj = Linear(config.n_embd, config.n_embd, device)
        self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head, device) if config.has_value_embed(layer) else None

    def forward(
        self, x: torch.Tensor, value_embed: torch.Tensor | None, rotary: Rotary, cache: KVCache | None
    ) -> torch.Tensor:
        """Return the output for x (B, T, n_embd), normed, and value_embed (B, T, kv_dim)."""
        rows, length, _ = x.shape
        q = self.c_q(x).view(rows, length, self.n_head, self.head_dim)
        k = self.c_k(x).view(rows, length, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(rows, length, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None and value_embed is not None:
            gate = VALUE_GATE * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k = (norm(rotate(part, rotary)) * QK_SCALE for part in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = attend(q, k, v, self.window)
        out: torch.Tensor = self.c_proj(y.transpose(1, 2).reshape(rows, length, -1))
        return out
