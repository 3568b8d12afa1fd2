"""Which inputs of a graph tracing can do without, and that they come back to where they were."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.listed_parameters import ListedParameters
from tests.harness import nodes_of, placeholders

MARKER = torch.ops.moeca.experts_fixed_k
SIZES = {"x": (5, 4), "index": (5, 2), "weight": (5, 2), "a0": (4, 4), "a1": (4, 4), "a2": (4, 4)}


def marked(of_last: str = "a2", also: str | None = None, alive: bool = True) -> tuple[fx.GraphModule, list]:
    """A layer of three experts of one matrix; the last's is `of_last`. `also` is an input with another use."""
    graph, inputs = fx.Graph(), []
    for name, size in SIZES.items():
        inputs.append(torch.zeros(size, dtype=torch.int64) if name == "index" else torch.randn(size))
        graph.placeholder(name).meta["example_value"] = inputs[-1]
    nodes = {node.name: node for node in graph.nodes}
    body = graph.call_function(torch.matmul, (nodes["x"], nodes["a0"]))
    last = nodes[of_last] if of_last in nodes else graph.call_method("t", (nodes["a2"],))
    params = [nodes["a0"], nodes["a1"], last]
    out = graph.call_function(MARKER, (nodes["x"], nodes["index"], nodes["weight"], body, params, 3))
    extra = (graph.call_method("sum", (nodes[also],)),) if also else ()
    graph.output((*((out,) if alive else (body,)), *extra))
    return fx.GraphModule({}, graph), inputs


def left_out(gm: fx.GraphModule) -> list[str]:
    listed = ListedParameters.of(gm.graph)
    kept = set(listed.traced) if listed else range(len(SIZES))
    return [name for position, name in enumerate(SIZES) if position not in kept]


def test_only_inputs_that_nothing_but_a_list_needs_are_left_out():
    assert left_out(marked()[0]) == ["a1", "a2"]
    assert left_out(marked(also="a1")[0]) == ["a2"]
    assert left_out(marked(of_last="a0")[0]) == ["a1"]
    assert left_out(marked(of_last="made from one")[0]) == []


def test_they_come_back_in_their_places():
    for gm, inputs in (marked(), marked(also="a1"), marked(of_last="a0"), marked(of_last="made from one")):
        exported = to_functional_aten(gm, inputs)
        (before,), (after,) = nodes_of(gm, MARKER), nodes_of(exported, MARKER)
        assert [tuple(node.meta["val"].shape) for node in placeholders(exported)] == list(SIZES.values())
        assert len(after.args[4]) == len(before.args[4]) == 3
        assert listed_positions(after, placeholders(exported)) == listed_positions(before, placeholders(gm))


def listed_positions(marker: fx.Node, inputs: list[fx.Node]) -> list[int | None]:
    """Which inputs stand in the marker's list; None for what is made from one."""
    return [inputs.index(node) if node in inputs else None for node in marker.args[4]]


def test_a_layer_that_nobody_needs_is_dropped_with_its_list():
    gm, inputs = marked(alive=False)
    exported = to_functional_aten(gm, inputs)
    assert nodes_of(exported, MARKER) == []
    assert len(placeholders(exported)) == len(SIZES)
    torch.testing.assert_close(exported(*inputs)[0], inputs[0] @ inputs[3])
