"""Rewrite: a policy's step over the captured graph as one function per step kind; tracing it gives the new graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.step import Step, StepKind
from moeca_compile.policies import Policy


class StepResult(NamedTuple):
    """What one step gives: the model's outputs, the updated caches by name, counters (layers, COUNTERS) or None."""

    outputs: tuple[Any, ...]
    updates: dict[str, Tensor]
    counts: Tensor | None


StepFunction = Callable[[Sequence[Any], dict[str, Tensor], Tensor], StepResult]


def step_function(graph: fx.Graph, regions: Regions, policy: Policy, kind: StepKind) -> StepFunction:
    """The step as an eager function of (inputs, state, clock). Ops mutate some of the state in place."""

    def run(inputs: Sequence[Any], state: dict[str, Tensor], clock: Tensor) -> StepResult:
        step = Step(graph, regions, kind, inputs, state, clock)
        under_way = policy.install(step)
        outputs = step.run()
        under_way.finish()
        counts = torch.stack(step.counts).to(torch.float32) if step.counts else None
        return StepResult(_apart(outputs, {**state, **step.updates}), step.updates, counts)

    return run


def _apart(outputs: Sequence[Any], caches: dict[str, Tensor]) -> tuple[Any, ...]:
    """The outputs, copied where they share memory with a cache: what the user does to them must not reach it."""
    held = [tensor.untyped_storage() for tensor in caches.values()]
    return tuple(value.clone() if isinstance(value, Tensor) and _lies_in(value, held) else value for value in outputs)


def _lies_in(tensor: Tensor, storages: Sequence[Any]) -> bool:
    return any(tensor.untyped_storage() is storage for storage in storages)
