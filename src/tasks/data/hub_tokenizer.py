"""Hugging Face's tokenizer files: read a model's own tokenizer, and write ours for `AutoTokenizer`."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from protocol import ProtocolError, digest
from tasks.data.tokenizer import (
    VOCABULARY_FILES,
    BPETokenizer,
    ByteTokenizer,
    HubTokenizer,
    HubVocabulary,
    RustTokenizer,
    Tokenizer,
    byte_letters,
    parse_vocabulary,
)

TOKENIZER = "tokenizer.json"
ENDOFTEXT = "<|endoftext|>"
CONFIG = "tokenizer_config.json"
OURS = ("meta.json", "vocabulary")  # of a model that this program saved
FOREIGN = ("vocab.json", "encoder.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
GPT2_DIGEST = "aaf31fbd9b2491c1961cee25bd4849fc8e87f0004a984c4b241d2e4554c8bd13"  # of its vocabulary
OTHER = "name another with --gpt2.tokenizer"


def find_file(name: str, file: str) -> Path | None:
    """Return a file of a model's folder, or of a model on the hub; None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder / file if os.path.lexists(folder / file) else None
    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    try:
        body = from_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON: cut short or damaged; copy or download it again") from None
    if not isinstance(body, dict):
        raise ValueError(f"{path}: not a JSON object")
    return body


# --- reading ----------------------------------------------------------------------------------------------------------


def own_tokenizer(name: str) -> Tokenizer | None:
    """Return the tokenizer in a model's folder or on the hub; None if it has none.

    Raises ValueError for a damaged one, and for one that is not GPT-2's byte-level BPE with a vocabulary of its own.
    """
    if saved := _saved_by_us(name):
        return saved
    if path := find_file(name, TOKENIZER):
        return _from_json(name, path)
    for encoder, merges in VOCABULARY_FILES:
        vocabulary, pairs = find_file(name, encoder), find_file(name, merges)
        if vocabulary and pairs:
            return _from_pairs(name, vocabulary, pairs)
    for file in FOREIGN:
        if path := find_file(name, file):
            raise ValueError(f"{path}: no byte-pair encoding of a kind that is read here, or a part of one; {OTHER}")
    return None


