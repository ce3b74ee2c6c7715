"""Render docs/BENCHMARKS.md from bench/results.jsonl: each figure with a sentence, and the command that measures it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from textwrap import fill
from typing import Any


@dataclass(frozen=True, eq=False)
class Section:
    """The figures of one bench: how they are measured, and a sentence for each figure by the pattern of its name."""

    title: str
    command: str
    method: str
    sentences: dict[str, str]


SECTIONS = (
    Section(
        "Start-up",
        "python -m bench.startup",
        "The median of interleaved runs. `--help` imports neither torch nor transformers nor bittensor.",
        {
            "startup.help_s": "Seconds until `validator.py --help` has printed and ended.",
            "startup.miner_at_rest_mb": "Resident memory of a miner that waits for an order.",
            "startup.first_round_s": "Seconds from the demo's start to its first round.",
        },
    ),
    Section(
        "Robust aggregation",
        "python -m bench.aggregation",
        "16 contributions of 10 million coordinates, 4 of them liars, with two threads. ByzFL gets the same tensors in "
        "the same process, and the results are equal up to rounding.",
        {
            "aggregation.*.s": "Seconds to aggregate.",
            "aggregation.*.extra_mb": "Memory beyond the contributions.",
        },
    ),
    Section(
        "Tokenizer",
        "python -m bench.tokenizer",
        "Training reads 80 MB of text and makes 32,768 tokens. Every training is a process of its own, and the "
        "programs take turns. Encoding and decoding run over 10 MB of the same text, with the same merges as tiktoken.",
        {
            "tokenizer.train_s": "Seconds to train the tokenizer.",
            "tokenizer.train_peak_mb": "Peak memory of the training.",
            "tokenizer.merges_equal": "1 if both trainers learn the same merges from every text.",
            "tokenizer.encode_mb_s": "Text encoded in a second, one document at a time.",
            "tokenizer.encode_batch_mb_s": "Text encoded in a second, in batches.",
            "tokenizer.decode_mb_s": "Text decoded in a second.",
            "tokenizer.worst_chunk_s": "Seconds for the slowest of several long texts without a break.",
        },
    ),
    Section(
        "Transport",
        "python -m bench.transport",
        "500 MB go between two processes on loopback, signed, hashed with blake3 at both ends, and streamed. The raw "
        "socket does not hash. The programs take turns.",
        {
            "transport.push_gb_s": "Speed from the validator to one miner, beside a raw socket.",
            "transport.push_vs_bytes_post": "The same, beside an aiohttp POST of bytes.",
            "transport.push_vs_file_post": "The same, beside an aiohttp POST of a file.",
            "transport.fetch_gb_s": "Speed from the miner to the validator, into a new file.",
            "transport.two_miners_gb_s": "Total speed to two miners at once.",
            "transport.extra_mb": "Peak memory of a push above what the sender held before.",
        },
    ),
    Section(
        "A warm round",
        "python -m bench.roundtrip",
        "Two miners each receive the whole state in fp32 (42 MB) and return 42 MB. The validator verifies, aggregates, "
        "steps and commits. Everything is durable.",
        {"transport.roundtrip_42mb_s": "Seconds from commit to commit."},
    ),
    Section(
        "Under junk",
        "python -m bench.junk",
        "50 connections send unsigned requests to a miner as fast as they are answered. Phases with and without junk "
        "take turns.",
        {
            "transport.under_junk": "Seconds of a round under junk.",
            "transport.under_junk_memory_mb": "Growth of the miner's memory.",
            "transport.under_junk_served": "Junk requests that were served; the peer counts those that were refused.",
        },
    ),
    Section(
        "Model",
        "python -m bench.model",
        "nanochat's GPT of depth 4, forward and backward on the CPU, beside the same model written plainly "
        "(`bench/reference_gpt.py`). Each variant is a process of its own, and the two take turns step by step. With "
        "`.reused` both keep the memory that they free, as `miner.py` and `base_train.py` do.",
        {
            "model.tokens_per_s.*": "Tokens in a second, forward and backward.",
            "model.peak_mb.*": "Peak memory.",
        },
    ),
    Section(
        "nanochat by a marketplace",
        "python -m bench.nanochat",
        "nanochat's d4 is trained on books, plainly and by a marketplace of two miners, on the same batches with the "
        "same optimizer and schedule.",
        {"nanochat.bpb.marketplace": "Bits per byte on held-out text after the run."},
    ),
    Section(
        "Overhead",
        "python -m bench.overhead",
        "One validator and one miner on one machine, beside plain training with the same threads. "
        "`overhead.tokens_per_s` is from a whole run: six rounds of 24.2 s of computing against six steps. "
        "`overhead.round_fixed_ms` was measured again by itself, because other work had run beside the first minute of "
        "its bench (33.8 ms).",
        {
            "overhead.round_fixed_ms": "Milliseconds that a round adds, with a nano GPT-2.",
            "overhead.tokens_per_s": "Tokens in a second with GPT-2 124M.",
        },
    ),
    Section(
        "Volatile machines",
        "python -m bench.volatile",
        "The marketplace runs on the emulated network in virtual time: links of 100 Mbit/s and 50 ms one way, 42 MB "
        "each way a round. The figures are the same in every run.",
        {
            "round.utilisation": "Share of the time that miners compute, after two rounds.",
            "round.utilisation_overlap": "The same with `--overlap 1`.",
            "round.accepted_preempted": "Work accepted from machines that are taken away with notice.",
            "round.lost_batches_per_preemption": "Micro-batches lost each time a machine is taken away with notice.",
            "deadline.auto_vs_fixed": "Samples accepted in an hour with `--deadline auto`.",
        },
    ),
    Section(
        "Many miners",
        "python -m bench.scale",
        "The real parts of the validator serve miners that compute nothing. CPU figures use payloads of 10 KB and "
        "leave out decoding; 256 and 1,024 miners run without sockets. Memory figures use payloads of 4 MB.",
        {
            "scale.cpu_ms_per_miner_round.*": "CPU time of the validator a miner and round, by the number of miners.",
            "scale.peak_mb.*": "Peak memory above what the validator held before the first round.",
        },
    ),
    Section(
        "Codecs",
        "python -m bench.codec",
        "124 million parameters in GPT-2's shapes, on one thread. Decoding adds to a tensor that exists. The peer does "
        "the same with whole tensors in plain torch, in turns. Figures of `ternary` and of `…+entropy` come from the "
        "build that had these codecs.",
        {
            "codec.copy_s": "Seconds to copy the same data in fp32, as a measure of the memory.",
            "codec.topk64.encode_extra_mb": "Memory that encoding takes beside its input.",
            "codec.*.encode_s": "CPU seconds to encode.",
            "codec.*.decode_s": "CPU seconds to decode and add.",
            "codec.*.encode_cuda_s": "Seconds to encode tensors on a GPU.",
            "codec.*.decode_cuda_s": "Seconds to decode into tensors on a GPU.",
            "codec.*.bits_per_param": "Bits a parameter, of the whole payload.",
            "codec.*.index_bits": "Bits an index takes with Rice coding.",
        },
    ),
    Section(
        "Joining late",
        "python -m bench.join",
        "A miner with nothing but its data joins at round 1,000 of a model of 10.6 million parameters, over loopback "
        "sockets. The peer is a history without snapshots.",
        {
            "wire.join_bytes": "Bytes that the newcomer receives.",
            "wire.join_s": "Seconds from its order until it works.",
        },
    ),
    Section(
        "A link of 100 Mbit/s",
        "python -m bench.thin",
        "GPT-2 124M on the emulated network: 100 Mbit/s, 50 ms one way, rounds of a minute.",
        {
            "wire.utilisation_100mbit.gradient": "Share of the time that miners compute in gradient mode.",
            "wire.utilisation_100mbit.gradient_overlap": "The same with `--overlap 1`.",
            "wire.utilisation_100mbit.diloco": "Share of the time that miners compute with `--mode diloco`.",
            "wire.utilisation_100mbit.diloco_overlap": "The same with `--overlap 1`.",
        },
    ),
    Section(
        "Loss against bytes",
        "python -m bench.wire",
        "GPT-2 nano on books, four miners, 4.1 million tokens, every byte of every message counted. `wire.gradient.…` "
        "is the mean of three seeds, `wire.diloco.…` of two, `small_batch` of one. The runs are in `bench/wire.jsonl`.",
        {
            "wire.gradient.gpt2.up_ratio": "Fewer bytes from miner to validator, by the default codecs.",
            "wire.gradient.gpt2.down_ratio": "Fewer bytes from validator to miner, by the default codecs.",
            "wire.gradient.gpt2.loss_vs_dense": "Final loss, beside the run in fp32.",
            "wire.gradient.gpt2.loss_vs_dense.small_batch": "The same with a batch that is mostly noise.",
            "wire.diloco.gpt2.loss_vs_sync": "Final loss of DiLoCo, beside synchronous training.",
            "wire.diloco.gpt2.loss_vs_dense": "Final loss of DiLoCo, beside DiLoCo in fp32.",
            "wire.diloco.gpt2.round_ratio": "Fewer bytes in a DiLoCo round, by the default codecs.",
            "wire.diloco.gpt2.token_ratio": "Fewer bytes a token than fp32 gradients at every step.",
            "wire.diloco.gpt2.run_ratio": "Fewer bytes over a whole run, its gradient rounds included.",
        },
    ),
    Section(
        "Chaos",
        "python -m bench.chaos",
        "Real processes are killed, paused, cut off and started again by a seed. The checker then reads what they "
        "left.",
        {
            "chaos.violations": "Rules that the checker found broken, over all seeds.",
            "chaos.loss": "The worst final loss, beside a calm run.",
        },
    ),
    Section(
        "Calls",
        "python -m bench.calls",
        "A validator and two miners run the quadratic task over HTTP on loopback. Calls are counted in steady rounds.",
        {
            "calls.*_crossings": "Calls in a round that go from one file to another.",
            "calls.*_files": "Files that a round enters.",
            "calls.*": "Function calls in a round.",
        },
    ),
)

HEAD = """\
# Benchmarks

