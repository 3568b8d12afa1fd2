"""Which parts of which steps are computed anew."""

from __future__ import annotations

import pytest

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.runtime.schedule import RefreshPlan, parts_to_refresh


def parts(steps: int, **options) -> tuple[list[int], list[int]]:
    """Steps with fresh attention, and with fresh experts."""
    config = MoecaConfig(**options)
    cached = {Part.WHOLE} if config.recipe == "stack" else {Part.ATTENTION, Part.EXPERTS}
    fresh = [parts_to_refresh(config, cached, number) for number in range(steps)]
    return [i for i, f in enumerate(fresh) if f.attention], [i for i, f in enumerate(fresh) if f.experts]


@pytest.mark.parametrize(
    ("options", "attention", "experts"),
    [
        ({"full_every": 4}, [0, 4, 8], [0, 4, 8]),
        ({"full_every": 1}, list(range(10)), list(range(10))),
        ({"full_steps": [0, 1, 7]}, [0, 1, 7], [0, 1, 7]),
        ({"attention_every": 2, "full_every": 4}, [0, 2, 4, 6, 8], [0, 4, 8]),
        ({"experts_every": 3, "full_every": 5}, [0, 5], [0, 3, 6, 9]),
        ({"attention_every": 3, "experts_every": 2}, [0, 3, 6, 9], [0, 2, 4, 6, 8]),
        ({"attention_every": 3, "full_steps": [0, 5]}, [0, 3, 6, 9], [0, 5]),
        ({"recipe": "stack", "attention_every": 2, "experts_every": 4}, [0, 4, 8], [0, 4, 8]),
    ],
    ids=str,
)
def test_steps(options, attention, experts):
    assert parts(10, **options) == (attention, experts)


def test_the_first_step_is_full():
    for options in ({}, {"full_every": 7}, {"attention_every": 3}, {"full_steps": [0]}):
        assert parts_to_refresh(MoecaConfig(**options), {Part.ATTENTION, Part.EXPERTS}, 0) == RefreshPlan(True, True)
