"""Sorting by expert on the device against a stable sort by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.triton.cases import DEVICE

compaction = pytest.importorskip("moeca_compile.ops.triton.compaction")


def assert_sorted(index: Tensor | None, mask: Tensor | None, experts: int, k: int) -> None:
    found = compaction.sort_by_expert(index, mask, experts, k)
    places = (index if index is not None else mask).numel()
    ids = index.flatten().tolist() if index is not None else [place % k for place in range(places)]
    runs = mask.flatten().tolist() if mask is not None else [True] * places
    order = sorted((place for place in range(places) if runs[place]), key=lambda place: ids[place])
    total = len(order)
    assert found.order.tolist() == order + [0] * (places - total)
    where = {place: position for position, place in enumerate(order)}
    assert found.position.tolist() == [where.get(place, -1) for place in range(places)]
    counts = [sum(ids[place] == e for place in order) for e in range(experts)]
    assert found.ends.tolist() == [sum(counts[: e + 1]) for e in range(experts)]
    assert found.rows()[:total].tolist() == [place // k for place in order]
    assert found.expert()[:total].tolist() == [ids[place] for place in order]


@st.composite
def sortings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    rows, k, experts = draw(st.integers(1, 40)), draw(st.integers(1, 8)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    index = torch.randint(experts, (rows, k), dtype=dtype, device=DEVICE)
    return index, torch.rand(rows, k, device=DEVICE) < draw(st.sampled_from([0.0, 0.3, 1.0])), experts, k


@settings(max_examples=25, deadline=None)
@given(sortings())
def test_any_ids_under_any_mask(case):
    assert_sorted(*case)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_one_expert_takes_all(number):
    index = torch.full((13, 3), number, device=DEVICE)
    assert_sorted(index, None, 5, 3)
    assert_sorted(index, index > 100, 5, 3)


def test_slots_are_the_experts_where_there_are_no_ids():
    torch.manual_seed(0)
    assert_sorted(None, torch.rand(17, 5, device=DEVICE) < 0.4, 5, 5)


def test_more_places_than_are_read_at_a_time(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(compaction, "_CHUNK", 16)
    index = torch.randint(3, (50, 2), device=DEVICE)
    assert_sorted(index, torch.rand(50, 2, device=DEVICE) < 0.5, 3, 2)


def test_ids_and_masks_with_strides():
    torch.manual_seed(0)
    index = torch.randint(4, (2, 14), device=DEVICE).t()
    assert_sorted(index, (torch.rand(2, 14, device=DEVICE) < 0.5).t(), 4, 2)


def test_no_places():
    found = compaction.sort_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), None, 3, 2)
    assert found.ends.tolist() == [0, 0, 0]
