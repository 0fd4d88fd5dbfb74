"""The shape of the code, kept by a test: who may import whom, what is public, how long a module may be."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import postroom

ROOT = Path(postroom.__file__).parent
MODULES = {
    ".".join(("postroom", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}

# A module may import those of its own layer and of the ones above it in this list.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "message", "clock", "signals", "config", "doctor"),
    ("store.base", "broker.base", "codec", "store.inbox", "store.blobs", "context"),
    ("broker", "handler", "topology", "lifecycle"),
    ("store", "producer", "worker", "dead_letters"),
    ("app", ""),
    ("gateway", "dashboard", "cli", "demo", "bench", "observability", "testing", "torture", "__main__"),
]
CLIENTS = {
    "apsw",
    "sqlite3",
    "aio_pika",
    "pika",
    "confluent_kafka",
    "redis",
    "boto3",
    "aiobotocore",
    "psycopg",
    "asyncpg",
}


def layer_of(module: str) -> int:
    name = module.removeprefix("postroom").removeprefix(".")
    while True:
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
        if "." not in name:
            raise AssertionError(f"{module} is in no layer: give it a place in LAYERS")
        name = name.rpartition(".")[0]


def imports_of(path: Path, *, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = _outside_functions(tree) if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {_as_module(name) for name in found}


def _outside_functions(tree: ast.AST) -> list[ast.AST]:
    """Every node but those in functions and under ``if TYPE_CHECKING``."""
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        nodes += [child, *_outside_functions(child)]
    return nodes


def _as_module(name: str) -> str:
    return name if name in MODULES or "." not in name else _as_module(name.rpartition(".")[0])


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_upwards_only(module: str) -> None:
    for imported in imports_of(MODULES[module], top_level=True):
        if imported.split(".")[0] == "postroom":
            assert layer_of(imported) <= layer_of(module), f"{module} must not import {imported}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("postroom.broker.")))
def test_adapters_know_neither_each_other_nor_the_worker(module: str) -> None:
    adapter = module.split(".")[2]
    shared = {"address", "base", "demands", "lanes", "leasing", "refusals", "registry", "routing", "thread"}
    for imported in imports_of(MODULES[module], top_level=False):
        parts = imported.split(".")
        if parts[:2] == ["postroom", "broker"] and len(parts) > 2:
            assert parts[2] in shared | {adapter}, f"{module} must not import {imported}"
        assert parts[:2] not in (["postroom", "worker"], ["postroom", "app"]), f"{module} must not import {imported}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not name.startswith("postroom.broker.")))
def test_only_adapters_talk_to_a_broker(module: str) -> None:
    # The demo reads the database of its example.
    allowed = {"sqlite3"} if module in {"postroom.demo.evidence"} else set()
    if module.startswith(("postroom.store.sqlite.", "postroom.testing.simulation.")):
        allowed = {"sqlite3"}
    clients = {name.split(".")[0] for name in imports_of(MODULES[module], top_level=False)} & CLIENTS
    assert clients <= allowed, f"{module} imports {clients}"


def test_modules_are_short() -> None:
    long = {name: lines for name, path in MODULES.items() if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_public_names_are_complete() -> None:
    """What the package shows is what ``__all__`` says, and nothing public is forgotten there."""
    assert sorted(postroom.__all__) == sorted(
        name for name, value in vars(postroom).items() if not name.startswith("_") and not _is_module(value)
    )
    errors = importlib.import_module("postroom.errors")
    public_errors = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    assert public_errors <= set(postroom.__all__)


def _is_module(value: object) -> bool:
    return isinstance(value, type(sys))


def test_importing_loads_no_client_and_no_web_server() -> None:
    code = "import sys, postroom; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"apsw", "click", "rich", "starlette", "uvicorn", "pydantic", "pytest", "hypothesis"} & set(loaded)


def test_the_project_has_no_leftovers() -> None:
    for name, path in MODULES.items():
        for word in ("TODO", "FIXME", "XXX"):
            assert word not in path.read_text(), f"{name} has a {word}"
