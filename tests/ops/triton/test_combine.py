"""Weighted sums over slots against the sum written out in float64."""

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
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_sum(batch, tokens, k, width, dtype, forecast, seed):
    torch.manual_seed(seed)
    cache = random((batch, tokens, k, width), dtype)
    slope = random((batch, tokens, k, width), dtype) if forecast else None
    weight, distance = random((batch, k, tokens)).transpose(1, 2), torch.tensor(0.7, device=DEVICE)
    found = combine.combine_fixed_k(cache, slope, distance, weight)
    values = cache.double() + (distance.double() * slope.double() if slope is not None else 0)
    # One rounding at the end; in float32 also one for each of the 2 * k sums.
    assert_within(found, (weight.double()[..., None] * values).sum(2), 1 + 2 * k)
    assert found.dtype == dtype
