"""Random DiT-MoE models of all kinds: nothing is missed, nothing is wrong.

A few stand in the normal suite, the same ones each time; `pytest -m generated` runs a thousand.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.variants.blocks import Modelling
from tests.variants.check import Outcome, check
from tests.variants.strategy import modellings, options

PARTS, EXAMPLES = 20, 50


def run(examples: int, number: int, shrink: bool) -> list[Outcome]:
    """Check `examples` models; the same ones for the same number."""
    outcomes: list[Outcome] = []
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @seed(number)
    @settings(
        max_examples=examples, phases=phases, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(modellings(), options())
    def one(how: Modelling, chosen: dict[str, Any]) -> None:
        outcomes.append(check(how, chosen))

    one()
    return outcomes


def assert_told(outcomes: list[Outcome]) -> None:
    """Most generations were followed to their end, so that the comparison tells something."""
    ended = sum(outcome.close for outcome in outcomes)
    assert ended <= len(outcomes) // 4, f"{ended} of {len(outcomes)} ended at a decision too close to call"


def test_some_models() -> None:
    outcomes = run(4, 0, shrink=False)
    assert len(outcomes) >= 4
    assert_told(outcomes)


@pytest.mark.generated
@pytest.mark.parametrize("part", range(PARTS))
def test_a_thousand_models(part: int) -> None:
    outcomes = run(EXAMPLES, 1000 + part, shrink=True)
    assert len(outcomes) >= EXAMPLES
    assert_told(outcomes)
