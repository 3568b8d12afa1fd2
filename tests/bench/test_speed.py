"""The step-time benchmark on a tiny model, nothing of it compiled by Inductor."""

from __future__ import annotations

import csv

import pytest
import torch

from bench import speed
from examples import families


def test_rows_of_a_tiny_model(without_inductor, monkeypatch, tmp_path):
    def ways(model, fractions):
        ours = torch.compile(model, backend="moeca", options={"budget": fractions[0], "full_every": speed.PERIOD})
        plain = [speed.Way(name, model) for name in (speed.EAGER, speed.COMPILED)]
        return [*plain, speed.Way("moeca 0.25", ours)]

    monkeypatch.setattr(speed, "ways", ways)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "speed.csv"
    arguments = ["--model", "tiny", "--fraction", "0.25", "--batch", "2", "--repeats", "2", "--out", str(out)]
    assert speed.main(arguments) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["step"]) for row in rows] == [
        (speed.EAGER, ""),
        (speed.COMPILED, ""),
        ("moeca 0.25", "full"),
        ("moeca 0.25", "cache"),
    ]
    assert float(rows[1]["over_compile"]) == 1.0
    assert 0.1 < float(rows[-1]["share"]) < 0.9  # a quarter of the branches, and what a cache step always computes
    assert float(rows[-1]["cache_mib"]) > 0


def test_a_turn_is_one_full_step_and_cache_steps():
    calls = []
    way = speed.Way("x", lambda x, t, y: calls.append(float(t[0])))
    inputs = families.inputs_for(families.reduced("DSMoE"))
    assert len(speed.run_turn(way, inputs, 2)) == speed.PERIOD
    assert calls == sorted(calls, reverse=True)
    assert calls[0] == float(inputs[1][0]) - 2 * speed.PERIOD


@pytest.mark.parametrize(("cached", "want"), [(None, [2.5, 5.0]), (False, [4.0, 8.0]), (True, [2.0, 4.0])])
def test_medians_of_a_turn(cached, want):
    way = speed.Way("x", None, turns=[[4.0, 1.0, 2.0, 3.0], [8.0, 2.0, 4.0, 6.0]])
    assert way.milliseconds(cached) == want
