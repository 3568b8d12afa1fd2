"""`variable_k_outputs` and `refresh_variable_k` by kernels against the ATen functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.ops import variable_k as reference
from tests.ops.triton.cases import BODIES, BODY_ROUNDINGS, DEVICE, DTYPES, WIDTH, Body, assert_within, random

kernels = pytest.importorskip("moeca_compile.ops.triton.variable_k")
from moeca_compile.ops.triton import fallback  # noqa: E402
from tests.ops.triton.test_fixed_k import forecast_of  # noqa: E402

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
    ring: list[Tensor]
    history: Tensor | None
    forecast: Tensor | None

    @property
    def slots(self) -> int:
        return len(self.ring[0])

    def all_arguments(self, before: bool) -> tuple[Any, ...]:
        """Those of variable_k_outputs, with rows that the branches had before or without."""
        pool_row = self.pool_row if before else None
        rest = (self.parameters, self.body.key(self.dtype), WIDTH, self.slots)
        return (self.rows, self.routed, self.weight, pool_row, *rest)

    def refresh_arguments(self, ring: list[Tensor]) -> tuple[Any, ...]:
        """Those of refresh_variable_k, which writes to the ring."""
        read = (self.weight, self.history, self.forecast, self.parameters, self.body.key(self.dtype))
        return (ring, self.rows, self.pool_row, self.routed, self.mask, *read)

    def new_ring(self) -> list[Tensor]:
        return [pool.clone() for pool in self.ring]


def make_case(
    tokens: int, experts: int, slots: int, share: float, depth: int, body: Body, dtype: torch.dtype, seed: int
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
        [random((slots, WIDTH), dtype) for _ in range(depth)],
        torch.randint(1, depth + 1, (tokens, experts), device=DEVICE).int() if depth > 1 else None,
        forecast_of(depth) if depth > 1 else None,
    )


cases = st.builds(
    make_case,
    st.integers(1, 9),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.integers(1, 3),
    st.sampled_from([BODIES[name] for name in ("swiglu", "gelu", "one linear", "layer norm", "modulated")]),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)


def assert_sums(found: Tensor, expected: Tensor, case: Case) -> None:
    """Sums over a token's branches: of as many terms as there are experts, each rounded like an output."""
    assert found.dtype == expected.dtype
    assert_within(found, expected, (BODY_ROUNDINGS + 4) * case.routed.shape[1], case.dtype)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(cases, st.booleans())
def test_all_branches(case: Case, before: bool):
    arguments = case.all_arguments(before)
    out, pool, pool_row, norms = kernels.variable_k_outputs(*arguments)
    wanted_out, wanted_pool, wanted_pool_row, wanted_norms = reference.variable_k_outputs(*arguments)
    assert torch.equal(pool_row, wanted_pool_row) and pool_row.dtype == torch.int32
    assert_within(pool, wanted_pool, BODY_ROUNDINGS)
    assert_within(norms, wanted_norms, BODY_ROUNDINGS + 1, case.dtype)
    assert norms.dtype == torch.float32 and torch.equal(norms == 0, wanted_norms == 0)
    assert_sums(out, wanted_out, case)
    assert all(value.is_contiguous() for value in (out, pool, pool_row, norms))
    into = torch.zeros_like(pool)
    again = kernels.variable_k_outputs_into(into, *arguments[:-2])
    assert all(map(torch.equal, (into, *again), (pool, out, pool_row, norms)))


@settings(max_examples=20, deadline=None)
@given(cases)
def test_a_refresh(case: Case):
    def run(function):
        ring = case.new_ring()
        return *function(*case.refresh_arguments(ring)), ring

    before = case.pool_row.clone()
    out, pool_row, norms, ring = run(kernels.refresh_variable_k)
    wanted_out, wanted_pool_row, wanted_norms, wanted_ring = run(reference.refresh_variable_k)
    assert torch.equal(case.pool_row, before)
    assert torch.equal(pool_row, wanted_pool_row) and pool_row.dtype == torch.int32
    for pool, wanted_pool in zip(ring, wanted_ring, strict=True):
        assert_within(pool, wanted_pool, BODY_ROUNDINGS + 3)
    assert_within(norms, wanted_norms, BODY_ROUNDINGS + 1, case.dtype)
    assert_sums(out, wanted_out, case)
    assert all(value.is_contiguous() for value in (out, pool_row, norms))


def test_strided_masks_and_weights():
    case = make_case(6, 4, 12, 0.6, 2, BODIES["swiglu"], torch.float32, 0)
    routed, weight = (value.t().contiguous().t() for value in (case.routed, case.weight))
    assert not routed.is_contiguous()
    rest = (case.parameters, case.body.key(case.dtype), WIDTH, case.slots)
    found = kernels.variable_k_outputs(case.rows, routed, weight, None, *rest)
    for one, other in zip(found, reference.variable_k_outputs(*case.all_arguments(False)), strict=True):
        assert_within(one, other, BODY_ROUNDINGS * 4, torch.float32)


def test_bodies_without_a_plan_run_by_aten_and_say_so():
    case = make_case(6, 4, 12, 0.6, 2, BODIES["swiglu"], torch.float64, 0)
    fallback._warned.clear()
    with pytest.warns(UserWarning, match="variable_k_outputs runs without kernels"):
        kernels.variable_k_outputs(*case.all_arguments(True))
    with pytest.warns(UserWarning, match="refresh_variable_k runs without kernels"):
        kernels.refresh_variable_k(*case.refresh_arguments(case.ring))
