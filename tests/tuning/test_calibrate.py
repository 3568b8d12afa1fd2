"""Calibrated schedules against all schedules there are, with costs by least squares on the outputs themselves."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moeca_compile.runtime.schedule import power_steps
from moeca_compile.tuning import calibrate
from moeca_compile.tuning.calibrate import costs, schedules, tables


def outside(target: np.ndarray, known: list[np.ndarray]) -> float:
    """The squared size of what no combination of `known` gives, by least squares."""
    basis = np.stack(known, axis=1)
    best = np.linalg.lstsq(basis, target, rcond=None)[0]
    return float(((target - basis @ best) ** 2).sum())


def gaps_of(outputs: np.ndarray, weights: np.ndarray, full: tuple[int, ...]) -> list[float]:
    """The cost of each gap of a schedule, by its definition."""
    found, steps = [], len(outputs)
    for i, (q, r) in enumerate(zip(full, (*full[1:], steps), strict=True)):
        target = (weights[q + 1 : r, None] * outputs[q + 1 : r]).sum(0)
        known = [outputs[q], *([outputs[full[i - 1]]] if i else [])]
        predicted = outside(target, known)
        corrected = outside(target, [*known, outputs[r]]) if r < steps else predicted
        found.append(corrected + 0.1 * predicted)
    return found


@pytest.fixture(scope="module")
def trajectory() -> tuple[np.ndarray, np.ndarray]:
    """Outputs [S, D] that change the more the later, and uneven times."""
    random = np.random.default_rng(0)
    speed = np.linspace(0.1, 1.5, 9)[:, None] * random.normal(size=(9, 12))
    weights = random.uniform(0.5, 1.5, 9)
    return 1 + np.cumsum(speed, axis=0), weights / weights.sum()


@pytest.mark.parametrize("full", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("by", [(1.0, 0.0), (0.0, 1.0)], ids=["worst", "sum"])
def test_no_other_schedule_costs_less(trajectory, full, by):
    outputs, weights = trajectory
    found = schedules(costs(outputs @ outputs.T, weights), 5, by)[full]
    assert len(found) == full and found[0] == 0 and list(found) == sorted(set(found))
    total = max if by[0] else sum
    everything = [(0, *rest) for rest in combinations(range(1, 9), full - 1)]
    least = min(total(gaps_of(outputs, weights, each)) for each in everything)
    assert total(gaps_of(outputs, weights, found)) == pytest.approx(least, rel=1e-4, abs=1e-9)


def test_a_planted_fault_in_the_costs_is_found(trajectory, monkeypatch):
    outputs, weights = trajectory
    found = costs(outputs @ outputs.T, weights)
    broken = type(found)(found.first, found.gaps[:, :, ::-1].copy())  # as if gaps ended where they do not
    results = schedules(broken, 4, (1.0, 0.0))[4]
    least = max(gaps_of(outputs, weights, schedules(found, 4, (1.0, 0.0))[4]))
    assert max(gaps_of(outputs, weights, results)) > 1.01 * least


def test_full_steps_move_to_where_outputs_change():
    random = np.random.default_rng(1)
    directions = random.normal(size=(40, 60))
    size = np.concatenate([np.full(20, 0.01), np.full(20, 1.0)])[:, None]
    outputs = 5 + np.cumsum(size * directions, axis=0)
    for listed in tables(outputs @ outputs.T, np.full(40, 1 / 40)).values():
        assert sum(step >= 20 for step in listed[10]) >= 7 > sum(step >= 20 for step in power_steps(40, 10, 1.0))


def test_outputs_on_a_line_cost_nothing_and_equal_ones_raise_nothing():
    line = np.outer(np.arange(1.0, 9.0), np.ones(5)) + np.outer(np.ones(8), np.arange(5.0))
    found = costs(line @ line.T, np.full(8, 1 / 8))
    assert found.gaps[0, 1, 2:].max() < 1e-4 * np.trace(line @ line.T)
    assert tables(np.zeros((8, 8)), np.full(8, 1 / 8))["calibrated"][3][0] == 0


def test_every_number_up_to_half_the_steps_and_none_for_too_few_or_too_many(monkeypatch):
    outputs = np.random.default_rng(2).normal(size=(9, 4))
    gram = outputs @ outputs.T
    assert {kind: set(found) for kind, found in tables(gram, np.full(9, 1 / 9)).items()} == {
        "calibrated": {1, 2, 3, 4, 5},
        "calibrated-mean": {1, 2, 3, 4, 5},
    }
    assert tables(gram[:3, :3], np.full(3, 1 / 3)) == {}
    monkeypatch.setattr(calibrate, "MOST_STEPS", 8)
    assert tables(gram, np.full(9, 1 / 9)) == {}
