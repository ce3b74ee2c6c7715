"""Generation against plain recomputation, its calculator, and sampling against a slow version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import GPTConfig
from nanochat.engine import Engine, Generation, Sampling, sample
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

CONFIG = GPTConfig(sequence_len=32, vocab_size=72, n_layer=3, n_head=2, n_kv_head=1, n_embd=32)
WINDOW = min(CONFIG.windows())
GREEDY = Sampling(temperature=0)


class Letters:
    """A tokenizer of single characters, with the special tokens that it is given."""

    def __init__(self, *special: str) -> None:
        self.characters = "0123456789+-*/().'abcdefghijklmnopqrstuvwxyz _,"
        self.special = {name: len(self.characters) + i for i, name in enumerate(("<|bos|>", *special))}

    def get_bos_token_id(self) -> int:
        return self.special["<|bos|>"]

    def encode_special(self, text: str) -> int:
        if text not in self.special:
            raise ValueError(f"no special token {text}")
        return self.special[text]

    def encode(self, text: str) -> list[int]:
        return [self.characters.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)


TOOL = tuple(f"<|{name}|>" for name in ("python_start", "python_end", "output_start", "output_end"))
PLAIN = Letters("<|assistant_end|>")
CHAT = Letters("<|assistant_end|>", *TOOL)


class Script:
    """A model that goes on as its script says, what may follow each token; it notes the rows that it is asked for."""

    config, dtype, device = CONFIG, torch.float32, torch.device("cpu")

    def __init__(self, follows: dict[int, list[int]]) -> None:
        self.follows = follows
        self.asked: list[tuple[int, int]] = []

    def __call__(self, idx: torch.Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> torch.Tensor:
        assert cache is not None
        assert last_only
        cache.check(*idx.shape)
        cache.advance(idx.size(1))
        self.asked.append((idx.size(0), idx.size(1)))
        logits = torch.full((idx.size(0), 1, CONFIG.vocab_size), -100.0)
        for row, last in enumerate(idx[:, -1].tolist()):
            logits[row, 0, self.follows[last]] = 0.0
        return logits


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> GPT:
    """A small model with something to say: no matrix of it is zero."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(1)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight", "smear_lambda")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def naively(
    model: GPT, codec: Letters, prompt: list[int], num_samples: int, max_tokens: int, how: Sampling, seed: int
) -> list[list[int]]:
    """Each token from the whole sequence before it, without a cache."""
    draw = torch.Generator().manual_seed(seed)
    uniforms = [torch.rand(num_samples, generator=draw) for _ in range(max_tokens)]
    ends = {codec.special.get("<|assistant_end|>"), codec.get_bos_token_id()}
    out = []
    for row in range(num_samples):
        tokens = list(prompt)
        for uniform in uniforms:
            with torch.no_grad():
                logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(sample(logits, uniform[row : row + 1], how)))
            if tokens[-1] in ends:
                tokens.pop()
                break
        out.append(tokens[len(prompt) :])
    return out


# --- generation -------------------------------------------------------------------------------------------------------


def test_greedy_generation_equals_recomputation_past_the_window(model: GPT) -> None:
    codec, prompt = Letters(), [3, 1, 4, 1, 5]
    beyond = WINDOW + 20
    assert len(prompt) < WINDOW < beyond < CONFIG.rotary_len
    ((found,),) = Engine(model, codec).generate_batch([prompt], max_tokens=beyond, how=GREEDY)
    assert found.tokens == naively(model, codec, prompt, 1, beyond, GREEDY, 0)[0]
    assert len(set(found.tokens)) > 3
    assert not any(found.forced)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, 20, 0.5)])
def test_seeded_samples_equal_recomputation(model: GPT, how: Sampling) -> None:
    prompt = [7, 8, 9]
    (found,) = Engine(model, PLAIN).generate_batch([prompt], 4, max_tokens=40, how=how, seed=5)
    assert [each.tokens for each in found] == naively(model, PLAIN, prompt, 4, 40, how, 5)
    assert len({tuple(each.tokens) for each in found}) == 4
    (again,) = Engine(model, PLAIN).generate_batch([prompt], 4, max_tokens=40, how=how, seed=5)
    assert again == found
    (other,) = Engine(model, PLAIN).generate_batch([prompt], 4, max_tokens=40, how=how, seed=6)
    assert other != found


def test_prompts_of_many_lengths_each_get_what_they_get_alone(model: GPT) -> None:
    prompts = [[1, 2, 3], [9] * 40, [4], [3, 2, 1], [6] * (WINDOW + 9)]
    engine = Engine(model, PLAIN)
    together = engine.generate_batch(prompts, 3, max_tokens=20, seed=11)
    for number, prompt in enumerate(prompts):
        assert together[number] == engine.generate_batch([prompt], 3, max_tokens=20, seed=11 + number)[0]
        assert [each.tokens for each in together[number]] == naively(
            model, PLAIN, prompt, 3, 20, Sampling(), 11 + number
        )
    assert engine.generate_batch([]) == []


