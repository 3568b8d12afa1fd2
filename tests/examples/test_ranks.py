"""The example on several processes: the same pictures and figures as on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.digits.testbed import DIGITS
from examples.testbed import ranks, sample
from examples.testbed.sampling import SAMPLERS
from tests.digits import tiny_digits
from tests.processes import torchrun


def velocity(x, t, y):
    """A row's result depends on that row alone."""
    return x * t[:, None, None, None] + 0.1 * y[:, None, None, None]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_of_a_batch_are_the_same_alone(sampler):
    labels = torch.tensor([3, 1, 4, 1, 5])
    whole = DIGITS.generate(velocity, labels, steps=5, sampler=sampler, seed=7)
    parts = [
        DIGITS.generate(velocity, labels, steps=5, sampler=sampler, seed=7, rows=rows)
        for rows in (slice(2), slice(2, 5))
    ]
    assert torch.equal(torch.cat(parts), whole) and parts[0].shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("batch", "size"), [(20, 3), (7, 4), (4, 4), (5, 1)])
def test_each_row_is_sampled_by_one_rank(batch, size, monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: size)
    rows = []
    for rank in range(size):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        rows += [list(range(batch))[ranks.own_rows(batch)]]
    assert [row for part in rows for row in part] == list(range(batch))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_the_first_rank_compiles_before_the_others(monkeypatch):
    done = []
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: done.append("barrier"))
    for rank in range(2):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        with ranks.first_one_first():
            done.append(f"rank {rank}")
    assert done == ["rank 0", "barrier", "barrier", "rank 1"]


def arguments(folder: Path, checkpoint: Path) -> list[str]:
    few = ["--batch", "6", "--steps", "6", "--repeats", "1", "--full-every", "3", "--guidance", "1"]
    how = ["--recipe", "stack-forecast", "--lowering", "eager", "--checkpoint", str(checkpoint)]
    return [*few, *how, "--json", f"{folder}/f.json", "--out", f"{folder}/p.png"]


def figures(folder: Path) -> dict[str, dict[str, float]]:
    found = json.loads((folder / "f.json").read_text())
    return {row["policy"]: row for row in found["rows"]} | {"setting": found["setting"]}


def test_two_processes_give_the_figures_of_one(tmp_path):
    checkpoint = tiny_digits(tmp_path, width=16, experts=3, expert_width=16)  # it compiles in seconds
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    assert sample.main(DIGITS, arguments(one, checkpoint)) == 0
    printed = torchrun(2, "examples/digits/sample.py", *arguments(two, checkpoint), folder=tmp_path)
    assert printed.count("wrote ") == 1 and (two / "p.png").stat().st_size > 0
    alone, together = figures(one), figures(two)
    assert alone["setting"]["processes"] == 1 and together["setting"]["processes"] == 2
    assert list(alone) == list(together) and "stack-forecast" in alone
    for policy in set(alone) - {"setting"}:
        a, b = alone[policy], together[policy]
        assert b["agreement"] == a["agreement"] and b["frechet"] == pytest.approx(a["frechet"], rel=1e-3)
        assert b["flops_speedup"] == pytest.approx(a["flops_speedup"], rel=1e-6) and b["seconds"] > 0
    cached = "stack-forecast"
    assert together[cached]["psnr"] == pytest.approx(alone[cached]["psnr"], abs=0.01) and alone[cached]["psnr"] < 60
