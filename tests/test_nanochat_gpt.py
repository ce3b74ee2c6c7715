"""The model beside plain ones: attention, the chunked loss, all of it with its gradients; sizes, errors, compiling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.reference_gpt import ReferenceGPT
from nanochat import loss as loss_module
from nanochat.attention import attend
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.linear import linear, linear_gradients
from nanochat.loss import Head, softcapped_cross_entropy

TINY = GPTConfig(sequence_len=512, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)  # windows of 128


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def perturbed(config: GPTConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """Fresh weights and some noise, so that no part is idle."""
    model = GPT(config, dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def tokens(config: GPTConfig, *shape: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, shape)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- parts ------------------------------------------------------------------------------------------------------------


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Query by query, head by head."""
    out = torch.empty_like(q)
    rows, heads, length, width = q.shape
    first = k.size(2) - length
    for b in range(rows):
        for head in range(heads):
            group = head // (heads // k.size(1))
            for t in range(length):
                seen = slice(max(first + t - window, 0), first + t + 1)
                weights = torch.softmax(k[b, group, seen] @ q[b, head, t] / math.sqrt(width), 0)
                out[b, head, t] = weights @ v[b, group, seen]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("length", "seen", "window"),
    [
        (1, 1, 8),
        (9, 9, 8),
        (10, 10, 8),
        (16, 16, 8),
        (24, 24, 8),
        (29, 29, 8),
        (29, 29, 3),
        (29, 29, 28),
        (5, 12, 8),
        (5, 13, 8),
    ],
)
def test_attention_is_the_naive_one(kv_heads: int, length: int, seen: int, window: int) -> None:
    q = torch.randn(2, 4, length, 16, requires_grad=True)
    k = torch.randn(2, kv_heads, seen, 16, requires_grad=True)
    v = torch.randn(2, kv_heads, seen, 16, requires_grad=True)
    expected, found = naive_attention(q, k, v, window), attend(q, k, v, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    up = torch.randn_like(q)
    for ours, naive in zip(
        torch.autograd.grad(found, (q, k, v), up), torch.autograd.grad(expected, (q, k, v), up), strict=True
    ):
        torch.testing.assert_close(ours, naive, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 63, 64, 200, 2048])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_matrices(dtype: torch.dtype, rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x = torch.randn(rows, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(40, 24, dtype=dtype, requires_grad=True)
    close = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 3e-2}
    y, up = linear(x, weight), torch.randn(rows, 40, dtype=dtype)
    torch.testing.assert_close(y, x @ weight.T, **close)
    y.backward(up)
    both, none = linear_gradients(up, x, weight, (True, True)), linear_gradients(up, x, weight, (False, False))
    assert none == (None, None)
    for found in (x.grad, both[0]):
        torch.testing.assert_close(found, up @ weight, **close)
    for found in (weight.grad, both[1]):
        torch.testing.assert_close(found, up.T @ x, **close)
    assert linear(x.view(1, rows, 24), weight).shape == (1, rows, 40)


# --- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, reduction: str
) -> torch.Tensor:
    logits = 15 * torch.tanh((x @ weight.T)[:, :vocab_size] / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


Reduction = Literal["mean", "sum", "none"]
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@every_reduction
@pytest.mark.parametrize("ignored", [0, 5, 149])
@pytest.mark.parametrize("scale", [0.02, 1.0, 8.0], ids=["fresh", "trained", "saturated"])
def test_loss_and_gradients_are_the_plain_ones(
    reduction: Reduction, ignored: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three chunks of blocks of some rows, the last of each cut; the table has rows beyond the vocabulary."""
    monkeypatch.setattr(loss_module, "CPU_CHUNK", 64 * 300 * 4)
    monkeypatch.setattr(loss_module, "CPU_BLOCK", 7 * 300)
    x = torch.randn(150, 32, dtype=torch.float64)
    weight = torch.randn(320, 32, dtype=torch.float64) * scale
    targets = torch.randint(300, (150,))
    targets[torch.randperm(150)[:ignored]] = -1
    up = torch.randn(150, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7, dtype=torch.float64)
    ours = [part.float().requires_grad_() for part in (x, weight)]
    plain = [part.clone().requires_grad_() for part in (x, weight)]
    found = softcapped_cross_entropy(ours[0], ours[1], targets, 300, reduction)
    expected = plain_loss(plain[0], plain[1], targets, 300, reduction)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-6)
    found.backward(up.float())
    expected.backward(up)
    for mine, other in zip(ours, plain, strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=1e-6 * other.grad.abs().max().item(), rtol=1e-4)
    assert not ours[1].grad[300:].any()  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(softcapped_cross_entropy(*ours, targets, 300, reduction), found)


def test_a_confident_bf16_model_keeps_its_gradient() -> None:
    """Where p is near 1, p - 1 is made before anything is rounded to bf16."""
    x = torch.eye(64).bfloat16().requires_grad_()
    weight = (torch.eye(64) * 25.0).requires_grad_()
    targets = torch.arange(64)
    softcapped_cross_entropy(x, weight, targets, 64).backward()
    exact = weight.detach().clone().requires_grad_()
    plain_loss(torch.eye(64), exact, targets, 64, "mean").backward()
    assert weight.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(weight.grad.diag(), exact.grad.diag(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_is_given_is_the_same_step(dtype: torch.dtype) -> None:
    logits, targets = (4 * torch.randn(9, 100)).to(dtype), torch.randint(-1, 100, (9,))
    pure = loss_module._pure_step(logits.clone(), targets)
    for found, expected in zip(loss_module._step(logits, targets), pure, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@every_reduction
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_wanted_gradients_are_made(frozen: str, reduction: Reduction) -> None:
    x = torch.randn(70, 16, requires_grad=frozen != "x")
    weight = torch.randn(64, 16, requires_grad=frozen != "weight")
    softcapped_cross_entropy(x, weight, torch.randint(64, (70,)), 64, reduction).sum().backward()
    assert (x.grad is None, weight.grad is None) == (frozen == "x", frozen == "weight")


def test_a_loss_of_ignored_tokens_alone_leaves_no_gradient() -> None:
    x, weight = torch.randn(5, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True)
    targets = torch.full((5,), -1)
    assert softcapped_cross_entropy(x, weight, targets, 64, "sum") == 0
    mean = softcapped_cross_entropy(x, weight, targets, 64)
    assert mean.isnan()  # as torch's
    mean.backward()
    assert x.grad is not None
    assert not x.grad.any()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_the_logits_are_never_whole() -> None:
    x, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(8192, 8, requires_grad=True)
    with Largest() as largest:
        softcapped_cross_entropy(x, weight, torch.randint(8192, (4096,)), 8192).backward()
    assert largest.elements == loss_module.CPU_CHUNK / 4 < 4096 * 8192


def test_heads_that_want_nothing_do_nothing() -> None:
    x, weight = torch.randn(3, 8), torch.randn(64, 8)
    _, dx, dweight = loss_module._chunks(x, weight, torch.tensor([0, 1, 2]), Head(64, False, False, False), None, 1.0)
    assert dx is None
    assert dweight is None


# --- the whole --------------------------------------------------------------------------------------------------------

SHAPES = {
    "modern": TINY,
    "classic": replace(TINY, window_pattern="L", value_embeds=False, smear=False, backout=False),
    "odd": replace(TINY, n_layer=5, n_kv_head=1, sequence_len=300),
}


DRAWS = 6


class OtherRounding(TorchDispatchMode):
    """Moves each bf16 result, of the forward and of the backward pass, at random by up to its rounding error.

    So do kernels that sum in another order or precision; which of them run, the processor decides.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        outs = found if isinstance(found, (tuple, list)) else (found,)
        for out, declared in zip(outs, func._schema.returns, strict=False):
            made = declared.alias_info is None  # neither a view of an argument nor the argument itself
            if made and isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16:
                off = 2 * torch.rand(out.shape, generator=self.generator) - 1
                out.mul_(1 + off * torch.finfo(out.dtype).eps / 2)
        return found


def rounding_noise(
    plain: ReferenceGPT, true: dict[str, torch.Tensor | None], idx: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """How far bf16 takes the reference's gradients from the true ones: the root mean square of some roundings."""
    squares = dict.fromkeys(true, 0.0)
    for seed in range(DRAWS):
        plain.zero_grad()
        with OtherRounding(seed):
            plain(idx, targets).backward()
        for name, found in gradients(plain).items():
            squares[name] += (found - true[name]).square().sum().item()  # type: ignore[operator]
    return {name: math.sqrt(square / DRAWS) for name, square in squares.items()}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_the_reference_s(config: GPTConfig, dtype: torch.dtype) -> None:
    ours, plain = perturbed(config, dtype), ReferenceGPT(config, dtype)
    plain.load_state_dict(ours.state_dict())
    idx, targets = tokens(config, 2, 300), tokens(config, 2, 300)
    targets[0, :40] = -1
    if dtype == torch.float32:
        torch.testing.assert_close(ours(idx), plain(idx), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours(idx, last_only=True), ours(idx)[:, -1:], atol=2e-5, rtol=1e-4)
    loss, expected = ours(idx, targets), plain(idx, targets)
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5 if dtype == torch.float32 else 2e-3)
    loss.backward()
    exact = ReferenceGPT(config)
    exact.load_state_dict(ours.state_dict())
    exact(idx, targets).backward()
    truths, found = gradients(exact), gradients(ours)
    noise = rounding_noise(plain, truths, idx, targets) if dtype == torch.bfloat16 else {}
    for name, true in truths.items():
        mine = found[name]
        assert mine is not None
        assert true is not None
        size, scalars = true.norm().item(), true.dim() == 1
        # A matrix's error hardly varies with the rounding. A few scalars' does; where their sums cancel it is large.
        limit = noise[name] * (4 if scalars else 2) if noise else 1e-4 * size
        if true.numel() > 100:
            assert limit < 0.1 * size, f"{name}: a gradient that is 10 % too large would pass"
        assert (mine - true).norm() < limit, name


def test_losses_of_tokens_are_those_of_the_logits() -> None:
    model = perturbed(TINY)
    idx, targets = tokens(TINY, 2, 50), tokens(TINY, 2, 50)
    targets[1, 3] = -1
    losses = model(idx, targets, reduction="none")
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses, expected.view(2, 50), atol=1e-5, rtol=1e-5)
    assert losses[1, 3] == 0
    torch.testing.assert_close(model(idx, targets, reduction="sum"), losses.sum())
    torch.testing.assert_close(model(idx, targets), losses.sum() / 99)


def test_gradients_add_up() -> None:
    model = perturbed(TINY)
    idx, targets = tokens(TINY, 2, 40), tokens(TINY, 2, 40)
    model(idx, targets).backward()
    once = gradients(model)
    model.zero_grad()
    for row in range(2):
        (model(idx[row : row + 1], targets[row : row + 1]) / 2).backward()
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, once[name], atol=1e-6, rtol=1e-3, msg=name)


