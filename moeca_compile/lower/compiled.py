"""What compilation returns: a model's graph with its plan, frozen. The runtime runs steps over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.dump import Dump
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, step_function
from moeca_compile.plan import Plan


@dataclass(frozen=True)
class CapturedGraph:
    """Dynamo's graph of a model, or of a part of one.

    Attributes:
        gm: the graph.
        arguments: which of its placeholders are arguments of the model; the others are its weights.
        numbers: positions of inputs that come as Python numbers and go in as 0-dim tensors.
        partial: whether its callers run as plain Python, since the graph breaks in the model.
        broken: whether the graph breaks anywhere in the model.
    """

    gm: fx.GraphModule
    arguments: tuple[bool, ...]
    numbers: tuple[int, ...] = ()
    partial: bool = False
    broken: bool = False

    @property
    def in_parts(self) -> bool:
        return self.partial or self.broken

    def argument_nodes(self, graph: fx.Graph) -> set[fx.Node]:
        """The placeholders of `graph`, which has the same inputs, that are arguments of the model."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        return {node for node, user in zip(placeholders, self.arguments, strict=True) if user}

    @property
    def names(self) -> list[str]:
        """The inputs by their names in the model's signature, as far as Dynamo tells."""
        return [n.name.removeprefix("l_").rstrip("_") for n in self.gm.graph.nodes if n.op == "placeholder"]


@dataclass(frozen=True)
class CompiledGraph:
    """One graph at one set of input shapes: normalized, matched, validated and planned.

    Attributes:
        captured: what it was made of.
        module: the normalized graph, functional ATen; one placeholder per input.
        device, dtype: where the model lies, and what its residual stream is computed in.
        uploaded: positions of the inputs that are copied to the device at each call.
        plan: what is cached, and what that costs.
        config: the options in force.
        waits: why the experts' ops wait for the host at every step; None where they do not.
        dump: where its stages are shown.
    """

    captured: CapturedGraph
    module: fx.GraphModule
    device: torch.device
    dtype: torch.dtype
    uploaded: tuple[int, ...]
    plan: Plan
    config: MoecaConfig
    waits: str | None = None
    dump: Dump = field(default_factory=Dump)

    @property
    def caching(self) -> bool:
        return bool(self.plan.replacements)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def regions(self) -> Regions:
        return self.plan.regions

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def timesteps(self) -> list[int]:
        """The positions of the inputs that may be the timestep."""
        places = {node: i for i, node in enumerate(self.placeholders)}
        return [places[node] for node in self.regions.timesteps]

    def input_names(self, state_names: Sequence[str], inputs: Sequence[Any]) -> list[str]:
        """What to call the inputs of a traced step: those of the model that are tensors, its caches, coefficients."""
        names = [name for name, value in zip(self.captured.names, inputs, strict=True) if isinstance(value, Tensor)]
        return [*names, *state_names, "coefficients"]

    def function(self, kind: StepKind) -> StepFunction:
        """The step of this kind as an eager function; it may change some of the state in place."""
        return step_function(self.graph, self.regions, self.plan.replacements, kind)

    def write_back(self, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Write back what the model changes in place; returns the model's own outputs."""
        mutated: tuple[int, ...] = self.module.meta["mutated_inputs"]
        for position, value in zip(mutated, outputs[: len(mutated)], strict=True):
            inputs[position].copy_(value)
        return outputs[len(mutated) :]


def stream_dtype(regions: Regions, inputs: Sequence[Any]) -> torch.dtype:
    """The dtype of the residual stream, else of any input with a fraction."""
    if regions.residuals:
        dtype: torch.dtype = regions.residuals[0].stream.meta["val"].dtype
        return dtype
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return next((value for value in tensors if value.is_floating_point()), tensors[0]).dtype


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Where a model runs: on the accelerator that any of its inputs or weights lies on, else on the CPU."""
    devices = [value.device for value in inputs if isinstance(value, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