def test_steps_stream_and_hold_what_the_batch_holds(model: GPT) -> None:
    engine, prompt = Engine(model, PLAIN), [5, 5]
    steps = engine.generate(prompt, 3, max_tokens=60, seed=3)
    first = next(steps)
    assert len(first.tokens) == len(first.forced) == 3
    rows: list[list[int]] = [[], [], []]
    for step in (first, *steps):
        for row, token in zip(rows, step.tokens, strict=True):
            if token is not None:
                row.append(token)
    ends = (PLAIN.get_bos_token_id(), PLAIN.encode_special("<|assistant_end|>"))
    (batch,) = engine.generate_batch([prompt], 3, max_tokens=60, seed=3)
    for row, each in zip(rows, batch, strict=True):
        assert row[: len(each.tokens)] == each.tokens
        assert len(row) == 60 or (row[-1] in ends and row[:-1] == each.tokens)


def test_a_prompt_is_read_once_and_finished_rows_cost_nothing() -> None:
    end = PLAIN.encode_special("<|assistant_end|>")
    script = Script({1: [2, end], 2: [1, end]})  # at each token a coin says whether it is the last
    (found,) = Engine(script, PLAIN).generate_batch([[2, 1]], 64, max_tokens=100, seed=0)
    lengths = [len(each.tokens) for each in found]
    assert max(lengths) < 99
    assert script.asked[0] == (1, 2)
    alive = [sum(length >= step for length in lengths) for step in range(1, max(lengths) + 1)]
    assert script.asked[1:] == [(rows, 1) for rows in alive]
    assert len(set(alive)) > 3


def test_a_step_has_none_for_a_sample_that_ended() -> None:
    end = PLAIN.encode_special("<|assistant_end|>")
    steps = list(Engine(Script({1: [2, end], 2: [1, end]}), PLAIN).generate([2, 1], 8, max_tokens=50, seed=0))
    for row in range(8):
        column = [step.tokens[row] for step in steps]
        assert column.index(end) == len(column) - column[::-1].index(end) - 1
        assert set(column[column.index(end) + 1 :]) <= {None}


@pytest.mark.parametrize("last", ["<|assistant_end|>", "<|bos|>"])
def test_generation_stops_at_the_end_of_the_turn(last: str) -> None:
    script = Script({1: [2], 2: [3], 3: [PLAIN.encode_special(last)]})
    assert Engine(script, PLAIN).generate_batch([[1]], max_tokens=50) == [[Generation([2, 3], [False, False])]]


def test_what_is_too_long_or_empty_is_refused(model: GPT) -> None:
    engine, reach = Engine(model, PLAIN), CONFIG.rotary_len
    for call in (engine.generate, lambda prompt, **rest: engine.generate_batch([prompt], **rest)):
        with pytest.raises(
            ValueError, match=rf"prompt of 20 tokens and {reach - 19} more: .* rotary tables reach {reach}"
        ):
            call([1] * 20, max_tokens=reach - 19)
        with pytest.raises(ValueError, match="a token at least"):
            call([])
        with pytest.raises(ValueError, match="num_samples 0"):
            call([1], num_samples=0)
        with pytest.raises(ValueError, match="max_tokens 0"):
            call([1], max_tokens=0)
    tokens = [step.tokens for step in Engine(model, Letters()).generate([1] * (reach - 2), max_tokens=2, how=GREEDY)]
    assert len(tokens) == 2


def test_the_weights_can_still_learn_after_generation(model: GPT) -> None:
    next(Engine(model, PLAIN).generate([1, 2]))
    loss = model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))
    (gradient,) = torch.autograd.grad(loss, [model.lm_head.weight])
    assert gradient.abs().sum() > 0


# --- the calculator as a tool -----------------------------------------------------------------------------------------


def chain(codec: Letters, tokens: Sequence[int]) -> Script:
    """A script that says these tokens, one after the other; each must be another."""
    assert not [token for token, times in Counter(tokens).items() if times > 1]
    return Script({a: [b] for a, b in pairwise(tokens)})


def test_the_value_of_a_sum_is_forced_after_it() -> None:
    start, end, output, output_end = map(CHAT.encode_special, TOOL)
    stop = CHAT.encode_special("<|assistant_end|>")
    script = chain(CHAT, [*CHAT.encode("a"), start, *CHAT.encode("12*(3+4)"), end])
    script.follows |= {end: [0], output: [0], CHAT.encode("8")[0]: [0], output_end: [stop]}
    script.follows[CHAT.encode("4")[0]] = CHAT.encode(")")
    ((found,),) = Engine(script, CHAT).generate_batch([CHAT.encode("a")], max_tokens=50)
    said = [start, *CHAT.encode("12*(3+4)"), end]
    forced = [output, *CHAT.encode("84"), output_end]
    assert found.tokens[: len(said)] == said
    assert found.tokens[len(said) : len(said) + len(forced)] == forced
    assert found.forced == [False] * len(said) + [True] * len(forced)
    assert len(found.tokens) == len(said) + len(forced)  # and the stop, which the script says after the forced end


