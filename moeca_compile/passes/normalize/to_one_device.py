"""Move what a model computes on the CPU to the accelerator, where it is used.

Before:  def forward(x (cuda), t (cpu)):   time = t.to("cuda");   f = arange(16, device="cpu").to("cuda")
After:   def forward(x (cuda), t (cuda)):  time = t.to("cuda");   f = arange(16, device="cuda").to("cuda")

A copy from the CPU inside a step would make every step wait for it. Outside, the argument is copied once a call, and
nothing waits (`lower.upload`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from moeca_compile._torch_private import fake_mode_of
from moeca_compile.passes.analysis.graph import draws_random_numbers, placeholders
from moeca_compile.passes.analysis.host_ops import values_of

CPU = torch.device("cpu")


def to_one_device(
    gm: fx.GraphModule, inputs: Sequence[Any], arguments: Sequence[bool], device: torch.device
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The exported graph with everything on `device`, and the positions of the inputs that must now be there.

    Args:
        gm, inputs: the graph, with `val` on every node, and an input for each placeholder.
        arguments: which inputs are arguments of the model; weights stay where they are.

    Returns `gm` itself and no positions where nothing is on the CPU, or where something must stay there: an output, a
    weight, or an op that draws random numbers (the device would draw different ones).
    """
    if device == CPU or not any(map(_on_cpu, gm.graph.nodes)) or not _may_move(gm.graph, arguments):
        return gm, ()
    moved = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    moved.meta = dict(gm.meta)
    positions = tuple(i for i, node in enumerate(placeholders(moved.graph)) if _on_cpu(node))
    for node in moved.graph.nodes:
        if _on_cpu(node):
            _move(moved, node, device)
    return (moved, positions) if _propagated(moved, inputs, positions, device) else (gm, ())


def _may_move(graph: fx.Graph, arguments: Sequence[bool]) -> bool:
    (output,) = (node for node in graph.nodes if node.op == "output")
    weights = [node for node, user in zip(placeholders(graph), arguments, strict=True) if not user]
    fixed = [*output.all_input_nodes, *(node for node in weights if node.users)]
    random = filter(draws_random_numbers, graph.nodes)
    return not any(_on_cpu(node) for node in [*fixed, *random])


def _move(gm: fx.GraphModule, node: fx.Node, device: torch.device) -> None:
    """Make a node whose value is on the CPU compute it on the device."""
    if node.op == "get_attr":
        setattr(gm, f"{node.target}_moved", getattr(gm, str(node.target)).to(device))
        node.target = f"{node.target}_moved"
    elif node.op == "call_function":
        node.args = tuple(device if arg == CPU else arg for arg in node.args)
        node.kwargs = {name: device if arg == CPU else arg for name, arg in node.kwargs.items()}
        if not node.all_input_nodes:
            node.kwargs = {**node.kwargs, "device": device}


def _propagated(gm: fx.GraphModule, inputs: Sequence[Any], positions: Sequence[int], device: torch.device) -> bool:
    """Give all nodes their new fake values; returns whether all are now on one device."""
    mode = fake_mode_of(inputs)
    with mode:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) and v.device != CPU else v for v in inputs]
        for i in positions:  # the upload makes contiguous copies
            fakes[i] = torch.empty(inputs[i].size(), dtype=inputs[i].dtype, device=device)
    try:
        with torch.no_grad():
            FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    except Exception:
        return False  # an op that runs only on the CPU: leave the graph as it is
    gm.recompile()
    return not any(_on_cpu(node) for node in gm.graph.nodes)


def _on_cpu(node: fx.Node) -> bool:
    return bool(node.users) and any(value.device == CPU for value in values_of(node))
