"""What compilation returns: a model's graph with its plan, frozen. The runtime runs its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn

from moeca_compile.config import MoecaConfig
from moeca_compile.disk.keys import graph_key
from moeca_compile.lower.parts import Parts
from moeca_compile.lower.passed_sizes import PassedSizes
from moeca_compile.passes.analysis.graph import ancestors, groups_in, placeholders, shape_of
from moeca_compile.passes.dump import Dump
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step import Observer
from moeca_compile.passes.rewrite.step_function import StepFunction, probe_function, step_function
from moeca_compile.plan import Plan


@dataclass(frozen=True)
class CapturedGraph:
    """Dynamo's graph of a model, or of a part of one.

    Attributes:
        gm: the graph.
        arguments: for each placeholder, whether it is an argument of the model; the others are its weights.
        numbers: positions of inputs that are Python numbers; they are passed on as 0-dim tensors.
        constants: positions of inputs that are 0-dim tensors; they are passed on as Python numbers.
        partial: whether plain Python code calls this graph, because a function that contains it broke the graph.
        broken: whether there is a graph break anywhere in the model.
        modules: where Dynamo calls the graph for certain modules alone, these; else empty, and one graph may serve
            several models.
        signature: the parameters of a forward that something wraps, which Dynamo sees as args and kwargs.
        parts: the compiled parts of the model's steps, at whatever input shapes.
        passed: where the rewrite has passed validation.
    """

    gm: fx.GraphModule
    arguments: tuple[bool, ...]
    numbers: tuple[int, ...] = ()
    partial: bool = False
    broken: bool = False
    constants: tuple[int, ...] = ()
    modules: tuple[ref[nn.Module], ...] = ()
    signature: tuple[str, ...] = ()
    parts: Parts = field(default_factory=Parts, compare=False, repr=False)
    passed: PassedSizes = field(default_factory=PassedSizes, compare=False, repr=False)

    @property
    def in_parts(self) -> bool:
        return self.partial or self.broken

    def argument_nodes(self, graph: fx.Graph) -> set[fx.Node]:
        """The placeholders of `graph` that are arguments of the model; its inputs must be those of `gm`."""
        return {node for node, user in zip(placeholders(graph), self.arguments, strict=True) if user}

    @property
    def names(self) -> list[str]:
        """The names of the inputs in the model's signature, as far as Dynamo keeps them."""
        names = [node.name.removeprefix("l_").rstrip("_") for node in placeholders(self.gm.graph)]
        wrapped = {f"args_{place}": name for place, name in enumerate(self.signature)}
        return [wrapped.get(name, name.removeprefix("kwargs_")) for name in names]


