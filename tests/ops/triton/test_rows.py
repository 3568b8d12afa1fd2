"""Rows by position put at their places."""

from __future__ import annotations

import pytest
import torch

from tests.ops.triton.cases import DEVICE, DTYPES, random

rows = pytest.importorskip("moeca_compile.ops.triton.rows")
from moeca_compile.ops.triton.compaction import sort_by_expert  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 1300])
def test_rows_go_to_their_places(width, dtype):
    torch.manual_seed(0)
    index = torch.randint(3, (7, 2), device=DEVICE)
    mask = torch.rand(7, 2, device=DEVICE) < 0.6
    branches, values = sort_by_expert(index, mask, 3, 2), random((14, width), dtype)
    found = rows.by_place(values, branches)
    total = int(branches.ends[-1])
    assert total == int(mask.sum()) > 0
    assert torch.equal(found[branches.order[:total].long()], values[:total])
