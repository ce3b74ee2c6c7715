"""Test scripts/simulate.py: make, play and plot a trace; report mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import simulate

DAY = ["--costs.batch", "60", "--hours", "3"]


def test_a_trace_is_made_then_played(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot = tmp_path / "spot.csv", tmp_path / "spot.png"
    common = ["--cache", str(tmp_path / "cache"), "--plot", str(plot)]
    simulate.main(["--make", "spot", "--out", str(trace), "--miners", "3", "--hours", "3", "--seed", "2", *common])
    assert "simulate it with --trace" in capsys.readouterr().out
    assert not plot.exists()
    simulate.main(["--trace", str(trace), "--keep", str(tmp_path / "run"), "--costs.batch", "60", *common])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["batch", "60.00000"] for line in lines)  # the cost model
    table = [line.split() for line in lines[lines.index(next(line for line in lines if "util." in line)) + 1 :]]
    assert 15 <= sum(len(row) > 6 and row[0].replace(".", "").isdigit() for row in table) <= 25
    summary = json.loads(lines[-1])
    assert summary["accepted_samples"] > 0
    assert summary["virtual_seconds"] == pytest.approx(3 * 3600, rel=0.05)
    assert 0 < summary["utilisation"] < 1
    assert summary["excess_loss"] < summary["val_loss"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "run" / "ledger.sqlite").is_file()


def test_the_same_seed_plays_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--make", "diurnal", "--miners", "2", "--seed", "5", "--deadline", "auto", "--overlap", "1", *DAY]
    summaries = []
    for _ in range(2):
        simulate.main([*flags, "--cache", str(tmp_path), "--plot", str(tmp_path / "p.png")])
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        del summary["real_seconds"]
        summaries.append(summary)
    assert summaries[0] == summaries[1]


def test_a_large_model_on_a_thin_link_in_diloco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--make", "steady", "--miners", "2", "--hours", "0.5", "--round-seconds", "60", "--state-mb", "497.8"]
    flags += ["--mode", "diloco", "--tau", "60", "--batches", "1", "--warmup-sync", "0.1", "--codec.up", "int4"]
    flags += ["--costs.batch", "2", "--quadratic.dimension", "16384"]
    simulate.main([*flags, "--cache", str(tmp_path), "--plot", str(tmp_path / "p.png")])
    lines = capsys.readouterr().out.splitlines()
    (size,) = [line for line in lines if line.startswith("a model of ")]
    assert size.startswith("a model of 497.8 MB in fp32")
    (budget,) = [line for line in lines if " a round and miner: " in line]
    assert budget.startswith("64.2 MB up (int4) and 33.1 MB down (2bit) a round and miner: ")
    summary = json.loads(lines[-1])
    assert summary["rounds"] >= 28
    assert summary["utilisation"] > 0.8
    most = summary["rounds"] * 2 * 66e6
    assert 28 * 2 * 33e6 < summary["bytes_up"] < most


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--trace: none given; name a CSV file, or make a trace with --make spot"),
        (["--trace", "nonesuch.csv"], "--trace nonesuch.csv: No such file or directory; make one"),
        (["--trace", "a.csv", "--make", "spot"], "--trace: give either this or --make"),
        (["--trace", "a.csv", "--out", "b.csv"], "--out b.csv: only --make writes a trace"),
        (["--make", "lunar"], "lunar"),
        (["--make", "spot", "--miners", "0"], "--miners 0: must lie between"),
        (["--make", "spot", "--hours", "-1"], "--hours -1: must lie between"),
        (["--make", "spot", "--hours", "nan"], "--hours nan: must lie between"),
        (["--make", "spot", "--state-mb", "0"], "--state-mb 0: must be above 0"),
        (["--make", "spot", "--link.loss", "1"], "--link.…: a link that loses 1"),
        (["--make", "spot", "--link.up-mbps", "0"], "--link.…: a link of 0 bit/s up"),
        (["--make", "spot", "--costs.batch", "0"], "--costs.batch 0.0: must be above 0"),
        (["--make", "spot", "--round-seconds", "-5"], "--round-seconds -5.0: must be 0 or more"),
        (["--make", "spot", "--deadline", "60"], "--deadline 60: must be 0.1 or more, and not less than"),
        (["--make", "spot", "--quorum", "2"], "--quorum 2: must be a share"),
        (["--make", "spot", "--plot", "no/such/folder/p.png"], "--plot no/such/folder/p.png: must be a file"),
        (["--make", "spot", "--keep", "."], "--keep .: exists"),
        (["--make", "spot", "--task", "chess"], "--task chess: unknown; known: gpt2"),
        (["--make", "spot", "--aggregation", "sum"], "--aggregation sum: unknown; known: mean"),
        (["--make", "spot", "--codec.up", "zip"], "--codec.up zip: unknown; known: fp32"),
        (["--make", "spot", "--gpt2.seq-len", "8"], "--gpt2.…: --task is quadratic"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        simulate.main(flags)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("simulate.py: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_bad_trace_is_named_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.csv").write_text("miner,start,end\na,0,10\na,5,20\n")
    with pytest.raises(SystemExit) as ended:
        simulate.main(["--trace", str(tmp_path / "trace.csv")])
    assert ended.value.code == 2
    assert f"{tmp_path}/trace.csv:3: a is up twice at 5 s" in capsys.readouterr().err
