"""The weighted sum over a token's slots in C++, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeca_compile.ops.cpu import library

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    slots=st.integers(1, 8),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(EPS)),
    weight_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    forecast=st.booleans(),
)
def test_any_sizes(tokens, slots, width, dtype, weight_dtype, forecast):
    torch.manual_seed(width)
    cache = torch.randn(2, tokens, slots, width).to(dtype)
    slope = torch.randn_like(cache) if forecast else None
    distance, weight = torch.tensor(0.7), torch.rand(2, tokens, slots).to(weight_dtype)
    found = library.combine(cache, slope, distance, weight)
    terms = cache.double() + (distance.double() * slope.double() if forecast else 0.0)
    parts = terms * weight.double()[..., None]
    sizes = (cache.double().abs() + (slope.double().abs() if forecast else 0.0)) * weight.double()[..., None]
    allowed = EPS[dtype] * parts.sum(-2).abs() + 4 * EPS[torch.float32] * sizes.sum(-2)
    assert found is not None
    assert found.dtype == dtype
    assert ((found.double() - parts.sum(-2)).abs() <= allowed).all()


def test_no_number_stays_none_in_bfloat16():
    cache = torch.tensor([[[float("nan"), float("inf"), 3.0]]], dtype=torch.bfloat16)
    found = library.combine(cache, None, torch.tensor(0.0), torch.ones(1, 1))
    assert found is not None
    assert found.isnan().tolist() == [[True, False, False]]
    assert found[0, 1:].tolist() == [float("inf"), 3.0]


@pytest.mark.parametrize(
    "cache",
    [torch.zeros(3, 2, 4).double(), torch.zeros(3, 4, 2).transpose(1, 2), torch.zeros(3, 2, 4, device="meta")],
)
def test_what_has_no_kernel(cache):
    assert library.combine(cache, None, torch.tensor(0.0), torch.ones(3, 2)) is None


def test_operands_that_do_not_fit_are_left_alone():
    """The kernel would read past their end."""
    cache, distance = torch.zeros(3, 2, 4), torch.tensor(0.0)
    assert library.combine(cache, None, distance, torch.ones(4, 2)) is None
    assert library.combine(cache, torch.zeros(2, 2, 4), distance, torch.ones(3, 2)) is None
