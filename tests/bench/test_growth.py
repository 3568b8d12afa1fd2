"""The growth benchmark on tiny models, nothing of it compiled by Inductor."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from bench import growth

pytestmark = pytest.mark.bench


@pytest.mark.slow
def test_rows_and_picture(inductor_replaced, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "BASE", replace(growth.BASE, width=24, depth=2, side=8, expert_width=16))
    monkeypatch.setattr(growth, "QUESTIONS", {"batch": (1, 2), "tokens": (4, 16), "experts": (4, 8)})
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "growth.csv"
    threads = str(torch.get_num_threads())
    arguments = ["--repeats", "1", "--threads", threads, "--out", str(out), "--to", str(tmp_path)]
    assert growth.main(arguments) == 0
    with out.open() as file:
        rows = {(row["question"], row["value"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    batch = [float(rows["batch", str(n)]["cache_mib"]) for n in (1, 2)]
    assert abs(batch[1] - 2 * batch[0]) < 0.002
    assert (tmp_path / "growth.png").exists()