@pytest.mark.parametrize("written", ["1+", "", "f(1)"])
def test_what_has_no_value_forces_nothing(written: str) -> None:
    start, end, *_ = map(CHAT.encode_special, TOOL)
    stop = CHAT.encode_special("<|assistant_end|>")
    script = chain(CHAT, [*CHAT.encode("a"), start, *CHAT.encode(written), end, stop])
    ((found,),) = Engine(script, CHAT).generate_batch([CHAT.encode("a")], max_tokens=50)
    assert found.tokens == [start, *CHAT.encode(written), end]
    assert not any(found.forced)


def test_forced_tokens_count_towards_the_length() -> None:
    start, end, output, _ = map(CHAT.encode_special, TOOL)
    script = chain(CHAT, [*CHAT.encode("a"), start, *CHAT.encode("2+3"), end, *CHAT.encode("z")])
    ((found,),) = Engine(script, CHAT).generate_batch([CHAT.encode("a")], max_tokens=6)
    assert found == Generation([start, *CHAT.encode("2+3"), end, output], [False] * 5 + [True])


def test_each_sample_has_its_own_sum() -> None:
    start, end, output, output_end = map(CHAT.encode_special, TOOL)
    stop = CHAT.encode_special("<|assistant_end|>")
    digits = CHAT.encode("123456789")
    script = Script(
        {0: [start], start: digits, **{digit: [end] for digit in digits}, end: [0], output: [0], output_end: [stop]}
    )
    (found,) = Engine(script, CHAT).generate_batch([[0]], 20, max_tokens=30, seed=1)
    seen = set()
    for tokens, forced in found:
        digit = tokens[1]
        assert tokens == [start, digit, end, output, digit, output_end]
        assert forced == [False] * 3 + [True] * 3
        seen.add(digit)
    assert len(seen) > 3


def test_without_its_special_tokens_there_is_no_calculator() -> None:
    codec = Letters("<|assistant_end|>", *TOOL[:3])
    start, end, _ = map(codec.encode_special, TOOL[:3])
    stop = codec.encode_special("<|assistant_end|>")
    script = chain(codec, [*codec.encode("a"), start, *codec.encode("1+2"), end, stop])
    ((found,),) = Engine(script, codec).generate_batch([codec.encode("a")], max_tokens=20)
    assert found == Generation([start, *codec.encode("1+2"), end], [False] * 5)


# --- sampling ---------------------------------------------------------------------------------------------------------


def chances(logits: list[float], how: Sampling) -> list[float]:
    """The distribution, as slowly and plainly as can be, in fp64."""
    scaled = torch.tensor(logits, dtype=torch.float64) / how.temperature
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: how.top_k or None]
    weights = torch.zeros(len(logits), dtype=torch.float64)
    weights[order] = (scaled[order] - scaled.max()).exp()
    weights /= weights.sum()
    before = 0.0
    for i in order:
        kept = before < how.top_p
        before += float(weights[i])
        if not kept:
            weights[i] = 0
    return (weights / weights.sum()).tolist()


distinct = st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True)


@settings(max_examples=100, deadline=None)
@given(distinct, st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 14), st.sampled_from([0.05, 0.4, 0.77, 0.99, 1.0]))
def test_sampling_follows_the_distribution(grid: list[int], temperature: float, top_k: int, top_p: float) -> None:
    logits = [i / 8 for i in grid]
    how, points = Sampling(temperature, top_k, top_p), 4000
    uniform = (torch.arange(points) + 0.5) / points
    drawn = sample(torch.tensor([logits]).expand(points, -1), uniform, how).tolist()
    wanted, counts = chances(logits, how), Counter(drawn)
    for i, chance in enumerate(wanted):
        assert abs(counts[i] / points - chance) <= 2 / points + 1e-6
        assert chance > 0 or counts[i] == 0


@settings(max_examples=50, deadline=None)
@given(distinct, st.sampled_from([0.0, 1 - 2**-24, 0.5]), st.sampled_from([1e-30, 1e-3, 1.0, 1e6]))
def test_the_ends_of_the_interval_and_of_the_temperatures_are_safe(
    grid: list[int], uniform: float, temperature: float
) -> None:
    how = Sampling(temperature, top_k=3, top_p=0.9)
    drawn = int(sample(torch.tensor([grid], dtype=torch.float32), torch.tensor([uniform]), how))
    assert grid[drawn] in sorted(grid)[-3:]
    assert temperature > 1e-2 or grid[drawn] == max(grid)
    assert int(sample(torch.tensor([grid]), torch.tensor([uniform]), GREEDY)) == grid.index(max(grid))


def test_sampling_never_takes_what_has_no_chance() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    uniform = torch.tensor([0.0, 0.49, 0.51, 1 - 2**-24])
    assert sample(logits.expand(4, -1), uniform, Sampling()).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_bad_sampling_is_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Sampling(**settings)
