"""The KV cache: whatever the portions in which a text comes, the logits are those of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import GPTConfig
from nanochat.gpt import GPT, KVCache

SHORT = GPTConfig(sequence_len=512, vocab_size=100, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)  # windows of 128
CLASSIC = replace(SHORT, window_pattern="L", value_embeds=False, smear=False, backout=False)
LENGTH = 300


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[SHORT, CLASSIC], ids=["modern", "classic"])
def model(request: pytest.FixtureRequest) -> GPT:
    return made(request.param)


def made(config: GPTConfig) -> GPT:
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.requires_grad_(False)


def text(rows: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(1))


def cached(model: GPT, idx: torch.Tensor, portions: list[int], capacity: int) -> torch.Tensor:
    cache = KVCache(model.config, idx.size(0), capacity)
    parts = [model(portion, cache=cache) for portion in idx.split(portions, dim=1)]
    assert cache.position == idx.size(1)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize(
    "portions",
    [[LENGTH], [1] * LENGTH, [100] + [1] * 200, [130, 1, 1, 168], [1, 127, 1, 1, 128, 42], [129, 129, 42], [1, 299]],
    ids=lambda portions: "+".join(map(str, portions[:4])),
)
@pytest.mark.parametrize("spare", [0, 250])
def test_portions_give_the_whole(model: GPT, portions: list[int], spare: int) -> None:
    idx = text(2)
    found = cached(model, idx, portions, LENGTH + spare)
    torch.testing.assert_close(found, model(idx), atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8))
def test_any_portions_give_the_whole(cuts: set[int]) -> None:
    model, idx = made(SHORT), text(1)
    borders = [0, *sorted(cuts), LENGTH]
    portions = [end - start for start, end in pairwise(borders)]
    torch.testing.assert_close(cached(model, idx, portions, LENGTH), model(idx), atol=2e-5, rtol=1e-4)


def test_a_sliding_layer_holds_its_window_alone() -> None:
    cache = KVCache(SHORT, 1, 400)
    assert [k.size(2) for k, _ in cache._layers] == [129, 129, 129, 400]


def test_rows_of_one_prompt_go_their_own_ways(model: GPT) -> None:
    """One row becomes three, then some are kept by index and by mask."""
    prompt, ends = text(1, 150), text(3, 40)
    whole = model(torch.cat([prompt.expand(3, -1), ends], dim=1))[:, 150:]
    rows = KVCache(model.config, 1, 200)
    model(prompt, cache=rows)
    rows.select(torch.zeros(3, dtype=torch.long))
    first = model(ends[:, :20], cache=rows)
    torch.testing.assert_close(first, whole[:, :20], atol=2e-5, rtol=1e-4)
    rows.select(torch.tensor([2, 0]))
    second = model(ends[[2, 0], 20:21], cache=rows)
    torch.testing.assert_close(second, whole[[2, 0], 20:21], atol=2e-5, rtol=1e-4)
    rows.select(torch.tensor([False, True]))
    third = model(ends[:1, 21:], cache=rows)
    torch.testing.assert_close(third, whole[:1, 21:], atol=2e-5, rtol=1e-4)
    assert (rows.batch, rows.position) == (1, 190)


def test_the_loss_may_come_from_a_cache_too(model: GPT) -> None:
    idx, targets = text(2, 60), text(2, 60).roll(-1, 1)
    cache = KVCache(model.config, 2, 60)
    model(idx[:, :25], cache=cache)
    found = model(idx[:, 25:], targets[:, 25:], cache=cache, reduction="none")
    torch.testing.assert_close(found, model(idx, targets, reduction="none")[:, 25:], atol=2e-5, rtol=1e-4)


def test_mistakes() -> None:
    model = made(replace(SHORT, sequence_len=4))
    cache = KVCache(model.config, 1, 100)
    with pytest.raises(ValueError, match=r"^2 rows for a cache of 1$"):
        model(text(2, 3), cache=cache)
    model(text(1, 30), cache=cache)
    with pytest.raises(ValueError, match=r"^a sequence of 41 tokens: .* 40$"):
        model(text(1, 11), cache=cache)
    small = KVCache(model.config, 2, 10)
    model(text(2, 6), cache=small)
    with pytest.raises(ValueError, match=r"^6 \+ 5 tokens for a cache of 10$"):
        model(text(2, 5), cache=small)
    assert small.position == 6
