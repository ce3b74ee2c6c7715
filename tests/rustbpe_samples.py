"""Texts for the tests of rustbpe, and its class; a test module that imports this is skipped where it is not built."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

rustbpe = pytest.importorskip("rustbpe")
if not hasattr(rustbpe, "Tokenizer"):
    pytest.skip("rustbpe is not built (it needs Rust's cargo: make setup)", allow_module_level=True)
Tokenizer = rustbpe.Tokenizer

SPECIALS = ("<|bos|>", "<|user|>", "<|user|>2")
PATTERNS = (rustbpe.DEFAULT_PATTERN, rustbpe.NANOCHAT_PATTERN, rustbpe.GPT2_PATTERN, rustbpe.CL100K_PATTERN)
TRICKY = (
    "I'LL say: don't, it'ſ 12345 ²³ Ⅷ  \t\r\n\n  \u00a0x\u2003 e\u0301 中文 👩\u200d💻 'S'd'K\u212a \u0085--- ...\n"
)


def library(count: int = 60) -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py"))[:count]]


def learn(texts: list[str], size: int, **arguments: object) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer.train_from_iterator(texts, size, **arguments)
    return tokenizer
