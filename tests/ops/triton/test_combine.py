"""Weighted sums over branches against the sum written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.triton.cases import DEVICE, DTYPES, assert_within, random

combine = pytest.importorskip("moeca_compile.ops.triton.combine")


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 8),
    st.sampled_from([1, 7, 64, 700]),
    st.sampled_from(DTYPES),
    st.integers(1, 3),
    st.integers(0, 10**6),
)
def test_any_sum(batch, tokens, k, width, dtype, slots, seed):
    torch.manual_seed(seed)
    ring = [random((batch, tokens, k, width), dtype) for _ in range(slots)]
    weight = random((batch, k, tokens)).transpose(1, 2)
    history = torch.randint(1, slots + 1, (batch, tokens, k), device=DEVICE)
    forecast = torch.rand(slots, slots, device=DEVICE)
    found = combine.combine_fixed_k(ring, weight, *((history.int(), forecast) if slots > 1 else ()))
    weights = forecast.double()[history - 1] if slots > 1 else torch.ones(batch, tokens, k, 1, device=DEVICE)
    values = sum(weights[..., r, None] * slot.double() for r, slot in enumerate(ring))
    # One rounding at the end; in float32 also one for each of the products and sums.
    assert_within(found, (weight.double()[..., None] * values).sum(2), 1 + 2 * k * slots)
    assert found.dtype == dtype
