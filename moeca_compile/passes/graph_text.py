"""A graph as text for people: one line an op with dtype and shape, under the module and source line of its code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from moeca_compile.passes.analysis.graph import between, module_path
from moeca_compile.passes.match.regions import Experts, FeedForward, Regions

Marks = Mapping[fx.Node, Sequence[str]]

_LONG = 8
"""Of longer lists of nodes, such as the parameters of all experts of a layer, only the ends are shown."""

_OPS = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))
"""The types of ops, without and with an overload."""


def graph_text(graph: fx.Graph, marks: Marks | None = None, inputs: Sequence[str] | None = None) -> str:
    """The inputs, the ops in order and the outputs, a line each.

    Args:
        marks: lines to write in front of a node.
        inputs: names for the placeholders, in order. Raises ValueError where there are more or fewer of them.
    """
    names = _names(graph, inputs)
    lines, origin = [], ""
    for node in graph.nodes:
        lines += [f"\n#### {mark}" for mark in (marks or {}).get(node, ())]
        if node.op not in ("placeholder", "output") and _origin(node) not in ("", origin):
            origin = _origin(node)
            lines.append(f"# {origin}")
        lines.append(_line(node, names))
    return "\n".join(lines) + "\n"


def region_marks(graph: fx.Graph, regions: Regions) -> dict[fx.Node, list[str]]:
    """Marks for where regions begin: kind and name in front of the first node, and the reason where one is skipped.

    A skipped region is located by its module's path alone. Where no node has that path, the mark is at the top.
    """
    begins = [(_first(a.residual.stream, [a.residual.output]), f"attention {a.name}") for a in regions.attentions]
    for layer in regions.experts:
        begins += _begins_of(layer)
    begins += [(_first(f.stream, [f.output]), f"feedforward {f.name}") for f in regions.feedforwards]
    begins += [(_first_in(graph, s.name), f"skipped {s.kind} {s.name}: {s.reason}") for s in regions.skipped]
    marks: dict[fx.Node, list[str]] = {}
    for node, mark in begins:
        marks.setdefault(node, []).append(mark)
    return marks


def _begins_of(layer: Experts) -> list[tuple[fx.Node, str]]:
    """Router, experts and shared experts; what all of them read, such as a norm, belongs to none of them."""
    stream, rows = layer.residual.stream, layer.body.rows
    router = _first(stream, [layer.choice, layer.weight], rows)

    def shared(one: FeedForward) -> fx.Node:
        return _first(one.stream, [one.output], [*rows, layer.choice])

    return [
        (router, f"router {layer.name}"),
        (layer.marker, f"experts {layer.name}"),
        *((shared(one), f"shared expert {one.name}") for one in layer.shared),
    ]


def _first(stream: fx.Node, ends: list[fx.Node], others: Sequence[fx.Node] = ()) -> fx.Node:
    """The first node between the stream and `ends` that `others` do not depend on."""
    inside = between(stream, ends) - between(stream, others)
    return min(inside or ends)


def _first_in(graph: fx.Graph, path: str) -> fx.Node:
    """The first op of a module or of its submodules."""
    ops = [node for node in graph.nodes if node.op != "placeholder"]
    inside = (node for node in ops if path and f"{module_path(node)}.".startswith(f"{path}."))
    return next(inside, next(iter(graph.nodes)))


def _names(graph: fx.Graph, inputs: Sequence[str] | None) -> dict[fx.Node, str]:
    """The name of each node: parameters and buffers as in the model, unless two nodes would get the same name."""
    names = {node: node.name for node in graph.nodes}
    placeholders = graph.find_nodes(op="placeholder")
    given = inputs if inputs is not None else [node.name for node in placeholders]
    short = names | dict(zip(placeholders, map(_parameter, given), strict=True))
    return short if len(set(short.values())) == len(names) else names


def _parameter(name: str) -> str:
    """`l_self_modules_blocks_modules_1_modules_attn_parameters_weight_` -> `self.blocks.1.attn.weight`."""
    if not re.match("l_self_(modules|parameters|buffers)_", name, re.IGNORECASE):
        return name
    return "self" + re.sub("_(modules|parameters|buffers)_", ".", name[len("l_self") :]).removesuffix("_")


def _origin(node: fx.Node) -> str:
    """The module and its line of code, as far as they are known."""
    found = re.findall(r'File "(.+)", line (\d+), in .*\n\s*(.+)', node.meta.get("stack_trace") or "")
    line = [f"{Path(file).name}:{line}: {code}" for file, line, code in found[-1:]]
    return "  ".join(filter(None, [module_path(node), *line]))


def _line(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    value = _described(node.meta.get("val", node.meta.get("example_value")))
    name = f"{names[node]}: {value}" if value else names[node]
    if node.op == "placeholder":
        return f"input {name}"
    if node.op == "output":
        return f"return {_shown(node.args[0], names)}"
    if node.op == "get_attr":
        return f"{name} = self.{node.target}"
    shown = [_shown(arg, names) for arg in node.args]
    called = f"{shown.pop(0)}.{node.target}" if node.op == "call_method" else _callee(node.target)
    shown += [f"{key}={_shown(arg, names)}" for key, arg in node.kwargs.items()]
    return f"{name} = {called}({', '.join(shown)})"


def _callee(target: Any) -> str:
    if isinstance(target, str):
        return f"self.{target}"
    if isinstance(target, _OPS):
        return str(target)
    module, name = getattr(target, "__module__", None), getattr(target, "__name__", repr(target))
    return f"{module.removeprefix('_')}.{name}" if module else f"torch.{name}"


def _shown(arg: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(arg, fx.Node):
        return names[arg]
    if not isinstance(arg, (list, tuple)):
        return repr(arg)
    items = [_shown(item, names) for item in arg]
    if len(items) > _LONG and all(isinstance(item, fx.Node) for item in arg):
        items[3:-1] = ["..."]
    return f"({', '.join(items)},)" if isinstance(arg, tuple) else f"[{', '.join(items)}]"


def _described(value: Any) -> str:
    """`float32[2, 16, 32]`, with the device where it is not the CPU."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_described, value))})"
    if not isinstance(value, torch.Tensor):
        return "" if value is None else type(value).__name__
    device = "" if value.device.type == "cpu" else f" on {value.device}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"
