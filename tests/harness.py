"""What tests stand on: a recording backend, captured models, exported graphs, steps without compilation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moeca_compile._torch_private import is_module_state
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.record import Record
from moeca_compile.runtime.specialization import Specialization


class RecordingBackend:
    """Pass it as `torch.compile(model, backend=RecordingBackend())`.

    graphs, inputs: Dynamo's graphs and their example inputs, in the order in which they came
    ours: whether capture takes it for a backend of this package
    run: what to execute a graph with; as it is, if None
    """

    __name__ = "recording"

    def __init__(self, ours: bool = True, run: Callable[[fx.GraphModule], Callable[..., Any]] | None = None) -> None:
        self._moeca_backend = ours
        self.run = run
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[Sequence[Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.inputs.append(list(example_inputs))
        return self.run(gm) if self.run else gm.forward


def nodes_of(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The nodes that call `target`: a function, an op packet (any overload of it) or the name of a method."""
    return [node for node in gm.graph.nodes if _packet(node.target) == target]


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


@dataclass(frozen=True)
class Captured:
    """What the backend gets of a model: Dynamo's graph, its inputs, and which of them are arguments."""

    gm: fx.GraphModule
    inputs: list[Any]
    user_inputs: list[bool]

    def engine(self, **options: Any) -> Engine:
        """The real engine under these options."""
        config = MoecaConfig.from_options(options)
        return Engine(self.gm, self.inputs, self.user_inputs, [], config, Record(config))

    def specialization(self, **options: Any) -> Specialization:
        """The engine's first set of shapes: the matched graph and its plan."""
        return self.engine(**options).prepare(self.inputs)

    def arguments(self, **values: Any) -> list[Any]:
        """One input per placeholder; `values` are arguments of the model's forward by name."""
        names = [node.name for node in self.gm.graph.nodes if node.op == "placeholder"]
        given = {f"l_{name}_": value for name, value in values.items()}
        return [given.get(name, old) for name, old in zip(names, self.inputs, strict=True)]


def captured(model: nn.Module, *arguments: Any) -> Captured:
    """Capture `model` as `torch.compile(model, backend="moeca")` does. Its graph must be one."""
    torch._dynamo.reset()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: _zeros(gm))
    with torch.no_grad():
        torch.compile(model, backend=backend)(*arguments)
    (gm,), (inputs,) = backend.graphs, backend.inputs
    user_inputs = [not is_module_state(node) for node in gm.graph.nodes if node.op == "placeholder"]
    return Captured(gm, list(inputs), user_inputs)


def _zeros(gm: fx.GraphModule) -> tuple[Any, ...]:
    """Outputs of the right shapes: whoever captures wants the graph, not its values."""
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    values = [node.meta["example_value"] for node in output.args[0]]
    return tuple(torch.zeros(tuple(value.shape), dtype=value.dtype) for value in values)


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        result = self.function(*inputs)
        return result if isinstance(result, tuple) else (result,)


def exported(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """Functional ATen of a function of tensors, as the passes see a model; one placeholder per input."""
    return to_functional_aten(_Function(function), inputs)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def outputs(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that the graph returns."""
    return list(next(node for node in gm.graph.nodes if node.op == "output").args[0])


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often each op stands in the graph, by its name without namespace and overload."""
    return Counter(_packet(n.target).__name__ for n in gm.graph.nodes if n.op == "call_function")


class EagerProgram:
    """In place of `runtime.program.Program`: the step function as it is, neither traced nor compiled."""

    def __init__(self, function: Callable[..., Any], *_: Any) -> None:
        self.function = function

    def lower(self, whole: bool) -> None:
        """There is nothing to compile."""

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any], state: dict[str, torch.Tensor], clock: torch.Tensor) -> Any:
        return self.function(inputs, state, clock)
