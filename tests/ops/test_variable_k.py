"""variable_k_outputs and refresh_variable_k: outputs, places and the pool against plain loops over branches."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

from moeca_compile.ops import bodies
from tests.harness import exported

WIDTH = 3
moeca = torch.ops.moeca


class Body(nn.Module):
    def forward(self, rows: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, weight).tanh()


@dataclass(frozen=True)
class Case:
    rows: Tensor  # (T, 5)
    parameters: list[Tensor]  # one an expert
    weight: Tensor  # (T, E)
    routed: Tensor
    body: str

    def expert(self, branch: tuple[int, int]) -> Tensor:
        return (self.parameters[branch[1]] @ self.rows[branch[0]]).tanh()


def make_case(tokens: int, experts: int, share: float, seed: int, by_expert: bool = False) -> Case:
    """by_expert: whether pairs lie in memory expert by expert, as routers of some layers leave them."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.randn(WIDTH, 5, generator=generator) for _ in range(experts)]
    body = fx.symbolic_trace(Body())
    rows = torch.randn(tokens, 5, generator=generator)
    weight = torch.rand(tokens, experts, generator=generator)
    routed = torch.rand(tokens, experts, generator=generator) < share
    if by_expert:
        weight, routed = (each.t().contiguous().t() for each in (weight, routed))
    return Case(rows, parameters, weight, routed, bodies.register(body))


def branches_of(mask: Tensor) -> list[tuple[int, int]]:
    return [tuple(branch) for branch in mask.nonzero().tolist()]


cases = st.builds(
    make_case,
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    st.integers(0, 10**6),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(0, 40), st.booleans(), st.integers(0, 10**6))
def test_all_branches_are_combined_and_the_first_are_cached(case: Case, slots: int, again: bool, seed: int):
    before = held_rows(case, slots, seed) if again else None
    out, pool, pool_row, norms = moeca.variable_k_outputs(
        [case.rows], case.routed, case.weight, before, case.parameters, case.body, WIDTH, slots
    )
    want = torch.zeros(len(case.rows), WIDTH)
    for number, branch in enumerate(branches_of(case.routed)):
        fresh = case.expert(branch)
        want[branch[0]] += case.weight[branch] * fresh
        cached, row = number < slots, int(pool_row[branch])
        assert (row > 0) == cached
        if before is None:
            assert row == (number + 1 if cached else 0)
        elif cached and before[branch]:
            assert row == before[branch], "a branch keeps its row"
        torch.testing.assert_close(norms[branch], fresh.norm() if cached else torch.tensor(0.0))
        if cached:
            torch.testing.assert_close(pool[row - 1], fresh)
    torch.testing.assert_close(out, want)
    rows = pool_row[pool_row > 0].tolist()
    assert len(set(rows)) == len(rows)
    assert not pool_row[~case.routed].any() and pool.shape == (slots, WIDTH)
    given_pool = torch.full((slots, WIDTH), 7.0)
    arguments = ([case.rows], case.routed, case.weight, before, case.parameters, case.body)
    for one, other in zip(moeca.variable_k_outputs_into(given_pool, *arguments), (out, pool_row, norms), strict=True):
        assert torch.equal(one, other)
    filled = torch.tensor(rows, dtype=torch.long) - 1
    assert torch.equal(given_pool[filled], pool[filled])
    assert len(filled) == slots or (given_pool == 7).all(-1).sum() == slots - len(filled)


