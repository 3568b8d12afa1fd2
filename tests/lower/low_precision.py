"""Models in 16 bits for the tests of validation: captured once, with other weights and inputs for each seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, fx, nn

from examples import families
from examples.families.common import randomize
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.interpret import interpret
from moeca_compile.lower.partition import Call, partition_graph, whole_graph
from moeca_compile.lower.program import CompiledStep, trace_step
from moeca_compile.lower.validate import same_step, sound_regions
from moeca_compile.notes import Notes
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.policies.forecast import LINEAR, weights_after_one
from tests.harness import Captured, captured

BATCH, CPU = 16, torch.device("cpu")
WEIGHTS = weights_after_one(LINEAR.slots, CPU)
Code = Callable[..., list[Any]]
Stand = Callable[[Call], Code]
"""Makes what stands in for the compiled code of a partition."""


@dataclass
class LowPrecision:
    """A captured model of a family under one recipe."""

    model: nn.Module
    graph: Captured
    compiled: CompiledGraph
    dtype: torch.dtype
    seed: int | None = None
    """Of the weights that the model has now."""

    @staticmethod
    def of(model: nn.Module, dtype: torch.dtype, recipe: str, **options: Any) -> LowPrecision:
        model = model.to(dtype)
        x, t, y = families.inputs_for(model, batch=BATCH)  # type: ignore[arg-type]
        graph = captured(model, x.to(dtype), t, y)
        planned = graph.loop(recipe=recipe, validate=False, **options).compiled
        config = MoecaConfig.from_options({"recipe": recipe, **options})
        return LowPrecision(model, graph, replace(planned, config=config), dtype)

    def inputs(self, seed: int) -> list[Any]:
        """New random weights, in the memory of the old ones, and new inputs."""
        if seed != self.seed:  # it takes a tenth of a test's time
            randomize(self.model, seed)
            self.seed = seed
        x, t, y = families.inputs_for(self.model, batch=BATCH, seed=seed)  # type: ignore[arg-type]
        return self.graph.arguments(x=x.to(self.dtype), t=torch.full_like(t, 50.0 * seed % 1000), y=y)

    def regions(self, seed: int = 0) -> tuple[Regions, Notes]:
        """What validation of the rewrite leaves of the regions."""
        notes = Notes()
        found = sound_regions(
            self.compiled.graph, self.compiled.regions, self.compiled.config, self.inputs(seed), notes
        )
        return found, notes

    def kinds(self) -> list[StepKind]:
        """A full step, and a cache step that recomputes a quarter of the tokens where the recipe does."""
        main, plan = self.compiled.regions.main, self.compiled.plan
        assert main is not None
        capacity = main.tokens // 4 if plan.recomputes and self.compiled.config.budget != 0 else 0
        return [StepKind(), StepKind(False, False, capacity)]

    def call(self, kind: StepKind, seed: int) -> tuple[list[Any], Caches]:
        """Inputs and caches of a step: at a cache step, those of a full step on inputs a little different."""
        inputs, state = self.inputs(seed), Caches(self.compiled.plan.caches, CPU)
        if kind.full:
            return inputs, state
        with torch.no_grad():
            full = self.compiled.function(StepKind())(inputs, state, WEIGHTS)
        state.store(full.updates)
        return [v + 0.1 * torch.randn_like(v) if _is_image(v) else v for v in inputs], state

    def step(self, kind: StepKind, stand: Stand) -> CompiledStep:
        """The traced step with something in place of Inductor's code."""
        inputs, state = self.call(kind, 0)
        traced = trace_step(self.compiled.function(kind), inputs, state, WEIGHTS)
        whole = not (kind.attention or kind.experts or kind.capacity)
        calls = whole_graph(traced.graph) if whole else partition_graph(traced.graph)
        return CompiledStep(traced, traced.graph, tuple((call, stand(call)) for call in calls))

    @staticmethod
    def step_like(step: CompiledStep, stand: Stand) -> CompiledStep:
        """The same step with something else in place of its code."""
        return replace(step, partitions=tuple((call, stand(call)) for call, _ in step.partitions))

    def same(self, kind: StepKind, step: CompiledStep, seed: int) -> tuple[bool, Notes]:
        """What validation says of the step's code."""
        notes, (inputs, state) = Notes(), self.call(kind, seed)
        return same_step(self.compiled, kind, step, inputs, state, WEIGHTS, notes), notes


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Products of 16 bits are computed in float32 and rounded once, whoever asks for them.

    That is what a CPU without 16-bit units does too, but for the order of the sums, and it takes seven times as long
    for it: most of the time of a test with models of published widths.
    """
    with torch.library._scoped_library("aten", "IMPL") as library, catch_warnings():
        simplefilter("ignore")  # torch warns that an op is replaced
        for op in (torch.mm, torch.addmm):
            library.impl(op.__name__, partial(_in_float32, op), "CPU", allow_override=True)
        yield


def _in_float32(op: Callable[..., Tensor], *operands: Tensor, **options: Any) -> Tensor:
    wide = [operand.to(torch.promote_types(operand.dtype, torch.float32)) for operand in operands]
    out = torch.empty(0, dtype=wide[0].dtype)  # the op that is given its result is another one, and not replaced
    return op(*wide, **options, out=out).to(operands[0].dtype)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and not isinstance(value, nn.Parameter)


def with_wide_intermediates(call: Call) -> Code:
    """As Inductor's fused kernels do: values within a partition stay in float32, unless the model casts them."""
    wanted = set(call.results)

    def code(*arguments: Any) -> list[Any]:
        values = dict(zip(call.arguments, arguments, strict=True))
        for node in call.nodes:
            own = str(node.target).startswith("moeca.")  # an op of ours gets what the graph says

            def given(arg: fx.Node, own: bool = own) -> Any:
                value = values[arg]
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                return (
                    value.to(arg.meta["val"].dtype)
                    if own
                    else value.to(torch.promote_types(value.dtype, torch.float32))
                )

            args, kwargs = fx.map_arg((node.args, node.kwargs), given)
            values[node] = node.target(*args, **kwargs)
        return [_as_in(node, values[node]) for node in call.nodes if node in wanted]

    return code


def _as_in(node: fx.Node, value: Any) -> Any:
    return value.to(node.meta["val"].dtype) if isinstance(value, Tensor) else value


def with_fault(change: Callable[[fx.Node, Any, Sequence[Any]], Any]) -> Stand:
    """Eager mode with some values changed: called with a node, its value and those of its inputs."""

    def stand(call: Call) -> Code:
        return lambda *arguments: interpret(
            call.nodes, dict(zip(call.arguments, arguments, strict=True)), call.results, change
        )

    return stand
