"""Recipes that decide by the data, over whole generations, against the eager simulations of the methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile.runtime.engine import Engine
from tests.harness import Captured
from tests.models import TinyDiTMoE, make_inputs
from tests.policies.reference_decisions import (
    BlockCache,
    Simulation,
    TeaCache,
    time_of,
    times_of,
    trajectory_step,
)

STEPS = 14

CASES: list[tuple[dict[str, Any], Callable[..., Simulation]]] = [
    ({"recipe": "teacache"}, lambda model, **kw: TeaCache(model, 0.4, **kw)),
    (
        {"recipe": "teacache", "reuse_threshold": 0.2, "warmup_steps": 3, "max_reused": 2},
        lambda model, **kw: TeaCache(model, 0.2, warmup=3, most=2, **kw),
    ),
    (
        {"recipe": "teacache", "reuse_threshold": 0.1, "rescale": (4.0, 0.1, 0.01)},
        lambda model, **kw: TeaCache(model, 0.1, polynomial=(4.0, 0.1, 0.01), **kw),
    ),
    (
        {"recipe": "teacache", "reuse_threshold": 0.3, "forecast": ("stack",)},
        lambda model, **kw: TeaCache(model, 0.3, forecast=True, **kw),
    ),
    ({"recipe": "block-cache", "reuse_threshold": 0.3}, lambda model, **kw: BlockCache(model, 0.3, **kw)),
    (
        {"recipe": "block-cache", "first_blocks": 2, "last_blocks": 1, "reuse_threshold": 0.4, "max_reused": 3},
        lambda model, **kw: BlockCache(model, 0.4, first=2, last=1, most=3, **kw),
    ),
    (
        {"recipe": "block-cache", "reuse_threshold": 0.5, "warmup_steps": 4, "forecast": ("stack",)},
        lambda model, **kw: BlockCache(model, 0.5, warmup=4, forecast=True, **kw),
    ),
]


@dataclass
class Ran:
    full: list[bool]
    outputs: list[Tensor]


class Sampler:
    """Generations of an engine with two guidance streams, beside simulations of both on the same pictures."""

    def __init__(self, graph: Captured, engine: Engine, streams: list[Simulation]) -> None:
        self.graph, self.engine, self.streams = graph, engine, streams
        self.loop = engine.loop_for(graph.inputs)

    @torch.no_grad()
    def generate(self, seed: int, expected: int | None, steps: int = STEPS, until: int | None = None) -> list[bool]:
        """Whether each step was full, stream by stream. Every output must be that of the simulation."""
        model = self.streams[0].model
        (x, y), full = make_inputs(model, seed=seed), []
        none = torch.full_like(y, model.sizes.classes)
        for stream in self.streams:
            stream.begin(expected)
        for time in times_of(steps)[:until]:
            outputs = []
            for stream, labels in zip(self.streams, (y, none), strict=True):
                t = time_of(x, time)
                wanted_full, wanted = stream.step(x, t, labels)
                before = self.full_steps
                (found,) = self.engine(*self.graph.arguments(x=x, t=t, y=labels))
                assert (self.full_steps > before) == wanted_full, f"time {time}"
                assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
                full.append(wanted_full)
                outputs.append(found)
            x = trajectory_step(x, *outputs, steps)
        return full

    @property
    def full_steps(self) -> int:
        return sum(tally.steps for kind, tally in self.loop.tallies.items() if kind.full)


def sampler(
    graph: Captured, options: dict[str, Any], simulate: Callable[..., Simulation], model: TinyDiTMoE
) -> Sampler:
    return Sampler(graph, graph.engine(**options), [simulate(model), simulate(model)])


@pytest.mark.smoke
@pytest.mark.parametrize(("options", "simulate"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else "")
def test_generations_are_those_of_the_simulation(model, graph, eager_steps, options, simulate):
    """Two generations, one that is canceled, and one after it: none reads what another has left."""
    each = sampler(graph, options, simulate, model)
    first = each.generate(seed=1, expected=None)
    second = each.generate(seed=2, expected=STEPS)
    canceled = each.generate(seed=3, expected=STEPS, until=5)
    each.generate(seed=4, expected=5)
    for full in (first, second):
        assert 3 < sum(full) < len(full) - 3, "decisions go both ways"
    assert second[-2:] == [True, True]
    assert not all(canceled[2:])
    assert min(min(stream.margins) for stream in each.streams) > 1e-4
    assert each.loop.tallies.probes == each.loop.tallies.steps == 2 * (3 * STEPS + 5)