def named_tokenizer(name: str) -> Tokenizer | None:
    """Return the tokenizer of --gpt2.tokenizer if that is a model's folder or its tokenizer.json, else None."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if found := own_tokenizer(name):
            return found
        raise ValueError(f"no {TOKENIZER}, nor vocab.json and merges.txt, in this folder")
    if path.is_file() and path.read_bytes()[:1] == b"{" and "model" in read_json(path):
        return _from_json(str(path.parent), path)
    return None


def _saved_by_us(name: str) -> Tokenizer | None:
    meta, vocabulary = (find_file(name, file) for file in OURS)
    if meta is None:
        return None
    values = read_json(meta).get("meta")
    kind = values.get("tokenizer") if isinstance(values, dict) else None
    kinds = {kind.name: kind for kind in (BPETokenizer, RustTokenizer, HubTokenizer)}
    if kind == ByteTokenizer.name:
        return ByteTokenizer()
    if kind not in kinds or vocabulary is None:
        return None
    try:
        return kinds[kind](vocabulary.read_bytes())
    except ProtocolError as error:
        raise ValueError(f"{vocabulary}: {error}") from None


def _from_json(name: str, path: Path) -> Tokenizer:
    body = read_json(path)
    model, before = body.get("model"), body.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: not a byte-pair encoding, the only kind that a GPT-2 is trained with; {OTHER}")
    for part, empty in (("continuing_subword_prefix", ""), ("end_of_word_suffix", ""), ("byte_fallback", False)):
        if (model.get(part) or empty) != empty:
            raise ValueError(f"{path}: {part} is not supported; {OTHER}")
    if body.get("normalizer") is not None:
        raise ValueError(f"{path}: it changes the text before it encodes it (normalizer); {OTHER}")
    if isinstance(before, dict) and before.get("type") == "Sequence" and len(before.get("pretokenizers", ())) == 1:
        before = before["pretokenizers"][0]
    if not isinstance(before, dict) or before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        raise ValueError(f"{path}: it does not split text as GPT-2's tokenizer does (ByteLevel); {OTHER}")
    if before.get("add_prefix_space"):
        raise ValueError(f"{path}: add_prefix_space adds a space to each text; set it to false, or {OTHER}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
    tokens = [token for token in body.get("added_tokens") or () if isinstance(token, dict)]
    vocab = {**model["vocab"], **{token.get("content"): token.get("id") for token in tokens}}
    flags = ("content", "single_word", "lstrip", "rstrip")
    added = [[token.get(flag) for flag in flags] for token in tokens if not token.get("special")]
    return _made(path, name, vocab, merges, added, _begins_with(body.get("post_processor")))


def _begins_with(post_processor: Any) -> str | None:
    """Return the special token that begins each text, if there is one."""
    parts = post_processor.get("processors", [post_processor]) if isinstance(post_processor, dict) else ()
    for part in parts:
        single = part.get("single") if isinstance(part, dict) and part.get("type") == "TemplateProcessing" else None
        if isinstance(single, list) and single and isinstance(single[0], dict) and "SpecialToken" in single[0]:
            return str(single[0]["SpecialToken"]["id"])
    return None


def _from_pairs(name: str, encoder: Path, merges: Path) -> Tokenizer:
    vocab = read_json(encoder)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{merges}: no list of merges ({error})") from None
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return _made(encoder, name, vocab, pairs, [], None)


def _made(path: Path, name: str, vocab: dict[str, Any], merges: list[Any], added: list[Any], first: Any) -> Tokenizer:
    """Return the tokenizer of these parts; GPT-2's own is the tokenizer gpt2, however it is written.

    `first` is the token that begins each text, if there is one.
    """
    separator = first or _separator(path, name, vocab)
    parts = {
        "vocab": vocab,
        "merges": merges,
        "added": added,
        "separator": (separator, vocab.get(separator)),
        "leads": first is not None,
    }
    try:
        found = HubVocabulary.parse(json.dumps(parts).encode()).pruned()
        ranks = _ranks(found)
        if digest("vocabulary", ranks) == GPT2_DIGEST:
            return BPETokenizer(ranks)
        return HubTokenizer(found.model_dump_json().encode())
    except ProtocolError as error:
        raise ValueError(f"{path}: {error}; {OTHER}") from None


def _ranks(parts: HubVocabulary) -> bytes:
    """Return the vocabulary as GPT-2's would be written for `BPETokenizer`."""
    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ordered = sorted(parts.vocab.items(), key=lambda item: item[1])
    tokens = (bytes(byte_of.get(letter, 0) for letter in token) for token, _ in ordered)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _separator(path: Path, name: str, vocab: Mapping[str, Any]) -> str:
    """Return the token between two documents: the tokenizer's eos_token, <|endoftext|>, or that of config.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = find_file(name, file)
        token = read_json(found).get("eos_token") if found else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            return token
    if ENDOFTEXT in vocab:
        return ENDOFTEXT
    config = find_file(name, "config.json")
    number = read_json(config).get("eos_token_id") if config else None
    for token, id in vocab.items():
        if type(id) is int and id == number:
            return token
    raise ValueError(f"{path}: no token that ends a text; name one as eos_token in tokenizer_config.json, or {OTHER}")


# --- writing ----------------------------------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer, positions: int) -> dict[str, bytes]:
    """Return tokenizer.json and tokenizer_config.json, with which `AutoTokenizer` makes the same ids.

    A text that holds the name of a special token gets that token's id there, as with every model of the hub.
    """
    body, separator = _to_json(tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "bos_token": separator,
        "eos_token": separator,
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER: json.dumps(body, ensure_ascii=False).encode(), CONFIG: json.dumps(config, indent=2).encode()}


def _to_json(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """Return the tokenizer in the form of Hugging Face's library, and its separator's name."""
    if isinstance(tokenizer, RustTokenizer):
        from nanochat.tokenizer import BOS

        body: dict[str, Any] = json.loads(tokenizer.inner.inner.to_huggingface())
        begins = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        body["post_processor"] = {
            "type": "TemplateProcessing",
            "single": begins,
            "pair": [*begins, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [tokenizer.separator], "tokens": [BOS]}},
        }
        return body, BOS
    if isinstance(tokenizer, HubTokenizer):
        parts = tokenizer.parts
        name, vocab, merges = parts.separator[0], dict(parts.vocab), parts.merges
        added: list[dict[str, Any]] = [
            {"content": text, "single_word": word, "lstrip": left, "rstrip": right, "special": False}
            for text, word, left, right in parts.added
        ]
    else:
        name, added = ENDOFTEXT, []
        vocab, merges = _pairs(tokenizer)
    vocab[name] = tokenizer.separator
    special: dict[str, Any] = {"content": name, "single_word": False, "lstrip": False, "rstrip": False, "special": True}
    tokens = [{"id": vocab[token["content"]], "normalized": False, **token} for token in (*added, special)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(tokens, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }, name


def _pairs(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return ids by token, and every pair of tokens that makes a third, in the order of merging."""
    letters = byte_letters()
    if tokenizer.vocabulary is None:  # of bytes, the separator is the one that no text has
        return {letter: byte for byte, letter in enumerate(letters) if byte != tokenizer.separator}, []
    ranks = {
        "".join(letters[byte] for byte in token): rank for token, rank in parse_vocabulary(tokenizer.vocabulary).items()
    }
    cuts = ((token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token)))
    return ranks, [(left, right) for left, right in cuts if left in ranks and right in ranks]
