"""Error control: the gap to the next full step follows from the last forecast's error, as in the eager simulation."""

from __future__ import annotations

import dataclasses
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from moeca_compile import Report, generation, report
from moeca_compile.config import MoecaConfig
from moeca_compile.options import ConfigError
from moeca_compile.passes.rewrite.kinds import REUSING, Part, StepKind
from moeca_compile.policies.criterion import StepAt
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.error_control import ErrorControl, relative_error
from moeca_compile.runtime.late import LateCopy
from moeca_compile.runtime.schedule import Schedule
from moeca_compile.runtime.tallies import Errors
from tests.harness import Captured
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model
from tests.policies.reference_error_control import Controlled

STEPS = 24
POWER = [round(STEPS * (1 - (1 - i / 8) ** 1.45)) for i in range(8)]
EVEN = list(range(0, STEPS, 3))
LISTED = [0, 2, 7, 9, 16, 18, 21]
STACK = {"recipe": "stack-forecast", "full_every": 3}

CASES: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    ({**STACK, "schedule": "power", "corrector": True}, POWER, {"corrector": True}),
    ({**STACK, "schedule": {"steps": STEPS, "full_steps": LISTED}}, LISTED, {}),
    (STACK, EVEN, {}),
    ({**STACK, "recipe": "stack", "corrector": True}, EVEN, {"forecast": False, "corrector": True}),
    ({"recipe": "auto", "full_every": 3, "sampler": "deterministic"}, POWER, {"corrector": True}),
]
"""Options, the full steps that they plan, and the simulation."""


@torch.no_grad()
def generate(engine: Engine, graph: Captured, simulated: Controlled, planned: list[int], seed: int) -> list[int]:
    """The full steps of a generation. Every decision and every output must be that of the simulation."""
    x, y = make_inputs(simulated.model, seed=seed)
    simulated.begin(planned, STEPS)
    tallies, found = engine.loop_for(graph.inputs).tallies, []
    for number in range(STEPS):
        t = torch.full((len(x),), 1 - number / STEPS)
        wanted_full, wanted = simulated.step(x, t, y)
        before = full_steps(engine)
        (out,) = engine(*graph.arguments(x=x, t=t, y=y))
        assert (full_steps(engine) > before) == wanted_full, f"step {number}"
        assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max(), f"step {number}"
        found += [number] * wanted_full
        x = x - wanted / STEPS
    assert tallies.forecasts >= len(found) - 1
    return found


def full_steps(engine: Engine) -> int:
    loops = engine.loops.values()
    return sum(tally.steps for loop in loops for kind, tally in loop.tallies.items() if kind.full)


def bound_for(model: TinyDiTMoE, planned: list[int], how: dict[str, Any]) -> float:
    """The typical error of this model, so that gaps get shorter and longer."""
    return 0.05


@pytest.mark.parametrize(("options", "planned", "how"), CASES, ids=lambda case: "")
def test_generations_are_those_of_the_simulation(small_model, small_graph, eager_steps, options, planned, how):
    simulated = Controlled(small_model, 0.05, **how)
    engine = small_graph.engine(max_error=0.05, **options)
    with generation(steps=STEPS):
        first = generate(engine, small_graph, simulated, planned, seed=1)
        print(first, simulated.errors)