def test_frozen_parameters_get_no_gradient_and_the_others_theirs() -> None:
    model = perturbed(TINY)
    idx, targets = tokens(TINY, 1, 40), tokens(TINY, 1, 40)
    model(idx, targets).backward()
    whole = gradients(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("lm_head", "wte", "blocks.1")))
    model(idx, targets).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-3, msg=name)


def test_no_token_sees_a_later_one() -> None:
    model = perturbed(TINY)
    idx = tokens(TINY, 1, 200)
    other = idx.clone()
    other[0, 150:] = tokens(TINY, 50)
    torch.testing.assert_close(model(idx)[:, :150], model(other)[:, :150], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compiled_model_is_the_same(dtype: torch.dtype) -> None:
    """The graph breaks before the loss, and there alone; a second length and micro-batches are right as well."""
    config = replace(TINY, n_layer=2, vocab_size=100)
    eager, compiled = perturbed(config, dtype), GPT(config, dtype)
    compiled.load_state_dict(eager.state_dict())
    run = torch.compile(compiled, backend="aot_eager")
    for length in (200, 140):
        idx, targets = tokens(config, 2, length), tokens(config, 2, length)
        (eager(idx, targets) / 2).backward()
        (run(idx, targets) / 2).backward()
    for (name, found), other in zip(gradients(compiled).items(), gradients(eager).values(), strict=True):
        assert found is not None
        assert other is not None
        assert (found - other).norm() / other.norm() < (1e-4 if dtype == torch.float32 else 0.3), name
    explained = torch._dynamo.explain(compiled)(idx, targets)
    assert explained.graph_count <= 2


# --- sizes, weights, errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "total", "width", "heads"), [(20, 560_988_200, 1280, 10), (32, 1_879_048_256, 2048, 16)]
)
def test_the_classic_sizes(depth: int, total: int, width: int, heads: int) -> None:
    config = GPTConfig.from_depth(depth, "classic", vocab_size=65_536, sequence_len=2048)
    assert (config.n_embd, config.n_head, config.n_kv_head) == (width, heads, heads)
    model = GPT(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameter_counts()["total"] == total


@pytest.mark.parametrize(("depth", "millions"), [(4, 36.7), (12, 286.3), (20, 896.5), (32, 2818.6)])
def test_the_modern_sizes(depth: int, millions: float) -> None:
    config = GPTConfig.from_depth(depth, vocab_size=32_768, sequence_len=2048)
    model = GPT(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, abs=1e5)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_shape_counts_what_a_model_holds(config: GPTConfig) -> None:
    counts = dict.fromkeys(config.parameter_counts(), 0)
    for name, parameter in GPT(config).named_parameters():
        kind = name.partition(".")[0] if name.startswith(("wte", "value_embeds", "lm_head")) else "scalars"
        counts["matrices" if name.startswith("blocks.") else kind] += parameter.numel()
        counts["total"] += parameter.numel()
    assert counts == config.parameter_counts()


def test_initial_weights() -> None:
    config = GPTConfig(sequence_len=128, vocab_size=3000, n_layer=6, n_head=2, n_kv_head=2, n_embd=128)
    first, second = GPT(config), GPT(config, torch.bfloat16)
    for model in (first, second):
        model.init_weights(torch.Generator().manual_seed(7))
    weights = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert parameter.dtype == torch.float32
    bound = (3 / 128) ** 0.5
    assert weights["wte.weight"].std().item() == pytest.approx(0.8, rel=0.01)
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.001, rel=0.01)
    for name in ("blocks.0.attn.c_q.weight", "blocks.5.attn.c_v.weight", "value_embeds.5.weight"):
        assert weights[name].std().item() == pytest.approx(128**-0.5, rel=0.02)
        assert 0.98 * bound < weights[name].abs().max().item() <= bound
    assert weights["blocks.2.mlp.c_fc.weight"].abs().max().item() == pytest.approx(0.4 * bound, rel=0.02)
    assert not any(weights[f"blocks.3.{part}.c_proj.weight"].any() for part in ("attn", "mlp"))
    for name in ("smear_gate.weight", "blocks.5.attn.ve_gate.weight"):
        assert 0 <= weights[name].min().item() <= weights[name].max().item() <= 0.02
    torch.testing.assert_close(weights["resid_lambdas"].detach(), torch.tensor([1.15, 1.13, 1.11, 1.09, 1.07, 1.05]))
    torch.testing.assert_close(weights["x0_lambdas"].detach(), torch.tensor([0.20, 0.17, 0.14, 0.11, 0.08, 0.05]))
    assert (weights["smear_lambda"].item(), weights["backout_lambda"].item()) == pytest.approx((0.0, 0.2))


def test_a_sequence_beyond_the_rotary_tables_is_refused_in_a_line() -> None:
    config = replace(TINY, sequence_len=8)
    model = perturbed(config)
    assert model(tokens(config, 1, 80)).shape == (1, 80, 300)
    with pytest.raises(ValueError, match=r"^a sequence of 81 tokens: .* 8 .* 80$"):
        model(tokens(config, 1, 81))