def held_rows(case: Case, slots: int, seed: int) -> Tensor:
    """(T, E) rows of a pool that some pairs have."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand(case.routed.shape, generator=generator) < 0.5
    held = before.flatten().nonzero().squeeze(1)[:slots]
    pool_row = torch.zeros_like(case.routed, dtype=torch.int32)
    rows = torch.randperm(slots, generator=generator)[: len(held)] + 1
    pool_row[held // pool_row.shape[1], held % pool_row.shape[1]] = rows.to(torch.int32)
    return pool_row


def refreshed_by_loop(case: Case, pool_row, mask, ring, weights):
    """As `refresh_variable_k`: branch by branch. Returns output and rows; the ring is written.

    `weights` (T, E, K) are those of each branch's slots.
    """
    pool_row = pool_row.clone()
    new = [branch for branch in branches_of(mask) if not pool_row[branch]]
    holders = {int(pool_row[branch]): branch for branch in branches_of(pool_row > 0)}
    free = [row for row in range(1, len(ring[0]) + 1) if row not in holders or not case.routed[holders[row]]]
    for branch, row in zip(new, free, strict=False):
        if row in holders:
            pool_row[holders[row]] = 0
        pool_row[branch] = row
    out = torch.zeros(len(case.rows), WIDTH)
    for branch in branches_of(case.routed):
        row = int(pool_row[branch]) - 1
        value = torch.zeros(WIDTH)
        if row >= 0:
            value = sum((w * pool[row] for w, pool in zip(weights[branch], ring, strict=True)), value)
        if mask[branch]:
            for pool in ring if row >= 0 else ():
                pool[row] += case.expert(branch) - value
            value = case.expert(branch)
        out[branch[0]] += case.weight[branch] * value
    return out, pool_row


@settings(max_examples=100, deadline=None)
@given(cases, st.integers(0, 40), st.integers(1, 3), st.integers(0, 10**6))
def test_a_refresh_equals_the_loop_over_branches(case: Case, slots: int, depth: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    pool_row = held_rows(case, slots, seed)
    mask = case.routed & ((torch.rand(case.routed.shape, generator=generator) < 0.5) | (pool_row == 0))
    ring = [torch.randn(slots, WIDTH, generator=generator) for _ in range(depth)]
    history = torch.randint(1, depth + 1, case.routed.shape, generator=generator, dtype=torch.int32)
    forecast = torch.randn(depth, depth, generator=generator)
    forecast[:, 0] += 1 - forecast.sum(1)
    read = (history, forecast) if depth > 1 else (None, None)
    weights = forecast[history.long() - 1] if depth > 1 else torch.ones(*case.routed.shape, 1)
    want_ring = [pool.clone() for pool in ring]
    want, want_pool_row = refreshed_by_loop(case, pool_row, mask, want_ring, weights)
    given_pool_row = pool_row.clone()
    out, new_pool_row, norms = moeca.refresh_variable_k(
        ring, [case.rows], pool_row, case.routed, mask, case.weight, *read, case.parameters, case.body
    )
    assert torch.equal(pool_row, given_pool_row)
    assert torch.equal(new_pool_row, want_pool_row)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)
    for pool, want_pool in zip(ring, want_ring, strict=True):
        torch.testing.assert_close(pool, want_pool, atol=1e-4, rtol=1e-4)
    for branch in branches_of(torch.ones_like(mask)):
        torch.testing.assert_close(norms[branch], case.expert(branch).norm() if mask[branch] else torch.tensor(0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_are_taken_in_float32(dtype):
    case = make_case(4, 64, 1.0, seed=0)
    low = [value.to(dtype) for value in (case.rows, *case.parameters)]
    out = torch.ops.moeca.variable_k_outputs([low[0]], case.routed, case.weight, None, low[1:], case.body, WIDTH, 0)[
        0
    ]
    exact = torch.zeros(4, WIDTH)
    for t, e in branches_of(case.routed):
        exact[t] += case.weight[t, e] * (low[1 + e] @ low[0][t]).tanh().float()
    torch.testing.assert_close(out, exact.to(dtype), rtol=2e-2, atol=2e-2)
    assert out.dtype == dtype


def test_fakes_agree_with_the_ops():
    case = make_case(5, 3, 0.5, seed=1)
    history, pool_row = (torch.zeros(5, 3, dtype=torch.int32) for _ in range(2))
    checks = ("test_schema", "test_faketensor")
    for before in (None, pool_row):
        arguments = ([case.rows], case.routed, case.weight, before, case.parameters, case.body)
        torch.library.opcheck(moeca.variable_k_outputs.default, (*arguments, WIDTH, 4), test_utils=checks)
        pool = torch.zeros(4, WIDTH)
        torch.library.opcheck(moeca.variable_k_outputs_into.default, (pool, *arguments), test_utils=checks)
    ring, forecast = [torch.zeros(4, WIDTH) for _ in range(2)], torch.ones(2, 2)
    arguments = (ring, [case.rows], pool_row, case.routed, case.routed, case.weight, history, forecast)
    every = (*arguments, case.parameters, case.body)
    torch.library.opcheck(moeca.refresh_variable_k.default, every, test_utils=checks)


def test_a_trace_holds_one_op_of_each():
    case = make_case(5, 3, 0.5, seed=1)

    def run(rows: Tensor, routed: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return moeca.variable_k_outputs([rows], routed, weight, None, [*parameters], case.body, WIDTH, 0)[0]

    graph = exported(run, case.rows, case.routed, case.weight, *case.parameters)
    assert [n.target for n in graph.graph.nodes].count(torch.ops.moeca.variable_k_outputs.default) == 1
