"""The steps of every recipe are traced, parted and run as they are for Inductor, which runs op by op here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moeca_compile
from moeca_compile.config import RECIPES
from tests.harness import own_warnings, replace_inductor
from tests.models import SMALL, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
MORE: dict[str, dict[str, Any]] = {
    "block-cache": {"reuse_threshold": 1e3},
    "deepcache": {"last_blocks": 0},  # there are two
    "magcache": {"magnitude_ratios": (1.0,) * 8},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_a_recipe_are_those_of_its_step_functions(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_inductor(monkeypatch)
    models = [make_model(SMALL), make_model(SMALL)]
    lowered, eager = (
        torch.compile(model, backend="moeca", options={"recipe": recipe, **how, **MORE.get(recipe, {})})
        for model, how in zip(models, ({}, {"lowering": "eager", "validate": False}), strict=True)
    )
    x, y = make_inputs(models[0])
    with torch.no_grad(), moeca_compile.generation(steps=8):
        for step in range(8):
            given = x, torch.full((2,), 1.0 - step / 8), y
            torch.testing.assert_close(lowered(*given), eager(*given))
    report = moeca_compile.report(lowered)
    assert not own_warnings(report)
    assert report.compiled_parts > 1 or recipe == "none"
    assert (report.flops is not None and report.flops.speedup > 1) or recipe == "none"