<!-- Written by `python -m bench --write` from bench/results.jsonl. Do not edit. -->

Every figure here comes from a command. `make bench` runs them all in about half an hour, writes
`bench/results.jsonl`, and renders this page; `python -m bench --write` only renders it. The machine is a virtual one
with two cores and no GPU. Ours and the peer's are measured in the same run. A ratio is our value divided by the peer's;
for `tokenizer.train_s`, `codec.…` and the byte savings of `wire.…` it is the peer's divided by ours.
"""

TAIL = """\
## Pictures

`python -m bench.wire` draws the loss against the bytes of a miner:

![Loss against bytes of a miner](wire.png)

`python -m bench.wire --only curves` runs more codecs over an eighth of the tokens, with very small batches:

![Loss against bytes of codecs](wire_codecs.png)
"""


def cells(figure: dict[str, Any]) -> tuple[str, str, str]:
    """Return a figure's value with its unit, its peer and the ratio, as the tables show them."""
    peer = f"{figure['peer']}: {figure['peer_value']:.4g}" if figure["peer"] else ""
    ratio = f"{figure['ratio']:.3f}" if figure["ratio"] is not None else ""
    return f"{figure['value']:.4g} {figure['unit']}", peer, ratio


def render(lines: Iterable[str]) -> str:
    """Return the page for these lines of results.jsonl. Raises ValueError for a figure that no section describes."""
    figures = [json.loads(line) for line in lines]
    rows: dict[Section, list[str]] = {}
    for figure in figures:
        section, sentence = describe(figure["name"])
        row = " | ".join([f"`{figure['name']}`", sentence, *cells(figure)])
        rows.setdefault(section, []).append(f"| {row} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join([HEAD, *(table(section, rows[section]) for section in SECTIONS if section in rows), TAIL])


def describe(name: str) -> tuple[Section, str]:
    """Return the section of a figure and its sentence. Raises ValueError for a figure that none describes."""
    for section in SECTIONS:
        for pattern, sentence in section.sentences.items():
            if fnmatchcase(name, pattern):
                return section, sentence
    raise ValueError(f"figure {name}: bench/page.py has no sentence for it")


def table(section: Section, rows: Sequence[str]) -> str:
    """Return a section of the page."""
    head = ["| figure | what it measures | value | peer | ratio |", "|---|---|---|---|---|"]
    return "\n".join(
        [f"## {section.title}", "", f"    {section.command}", "", fill(section.method, 120), "", *head, *rows, ""]
    )
