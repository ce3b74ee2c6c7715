"""The shape of src/ as docs/ARCHITECTURE.md draws it, read from the sources: who imports whom, what no file does."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from aggregation import AGGREGATORS, load_aggregator
from codec import CODECS, load_codec
from ranking import RANKERS, load_ranker
from tasks import TASKS, load_task

SRC = Path(__file__).resolve().parent.parent / "src"
FILES = sorted(SRC.rglob("*.py"))

# What each part may import besides itself. A part that is not here yet gets its line together with its first file.
BELOW = frozenset({"limits", "protocol", "values", "durable", "nanochat", "tasks"})  # know nothing of the market
CORES = frozenset({"market", "aggregation", "ranking"})
EDGES = frozenset({"transport", "records", "chain", "dashboard"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "limits": frozenset(),
    "digests": frozenset(),
    "protocol": frozenset({"digests"}),
    "values": frozenset({"protocol"}),
    "durable": frozenset({"protocol"}),
    "nanochat": frozenset({"protocol", "durable"}),
    "tasks": frozenset({"protocol", "values", "nanochat"}),
    "codec": frozenset({"protocol"}),
    "aggregation": BELOW | {"codec"},
    "ranking": BELOW | {"codec"},
    "market": BELOW | {"codec", "aggregation", "ranking"},
    **dict.fromkeys(EDGES, BELOW | {"codec"}),
    "cli": frozenset(),
    "local_miners": frozenset({"protocol"}),
    "ranks": frozenset({"market", "protocol"}),
    # The roots: only here do cores meet edges.
    "emulation": BELOW | CORES | EDGES | {"codec"},
    "runs": BELOW | CORES | EDGES | {"cli"},
    "report": BELOW | CORES | EDGES | {"cli"},
    "wiring": BELOW | CORES | EDGES | {"cli", "codec"},
    "miner": BELOW | CORES | EDGES | {"cli", "codec"},
    "validator": BELOW | CORES | EDGES | {"cli", "codec", "runs", "report", "local_miners", "wiring"},
}

OUTSIDE = frozenset({"random", "secrets", "os", "socket", "ssl", "http", "urllib", "aiohttp", "sqlite3", "subprocess"})
PICKLES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
LATER_STDLIB = frozenset({"compression", "annotationlib"})  # new in Python 3.14


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def part(path: Path) -> str:
    """A file's package, or its own name where it lies at the top."""
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def name(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, also under TYPE_CHECKING, with the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call by its dotted name, as far as it is one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def says_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and ast.unparse(k.value) == "True" for k in call.keywords)


every_file = pytest.mark.parametrize("path", FILES, ids=name)
every_core_file = pytest.mark.parametrize("path", [path for path in FILES if part(path) in CORES], ids=name)


# --- who imports whom -------------------------------------------------------------------------------------------------


def test_every_part_has_its_line_in_the_table() -> None:
    assert {part(path) for path in FILES} <= MAY_IMPORT.keys()


def test_the_table_has_no_cycle() -> None:
    left = dict(MAY_IMPORT)
    while free := [p for p, below in left.items() if not below & left.keys()]:
        for p in free:
            del left[p]
    assert not left


@every_file
def test_imports_point_one_way(path: Path) -> None:
    own = part(path)
    allowed = MAY_IMPORT[own] | {own}
    wrong = [f"{name(path)}:{line} imports {module}" for module, line in imports(path) if _ours(module) - allowed]
    assert not wrong


def _ours(module: str) -> frozenset[str]:
    top = module.partition(".")[0]
    return frozenset({top} & MAY_IMPORT.keys())


@every_file
def test_src_is_the_import_root(path: Path) -> None:
    assert path != SRC / "__init__.py"
    for module, line in imports(path):
        assert module.partition(".")[0] not in ("src", ""), f"{name(path)}:{line} imports {module}"


@every_file
def test_no_name_of_the_standard_library_is_taken(path: Path) -> None:
    """src/ comes first on the path: one such name breaks every import of the other."""
    assert part(path) not in sys.stdlib_module_names | LATER_STDLIB


@every_file
def test_nobody_imports_a_program(path: Path) -> None:
    assert not {"validator", "miner"} & {module for module, _ in imports(path)}


# --- what no file does ------------------------------------------------------------------------------------------------


@every_file
def test_no_handler_swallows_everything(path: Path) -> None:
    """All exceptions may be caught only to clean up: the handler ends by raising again."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = {ast.unparse(t) for t in ast.walk(node.type) if isinstance(t, ast.expr)} if node.type else {""}
            raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not caught & {"", "Exception"}, f"{name(path)}:{node.lineno}"
            assert "BaseException" not in caught or raises, f"{name(path)}:{node.lineno}"


@every_file
def test_nothing_is_unpickled_or_run_from_data(path: Path) -> None:
    assert not PICKLES & {module.partition(".")[0] for module, _ in imports(path)}
    for function, call in calls(path):
        where = f"{name(path)}:{call.lineno} {function}"
        assert function not in ("eval", "exec", "compile", "__import__"), where
        assert function != "torch.load" or says_true(call, "weights_only"), where
        assert not says_true(call, "allow_pickle"), where
        assert not says_true(call, "trust_remote_code"), where


@every_core_file
def test_cores_reach_for_nothing_outside(path: Path) -> None:
    """No randomness, environment, file, socket or clock but those that come as arguments.

    A real clock may be the default of such an argument, and `time_ns=time.time_ns()` is a stamp that a message carries.
    """
    assert not OUTSIDE & {module.partition(".")[0] for module, _ in imports(path)}
    stamps = {id(k.value) for _, call in calls(path) for k in call.keywords if k.arg == "time_ns"}
    for function, call in calls(path):
        where = f"{name(path)}:{call.lineno} calls {function}"
        assert function != "open", where
        assert not function.startswith("time.") or (function == "time.time_ns" and id(call) in stamps), where
        assert not function.startswith(("torch.rand", "torch.manual_seed", "torch.seed")), where


@every_file
def test_files_and_functions_can_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 450
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 70, f"{name(path)}:{node.lineno} {node.name}"


# --- plug-in points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*TASKS.values(), *CODECS.values(), *AGGREGATORS.values(), *RANKERS.values()])
def test_each_registered_name_leads_to_something(target: str) -> None:
    module, _, attribute = target.partition(":")
    assert hasattr(import_module(module), attribute)


@pytest.mark.parametrize("load", [load_task, load_codec, load_aggregator, load_ranker])
def test_a_name_that_is_not_registered_is_refused_with_those_that_are(load: object) -> None:
    assert callable(load)
    with pytest.raises(ValueError, match=r"nonesuch: unknown; known: \w+"):
        load("nonesuch")
