"""The weighted sum over a token's branches in C++, against float64."""

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
    branches=st.integers(1, 8),
    width=st.integers(1, 70),
    dtype=st.sampled_from(list(EPS)),
    factor_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    slots=st.integers(1, 4),
)
def test_any_sizes(tokens, branches, width, dtype, factor_dtype, slots):
    torch.manual_seed(width)
    ring = [torch.randn(2, tokens, branches, width).to(dtype) for _ in range(slots)]
    factors = torch.randn(2, tokens, branches, slots).to(factor_dtype)
    found = library.combine(ring, factors)
    terms = torch.stack([slot.double() for slot in ring], -1) * factors.double()[:, :, :, None]
    wanted, sizes = terms.sum((-1, 2)), terms.abs().sum((-1, 2))
    assert found is not None
    assert found.dtype == dtype
    assert ((found.double() - wanted).abs() <= EPS[dtype] * wanted.abs() + 8 * EPS[torch.float32] * sizes).all()


def test_no_number_stays_none_in_bfloat16():
    cache = torch.tensor([[[float("nan"), float("inf"), 3.0]]], dtype=torch.bfloat16)
    found = library.combine([cache], torch.ones(1, 1, 1))
    assert found is not None
    assert found.isnan().tolist() == [[True, False, False]]
    assert found[0, 1:].tolist() == [float("inf"), 3.0]


@pytest.mark.parametrize("dtype", list(EPS))
def test_a_slot_that_does_not_count_is_not_read(dtype):
    ring = [torch.full((1, 1, 20), value, dtype=dtype) for value in (float("nan"), 3.0)]
    found = library.combine(ring, torch.tensor([[[0.0, 2.0]]]))
    assert found is not None
    assert found.tolist() == [[6.0] * 20]


@pytest.mark.parametrize(
    "cache",
    [torch.zeros(3, 2, 4).double(), torch.zeros(3, 4, 2).transpose(1, 2), torch.zeros(3, 2, 4, device="meta")],
)
def test_what_has_no_kernel(cache):
    assert library.combine([cache], torch.ones(3, 2, 1)) is None


def test_operands_that_do_not_fit_are_left_alone():
    """The kernel would read past their end."""
    cache = torch.zeros(3, 2, 4)
    assert library.combine([cache], torch.ones(4, 2, 1)) is None
    assert library.combine([cache], torch.ones(3, 2, 2)) is None
    assert library.combine([cache, torch.zeros(2, 2, 4)], torch.ones(3, 2, 2)) is None
