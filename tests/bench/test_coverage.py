"""The coverage table: what it says of a model that is covered, of one that is not, and of one that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bench import coverage
from moeca_compile.backend import backend_with
from moeca_compile.runtime.engine import Stages

pytestmark = pytest.mark.bench


def test_a_family_that_is_covered_has_a_row_that_says_so(tmp_path: Path):
    out = tmp_path / "coverage.md"
    threads = str(torch.get_num_threads())
    assert coverage.main(["--model", "DiT-MoE", "--threads", threads, "--out", str(out)]) == 0
    text = out.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| DiT-MoE |")]
    _, graphs, breaks, experts, attentions, *errors = line.strip("| ").split(" | ")
    assert (graphs, breaks, experts, attentions) == ("1", "0", "3 of 3", "3 of 3")
    assert len(errors) == 3 and all(float(error) < 1e-5 for error in errors)
    assert f"torch {torch.__version__}" in text and "threads" in text
    assert text.count("None.") == 2  # no graph breaks, nothing skipped


def test_errors_are_measured_and_not_assumed(monkeypatch: pytest.MonkeyPatch):
    """Cache steps as they are, not recomputing, differ from the model at another timestep."""
    stages = Stages(coverage.compile_graph, lambda compiled, kind, *_: torch.no_grad()(compiled.function(kind)))
    monkeypatch.setattr(coverage, "BACKEND", backend_with(stages))
    row = coverage.look_at(next(s for s in coverage.subjects() if s.name == "DiT-MoE"))
    assert row.full < 1e-5 < row.recomputed


def test_what_is_not_understood_or_fails_is_said():
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return torch.nn.functional.scaled_dot_product_attention(q, q, q) * t.sin()[:, None, None, None]

    x = torch.randn(2, 5, 8)
    unknown = coverage.Subject("plain", lambda: (Plain().eval(), lambda call, at: call(x, torch.full((2,), at))))
    row = coverage.look_at(unknown)
    assert (row.graphs, row.experts, row.attentions) == (1, (0, 0), (0, 1))
    assert any("residual stream" in reason for reason in row.skipped)

    def broken() -> tuple[nn.Module, coverage.Call]:
        raise ValueError("no such model")

    text = coverage.document([coverage.look_at(coverage.Subject("broken", broken))], {"torch": "x"})
    assert "| broken | failed |" in text and "- broken: ValueError: no such model" in text
