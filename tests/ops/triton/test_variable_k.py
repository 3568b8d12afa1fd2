"""`variable_k_outputs` and `refresh_variable_k` by kernels against the ATen functions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.ops import variable_k as reference
from tests.ops.triton.cases import BODIES, BODY_ROUNDINGS, DEVICE, DTYPES, WIDTH, Body, assert_within, random

kernels = pytest.importorskip("moeca_compile.ops.triton.variable_k")
from moeca_compile.ops.triton import fallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:moeca")  # a fall-back is a failure


@dataclass(frozen=True)
class Case:
    """Pairs of a layer, and the state that a refresh finds."""

    body: Body
    dtype: torch.dtype
    rows: list[Tensor]
    parameters: list[Tensor]
    weight: Tensor  # (T, E)
    routed: Tensor
    mask: Tensor
    pool_row: Tensor
    pool: Tensor
    slope: Tensor | None

    @property
    def slots(self) -> int:
        return len(self.pool)


def make_case(
    tokens: int, experts: int, slots: int, share: float, forecast: bool, body: Body, dtype: torch.dtype, seed: int
) -> Case:
    torch.manual_seed(seed)
    routed, before, again = (torch.rand(tokens, experts, device=DEVICE) < each for each in (share, 0.5, 0.5))
    held = before.flatten().nonzero().squeeze(1)[:slots]
    pool_row = torch.zeros(tokens, experts, dtype=torch.int32, device=DEVICE)
    pool_row.view(-1)[held] = (torch.randperm(slots, device=DEVICE)[: len(held)] + 1).to(torch.int32)
    return Case(
        body,
        dtype,
        [random((tokens, WIDTH), dtype) for _ in range(body.rows)],
        body.parameters(experts, dtype),
        torch.rand(tokens, experts, device=DEVICE).to(dtype),
        routed,
        routed & (again | (pool_row == 0)),
        pool_row,
        random((slots, WIDTH), dtype),
        random((slots, WIDTH), dtype) if forecast else None,
    )


cases = st.builds(
    make_case,
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.booleans(),
    st.sampled_from([BODIES[name] for name in ("swiglu", "gelu", "one linear", "layer norm", "modulated")]),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)


def assert_sums(found: Tensor, expected: Tensor, case: Case) -> None:
    """Sums over a token's branches: of as many terms as there are experts, each rounded like an output."""
    assert found.dtype == expected.dtype
    assert_within(found, expected, (BODY_ROUNDINGS + 4) * case.routed.shape[1], case.dtype)


@settings(max_examples=20, deadline=None)
@given(cases)
def test_all_branches(case: Case):
    arguments = (case.rows, case.routed, case.weight, case.parameters, case.body.key(case.dtype), WIDTH, case.slots)
    out, pool, pool_row, norms = kernels.variable_k_outputs(*arguments)
    wanted_out, wanted_pool, wanted_pool_row, wanted_norms = reference.variable_k_outputs(*arguments)
    assert torch.equal(pool_row, wanted_pool_row) and pool_row.dtype == torch.int32
    assert_within(pool, wanted_pool, BODY_ROUNDINGS)
    assert_within(norms, wanted_norms, BODY_ROUNDINGS + 1, case.dtype)
    assert norms.dtype == torch.float32 and torch.equal(norms == 0, wanted_norms == 0)
    assert_sums(out, wanted_out, case)
    assert all(value.is_contiguous() for value in (out, pool, pool_row, norms))


@settings(max_examples=20, deadline=None)
@given(cases)
def test_a_refresh(case: Case):
    def run(function):
        pool, slope = case.pool.clone(), None if case.slope is None else case.slope.clone()
        state = (pool, slope, case.rows, case.pool_row, case.routed, case.mask, case.weight)
        distance = torch.tensor(0.5, device=DEVICE)
        return *function(*state, distance, case.parameters, case.body.key(case.dtype)), pool, slope

    before = case.pool_row.clone()
    out, pool_row, norms, pool, slope = run(kernels.refresh_variable_k)
    wanted_out, wanted_pool_row, wanted_norms, wanted_pool, wanted_slope = run(reference.refresh_variable_k)
    assert torch.equal(case.pool_row, before)
    assert torch.equal(pool_row, wanted_pool_row) and pool_row.dtype == torch.int32
    assert_within(pool, wanted_pool, BODY_ROUNDINGS + 3)
    assert_within(norms, wanted_norms, BODY_ROUNDINGS + 1, case.dtype)
    if slope is not None:
        assert torch.equal(slope, wanted_slope)
    assert_sums(out, wanted_out, case)
    assert all(value.is_contiguous() for value in (out, pool_row, norms))


def test_strided_masks_and_weights():
    case = make_case(6, 4, 12, 0.6, True, BODIES["swiglu"], torch.float32, 0)
    routed, weight = (value.t().contiguous().t() for value in (case.routed, case.weight))
    assert not routed.is_contiguous()
    rest = (case.parameters, case.body.key(case.dtype), WIDTH, case.slots)
    found = kernels.variable_k_outputs(case.rows, routed, weight, *rest)
    for one, other in zip(
        found, reference.variable_k_outputs(case.rows, case.routed, case.weight, *rest), strict=True
    ):
        assert_within(one, other, BODY_ROUNDINGS * 4, torch.float32)


def test_bodies_without_a_plan_run_by_aten_and_say_so():
    case = make_case(6, 4, 12, 0.6, True, BODIES["swiglu"], torch.float64, 0)
    fallback._warned.clear()
    rest = (case.parameters, case.body.key(case.dtype))
    with pytest.warns(UserWarning, match="variable_k_outputs runs without kernels"):
        kernels.variable_k_outputs(case.rows, case.routed, case.weight, *rest, WIDTH, case.slots)
    state = (case.pool, case.slope, case.rows, case.pool_row, case.routed, case.mask, case.weight)
    with pytest.warns(UserWarning, match="refresh_variable_k runs without kernels"):
        kernels.refresh_variable_k(*state, torch.tensor(0.5), *rest)
