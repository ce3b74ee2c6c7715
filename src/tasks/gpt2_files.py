"""Read a GPT-2 from a folder or the hub, strictly, and write the files with which other programs read ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.data.hub_tokenizer import find_file, read_json, tokenizer_files

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn

    from tasks.data.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"  # of weights in several files
POINTER = b"version https://git-lfs"
# Wrappers of a model put these parts into the names of its tensors: torch.compile, DDP, FSDP, checkpointing, Lightning.
WRAPPERS = frozenset(
    {"_orig_mod", "module", "model", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that older releases of transformers saved
FLOATS = ("float16", "bfloat16", "float32", "float64")
DAMAGED = "cut short or damaged; copy or download it again"
GARBLED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError)
STRANGE = "save the model again with save_pretrained, or name another"


# --- reading ----------------------------------------------------------------------------------------------------------


def load_config(name: str) -> transformers.GPT2Config:
    """Return the configuration of a GPT-2. Raises ValueError if there is none, or of another architecture."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    transformers.utils.logging.set_verbosity_error()  # what its warnings are about is checked here, or ours
    where = os.path.expanduser(name)
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        if os.path.isfile(os.path.join(where, CONFIG)):
            raise ValueError(
                f"{os.path.join(where, CONFIG)}: not the configuration of a model: {line_of(error)}"
            ) from None
        raise
    if not isinstance(config, transformers.GPT2Config):
        raise ValueError(f"a {config.model_type}, not a gpt2; name a GPT-2")
    return config


def line_of(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def load_weights(name: str, config: transformers.GPT2Config) -> nn.Module:
    """Return the model of a folder or the hub, in fp32.

    Raises ValueError unless the files hold each of its tensors in its shape, all finite, and nothing else.
    """
    import torch
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model: nn.Module = GPT2LMHeadModel(config)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    head, table = "lm_head.weight", "transformer.wte.weight"
    found: dict[str, torch.Tensor] = {}
    for file, key, tensor in _tensors(name):
        own = _plain_name(key, expected)
        if own is None:
            continue
        if own not in expected:
            raise ValueError(f"{file}: {key} is not of a GPT-2 language model of {CONFIG}'s sizes; {STRANGE}")
        if tensor.shape != expected[own]:
            shapes = tuple(tensor.shape), tuple(expected[own])
            raise ValueError(f"{file}: {key} has the shape {shapes[0]}, by {CONFIG} it is {shapes[1]}; correct that")
        if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
            raise ValueError(f"{file}: {key} is {tensor.dtype}, as of a quantised model; name one of floats")
        tensor = tensor.to(torch.float32, copy=True)  # not of the file, which may change
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {key} holds NaN or infinity; the run that saved it diverged, name another model")
        if own in found and not torch.equal(found[own], tensor):
            raise ValueError(f"{file}: {key} is there twice, with other values; {STRANGE}")
        found[own] = tensor
    if config.tie_word_embeddings:
        if head in found and table in found and not torch.equal(found[head], found[table]):
            raise ValueError(f"{name}: {head} differs from wte.weight; set tie_word_embeddings in {CONFIG} to false")
        shared = found.get(table, found.get(head))
        found |= {} if shared is None else {head: shared, table: shared}
    if missing := sorted(expected.keys() - found.keys()):
        others = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(f"{name}: its weights lack {missing[0]}{others}; {STRANGE}")
    model.load_state_dict(found, strict=True, assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model


def _plain_name(key: str, expected: Mapping[str, Any]) -> str | None:
    """Return the tensor's name in GPT2LMHeadModel, without a wrapper's parts; None for a mask."""
    plain = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    if plain.endswith(MASKS):
        return None
    return plain if plain in expected else f"transformer.{plain}"


def _tensors(name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (file, name, tensor) of the folder's or the hub model's weights. Raises ValueError if one is unreadable."""
    for weights in WEIGHTS:
        if path := find_file(name, weights):
            yield from _tensors_of(path)
            return
        if index := find_file(name, weights + INDEX):
            body = read_json(index)
            shards = body.get("weight_map")
            if not isinstance(shards, dict):
                raise ValueError(f"{index}: no weight_map; {DAMAGED}")
            for shard in sorted(set(map(str, shards.values()))):
                path = find_file(name, shard) if Path(shard).name == shard else None
                if path is None:
                    raise ValueError(f"{index}: names {shard}, which is not there; copy or download it")
                yield from _tensors_of(path)
            return
    raise ValueError(f"{name}: no {WEIGHTS[0]} or {WEIGHTS[1]} there; save the weights with save_pretrained")


def _tensors_of(path: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    try:
        with path.open("rb") as file:
            begins = file.read(len(POINTER))
        if begins == POINTER:
            raise ValueError(f"{path}: a Git LFS pointer, not the weights; fetch them with git lfs pull")
        tensors = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; make the file readable, or name another model") from None
    for key, tensor in tensors.items():
        yield str(path), key, tensor


def _safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, KeyError) as error:  # a KeyError for a type that torch lacks
        raise ValueError(f"{path}: {DAMAGED} ({line_of(error)})") from None


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of torch.save that holds tensors by name, and nothing that would run code."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (torch.serialization.pickle.UnpicklingError, *GARBLED) as error:  # type: ignore[attr-defined]
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise ValueError(f"{path}: holds Python objects besides tensors, which are not loaded; {STRANGE}") from None
        raise ValueError(f"{path}: {DAMAGED} ({line_of(error)})") from None
    if not isinstance(tensors, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: not tensors by name, as of model.state_dict(); {STRANGE}")
    return {str(key): tensor for key, tensor in tensors.items()}


# --- writing ----------------------------------------------------------------------------------------------------------


def exported(config: transformers.GPT2Config, tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files beside model.safetensors for AutoModelForCausalLM, AutoTokenizer and pipeline."""
    separator = tokenizer.separator
    config.architectures = ["GPT2LMHeadModel"]
    config.bos_token_id = config.eos_token_id = separator
    config.use_cache = True  # training has it off; generation is slow without
    config.dtype = "float32"
    # without a length `pipeline` makes 256 tokens, which may be more than the model has positions
    generation = {"bos_token_id": separator, "eos_token_id": separator, "max_length": config.n_positions}
    files = {
        CONFIG: config.to_json_string().encode(),
        "generation_config.json": json.dumps({**generation, "do_sample": True}, indent=2).encode(),
    }
    return files | tokenizer_files(tokenizer, config.n_positions)
