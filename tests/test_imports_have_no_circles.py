"""The package's imports: from the front of the pipeline to its back, never round. Imports for types alone count."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import moeca_compile

ROOT = Path(moeca_compile.__file__).resolve().parent


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports(source: str, name: str, modules: set[str]) -> set[str]:
    """The modules of `modules` that a source imports anywhere, within functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    # A submodule stands for itself, not for the package that it lies in.
    return {module for module in found if module in modules} - {name}


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    found = {name: imports(source, name, set(sources)) for name, source in sources.items()}
    return {name: {other for other in others if not name.startswith(other + ".")} for name, others in found.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, [] where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others():
    edges = graph({name: path.read_text() for name, path in MODULES.items()})
    assert sum(map(len, edges.values())) > 100
    assert circle(edges) == []


ROOMS = ("ops", "passes", "policies", "disk", "lower", "runtime", "reporting", "pipelines", "tuning", "command")
"""Folders in the order of the data: one may import those before it."""


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def test_no_room_imports_a_later_one():
    edges = graph({name: path.read_text() for name, path in MODULES.items()})
    backwards = {
        (name, other)
        for name, others in edges.items()
        for other in others
        if room(name) in ROOMS and room(other) in ROOMS and ROOMS.index(room(other)) > ROOMS.index(room(name))
    }
    assert backwards == set()


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "from p.b import x", "p.b": "import p.a"},
        {"p.a": "from p import b", "p.b": "def f():\n    from p.c import y", "p.c": "from .a import z"},
        {"p.a": "if TYPE_CHECKING:\n    from p.b import X", "p.b": "from p.a import Y"},
    ],
    ids=["direct", "within a function", "for types"],
)
def test_a_circle_is_found(sources):
    assert circle(graph(sources))
