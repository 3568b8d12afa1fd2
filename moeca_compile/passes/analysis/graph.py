"""Helpers that every pass may use to read a graph."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

from moeca_compile._torch_private import schema_of
from moeca_compile.ops import markers  # noqa: F401  (defines the marker ops)
from moeca_compile.ops.aten import CASTS, SDPA

aten = torch.ops.aten

T = TypeVar("T", bound=Hashable)

_LIKES = frozenset({aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default})
_COPIES = CASTS | _LIKES | {torch.ops.moeca.expert_rows.default}
_GROUPS = ("group", "group_name")
"""What ops call the name of a process group."""


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Static shape of the node's value, or of its first output where it has several; () for a number."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(first.shape) if isinstance(first, torch.Tensor) else ()


def dtype_of(node: fx.Node) -> torch.dtype:
    """Dtype of the node's value, or of its first output where it has several."""
    value: Any = node.meta["val"]
    first: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return first.dtype


def argument(node: fx.Node, position: int, name: str, default: object = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_pointwise(target: object) -> bool:
    """Whether each output element of an op depends only on the aligned elements of its broadcast inputs."""
    return torch.Tag.pointwise in getattr(target, "tags", ()) or target in _COPIES


def draws_random_numbers(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _drops_nothing(node)


def _drops_nothing(node: fx.Node) -> bool:
    """Whether it is an attention without dropout: its op has the tag in any case."""
    return node.target is SDPA and not argument(node, 4, "dropout_p", 0.0)


def module_path(node: fx.Node) -> str:
    """The path of the module that a node was traced from (for reports only), "" where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(list(stack.values()))), "")
    return clean_path(path)


def clean_path(path: str) -> str:
    """`L['self'].__dict__['_modules']['blocks']._modules['1'].attn` -> `blocks.1.attn`."""
    names = re.findall(r"\w+", path.removeprefix("L['self']").removeprefix("L"))
    return ".".join(name for name in names if name not in ("_modules", "__dict__"))


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = (), since: fx.Node | None = None) -> set[fx.Node]:
    """All nodes that `nodes` are computed from, including themselves and `stop` but nothing behind `stop`.

    With `since`, nodes before that one in the graph are left out. Without it, every question about a late block would
    visit all blocks before it.
    """
    found: set[fx.Node] = set()
    ends = set(stop)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and (since is None or not node < since):
            found.add(node)
            if node not in ends:
                stack.extend(node.all_input_nodes)
    return found


def last_uses(steps: Sequence[Iterable[T]], kept: Iterable[T]) -> list[list[T]]:
    """For each step, given by all values that it reads or computes, those that no later step has.

    `kept` are values that are wanted after the last step.
    """
    seen, found = set(kept), []
    for step in reversed(steps):
        found.append([value for value in dict.fromkeys(step) if value not in seen])
        seen.update(found[-1])
    return found[::-1]


def between(source: fx.Node, outputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes on a path from `source` to `outputs`, without the source."""
    inside = ancestors(outputs, stop=(source,), since=source)
    reached = {source}
    for node in sorted(inside):
        if any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    return reached & inside - {source}


def groups_in(graph: fx.Graph) -> set[str]:
    """The names of the process groups that a graph's ops talk to."""
    found: set[str] = set()
    for node in graph.nodes:
        schema = schema_of(getattr(node.target, "default", node.target))  # Dynamo's graph has ops without overloads
        for at, argument in enumerate(schema.arguments if schema is not None else ()):
            if argument.name in _GROUPS:
                given = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name)
                found |= {given} if isinstance(given, str) else set()
    return found - {""}
