"""Check a compiled step partition by partition: each on the inputs that it has in eager mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from moeca_compile.lower.executor import Compiled
from moeca_compile.lower.interpret import Change, Given, interpret
from moeca_compile.lower.partition import Call, one_call, written_by
from moeca_compile.lower.program import CompiledStep
from moeca_compile.lower.random_state import RandomState
from moeca_compile.lower.rounding import Trial, with_noise
from moeca_compile.passes.analysis.graph import last_uses, placeholders

_log = logging.getLogger(__name__)

Run = Callable[["_Partition", "Compiled | None"], list[Any]]
"""Runs a partition, of which the compiled code is given too; returns its results."""


class Compare(Protocol):
    """Raises ValidationError where found and wanted values differ by more than rounding."""

    def __call__(self, found: Sequence[Any], wanted: Sequence[Any], trial: Trial) -> None: ...


def checked_outputs(step: CompiledStep, flat: Sequence[Any], device: torch.device, compare: Compare) -> list[Any]:
    """The model's outputs, by the step's partitions in eager mode; `compare` is given those of the compiled ones.

    Args:
        step: the compiled step.
        flat: the inputs of its graph; they do not change.
        device: where the step runs.
    """

    def checked(partition: _Partition, code: Compiled | None) -> list[Any]:
        results = partition.eagerly()
        if code is not None:
            compare(partition.compiled(code), results, partition.noisy)
        return results

    return _outputs(step, flat, device, checked)


def noisy_outputs(step: CompiledStep, flat: Sequence[Any], generator: torch.Generator) -> list[Any]:
    """The model's outputs in eager mode, where every value rounds differently."""
    return _outputs(step, flat, generator.device, lambda partition, code: partition.noisy(generator))


def _outputs(step: CompiledStep, flat: Sequence[Any], device: torch.device, run: Run) -> list[Any]:
    """The model's outputs, where `run` runs each partition. A step that was not compiled is one partition.

    Values are dropped after their last use, and caches are copied only where a partition writes to them, as long as
    that runs. So this needs little more memory than the step.
    """
    graph, traced = step.traced.graph.graph, step.traced
    inputs, outputs = placeholders(graph), traced.output_nodes
    own = traced.cache_nodes
    values = {**dict(zip(inputs, flat, strict=True)), **traced.lifted}
    partitions = step.partitions or ((one_call(graph), None),)
    last = last_uses([(*call.arguments, *call.results) for call, _ in partitions], outputs)
    for (call, code), dead in zip(partitions, last, strict=True):
        partition = _Partition(call, values, _written(call.nodes, own | set(call.arguments) - set(inputs)), device)
        values |= dict(zip(call.results, run(partition, code), strict=False))
        for node in dead:
            del values[node]
    return [values[node] if isinstance(node, fx.Node) else node for node in outputs]


class _Partition:
    """One partition with the values of its inputs. `written` are inputs that it writes to: each run has copies, and
    draws the same random numbers."""

    def __init__(
        self, call: Call, values: Mapping[fx.Node, Any], written: AbstractSet[fx.Node], device: torch.device
    ) -> None:
        self.call, self.written = call, [node for node in call.arguments if node in written]
        self.values = {node: values[node] for node in call.arguments}
        self.random = RandomState(device)

    def eagerly(self, change: Change | None = None, given: Given | None = None) -> list[Any]:
        """Its results, and the inputs that it wrote to."""
        copies = self._copies()
        self.random.restore()
        values = interpret(self.call.nodes, self.values | copies, self.call.results, change, given)
        return values + list(copies.values())

    def compiled(self, code: Compiled) -> list[Any]:
        """The same by compiled code."""
        copies = self._copies()
        values = self.values | copies
        self.random.restore()
        return [*code(*(values[node] for node in self.call.arguments)), *copies.values()]

    def noisy(self, generator: torch.Generator) -> list[Any]:
        """The same in eager mode, where every value rounds differently.

        In every second trial values stay in float32 between ops, as in Inductor's kernels. That breaks ties between
        rounded values, which a selection in eager mode breaks by order, and which noise on these values leaves.
        """
        if generator.initial_seed() % 2:
            try:
                return self._wide(generator)
            except Exception:  # an op may take no float32
                _log.debug("a part of a step does not run in float32", exc_info=True)
        return self.eagerly(lambda node, value, arguments: with_noise(node, value, arguments, generator))

    def _wide(self, generator: torch.Generator) -> list[Any]:
        def noisy(node: fx.Node, value: Any, arguments: Sequence[Any]) -> Any:
            kept = node.meta.get("val")
            dtype = kept.dtype if isinstance(kept, Tensor) else None
            return with_noise(node, value, arguments, generator, dtype=dtype)

        found, count = self.eagerly(noisy, _widened), len(self.call.results)
        return [*map(_as_traced, self.call.results, found[:count]), *found[count:]]

    def _copies(self) -> dict[fx.Node, Any]:
        return {node: self.values[node].clone() for node in self.written}


def _widened(node: fx.Node, source: fx.Node, value: Any) -> Any:
    """A value in float32 at least; as the graph has it for an op of ours, which no kernel is fused with."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if str(node.target).startswith("moeca."):
        return _as_traced(source, value)
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _as_traced(node: fx.Node, value: Any) -> Any:
    """The value of a node in the dtype that it has in the graph."""
    return value.to(node.meta["val"].dtype) if isinstance(value, Tensor) else value


def _written(nodes: Iterable[fx.Node], own: AbstractSet[fx.Node]) -> set[fx.Node]:
    """Which of the nodes `own` some op may write to. The model's inputs are none of them: it is functional."""
    return {arg for node in nodes for arg in written_by(node)} & own
