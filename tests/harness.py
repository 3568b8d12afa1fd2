"""What tests stand on: a recording backend, captured models, exported graphs, steps without compilation."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moeca_compile import fallback
from moeca_compile._torch_private import is_module_state
from moeca_compile.backend import backend_with, compile_graph, compile_step, wrapped_parameters
from moeca_compile.config import MoecaConfig
from moeca_compile.lower import parts
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph
from moeca_compile.lower.parts import Parts
from moeca_compile.lower.program import CompiledStep, TracedStep, lower_parts, part_step
from moeca_compile.notes import Notes
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.policies.forecast import rule_of, weights_after_one
from moeca_compile.reporting.report import Report
from moeca_compile.runtime.engine import Engine, Stages
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.streams import bounds_of


@dataclass
class How:
    """How tests compile: fixtures of conftest.py choose something faster than what users get."""

    stages: Stages = field(default_factory=lambda: Stages(compile_graph, compile_step))
    options: Mapping[str, Any] = field(default_factory=dict)


how = How()


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
    signature: tuple[str, ...] = ()

    def engine(self, **options: Any) -> Engine:
        """The real engine under these options."""
        config = MoecaConfig.from_options({"recipe": "moeca", **how.options, **options})
        return Engine(self.graph, self.inputs, config, Notes(), how.stages, bounds_of(config))

    @property
    def graph(self) -> CapturedGraph:
        return CapturedGraph(self.gm, tuple(self.user_inputs), signature=self.signature)

    def loop(self, **options: Any) -> StepLoop:
        """The engine's step loop for these inputs: the matched graph and its plan."""
        return self.engine(**options).loop_for(self.inputs)

    def arguments(self, **values: Any) -> list[Any]:
        """One input per placeholder; `values` are arguments of the model's forward by name."""
        assert values.keys() <= set(self.graph.names), f"the graph has inputs {self.graph.names}"
        return [values.get(name, old) for name, old in zip(self.graph.names, self.inputs, strict=True)]


def caches_of(loop: StepLoop) -> tuple[Caches, Tensor]:
    """Caches for steps of this loop, and the forecast weights of the steps after the first full one."""
    compiled = loop.compiled
    slots = rule_of(compiled.config).slots
    return Caches(compiled.plan.caches, compiled.device), weights_after_one(slots, compiled.device)


def captured(model: nn.Module, *arguments: Any) -> Captured:
    """Capture `model` as `torch.compile(model, backend="moeca")` does. Its graph must be one."""
    torch._dynamo.reset()
    backend = RecordingBackend(run=lambda gm: lambda *inputs: _zeros(gm))
    with torch.no_grad():
        torch.compile(model, backend=backend)(*arguments)
    (gm,), (inputs,) = backend.graphs, backend.inputs
    user_inputs = [not is_module_state(node) for node in gm.graph.nodes if node.op == "placeholder"]
    signature = wrapped_parameters(model) if isinstance(model, nn.Module) else ()
    return Captured(gm, list(inputs), user_inputs, signature)


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


def own_warnings(report: Report) -> list[str]:
    """Those of the model. A report also has what capture refused, anywhere in the process."""
    return [text for text in report.warnings if re.match(r"\S+:\d+ ", text) is None]


def calls_of(function: Callable[[], object]) -> int:
    """How many functions are called, Python's and built-in ones."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def one_in(n: int, cases: Iterable[Any]) -> list[Any]:
    """The cases, with the mark `smoke` for those that `sampled(n)` lets run with other tests."""
    return [pytest.param(case, marks=[pytest.mark.smoke] * (at % n == 0)) for at, case in enumerate(cases)]


def replace_inductor(patch: pytest.MonkeyPatch) -> None:
    """Graphs run op by op wherever Inductor would compile them."""
    patch.setattr(parts, "compile_graph", lambda gm, *_: gm)
    patch.setattr(parts, "compile_for_sizes", lambda gm, *_: (gm, lambda sizes: True))
    patch.setattr(fallback, "inductor", lambda gm, inputs: gm.forward)


def lower_alone(traced: TracedStep, lowering: str, whole: bool) -> CompiledStep:
    """A traced step, compiled beside no other; `lowering` and `whole` as in `part_step`."""
    return lower_parts(part_step(traced, lowering, whole), Parts(), all_sizes=False)


def eager_step(compiled: CompiledGraph, kind: StepKind, *_: Any) -> StepFunction:
    """In place of `backend.compile_step`: the step function as it is, neither traced nor compiled."""
    return torch.no_grad()(compiled.function(kind))


EAGER = Stages(compile_graph, eager_step)
"""Steps run as eager functions."""


eager_backend = backend_with(EAGER)
"""The backend with eager steps; with `lowering="eager"`, graphs in which nothing is cached run as they are too."""
