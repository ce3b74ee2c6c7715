"""Generation: a prompt is read once; its samples continue together from one cache, which finished ones leave.

Between <|python_start|> and <|python_end|> the model may write an expression: its value is inserted after it,
between <|output_start|> and <|output_end|>, as if the model had written it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from nanochat.calculator import calculate
from nanochat.kv_cache import KVCache

if TYPE_CHECKING:
    from nanochat.config import GPTConfig


class Model(Protocol):
    """The part of nanochat.gpt.GPT that is used here."""

    @property
    def config(self) -> GPTConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, idx: torch.Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> torch.Tensor: ...


class Codec(Protocol):
    """The part of nanochat.tokenizer.Tokenizer that is used here."""

    def get_bos_token_id(self) -> int: ...
    def encode_special(self, text: str, /) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, ids: Sequence[int], /) -> str: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; top_k 0 and top_p 1 exclude none."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: must be 0 or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}: must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: must lie above 0 and be 1 at most")


class Step(NamedTuple):
    """A token of each sample, None if it has ended; `forced` marks those that the calculator wrote."""

    tokens: list[int | None]
    forced: list[bool]


class Generation(NamedTuple):
    """A prompt's continuation, without the token that ended it."""

    tokens: list[int]
    forced: list[bool]


@dataclass
class _Sample:
    number: int
    waiting: deque[int] = field(default_factory=deque)  # forced tokens
    expression: list[int] | None = None  # since <|python_start|>


def sample(logits: torch.Tensor, uniform: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Choose ids (B,) by logits (B, V) and uniform numbers (B,) in [0, 1), by inverting the cumulative distribution.

    The caller draws the numbers, so they are the same on every device, and each row's are independent of the others.
    """
    if how.temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits.float(), None
    if how.top_k or how.top_p < 1:
        logits, ids = logits.topk(min(how.top_k or logits.size(-1), logits.size(-1)))
    chances = ((logits - logits.amax(-1, keepdim=True)) / how.temperature).softmax(-1)
    if how.top_p < 1:  # the likeliest ones whose sum reaches it
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= how.top_p, 0)
    reached = chances.cumsum(-1)
    at = torch.searchsorted(reached, uniform.to(reached)[:, None] * reached[:, -1:], right=True)
    at.clamp_(max=reached.size(-1) - 1)
    return (at if ids is None else ids.gather(-1, at)).squeeze(-1)


class Engine:
    """Generates text with a model and its tokenizer. The calculator needs the tokenizer's special tokens."""

    def __init__(self, model: Model, tokenizer: Codec) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._ends = {tokenizer.get_bos_token_id(), self._special("<|assistant_end|>")}
        tool = [self._special(f"<|{name}|>") for name in ("python_start", "python_end", "output_start", "output_end")]
        self._tool = [token for token in tool if token is not None] if None not in tool else None

    def generate(
        self,
        prompt: Sequence[int],
        num_samples: int = 1,
        *,
        max_tokens: int = 256,
        how: Sampling = Sampling(),
        seed: int = 42,
    ) -> Iterator[Step]:
        """Yield token by token. A sample ends with <|assistant_end|> or <|bos|>, or after `max_tokens`.

        Raises ValueError if prompt and `max_tokens` exceed the model's rotary tables.
        """
        self._check([prompt], num_samples, max_tokens)
        return self._steps([prompt], [seed], num_samples, max_tokens, how)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        *,
        max_tokens: int = 256,
        how: Sampling = Sampling(),
        seed: int = 42,
    ) -> list[list[Generation]]:
        """Return the samples of each prompt; prompts of one length share a batch. Prompt i has the seed `seed` + i.

        Raises ValueError as `generate` does.
        """
        self._check(prompts, num_samples, max_tokens)
        done = [[Generation([], []) for _ in range(num_samples)] for _ in prompts]
        for length in sorted({len(prompt) for prompt in prompts}):
            numbers = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
            together, seeds = [prompts[i] for i in numbers], [seed + i for i in numbers]
            for step in self._steps(together, seeds, num_samples, max_tokens, how):
                for row, (token, forced) in enumerate(zip(*step, strict=True)):
                    if token is not None and token not in self._ends:
                        generation = done[numbers[row // num_samples]][row % num_samples]
                        generation.tokens.append(token)
                        generation.forced.append(forced)
        return done

    def _check(self, prompts: Sequence[Sequence[int]], num_samples: int, max_tokens: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples {num_samples}: must be 1 or more")
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: must be 1 or more")
        if not all(map(len, prompts)):
            raise ValueError("a prompt must have a token at least, such as <|bos|>")
        longest, reach = max(map(len, prompts), default=0), self.model.config.rotary_len
        if longest + max_tokens > reach:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens} more: the model's rotary tables reach {reach} tokens"
            )

    def _special(self, text: str) -> int | None:
        try:
            return self.tokenizer.encode_special(text)
        except (KeyError, ValueError):
            return None

    def _steps(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], num_samples: int, max_tokens: int, how: Sampling
    ) -> Iterator[Step]:
        """Generate from prompts of one length, `num_samples` rows each."""
        total = len(prompts) * num_samples
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        samples = [_Sample(number) for number in range(total)]
        cache, logits = self._read(prompts, num_samples, len(prompts[0]) + max_tokens)
        for left in range(max_tokens - 1, -1, -1):
            uniform = torch.cat([torch.rand(num_samples, generator=draw) for draw in draws])
            rows = torch.tensor([each.number for each in samples])
            chosen = sample(logits, uniform[rows].to(logits.device), how).tolist()
            step = Step([None] * total, [False] * total)
            for i, each in enumerate(samples):
                step.forced[each.number] = bool(each.waiting)
                step.tokens[each.number] = chosen[i] = self._take(each, chosen[i])
            yield step
            goes_on = [i for i, token in enumerate(chosen) if token not in self._ends]
            if not goes_on or not left:
                return
            if len(goes_on) < len(samples):
                cache.select(torch.tensor(goes_on))
                samples = [samples[i] for i in goes_on]
            logits = self._logits([[chosen[i]] for i in goes_on], cache)

    def _read(self, prompts: Sequence[Sequence[int]], num_samples: int, capacity: int) -> tuple[KVCache, torch.Tensor]:
        """Read each prompt once, then make a row for each sample."""
        cache = KVCache(self.model.config, len(prompts), capacity, self.model.device, self.model.dtype)
        logits = self._logits(prompts, cache)
        if num_samples > 1:
            cache.select(torch.arange(len(prompts)).repeat_interleave(num_samples))
        return cache, logits.repeat_interleave(num_samples, 0)

    def _logits(self, tokens: Sequence[Sequence[int]], cache: KVCache) -> torch.Tensor:
        """Return the logits of the next token, (B, V)."""
        with torch.no_grad():
            return self.model(torch.tensor(tokens, device=self.model.device), cache=cache, last_only=True)[:, -1]

    def _take(self, each: _Sample, token: int) -> int:
        """Return the sample's next token, forced or chosen, and let the calculator react to it."""
        if each.waiting:
            return each.waiting.popleft()
        if self._tool is not None:
            python_start, python_end, output_start, output_end = self._tool
            if token == python_start:
                each.expression = []
            elif token == python_end and each.expression is not None:
                value = calculate(self.tokenizer.decode(each.expression))
                each.expression = None
                if value is not None:
                    each.waiting.extend([output_start, *self.tokenizer.encode(value), output_end])
            elif each.expression is not None:
                each.expression.append(token)
        return token
