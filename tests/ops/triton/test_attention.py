"""`attend_rows` by a kernel against the ATen function: caches and outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.ops.attention import attend_rows as reference
from tests.ops.triton.cases import DEVICE, DTYPES, assert_within, random

kernels = pytest.importorskip("moeca_compile.ops.triton.attention")


def make_case(batch, heads, kv_heads, tokens, chosen, width, value_width, dtype, cache_dtype, share, seed):
    """(keys, values, query, key, value, chosen, valid) of one call."""
    torch.manual_seed(seed)
    keys, values = (random((batch, tokens, kv_heads, each), cache_dtype) for each in (width, value_width))
    # As they come from a projection, (B, C, H, d) transposed: not contiguous.
    query, key, value = (
        random((batch, chosen, count, each), dtype).transpose(1, 2)
        for count, each in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    )
    places = torch.rand(batch, tokens, device=DEVICE).argsort(-1)[:, :chosen]
    return keys, values, query, key, value, places, torch.rand(batch, chosen, device=DEVICE) < share


def assert_as_the_reference(case, mask: Tensor | None = None, scale: float | None = None) -> None:
    query, gqa = case[2], case[2].shape[1] > case[3].shape[1]
    found, expected = ((case[0].clone(), case[1].clone(), *case[2:], mask, scale, gqa) for _ in range(2))
    out, wanted = kernels.attend_rows(*found), reference(*expected)
    untouched = torch.ones(case[0].shape[:2], dtype=torch.bool, device=DEVICE)
    for b, c in case[6].nonzero().tolist():
        untouched[b, case[5][b, c]] = False
    for one, other, before in zip(found[:2], expected[:2], case[:2], strict=True):
        # Copies are equal to the bit. Triton's interpreter cuts float32 off to bfloat16, where a device rounds.
        assert_within(one, other, 1 if one.dtype != query.dtype else 0)
        assert torch.equal(one[untouched], before[untouched])
    assert_within(out, wanted, 2 if case[0].dtype != query.dtype else 0, case[0].dtype)
    assert out.dtype == query.dtype and out.transpose(1, 2).is_contiguous() and wanted.transpose(1, 2).is_contiguous()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.sampled_from([None, torch.bfloat16]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 10**6),
)
def test_any_call(batch, heads, tokens, part, width, value_width, dtype, cache_dtype, share, seed):
    chosen = max(1, round(part * tokens))
    sizes = (batch, *heads, tokens, chosen, width, value_width)
    assert_as_the_reference(make_case(*sizes, dtype, cache_dtype or dtype, share, seed))


def test_rows_wider_than_a_program_takes_at_a_time():
    assert_as_the_reference(make_case(2, 40, 40, 5, 3, 33, 33, torch.float32, torch.float32, 0.5, 0))


def test_masks_scales_and_strided_caches():
    case = make_case(2, 3, 3, 7, 4, 8, 8, torch.float32, torch.float32, 0.5, 0)
    assert_as_the_reference(case, mask=random((2, 1, 4, 7)), scale=0.3)
    keys, values = (random((2, 7, 3, 24))[..., 8 * n : 8 * n + 8] for n in range(2))
    assert_as_the_reference((keys, values, *case[2:5], case[5].int().long().t().contiguous().t(), case[6]))
