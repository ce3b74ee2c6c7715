"""Soft-capped logits, and their cross-entropy without holding all of them at once.

The cap is 15 tanh(z / 15) = 30 sigmoid(2 z / 15) - 15. The constant cancels in the softmax, and a sigmoid is cheaper
than a tanh. Capped logits lie within 30 of each other, so no probability underflows in fp32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch.autograd.function import once_differentiable

from nanochat.linear import linear, linear_gradients

Reduction = Literal["mean", "sum", "none"]

SOFTCAP = 15.0
IGNORED = -1
CPU_CHUNK = 1 << 26  # bytes of logits held at a time
CHUNK = 1 << 28  # on other devices
CPU_BLOCK = 1 << 19  # logits per block of elementwise steps, so that they stay in the cache
CHUNK_MULTIPLE = 64


def softcapped_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the capped logits of x (..., C) and weight (V, C): (..., V) in fp32, between -15 and 15."""
    logits = linear(x, weight.to(x.dtype)).float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, reduction: Reduction = "mean"
) -> torch.Tensor:
    """Return the loss in nats, a scalar or (N,): x (N, C), weight (vocab_size or more, C), targets (N,), -1 is ignored.

    For "mean" and "sum" the gradients are computed with the loss; for "none" the backward pass recomputes the logits.
    A compiled model leaves all this out of its graph, which it would only enlarge.
    """
    if torch.compiler.is_compiling():
        outside: Any = torch.compiler.disable(_loss)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, outside(x, weight, targets, vocab_size, reduction, True))
    return _loss(x, weight, targets, vocab_size, reduction, False)


def _loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, reduction: Reduction, compiled: bool
) -> torch.Tensor:
    graded = torch.is_grad_enabled()
    head = Head(vocab_size, compiled, graded and x.requires_grad, graded and weight.requires_grad)
    loss: torch.Tensor
    if reduction == "none":
        loss = _Losses.apply(x, weight, targets, head)
    else:
        loss = _Reduced.apply(x, weight, targets, head, reduction == "mean")
    return loss


class Head(NamedTuple):
    vocab_size: int
    compiled: bool
    x_graded: bool
    weight_graded: bool


class _Reduced(torch.autograd.Function):
    """The sum or the mean; its gradients are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head, mean: bool
    ) -> torch.Tensor:
        kept = (targets != IGNORED).float()
        count = kept.sum()
        scale = 1 / max(count.item(), 1) if mean else 1.0
        losses, *found = _chunks(x, weight, targets, head, kept, scale)
        ctx.save_for_backward(*found)
        return losses.sum() / count if mean else losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        if grad.device.type != "cpu" or grad.item() != 1:
            dx, dweight = (None if one is None else (one * grad).to(one.dtype) for one in (dx, dweight))
        return dx, dweight, None, None, None


class _Losses(torch.autograd.Function):
    """Each token's loss. The backward pass recomputes the logits, because the tokens' weights are known only then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.head = head
        return _chunks(x, weight, targets, head._replace(x_graded=False, weight_graded=False), None, 1.0)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        kept = torch.where(targets != IGNORED, grad, 0.0)
        _, dx, dweight = _chunks(x, weight, targets, ctx.head, kept, 1.0)
        return dx, dweight, None, None


def _chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    rows: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the losses (N,), 0 where ignored, and the wanted gradients of their sum weighted by scale * rows (N,)."""
    tokens, factor = x.size(0), 4 * scale
    matrix = weight[: head.vocab_size].to(x.dtype)
    losses = torch.empty(tokens, device=x.device, dtype=torch.float32)
    dx = torch.empty_like(x) if head.x_graded else None
    dweight = torch.zeros_like(weight) if head.weight_graded else None
    held = CPU_CHUNK if x.device.type == "cpu" else CHUNK
    chunk = max(held // (head.vocab_size * x.element_size() * CHUNK_MULTIPLE), 1) * CHUNK_MULTIPLE
    step = _compiled_step() if head.compiled and x.device.type == "cuda" else _step
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        losses[part], slopes = step(linear(x[part], matrix), targets[part])
        if rows is None:
            continue
        seen = (x[part] * rows[part, None]).to(x.dtype)
        to_x, to_weight = linear_gradients(slopes, seen, matrix, (head.x_graded, head.weight_graded))
        if dx is not None and to_x is not None:
            dx[part] = to_x * (factor * rows[part, None])
        if dweight is not None and to_weight is not None:
            dweight[: head.vocab_size].add_(to_weight, alpha=factor)
    return losses.masked_fill_(targets == IGNORED, 0), dx, dweight


def _step(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (n,), and a quarter of their gradient by the uncapped logits (n, V), written over the logits.

    That is (p - onehot) s (1 - s): the cap's slope is 4 s (1 - s), where s is its sigmoid. Blocks share their memory.
    """
    losses = []
    block = max(CPU_BLOCK // logits.size(1), 1) if logits.device.type == "cpu" else logits.size(0)
    inside = logits.dtype == torch.float32
    room = torch.empty(1 if inside else 2, block, logits.size(1), device=logits.device, dtype=torch.float32)
    for start in range(0, logits.size(0), block):
        part, target = logits[start : start + block], targets[start : start + block, None].clamp(min=0)
        p = room[0, : part.size(0)]
        s = part if inside else room[1, : part.size(0)].copy_(part)
        torch.softmax(torch.mul(s.mul_(2 / SOFTCAP).sigmoid_(), 2 * SOFTCAP, out=p), 1, out=p)
        hit = p.gather(1, target)
        losses.append(-hit.log())
        p.scatter_(1, target, hit - 1)
        slopes = torch.ops.aten.sigmoid_backward.grad_input(p, s, grad_input=part if inside else p)
        if not inside:
            part.copy_(slopes)
    return torch.cat(losses)[:, 0], logits


@cache
def _compiled_step() -> Any:
    return torch.compile(_pure_step, dynamic=False)


def _pure_step(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same without in-place operations, for a compiler, which fuses it into few kernels."""
    target = targets.clamp(min=0)[:, None]
    s = torch.sigmoid(logits.float() * (2 / SOFTCAP))
    p = torch.softmax(s * (2 * SOFTCAP), 1)
    losses = -p.gather(1, target).log()
    hot = torch.arange(logits.size(1), device=logits.device) == target
    return losses[:, 0], ((p - hot.float()) * (s * (1 - s))).to(logits.dtype)
