"""Checkpoints: bit-equal, all or nothing under SIGKILL, and whatever is damaged is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanochat.checkpoint_manager import Checkpoint, check_tokenizer, link_newest, load, load_model, save, steps
from nanochat.config import GPTConfig
from nanochat.gpt import GPT

torch.set_num_threads(1)

SHAPE = GPTConfig.from_depth(2, vocab_size=300, sequence_len=32, head_dim=32, aspect_ratio=32)
META: dict[str, Any] = {"tokenizer": "ab" * 32, "settings": {"lr": 0.1, "ü": [1, None, True]}, "loader": {"step": 7}}
Named = dict[str, torch.Tensor]


def tensors(seed: int = 0) -> dict[str, Named]:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "weight": torch.randn(17, 33, generator=generator),
        "transposed": torch.randn(8, 5, generator=generator).T,
        "bf16": torch.randn(3, 3, generator=generator).bfloat16(),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(4, generator=generator)),
    }
    optimizer = {"step/weight": torch.tensor(12.0), "random": torch.arange(5, dtype=torch.uint8)}
    return {"model": model, "optimizer": optimizer}


def put(folder: Path, step: int, keep: int = 0, seed: int = 0) -> Path:
    return save(folder, step, tensors=tensors(seed), meta=META, files={"tokenizer.json": b'{"a": 1}'}, keep=keep)


def same(one: Named, other: Named) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and torch.equal(bits(one[k]), bits(other[k]))
        for k in one
    )


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    path = put(tmp_path / "a" / "b", 123)
    assert path == tmp_path / "a" / "b" / "step_000123"
    checkpoint = load(path.parent)
    assert (checkpoint.step, checkpoint.meta, checkpoint.path) == (123, META, path)
    for part, named in tensors().items():
        assert same(checkpoint.tensors(part), named)
        assert same(load_file(path / f"{part}.safetensors"), named)
    assert checkpoint.read("tokenizer.json") == b'{"a": 1}'
    assert {p.name for p in path.parent.iterdir()} == {"step_000123"}


def test_a_folder_is_its_newest_checkpoint_by_links(tmp_path: Path) -> None:
    for step in (3, 7):
        path = put(tmp_path, step, keep=1, seed=step)
        link_newest(tmp_path)
        assert load(tmp_path).step == load(path).step == step
        assert same(load_file(tmp_path / "model.safetensors"), tensors(step)["model"])
    assert {p.name for p in tmp_path.iterdir() if not p.is_symlink()} == {"step_000007"}
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert load(moved).step == 7


def test_what_is_not_in_it_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1, tensors={"model": {}}, meta={})
    checkpoint = load(tmp_path)
    assert checkpoint.tensors() == {}
    with pytest.raises(ValueError, match=r"no optimizer\.safetensors"):
        checkpoint.tensors("optimizer")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        checkpoint.read("tokenizer.json")
    with pytest.raises(ValueError, match=r"meta\.json: config is not a model's shape"):
        _ = checkpoint.config


def test_one_is_found_by_step_as_the_newest_and_by_its_own_folder(tmp_path: Path) -> None:
    for step in (9, 100, 1_000_000):
        put(tmp_path, step, seed=step)
    assert steps(tmp_path) == [9, 100, 1_000_000]
    assert load(tmp_path).step == 1_000_000
    assert same(load(tmp_path, 9).tensors(), tensors(9)["model"])
    assert load(tmp_path / "step_000100").step == 100
    assert load(tmp_path / "step_000100", 100).step == 100
    with pytest.raises(ValueError, match="the checkpoint of step 100, not of 9"):
        load(tmp_path / "step_000100", 9)
    with pytest.raises(ValueError, match="no checkpoint of step 10; there are 9, 100, 1000000"):
        load(tmp_path, 10)


def test_a_checkpoint_may_be_moved(tmp_path: Path) -> None:
    os.rename(put(tmp_path, 5), tmp_path / "best")
    assert load(tmp_path / "best").step == 5


@pytest.mark.parametrize("folder", ["nowhere", "empty", "empty/step_000001"])
def test_no_checkpoint(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    assert steps(tmp_path / folder) == []
    with pytest.raises(ValueError, match=rf"{folder}: no (such )?checkpoint"):
        load(tmp_path / folder)


def test_the_last_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        put(tmp_path, step, keep=2)
    assert steps(tmp_path) == [4, 5]
    assert {p.name for p in tmp_path.iterdir()} == {"step_000004", "step_000005"}


def test_going_back_keeps_what_is_written(tmp_path: Path) -> None:
    for step in (1, 2, 8, 9):
        put(tmp_path, step)
    put(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3, 8, 9]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    put(tmp_path, 1, seed=1)
    put(tmp_path, 1, seed=2)
    assert same(load(tmp_path).tensors(), tensors(2)["model"])
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001"}


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    os.rename(put(tmp_path, 1, seed=1), tmp_path / ".step_000001.old")
    assert steps(tmp_path) == [1]
    assert same(load(tmp_path).tensors(), tensors(1)["model"])
    put(tmp_path, 2, seed=2)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001", "step_000002"}
    assert same(load(tmp_path, 1).tensors(), tensors(1)["model"])


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for meta, files in (({"x": float("nan")}, {}), ({}, {"../evil": b""}), ({}, {"model.safetensors": b""})):
        with pytest.raises((ValueError, FileExistsError)):
            save(tmp_path, 2, tensors=tensors(), meta=meta, files=files)
    assert {p.name for p in tmp_path.iterdir()} == {"step_000001"}


# --- damage -----------------------------------------------------------------------------------------------------------

FILES = ["meta.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut, empty, lengthen, flip, remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_file_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    put(tmp_path, 1)
    damage(put(tmp_path, 2) / name)
    with pytest.raises(
        ValueError, match=rf"step_000002/{name}: .+; delete it to go on from the one before, of step 1"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"step_000002/{name}: "):
        load(tmp_path / "step_000002")
    assert load(tmp_path, 1).step == 1


def test_every_flipped_byte_of_the_meta_data_is_found(tmp_path: Path) -> None:
    path = put(tmp_path, 1) / "meta.json"
    good = path.read_bytes()
    for at in range(len(good)):
        content = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"step_000001/meta\.json: ") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_tensors_that_nobody_wants_are_not_read(tmp_path: Path) -> None:
    flip(put(tmp_path, 1) / "optimizer.safetensors")
    checkpoint = load(tmp_path, parts={"model"})
    assert same(checkpoint.tensors(), tensors()["model"])
    with pytest.raises(ValueError, match="no optimizer"):
        checkpoint.tensors("optimizer")


# --- a process that is killed -----------------------------------------------------------------------------------------

WRITER = """
import sys, torch
from pathlib import Path
from nanochat.checkpoint_manager import save
torch.set_num_threads(1)
folder, step, stride = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
while True:
    tensors = {part: {str(i): torch.full((1 << 20,), float(step)) for i in range(4)} for part in ("model", "optimizer")}
    save(folder, step, tensors=tensors, meta={"of": step}, files={"note": str(step).encode()}, keep=2)
    print(step, flush=True)
    step += stride
