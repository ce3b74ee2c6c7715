"""Check README.md and docs/ against the tree: paths, links, flags, figures and quoted messages."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bench.__main__ import PAGE, RESULTS
from bench.page import cells, render
from pilot.app.backup import BackupConfig
from pilot.app.base_train_flags import BaselineConfig
from pilot.app.export import ExportConfig
from pilot.app.miner_flags import MinerConfig
from pilot.app.sample import SampleConfig
from pilot.app.validator_flags import ValidatorConfig
from pilot.simulation.flags import SimulateConfig
from protocol import Fault
from scripts.base_eval import BaseEvalConfig
from scripts.base_train import SHORT
from scripts.chaos import ChaosConfig
from scripts.tok_eval import TokEvalConfig
from scripts.tok_train import TokTrainConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = (
    *(ValidatorConfig, MinerConfig, BaselineConfig, SimulateConfig, BaseEvalConfig, ChaosConfig),
    *(TokEvalConfig, TokTrainConfig, SampleConfig, ExportConfig, BackupConfig),
)
# Programs whose flags are not dataclasses, and flags of other people's programs.
SOURCES = (
    "scripts/base_train.py",
    "src/nanochat/dataset.py",
    "bench/__main__.py",
    "bench/wire.py",
    "nanochat_train.py",
)
FOREIGN = {
    "--now",
    "--help",
    "--help-all",
    "--standalone",
    "--nproc-per-node",
    "--line.points",
}  # the last is an example's
TOP = "src|docs|bench|scripts|tests|experiments|rustbpe|pilot|tasks|nanochat"  # folders that a path may begin with
MADE = ("runs/", "pilot/1", "pilot/2")  # not in the tree: runs, and the protocol's names


@pytest.fixture(params=DOCS, ids=lambda path: path.name)
def page(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def flags_of(config: object, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        name, value = field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flags_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@cache
def known_flags() -> frozenset[str]:
    quoted = re.findall(r"--[a-z][a-z0-9_.-]*", " ".join((ROOT / path).read_text() for path in SOURCES))
    return frozenset({*(flag for config in CONFIGS for flag in flags_of(config())), *quoted, *SHORT, *FOREIGN})


def test_every_flag_exists(page: Path) -> None:
    found = {flag.rstrip(".-").replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", page.read_text())}
    known = {flag.replace("_", "-") for flag in known_flags()}
    groups = {flag.rpartition(".")[0] for flag in known}
    assert not found - known - groups


def paths_of(page: Path) -> Iterator[str]:
    """Yield the paths that a page names: in prose, in commands, and in the README's map of nested folders."""
    text = page.read_text()
    yield from re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w./-]*[\w/])", text)
    above: list[str] = []
    for indent, names in re.findall(r"^    ( *)(\S+(?:  \S+)*)   ", text.partition("## Files")[2], re.M):
        above = above[: len(indent) // 4]
        yield from ("".join(above) + name for name in names.split())
        above.append(names.split()[0])
    if page.name == "ATTACKS.md":
        yield from (f"tests/attacks/{name}" for name in re.findall(r"`(test_\w+\.py)`", text))


def test_every_path_exists(page: Path) -> None:
    missing = {
        path
        for path in paths_of(page)
        if not path.startswith(MADE) and not (ROOT / path).exists() and not (ROOT / "src" / path).exists()
    }
    assert not missing


def test_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    assert [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()] == []


def test_the_benchmarks_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == render(RESULTS.read_text().splitlines())


def test_figures_in_the_readme_are_measured() -> None:
    measured = {figure["name"]: figure for figure in map(json.loads, RESULTS.read_text().splitlines())}
    rows = re.findall(
        r"^\| `([\w.]+)` \| ([^|]+) \| ([^|]+) \| `python -m (bench\.\w+)` \|$", DOCS[0].read_text(), re.M
    )
    assert len(rows) >= 6
    for name, value, meaning, command in rows:
        shown = cells(measured[name])
        assert value == shown[0]
        assert (ROOT / f"{command.replace('.', '/')}.py").exists()
        for number in re.findall(r"(?<![\w.])\d+\.?\d*(?= ?[|;]|$)", meaning):
            assert number in " ".join(shown), (name, number)


@cache
def messages() -> str:
    """Return every string in the sources, a line each, with `…` for what a program inserts."""
    lines = []
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                lines.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


def test_quoted_messages_are_printed_by_the_programs() -> None:
    rows = re.findall(r"^\| (verdict )?`([^`]+)`", (ROOT / "docs" / "TROUBLESHOOTING.md").read_text(), re.M)
    assert len(rows) > 20
    unknown = [text for verdict, text in rows if (text not in set(Fault) if verdict else text not in messages())]
    assert not unknown
