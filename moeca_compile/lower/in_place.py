"""New values of caches, written where they stay: for steps that know caches by their addresses.

    def step(x, weights):                      def step(x, weights, cache, branches):
        y = pointwise(x)                           y = pointwise(x)
                                       ->          cache.copy_(y)
        b = fixed_k_outputs(y, ...)                fixed_k_outputs_into(branches, y, ...)
        return out, y, b                           return out

A step that is recorded as a CUDA graph cannot hand over new tensors, since the next step reads caches at the
addresses that it was recorded with. Copied after the step, each value is written, read and written again. Written by
the step itself, Inductor lets the kernel that computes a value write it, and our ops write to the memory that they
are given.

A cache that the step reads too is left to the caller: other parts of the graph may read it after the write.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from moeca_compile._torch_private import fake_mode_of, schema_of
from moeca_compile.lower.program import TracedStep
from moeca_compile.ops.aten import CASTS, VIEWS
from moeca_compile.passes.analysis.graph import placeholders
from moeca_compile.passes.rewrite.caches import Caches

aten, moeca = torch.ops.aten, torch.ops.moeca


def write_in_place(traced: TracedStep, state: Caches) -> TracedStep:
    """The step with one more input for each cache that it replaces without reading it; these it does not return."""
    graph = traced.graph.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    values = list(output.args[0])
    updates = dict(zip(traced.update_names, values[traced.outputs :], strict=False))
    written = [name for name in updates if _unread(name, traced, state)]
    for name in written:
        _write(updates[name], _target(graph, state, name))
    kept = [*values[: traced.outputs], *(value for name, value in updates.items() if name not in written)]
    output.args = ([*kept, *values[traced.outputs + len(updates) :]],)
    graph.eliminate_dead_code()
    graph.lint()
    traced.graph.recompile()
    left = tuple(name for name in updates if name not in written)
    return replace(traced, update_names=left, written_names=tuple(written))


def _unread(name: str, traced: TracedStep, state: Caches) -> bool:
    """Whether the step reads none of the tensors that the value may go to."""
    slots = {spec.name for spec in state.rings.get(name, ())} or {name}
    return slots.isdisjoint(traced.state_names)


def _target(graph: fx.Graph, state: Caches, name: str) -> fx.Node:
    """An input of the graph for the tensor that holds the new value."""
    spec = state.specs[state.slot(name)]
    last = placeholders(graph)[-1]
    with graph.inserting_after(last):
        target = graph.placeholder(f"written_{len(placeholders(graph))}")
    with fake_mode_of([last.meta["val"]]):
        target.meta["val"] = torch.empty(spec.shape, dtype=spec.dtype, device=state.device)
    return target


def _write(value: fx.Node, target: fx.Node) -> None:
    source = _origin(value)
    if source.op == "call_function" and _same_memory(source, target):
        if source.target is moeca.fixed_k_outputs.default:
            return _write_fixed_k(source, target)
        if source.target is operator.getitem and _is_pool(source):
            return _write_variable_k(source, target)
    with value.graph.inserting_after(_after(value)):
        value.graph.call_function(aten.copy_.default, (target, value)).meta["val"] = target.meta["val"]
    return None


def _origin(node: fx.Node) -> fx.Node:
    """The node that computes these values, in this order and dtype; views and copies of them lie between."""
    while node.target in VIEWS | CASTS:
        before = node.args[0]
        assert isinstance(before, fx.Node)
        if before.meta["val"].dtype != node.meta["val"].dtype:
            break
        node = before
    return node


def _same_memory(source: fx.Node, target: fx.Node) -> bool:
    """Whether the values of `source` lie in memory like those of `target`, but for the shape."""
    value, into = source.meta["val"], target.meta["val"]
    return bool(value.dtype == into.dtype and value.is_contiguous() and value.numel() == into.numel())


def _is_pool(source: fx.Node) -> bool:
    outputs, number = source.args
    return isinstance(outputs, fx.Node) and outputs.target is moeca.variable_k_outputs.default and bool(number == 1)


def _write_fixed_k(outputs: fx.Node, target: fx.Node) -> None:
    rows, index, parameters, experts, body, _ = _arguments(outputs)
    graph = outputs.graph
    with graph.inserting_before(outputs):
        arguments = (target, rows, index, parameters, experts, body)
        graph.call_function(moeca.fixed_k_outputs_into.default, arguments).meta["val"] = None
        shape = list(outputs.meta["val"].shape)
        written = graph.call_function(aten.view.default, (target, shape))
    written.meta = dict(outputs.meta)
    outputs.replace_all_uses_with(written)
    graph.erase_node(outputs)


def _write_variable_k(pool: fx.Node, target: fx.Node) -> None:
    outputs = pool.args[0]
    assert isinstance(outputs, fx.Node)
    rows, routed, weight, pool_row, parameters, body, _, _ = _arguments(outputs)
    graph, values = outputs.graph, outputs.meta["val"]
    with graph.inserting_before(outputs):
        arguments = (target, rows, routed, weight, pool_row, parameters, body)
        written = graph.call_function(moeca.variable_k_outputs_into.default, arguments)
    written.meta["val"] = (values[0], *values[2:])
    for user in list(outputs.users):
        number = user.args[1]
        assert isinstance(number, int)
        if number == 1:
            user.replace_all_uses_with(target)
            graph.erase_node(user)
        else:
            user.args = (written, number - (number > 1))
    graph.erase_node(outputs)


def _arguments(node: fx.Node) -> Sequence[Any]:
    """All arguments of an op of ours, in order."""
    given: Mapping[str, Any] = node.kwargs
    names = [argument.name for argument in schema_of(node.target).arguments]
    return [*node.args, *(given.get(name) for name in names[len(node.args) :])]


def _after(value: fx.Node) -> fx.Node:
    """The node after which `value` and all inputs of the graph are there."""
    return placeholders(value.graph)[-1] if value.op == "placeholder" else value