"""


def in_a_part(name: str, least: int) -> Callable[[Path], bool]:
    def there(folder: Path) -> bool:
        try:
            return any((p / name).stat().st_size >= least for p in folder.glob(".step_*.tmp"))
        except FileNotFoundError:
            return False

    return there


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "a folder": lambda folder: any(folder.glob(".step_*.tmp")),
    "half of the weights": in_a_part("model.safetensors", 8 << 20),
    "some of the optimizer": in_a_part("optimizer.safetensors", 1 << 20),
    "the meta data": in_a_part("meta.json", 0),
    "an old one aside": lambda folder: any(folder.glob(".step_*.old")),
}


NEXT = ["a folder", "half of the weights", "the meta data"]
AGAIN = ["some of the optimizer", "the meta data", "an old one aside"]


@pytest.mark.slow
@pytest.mark.parametrize(("stride", "moments"), [(1, NEXT), (0, AGAIN)], ids=["next", "again"])
def test_killed_while_saving_the_last_whole_one_is_found(tmp_path: Path, stride: int, moments: list[str]) -> None:
    """`stride` 0 writes one step again and again."""
    last = 0
    for moment in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(last + stride), str(stride)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        printed = [int(process.stdout.readline()) for _ in range(2)]  # two whole ones first
        deadline = time.monotonic() + 60
        while not MOMENTS[moment](tmp_path):
            assert time.monotonic() < deadline, moment
        process.send_signal(signal.SIGKILL)
        printed += [int(line) for line in process.communicate()[0].split()]
        found = load(tmp_path)
        assert found.step in (printed[-1], printed[-1] + stride)  # killed after the rename it may not have said so
        last = found.step
        assert found.meta == {"of": last}
        assert found.read("note") == str(last).encode()
        for part in ("model", "optimizer"):
            named = found.tensors(part)
            assert len(named) == 4
            assert all(torch.equal(t, torch.full((1 << 20,), float(last))) for t in named.values())
    save(tmp_path, last + 1, tensors={}, meta={})
    assert all(p.name.startswith("step_") for p in tmp_path.iterdir())  # what the killed left is cleared


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    import fcntl

    living, dead = tmp_path / ".step_000001.0123abcd.tmp", tmp_path / ".step_000001.456789ef.tmp"
    for folder in (living, dead):
        folder.mkdir()
    descriptor = os.open(living, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        put(tmp_path, 2)
    finally:
        os.close(descriptor)
    assert {p.name for p in tmp_path.iterdir()} == {living.name, "step_000002"}


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> GPT:
    model = GPT(SHAPE)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def put_model(
    folder: Path, model: GPT, shape: dict[str, Any] | None = None, **changed: torch.Tensor | None
) -> Checkpoint:
    weights = {name: changed.get(name.replace(".", "_"), p) for name, p in model.state_dict().items()}
    found = {name: tensor for name, tensor in weights.items() if tensor is not None}
    meta = {"config": asdict(SHAPE) if shape is None else shape, "tokenizer": "ab" * 32}
    save(folder, 1, tensors={"model": found}, meta=meta)
    return load(folder)


def test_a_model_comes_back(tmp_path: Path, model: GPT) -> None:
    checkpoint = put_model(tmp_path, model)
    assert checkpoint.config == SHAPE
    loaded = load_model(checkpoint, "cpu", torch.float32)
    idx = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    assert torch.equal(loaded(idx), model(idx))
    assert all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        loaded.wte.weight.zero_()  # its own memory: the file stays
    assert torch.equal(load_model(checkpoint, "cpu", torch.float32)(idx), model(idx))
    assert load_model(checkpoint, torch.device("cpu"), torch.bfloat16).dtype == torch.bfloat16


def test_weights_of_another_shape_are_refused(tmp_path: Path, model: GPT) -> None:
    wrong = {
        "wte.weight is missing": put_model(tmp_path / "a", model, wte_weight=None),
        r"wte.weight has the shape \(3, 3\)": put_model(tmp_path / "b", model, wte_weight=torch.zeros(3, 3)),
        "wte.weight holds NaN": put_model(tmp_path / "e", model, wte_weight=model.wte.weight * float("nan")),
        "smear_gate.weight is not of a model": put_model(tmp_path / "c", model, {**asdict(SHAPE), "smear": False}),
        r"blocks\.0\.attn\.ve_gate\.weight is missing": put_model(
            tmp_path / "d", model, {**asdict(SHAPE), "n_layer": 3}
        ),
    }
    for message, checkpoint in wrong.items():
        with pytest.raises(ValueError, match=rf"step_000001/model\.safetensors: .*{message}") as caught:
            load_model(checkpoint, "cpu", torch.float32)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape", [{}, {"depth": 4}, {**asdict(SHAPE), "n_head": 7}, {**asdict(SHAPE), "n_embd": "wide"}], ids=str
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, model: GPT, shape: dict[str, Any]) -> None:
    checkpoint = put_model(tmp_path, model, shape)
    with pytest.raises(ValueError, match=r"step_000001/meta\.json: config"):
        load_model(checkpoint, "cpu", torch.float32)


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path: Path) -> None:
    put(tmp_path, 1)
    checkpoint = load(tmp_path)
    check_tokenizer(checkpoint, "ab" * 32)
    with pytest.raises(ValueError, match=rf"step_000001: .*{'ab' * 32}.*{'cd' * 32}"):
        check_tokenizer(checkpoint, "cd" * 32)


def test_the_meta_data_is_plain_json(tmp_path: Path) -> None:
    path = put(tmp_path, 3)
    content = json.loads((path / "meta.json").read_text())
    assert content["meta"] == META
    assert content["step"] == 3
    for name in FILES[1:]:
        assert content["files"][name]["bytes"] == (path / name).stat().st_size
