"""attend_rows against attention over all tokens with the caches written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

attend_rows = torch.ops.moeca.attend_rows


def make_case(batch: int, heads: int, tokens: int, chosen: int, width: int = 4, kv_heads: int | None = None):
    """(keys, values, query, key, value, chosen, valid) of one call."""
    torch.manual_seed(batch * tokens)
    kv_heads = kv_heads or heads
    caches = [torch.randn(batch, tokens, kv_heads, width) for _ in range(2)]
    fresh = [torch.randn(batch, count, chosen, width) for count in (heads, kv_heads, kv_heads)]
    places = torch.rand(batch, tokens).argsort(-1)[:, :chosen]
    return *caches, *fresh, places, torch.rand(batch, chosen) < 0.6


def loop(cache: Tensor, fresh: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
    """The cache (B, N, H, d) after the valid rows were written."""
    result = cache.clone()
    for b, c in valid.nonzero().tolist():
        result[b, chosen[b, c]] = fresh[b, :, c]
    return result


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "chosen", "kv_heads"),
    [(1, 1, 1, 1, None), (2, 3, 7, 4, None), (3, 4, 9, 9, 2), (2, 4, 5, 2, 1)],
)
def test_caches_and_outputs(batch, heads, tokens, chosen, kv_heads, scale):
    keys, values, query, key, value, places, valid = make_case(batch, heads, tokens, chosen, 4, kv_heads)
    gqa = kv_heads is not None
    all_keys, all_values = loop(keys, key, places, valid), loop(values, value, places, valid)
    found = attend_rows(keys, values, query, key, value, places, valid, None, scale, gqa)
    assert torch.equal(keys, all_keys)
    assert torch.equal(values, all_values)
    by_head = [cache.transpose(1, 2) for cache in (all_keys, all_values)]
    expected = F.scaled_dot_product_attention(query, *by_head, scale=scale, enable_gqa=gqa)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mask_shape", [(2, 1, 1, 7), (2, 3, 4, 7), (4, 7)])
def test_a_mask_of_the_chosen_queries(mask_shape):
    keys, values, query, key, value, places, valid = make_case(2, 3, 7, 4)
    mask = torch.randn(mask_shape)
    expected_keys, expected_values = loop(keys, key, places, valid), loop(values, value, places, valid)
    found = attend_rows(keys, values, query, key, value, places, valid, mask, None, False)
    scores = query @ expected_keys.permute(0, 2, 3, 1) / 2 + mask
    torch.testing.assert_close(found, scores.softmax(-1) @ expected_values.transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("every", [False, True])
def test_no_valid_row_and_all(every):
    keys, values, query, key, value, places, valid = make_case(2, 2, 6, 3)
    before = keys.clone()
    attend_rows(keys, values, query, key, value, places, torch.full_like(valid, every), None, None, False)
    assert torch.equal(keys, loop(before, key, places, torch.full_like(valid, every)))


def test_caches_of_lower_precision():
    keys, values, query, key, value, places, valid = make_case(2, 2, 6, 3)
    keys, values = keys.bfloat16(), values.bfloat16()
    expected = loop(keys, key.bfloat16(), places, valid)
    found = attend_rows(keys, values, query, key, value, places, valid, None, None, False)
    assert torch.equal(keys, expected)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_schema_and_fake(kv_heads):
    case = make_case(2, 4, 6, 3, kv_heads=kv_heads)
    arguments = (*case, None, None, kv_heads is not None)
    torch.library.opcheck(attend_rows, arguments, test_utils=("test_schema", "test_faketensor"))
