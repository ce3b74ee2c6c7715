"""Check the shape of src/ against docs/ARCHITECTURE.md: who imports whom, and what no file may do."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from pilot.aggregation import AGGREGATORS, load_aggregator
from pilot.codec import CODECS, load_codec
from pilot.ranking import RANKERS, load_ranker
from tasks import TASKS, load_task

SRC = Path(__file__).resolve().parent.parent / "src"
FILES = sorted(SRC.rglob("*.py"))

# The parts of src/, lowest first, each with the parts that it may import besides itself.
SHARED = frozenset({"common", "interfaces", "protocol", "nanochat", "tasks", "codec"})
CORES = frozenset({"aggregation", "ranking", "training", "market", "worker"})
EDGES = frozenset({"transport", "storage", "display"})
MAY_IMPORT: dict[str, frozenset[str]] = {
    "common": frozenset(),
    "protocol": frozenset({"common"}),
    "interfaces": frozenset({"common", "protocol"}),
    "nanochat": frozenset({"common", "protocol"}),
    "tasks": frozenset({"common", "protocol", "interfaces", "nanochat"}),
    "codec": frozenset({"common", "protocol", "interfaces"}),
    "aggregation": frozenset({"common", "protocol", "interfaces", "codec"}),
    "ranking": frozenset({"common", "protocol", "interfaces"}),
    "training": SHARED,
    "market": SHARED | {"aggregation", "ranking", "training"},
    "worker": SHARED | {"training"},
    **dict.fromkeys(EDGES, SHARED),
    "app": SHARED | CORES | EDGES,
    "simulation": SHARED | CORES | EDGES | {"app"},
    "validator": SHARED | CORES | EDGES | {"app"},
    "miner": SHARED | CORES | EDGES | {"app"},
}

# A core receives clocks, randomness, files and sockets as arguments. `training.distributed` joins torchrun's group.
OUTSIDE = frozenset({"random", "secrets", "os", "socket", "ssl", "http", "urllib", "aiohttp", "sqlite3", "subprocess"})
EXEMPT = frozenset({"pilot/training/distributed.py"})
CONTAINMENT = "pilot/worker/containment.py"  # nothing that an order causes may end a miner
PICKLES = frozenset({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
LATER_STDLIB = frozenset({"compression", "annotationlib"})  # new in Python 3.14


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


def part(path: Path) -> str:
    """Return the part of the table that a file belongs to; "" for src/pilot/__init__.py."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return (parts[1] if parts[1:] != ("__init__",) else "") if parts[0] == "pilot" else parts[0]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield every module that a file imports anywhere, also under TYPE_CHECKING, and the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "pilot":
                yield from ((f"pilot.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def imported_part(module: str) -> str | None:
    first, _, rest = module.partition(".")
    found = rest.partition(".")[0] if first == "pilot" else first
    return found if found in MAY_IMPORT else None


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def says_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and ast.unparse(k.value) == "True" for k in call.keywords)


def test_imports_follow_the_table() -> None:
    wrong = []
    for path in FILES:
        if own := part(path):
            allowed = MAY_IMPORT[own] | {own, None}
            wrong += [
                f"{name(path)}:{line} {module}"
                for module, line in imports(path)
                if imported_part(module) not in allowed
            ]
    assert not wrong


def test_the_table_has_no_circle() -> None:
    left = dict(MAY_IMPORT)
    while free := [p for p, below in left.items() if not below & left.keys()]:
        for p in free:
            del left[p]
    assert not left


def test_src_holds_the_programs_and_one_package() -> None:
    """src/ comes first on the path, so a name of the standard library there would hide the library's module."""
    top = {
        path.name.removesuffix(".py")
        for path in SRC.iterdir()
        if path.suffix in (".py", "") and path.name[0] not in "._"
    }
    assert top == {"validator", "miner", "protocol", "nanochat", "tasks", "pilot"}
    assert not top & (sys.stdlib_module_names | LATER_STDLIB)
    relative = [
        f"{name(path)}:{line}" for path in FILES for module, line in imports(path) if module.startswith((".", "src"))
    ]
    assert not relative


def test_no_handler_swallows_everything() -> None:
    """A handler of all exceptions may only clean up, and ends by raising again. One makes refusals of them."""
    wrong = []
    for path in FILES:
        if name(path) == CONTAINMENT:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = {ast.unparse(t) for t in ast.walk(node.type) if isinstance(t, ast.expr)} if node.type else {""}
                raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if caught & {"", "Exception"} or ("BaseException" in caught and not raises):
                    wrong.append(f"{name(path)}:{node.lineno}")
    assert not wrong


def test_nothing_is_unpickled_or_run_from_data() -> None:
    wrong = []
    for path in FILES:
        wrong += [f"{name(path)}:{line} {m}" for m, line in imports(path) if m.partition(".")[0] in PICKLES]
        for function, call in calls(path):
            unsafe = function in ("eval", "exec", "compile", "__import__")
            unsafe |= function == "torch.load" and not says_true(call, "weights_only")
            if unsafe or says_true(call, "allow_pickle") or says_true(call, "trust_remote_code"):
                wrong.append(f"{name(path)}:{call.lineno} {function}")
    assert not wrong


def test_cores_reach_for_nothing_outside() -> None:
    """Find clocks, randomness, files and sockets in the cores that did not come as arguments.

    A real clock may be the default of an argument, and `time_ns=time.time_ns()` is a stamp that a message carries.
    """
    wrong = []
    for path in FILES:
        if part(path) not in CORES or name(path) in EXEMPT:
            continue
        wrong += [f"{name(path)}:{line} {m}" for m, line in imports(path) if m.partition(".")[0] in OUTSIDE]
        stamps = {id(k.value) for _, call in calls(path) for k in call.keywords if k.arg == "time_ns"}
        for function, call in calls(path):
            clock = function.startswith("time.") and (function != "time.time_ns" or id(call) not in stamps)
            if clock or function == "open" or function.startswith(("torch.rand", "torch.manual_seed", "torch.seed")):
                wrong.append(f"{name(path)}:{call.lineno} {function}")
    assert not wrong


def test_every_registered_name_leads_to_something() -> None:
    for target in (*TASKS.values(), *CODECS.values(), *AGGREGATORS.values(), *RANKERS.values()):
        module, _, attribute = target.partition(":")
        assert hasattr(import_module(module), attribute), target


@pytest.mark.parametrize("load", [load_task, load_codec, load_aggregator, load_ranker])
def test_an_unknown_name_is_refused_with_the_known_ones(load: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"nonesuch: unknown; known: \w+"):
        load("nonesuch")
