"""Continue text with a trained language model: a checkpoint's folder, of ours or of Hugging Face's form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nanochat.checkpoint_manager import META, Checkpoint, load, load_model

if TYPE_CHECKING:
    import torch

    from nanochat.engine import Sampling

Conversation = Sequence[Mapping[str, str]]  # {"role": "user" or "assistant", "content": …}, in turn

CONFIG = "config.json"  # of a model in Hugging Face's form


class TextModel(Protocol):
    """A language model with its tokenizer."""

    context: int
    """Tokens that it reads at most: prompt and continuation together, unless it forgets the beginning."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's beginning, with whatever token a text begins with in training."""
        ...

    def render(self, conversation: Conversation) -> list[int]:
        """Return the ids up to where the assistant's answer begins. Raises ValueError if it has no form for chats."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def generate(self, prompt: Sequence[int], max_tokens: int, how: Sampling, seed: int) -> Iterator[int]:
        """Yield the ids that follow, until the model ends the text or `max_tokens`. Same seed, same ids."""
        ...


def load_text_model(path: Path, device: torch.device, step: int | None = None) -> TextModel:
    """Load the model of a run's folder, of its model folder, or of one with config.json.

    Raises ValueError in one line that names the folder if there is no language model that can be read.
    """
    folder = path / "model" if (path / "model").is_dir() else path
    if not folder.is_dir():
        raise ValueError(f"{path}: no such folder; name a run's, such as runs/demo, or a model's")
    if (folder / CONFIG).is_file() and step is None and not (folder / META).is_file():
        return HubModel(folder, device)
    try:
        checkpoint = load(folder, step, parts={"model"})
    except OSError as error:
        raise ValueError(f"{folder}: {error.strerror or error}") from None
    if CONFIG in checkpoint.files:
        return HubModel(checkpoint.path, device)
    if "config" not in checkpoint.meta:
        raise ValueError(f"{folder}: holds no language model, so there is no text to continue")
    return NanochatModel(checkpoint, device)


def continuation(
    model: TextModel, prompt: Sequence[int], *, max_tokens: int, how: Sampling, seed: int
) -> Iterator[str]:
    """Yield the text that follows the prompt's ids, each piece as soon as its characters are complete."""
    ids, shown = list(prompt), len(model.decode(prompt))
    for token in model.generate(prompt, max_tokens, how, seed):
        ids.append(token)
        text = model.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # which stands for the first bytes of a character
            yield text[shown:]
            shown = len(text)
    yield model.decode(ids)[shown:]


class HubModel:
    """Any causal language model that Hugging Face's transformers loads from a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{folder}: {' '.join(str(error).split())[:300]}") from None
        self._model, self._device = model.to(device).eval(), device
        config = model.config
        self.context: int = getattr(config, "max_position_embeddings", 2048)  # GPT-2's name for it works, too
        ends = {self._tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)}
        self._ends = {end for each in ends for end in (each if isinstance(each, list) else [each])}

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"]) or [self._tokenizer.bos_token_id]

    def render(self, conversation: Conversation) -> list[int]:
        if not self._tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template; continue a --prompt instead")
        ids = self._tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=False)
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, prompt: Sequence[int], max_tokens: int, how: Sampling, seed: int) -> Iterator[int]:
        """See TextModel. Past `context` tokens it starts again from the last half of them."""
        import torch

        from nanochat.engine import sample

        draws = torch.Generator().manual_seed(seed)
        text, cache, unread = list(prompt[-self.context :]), None, list(prompt[-self.context :])
        for _ in range(max_tokens):
            if len(text) > self.context:
                text = text[-self.context // 2 :]
                cache, unread = None, text
            with torch.no_grad():
                ids = torch.tensor([unread], device=self._device)
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
            uniform = torch.rand(1, generator=draws).to(self._device)
            token = int(sample(out.logits[:, -1], uniform, how))
            if token in self._ends:
                return
            yield token
            cache, unread = out.past_key_values, [token]
            text.append(token)


class NanochatModel:
    """nanochat's GPT. A checkpoint without a tokenizer is one of bytes."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        import torch

        from nanochat.checkpoint_manager import check_tokenizer
        from nanochat.engine import Engine
        from nanochat.tokenizer import Tokenizer

        if "tokenizer.json" in checkpoint.files:
            self._tokenizer = Tokenizer.from_bytes(checkpoint.read("tokenizer.json"))
            check_tokenizer(checkpoint, self._tokenizer.digest)
        else:
            self._tokenizer = Tokenizer.bytewise()
        if self._tokenizer.get_vocab_size() != checkpoint.config.vocab_size:
            raise ValueError(f"{checkpoint.path}: holds no tokenizer.json, and its model is not one of bytes")
        wide = checkpoint.meta.get("dtype", "fp32") == "fp32" or device.type == "cpu"
        model = load_model(checkpoint, device, torch.float32 if wide else torch.bfloat16).eval()
        self._engine = Engine(model, self._tokenizer)
        self._ends = {self._tokenizer.get_bos_token_id()}
        self._ends |= {self._tokenizer.special_tokens.get("<|assistant_end|>", -1)}
        self.context = checkpoint.config.rotary_len

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, prepend=self._tokenizer.get_bos_token_id())

    def render(self, conversation: Conversation) -> list[int]:
        return self._tokenizer.render_for_completion({"messages": list(conversation)})

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def generate(self, prompt: Sequence[int], max_tokens: int, how: Sampling, seed: int) -> Iterator[int]:
        """See TextModel. Raises ValueError if prompt and continuation exceed `context`."""
        for step in self._engine.generate(prompt, max_tokens=max_tokens, how=how, seed=seed):
            (token,) = step.tokens
            if token is None or token in self._ends:
                return
            yield token
