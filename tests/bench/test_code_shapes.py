"""The table of code shapes: what it says of kinds that are captured, and of one that is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from bench import code_shapes
from bench.coverage import look_at
from tests.variants.blocks import make_model
from tests.variants.shapes import PLAIN, Shape, shapes

pytestmark = pytest.mark.bench


def test_a_group_has_a_table_with_a_row_for_each_kind(tmp_path: Path):
    out = tmp_path / "shapes.md"
    assert code_shapes.main(["--group", "Experts", "--out", str(out)]) == 0
    text = out.read_text()
    kinds = [shape.what for shape in shapes() if shape.group == "Experts"]
    assert len(kinds) > 3 and text.count("## Experts") == 1 and "Nothing." in text
    for kind in kinds:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {kind} |")]
        _, captured, *errors = line.strip("| ").split(" | ")
        assert captured == "1 of 1 layers, 1 of 1 attentions"
        assert len(errors) == 2 and all(float(error) < 1e-5 for error in errors)


def test_groups_lie_together_and_kinds_are_told_apart():
    found = [(shape.group, shape.what) for shape in shapes()]
    assert len(set(found)) == len(found) > 80
    groups = [group for group, _ in found]
    assert groups == sorted(groups, key=groups.index)


class Unknown(nn.Module):
    """Experts that look at the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(PLAIN.width, 3)
        self.experts = nn.ModuleList(nn.Linear(PLAIN.width, PLAIN.width) for _ in range(3))

    def forward(self, x):
        ids, out = self.gate(x).argmax(-1), x * 0
        for number, expert in enumerate(self.experts):
            if (ids == number).any():
                rows = x[ids == number]
                out[ids == number] = expert(rows - rows.mean(0))
        return out


def test_what_is_not_captured_is_said_with_the_reason():
    def make() -> nn.Module:
        model = make_model(PLAIN)
        model.blocks[0].mlp = Unknown().eval().requires_grad_(False)
        return model

    shape = replace(next(shapes()), what="mixed | rows", how=PLAIN, make=make)
    assert isinstance(shape, Shape)
    row = look_at(code_shapes.subject_of(shape))
    text = code_shapes.document([(shape, row)], {"torch": "x"})
    assert "| mixed \\| rows | 0 of 1 layers" in text and "graphs |" in text
    assert "- mixed | rows: " in text and "depends on the other" in text
