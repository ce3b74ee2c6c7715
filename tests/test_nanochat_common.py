"""Devices' speed by name, memory that is needed against memory that is taken, and memory that is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import (
    available_memory,
    base_dir,
    check_memory,
    memory_need,
    peak_flops,
    peak_flops_of,
)
from nanochat.config import GPTConfig

GIB = 1 << 30


def shape(depth: int, vocab_size: int = 32_768, sequence_len: int = 2048) -> GPTConfig:
    return GPTConfig.from_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len)


def test_base_dir_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    assert base_dir() == tmp_path / ".cache" / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/chat")
    assert base_dir() == tmp_path / "chat"
    assert not any(tmp_path.iterdir())


# --- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_known_devices(name: str, tera: float) -> None:
    assert peak_flops_of(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "Quadro RTX 6000",
        "Tesla T4",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA Z900",
        "",
    ],
)
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert peak_flops_of(name) is None


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops("cpu") is None


# --- memory needed ----------------------------------------------------------------------------------------------------

TRAIN = """
import sys, torch
from nanochat.config import GPTConfig, MuonAdamWConfig
from nanochat.gpt import GPT
from nanochat.optim import build_optimizer

def run(shape, batch, dtype):
    model = GPT(shape, dtype)
    model.init_weights()
    optimizer = build_optimizer(model, MuonAdamWConfig())
    idx = torch.zeros(batch, shape.sequence_len, dtype=torch.int64)
    model(idx, idx).backward()
    optimizer.step()
    model(idx, idx).backward()  # with moments, and gradients to add to

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
run(GPTConfig.from_depth(1, vocab_size=64, sequence_len=16), 1, dtype)
before = peak()
run(GPTConfig.from_depth(4, vocab_size=int(sys.argv[2]), sequence_len=512), int(sys.argv[3]), dtype)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_need_is_what_training_takes(dtype: str, size: int) -> None:
    """A model of depth 4 in a process of its own."""
    vocab, batch = 8192, 4
    done = subprocess.run([sys.executable, "-c", TRAIN, dtype, str(vocab), str(batch)], capture_output=True, check=True)
    need = memory_need(shape(4, vocab, 512), batch, activation_bytes=size)
    assert need == pytest.approx(int(done.stdout), rel=0.25)


def test_the_need_grows_with_everything() -> None:
    small = memory_need(shape(4), 2)
    assert memory_need(shape(4), 2, optimizer=False) < small < memory_need(shape(4), 3)
    assert memory_need(shape(4), 2, activation_bytes=2) < small < memory_need(shape(5), 2)
    total, matrices = (shape(4).parameter_counts()[kind] for kind in ("total", "matrices"))
    moments = memory_need(shape(4), 2) - memory_need(shape(4), 2, optimizer=False)
    assert moments == 4 * (2 * total - matrices)


# --- memory left ------------------------------------------------------------------------------------------------------


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {32 * GIB >> 10} kB\nMemFree: 1 kB\nMemAvailable:   {20 * GIB >> 10} kB"}


def test_of_a_machine_what_the_kernel_can_free(tmp_path: Path) -> None:
    assert available_memory("cpu", put(tmp_path, MEMINFO)) == 20 * GIB


def test_of_a_control_group_what_is_left(tmp_path: Path) -> None:
    files = {
        **MEMINFO,
        "proc/self/cgroup": "0::/user/job",
        "sys/fs/cgroup/user/job/memory.max": "max",
        "sys/fs/cgroup/user/job/memory.current": str(GIB),
        "sys/fs/cgroup/user/memory.max": str(8 * GIB),
        "sys/fs/cgroup/user/memory.current": str(5 * GIB),
        "sys/fs/cgroup/user/memory.stat": f"anon 7\nactive_file 9\ninactive_file {2 * GIB}",
    }
    assert available_memory("cpu", put(tmp_path, files)) == 5 * GIB


def test_of_an_old_control_group_what_is_left(tmp_path: Path) -> None:
    """Inside a container its own path is not there, but the top is its own group."""
    files = {
        **MEMINFO,
        "proc/self/cgroup": "5:cpu:/\n4:memory:/docker/0123\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}",
    }
    assert available_memory("cpu", put(tmp_path, files)) == 3 * GIB // 2
    (tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text(str((1 << 63) - 4096))
    assert available_memory("cpu", tmp_path) == 20 * GIB


def test_where_nothing_is_told_nothing_is_refused(tmp_path: Path) -> None:
    assert available_memory("cpu", tmp_path) is None
    assert available_memory("mps") is None
    check_memory(shape(1000), 1000, "cpu", root=tmp_path)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's /proc")
def test_this_machine_has_some() -> None:
    left = available_memory("cpu")
    assert left is not None
    assert left > 0


def test_a_model_that_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    root = put(tmp_path, MEMINFO)
    check_memory(shape(4), 1, "cpu", root=root)
    with pytest.raises(ValueError, match=r"^--nanochat\.depth 32: needs [\d.]+ GB .+, cpu has 21\.5 GB") as caught:
        check_memory(shape(32), 1, "cpu", root=root)
    said = str(caught.value)
    assert "\n" not in said
    fits = int(said.partition("such as ")[2].partition(",")[0])
    check_memory(shape(fits), 1, "cpu", root=root)
    with pytest.raises(ValueError, match="smaller depth"):
        check_memory(shape(fits + 1), 1, "cpu", root=root)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(tmp_path: Path) -> None:
    root = put(tmp_path, MEMINFO)
    with pytest.raises(ValueError, match=r"train on \d+ sequences of 2048 tokens at once instead of 64") as caught:
        check_memory(shape(12), 64, "cpu", root=root)
    rows = int(str(caught.value).partition("train on ")[2].partition(" ")[0])
    check_memory(shape(12), rows, "cpu", root=root)
    with pytest.raises(ValueError, match=rf"train on {rows} sequences"):
        check_memory(shape(12), rows + 1, "cpu", root=root)
