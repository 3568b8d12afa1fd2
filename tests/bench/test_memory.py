"""The benchmark of memory on a tiny model: no recipe takes much more than the model itself; a copied weight shows."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import memory
from examples import families
from moeca_compile.runtime import engine
from tests.harness import replace_inductor

pytestmark = pytest.mark.usefixtures("inductor_replaced")


@pytest.fixture
def model():
    return families.reduced("DSMoE")


def beyond(model, recipe: str) -> dict[str, float]:
    """MiB beyond the planned caches, by call."""
    torch._dynamo.reset()
    call = memory.compiled(model, recipe, {"validate": False})
    with torch.no_grad():
        return {row["call"]: row["beyond_mib"] for row in memory.measured(call, recipe, families.inputs_for(model))}


@pytest.fixture(scope="module")
def plain():
    """Of the package as it is, measured once."""
    with pytest.MonkeyPatch.context() as patch:
        replace_inductor(patch)
        return beyond(families.reduced("DSMoE"), "none")


def test_a_step_takes_less_than_the_weights(model, plain):
    found = plain
    assert set(found) == {"first", "first cache", "full", "cache"}
    assert 0 < max(found.values()) < memory.weights_mib(model)


def test_a_copy_of_the_weights_shows(model, plain, monkeypatch):
    original = engine.Engine.__call__

    def copying(self, *inputs):
        copies = [value.clone() for value in inputs if isinstance(value, torch.Tensor)]
        return original(self, *inputs) if copies else None

    monkeypatch.setattr(engine.Engine, "__call__", copying)
    planted = beyond(model, "none")
    assert planted["first"] > plain["first"] + 0.9 * memory.weights_mib(model)
    assert planted["first"] > memory.weights_mib(model)


@pytest.mark.slow
def test_the_command_writes_a_row_a_call_with_its_ratio_to_plain(tmp_path):
    out = tmp_path / "memory.csv"
    arguments = ["--model", "tiny", "--batch", "2", "--recipe", "stack", "--no-validate", "--threads", "1"]
    assert memory.main([*arguments, "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["torch.compile", *["stack"] * 4]
    assert [row["call"] for row in rows[1:]] == ["first", "first cache", "full", "cache"]
    assert float(rows[0]["ratio"]) == 1.0
    assert all(float(row["planned_mib"]) > 0 for row in rows[1:])
