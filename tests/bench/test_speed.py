"""The step-time benchmark on a tiny model, nothing of it compiled by Inductor."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import speed
from examples import families

pytestmark = pytest.mark.bench


@pytest.mark.slow
def test_rows_of_a_tiny_model(inductor_replaced, monkeypatch, tmp_path):
    def ways(model, fractions):
        ours = torch.compile(
            model, backend="moeca", options={"recipe": "moeca", "budget": fractions[0], "full_every": speed.PERIOD}
        )
        plain = [speed.Way(name, model) for name in (speed.EAGER, speed.COMPILED)]
        return [plain, [speed.Way("moeca 0.25", ours, {"budget": fractions[0]})]]

    monkeypatch.setattr(speed, "ways", ways)
    monkeypatch.setattr(speed, "compiled", lambda name, model, options: speed.Way(name, lambda x, t, y: None))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "speed.csv"
    arguments = ["--model", "tiny", "--fraction", "0.25", "--batch", "2", "--repeats", "2", "--out", str(out)]
    arguments += ["--split", str(tmp_path / "split.csv"), "--steps", "4"]
    assert speed.main(arguments) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["kind"]) for row in rows] == [
        *((way, kind) for way in (speed.EAGER, speed.COMPILED) for kind in ("step", "loop")),
        *(("moeca 0.25", kind) for kind in ("full", "cache", "generation", "loop")),
    ]
    assert float(rows[2]["over_compile"]) == float(rows[3]["over_compile"]) == 1.0
    assert all(row["repeats"] == "4" for row in rows if row["kind"] != "loop")  # two turns of each of two copies
    cache = rows[5]
    assert 0.1 < float(cache["share"]) < 0.9  # a quarter of the branches, and what a cache step always computes
    assert float(cache["cache_mib"]) > 0
    assert float(cache["peak_mib"]) > 0
    with (tmp_path / "split.csv").open() as file:
        parts = {row["part"]: float(row["milliseconds"]) for row in csv.DictReader(file)}
    assert parts["experts"] > 0
    assert parts["attention"] > 0


def test_a_turn_is_one_full_step_and_cache_steps():
    calls = []
    inputs = families.inputs_for(families.reduced("DSMoE"))
    assert len(speed.run_turn(lambda x, t, y: calls.append(float(t[0])), inputs, 2)) == speed.PERIOD
    assert calls == sorted(calls, reverse=True)
    assert calls[0] == float(inputs[1][0]) - 2 * speed.PERIOD


@pytest.mark.parametrize(
    ("kind", "want"),
    [("step", [2.5, 5.0]), ("full", [4.0, 8.0]), ("cache", [2.0, 4.0]), ("generation", [10.0, 20.0])],
)
def test_medians_of_a_turn(kind, want):
    way = speed.Way("x", None, turns=[[4.0, 1.0, 2.0, 3.0], [8.0, 2.0, 4.0, 6.0]])
    assert way.milliseconds(kind) == want