@dataclass(frozen=True)
class CompiledGraph:
    """One graph at one set of input shapes: normalized, matched, validated and planned.

    Attributes:
        captured: Dynamo's graph.
        module: the normalized graph in functional ATen; one placeholder per input.
        device: where the model runs; dtype: of its residual stream.
        uploaded: positions of the inputs that are copied to the device at each call.
        plan: what is cached, and what that costs.
        config: the options in force.
        waits: why the experts make the host wait for the device at every step; None where they do not.
        dump: where the graph is written after each stage.
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

    @cached_property
    def key(self) -> str:
        """What all its steps are made from, for what is kept on disk. Raises NoFormError where it has no key."""
        return graph_key(self.module, self.regions, self.config, self.device)

    @property
    def caching(self) -> bool:
        return bool(self.plan.replacements)

    @property
    def recorded(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        return self.config.records_on(self.device)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def regions(self) -> Regions:
        return self.plan.regions

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        return placeholders(self.graph)

    @cached_property
    def proven(self) -> bool:
        """Whether validation compared all that it should."""
        return self.regions.proven

    @cached_property
    def tensor_arguments(self) -> list[int]:
        """The positions of the model's arguments that are tensors."""
        given = zip(self.placeholders, self.captured.arguments, strict=True)
        return [i for i, (node, user) in enumerate(given) if user and isinstance(node.meta.get("val"), Tensor)]

    @cached_property
    def mutated(self) -> tuple[int, ...]:
        """The positions of the inputs that the model changes in place; their new values are its first outputs."""
        positions: tuple[int, ...] = self.module.meta["mutated_inputs"]
        return positions

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The names of the process groups through which the model talks to other ranks."""
        return tuple(sorted(groups_in(self.graph)))

    @cached_property
    def timesteps(self) -> list[int]:
        """The positions of the inputs that may be the timestep."""
        position = {node: i for i, node in enumerate(self.placeholders)}
        return [position[node] for node in self.regions.timesteps]

    @cached_property
    def perhaps_labels(self) -> set[int]:
        """Those of the inputs that may be the timestep which may as well be class labels: integers, of which no sines
        are taken."""
        guesses = self.timesteps if self.regions.guessed else []
        return {i for i in guesses if not self.placeholders[i].meta["val"].dtype.is_floating_point}

    @cached_property
    def picture(self) -> int | None:
        """The position of the input that a sampler changes from step to step; None if there is no such input.

        The residual streams begin with it. Where other arguments lead there too (a text that is joined with it), it
        is the one whose samples have the form of an output, or else the largest.
        """
        starts = [start for start, _ in self.regions.stacks]
        arguments = self._arguments & ancestors(starts)
        shapes = {node: shape_of(node) for node in arguments if node.meta["val"].is_floating_point()}
        *_, returned = self.graph.nodes
        outputs = [shape_of(node) for node in returned.all_input_nodes]

        def like_an_output(shape: tuple[int, ...]) -> bool:
            return any(shape[:1] == other[:1] and shape[-2:] == other[-2:] for other in outputs)

        many = {node: shape for node, shape in shapes.items() if len(shape) > 1}
        found = max(many, key=lambda node: (like_an_output(many[node]), prod(many[node])), default=None)
        return None if found is None else self.placeholders.index(found)

    @cached_property
    def told_by(self) -> dict[str, int]:
        """The arguments that tell streams and requests apart: all but the timestep and the picture, by name.

        Class labels do, so what may be one or the timestep is among them.
        """
        others = {self.picture, *self.timesteps} - self.perhaps_labels
        names, own = self.captured.names, self._arguments
        return {names[i]: i for i, node in enumerate(self.placeholders) if node in own and i not in others}

    @property
    def _arguments(self) -> set[fx.Node]:
        return self.captured.argument_nodes(self.graph)

    def input_names(self, state_names: Sequence[str], inputs: Sequence[Any]) -> list[str]:
        """Names of a traced step's inputs: tensor inputs of the model, caches, forecast weights."""
        names = [name for name, value in zip(self.captured.names, inputs, strict=True) if isinstance(value, Tensor)]
        return [*names, *state_names, "forecast_weights"]

    def function(self, kind: StepKind, updates: bool = True, observer: Observer | None = None) -> StepFunction:
        """The step of this kind as an eager function, which may write to some of the caches."""
        probe = self.plan.probe
        if kind.probe and probe is not None:
            return probe_function(self.graph, self.regions, probe)
        return step_function(self.graph, self.regions, self.plan.replacements, kind, updates, probe, observer)

    def write_back(self, inputs: Sequence[Any], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copy new values into the inputs that the model changes in place; returns the model's outputs."""
        for position, value in zip(self.mutated, outputs, strict=False):
            inputs[position].copy_(value)
        return outputs[len(self.mutated) :]


def stream_dtype(regions: Regions, inputs: Sequence[Any]) -> torch.dtype:
    """The dtype of the residual stream; without one, of the first floating-point input."""
    if regions.residuals:
        dtype: torch.dtype = regions.residuals[0].stream.meta["val"].dtype
        return dtype
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    return next((value for value in tensors if value.is_floating_point()), tensors[0]).dtype


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Where a model runs: the accelerator of the first input or weight that is on one, else the CPU."""
    devices = [value.device for value in inputs if isinstance(value, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
