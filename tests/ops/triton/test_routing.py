"""The kernel of a router's choice against the reference: ids equal, also among ties, and weights up to rounding."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moeca_compile.ops import routing as reference
from moeca_compile.ops import selection
from tests.ops.routing_cases import CASES, Choice, make_inputs
from tests.ops.triton.cases import DEVICE, DTYPES

pytest.importorskip("triton")
from moeca_compile.ops.triton.routing import choose_experts

ROUNDINGS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def lower_ids_first(monkeypatch):
    """torch.topk leaves the order of ties open; `selection.topk` has its values, and the lower id first."""

    def topk(x: Tensor, k: int) -> torch.return_types.topk:
        return torch.return_types.topk(selection.topk(x, k))

    monkeypatch.setattr(Tensor, "topk", topk)


def assert_same(logits: Tensor, bias: Tensor | None, choice: Choice) -> None:
    ids, weights = choose_experts(logits, bias, *choice.arguments())
    expected_ids, expected = reference.choose_experts(logits, bias, *choice.arguments())
    assert ids.dtype == torch.int64 and weights.dtype == expected.dtype == choice.weight_dtype
    assert torch.equal(ids, expected_ids)
    bound = ROUNDINGS[choice.weight_dtype]
    torch.testing.assert_close(weights, expected, rtol=bound, atol=0, equal_nan=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("name", CASES)
def test_every_form(name, tokens):
    """70 tokens are no multiple of a block's, which has 512 / E rounded up to a power of two."""
    assert_same(*make_inputs(tokens, CASES[name], torch.float32, DEVICE), CASES[name])


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", CASES)
def test_in_16_bits_with_its_ties(name, dtype):
    """Every step is rounded, so that scores that are equal in 16 bits are equal in the kernel too."""
    choice = replace(CASES[name], dtype=dtype, weight_dtype=dtype)
    logits, bias = make_inputs(40, choice, dtype, DEVICE)
    bias = None if bias is None else bias.to(dtype)
    assert_same(logits, bias, choice)
    assert_same((2 * logits).round() / 2, bias, choice)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_16_bits_and_scores_in_32(dtype):
    choice = replace(CASES["48 experts"], weight_dtype=dtype)
    logits, bias = make_inputs(9, choice, dtype, DEVICE)
    assert_same(logits, bias, choice)
    assert_same(logits, bias, replace(choice, scores="softmax"))


@pytest.mark.parametrize("name", CASES)
def test_ties(name):
    """All logits equal; and few distinct ones, with -0.0 beside 0.0."""
    choice = CASES[name]
    assert_same(torch.zeros(3, choice.experts, device=DEVICE), None, choice)
    few = torch.randint(-1, 2, (20, choice.experts), generator=torch.Generator().manual_seed(0)) * 0.5
    assert_same(torch.where(torch.rand(few.shape) < 0.5, -few, few).to(DEVICE), None, choice)


def test_values_that_are_no_numbers():
    logits = torch.tensor([[0.0, math.nan, 1.0, -math.inf], [math.inf, -math.inf, 2.0, math.inf]], device=DEVICE)
    choice = Choice(4, 4, "none")
    ids, weights = choose_experts(logits, None, *choice.arguments())
    assert ids.tolist() == [[1, 2, 0, 3], [0, 3, 2, 1]]
    torch.testing.assert_close(weights, logits.gather(1, ids), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [-math.inf, -1e4, 0.1, 1.0])
def test_what_stands_outside_of_the_groups_is_rounded_too(fill, dtype):
    """More are chosen than the kept groups hold."""
    choice = replace(CASES["more than the groups hold"], fill=fill, dtype=dtype, weight_dtype=dtype)
    assert_same(*make_inputs(20, choice, dtype, DEVICE), choice)


def test_any_strides_and_no_tokens():
    choice = CASES["DSMoE"]
    logits, bias = make_inputs(6, choice, torch.float32, DEVICE)
    expected = choose_experts(logits, bias, *choice.arguments())
    wide = torch.zeros(16, 12, device=DEVICE)[:, ::2].t()
    wide.copy_(logits)
    apart = torch.zeros(16, 2, device=DEVICE)[:, 1].copy_(bias)
    for found in (
        choose_experts(wide, apart, *choice.arguments()),
        reference.choose_experts(wide, apart, *choice.arguments()),
    ):
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    ids, weights = choose_experts(logits[:0], bias, *choice.arguments())
    assert ids.shape == weights.shape == (0, 2)
