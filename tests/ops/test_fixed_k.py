"""fixed_k_outputs and refresh_fixed_k against plain loops over tokens and slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops import bodies

fixed_k_outputs, refresh_fixed_k = torch.ops.moeca.fixed_k_outputs, torch.ops.moeca.refresh_fixed_k
WIDTH, HIDDEN = 6, 10


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Two values enter this expert row by row."""
    return F.linear(x * scale, weight)


SWIGLU, SCALED = (bodies.register(fx.symbolic_trace(body)) for body in (swiglu, scaled))


@dataclass(frozen=True)
class Case:
    """Arguments of refresh_fixed_k, in its order."""

    cache: Tensor
    rows: list[Tensor]
    index: Tensor
    mask: Tensor
    matched: Tensor
    chosen: Tensor
    weight: Tensor
    slope: Tensor | None
    distance: Tensor
    parameters: list[Tensor]
    experts: int
    body: str = SWIGLU

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def copy(self) -> Case:
        slope = None if self.slope is None else self.slope.clone()
        return replace(self, cache=self.cache.clone(), slope=slope)


def swiglu_parameters(experts: int) -> list[Tensor]:
    shapes = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * experts
    return [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]


def make_case(
    batch: int = 2,
    tokens: int = 7,
    chosen: int = 3,
    k: int = 2,
    experts: int = 5,
    slope: bool = False,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    return Case(
        cache=torch.randn(batch, tokens, k, WIDTH),
        rows=[torch.randn(batch * chosen, WIDTH)],
        index=torch.rand(batch, chosen, experts).argsort(-1)[..., :k],
        mask=torch.rand(batch, chosen, k) < 0.5,
        matched=torch.rand(batch, chosen, k) < 0.5,
        chosen=torch.rand(batch, tokens).argsort(-1)[:, :chosen],
        weight=torch.rand(batch, tokens, k),
        slope=torch.randn(batch, tokens, k, WIDTH) if slope else None,
        distance=torch.tensor(0.75 if slope else 0.0),
        parameters=swiglu_parameters(experts),
        experts=experts,
    )


def expert(case: Case, number: int, rows: list[Tensor]) -> Tensor:
    each = len(case.parameters) // case.experts
    body = {SWIGLU: swiglu, SCALED: scaled}[case.body]
    return body(*rows, *case.parameters[number * each : (number + 1) * each])


def loop(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, norms, cache, slope) afterwards, one branch at a time."""
    cache = case.cache.clone()
    slope = torch.zeros_like(cache) if case.slope is None else case.slope.clone()
    norms = torch.zeros(case.mask.shape)
    for b, c, q in case.mask.nonzero().tolist():
        row = b * case.mask.shape[1] + c
        place = (b, int(case.chosen[b, c]), q)
        fresh = expert(case, int(case.index[b, c, q]), [value[row] for value in case.rows])
        if not case.matched[b, c, q]:
            slope[place] = 0
        norms[b, c, q] = fresh.norm()
        cache[place] = fresh - case.distance * slope[place]
    used = cache + case.distance * slope
    output = torch.zeros_like(cache[:, :, 0])
    for b, n, q in torch.ones(cache.shape[:3]).nonzero().tolist():
        output[b, n] += case.weight[b, n, q] * used[b, n, q]
    return output, norms, cache, None if case.slope is None else slope


def assert_as_the_loop(case: Case) -> None:
    output, norms, cache, slope = loop(case)
    case = case.copy()
    found, found_norms = refresh_fixed_k(*case.arguments())
    for one, other in ((found, output), (found_norms, norms), (case.cache, cache)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    if slope is not None:
        torch.testing.assert_close(case.slope, slope, atol=0, rtol=0)


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "tokens", "chosen"), [(1, 1, 1), (2, 7, 3), (3, 13, 13)])
def test_refresh_at_odd_sizes(batch, tokens, chosen, k, slope):
    assert_as_the_loop(make_case(batch, tokens, chosen, k, slope=slope))


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("every", [False, True])
def test_refresh_of_no_branch_and_of_all(every, slope):
    case = make_case(slope=slope)
    case = replace(case, mask=torch.full_like(case.mask, every))
    assert_as_the_loop(case)
    after = case.copy()
    _, norms = refresh_fixed_k(*after.arguments())
    assert torch.equal(after.cache, case.cache) is not every
    assert bool(norms.any()) is every


def test_refresh_with_one_expert_taking_all_and_the_others_empty():
    case = make_case(k=1, experts=6)
    for number in (0, 3, 5):
        assert_as_the_loop(replace(case, index=torch.full_like(case.index, number), mask=torch.ones_like(case.mask)))


def test_refresh_touches_the_recomputed_slots_only():
    case = make_case(slope=True)
    after = case.copy()
    refresh_fixed_k(*after.arguments())
    touched = torch.zeros(case.cache.shape[:3], dtype=torch.bool)
    for b, c, q in case.mask.nonzero().tolist():
        touched[b, case.chosen[b, c], q] = True
    assert torch.equal((after.cache != case.cache).any(-1), touched)
    assert torch.equal(after.cache[~touched], case.cache[~touched])
    assert torch.equal(after.slope[~touched], case.slope[~touched])


def test_an_unmatched_slot_loses_its_slope_and_a_matched_one_keeps_it():
    case = make_case(slope=True)
    case = replace(case, mask=torch.ones_like(case.mask))
    after = case.copy()
    refresh_fixed_k(*after.arguments())
    places = case.chosen[..., None, None].expand(-1, -1, *case.slope.shape[2:])
    slope, before = after.slope.gather(1, places), case.slope.gather(1, places)
    assert (slope[~case.matched] == 0).all()
    assert torch.equal(slope[case.matched], before[case.matched])


def test_a_body_that_takes_two_values_a_row():
    case = make_case(k=2, experts=3)
    rows = [torch.randn(6, WIDTH), torch.randn(6, WIDTH)]
    parameters = [torch.randn(WIDTH, WIDTH) for _ in range(3)]
    assert_as_the_loop(replace(case, rows=rows, parameters=parameters, body=SCALED))


def test_a_cache_of_lower_precision_is_rounded_once():
    case = make_case()
    half = replace(case.copy(), cache=case.cache.bfloat16())
    refresh_fixed_k(*half.arguments())
    _, _, cache, _ = loop(replace(case, cache=case.cache.bfloat16().float()))
    torch.testing.assert_close(half.cache, cache.bfloat16(), atol=0, rtol=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_outputs_of_all_branches(tokens, k):
    torch.manual_seed(k)
    rows, parameters = torch.randn(tokens, WIDTH), swiglu_parameters(5)
    index = torch.rand(tokens, 5).argsort(-1)[:, :k]
    found = fixed_k_outputs([rows], index, parameters, 5, SWIGLU, WIDTH)
    assert found.shape == (tokens, k, WIDTH)
    for t in range(tokens):
        for q in range(k):
            e = 3 * int(index[t, q])
            torch.testing.assert_close(found[t, q], swiglu(rows[t], *parameters[e : e + 3]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("number", [0, 4])
def test_outputs_with_one_expert_taking_all(number):
    torch.manual_seed(0)
    rows, parameters = torch.randn(9, WIDTH), swiglu_parameters(5)
    index = torch.full((9, 1), number)
    found = fixed_k_outputs([rows], index, parameters, 5, SWIGLU, WIDTH)
    expected = swiglu(rows, *parameters[3 * number : 3 * number + 3])
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_int32_ids_are_taken_too():
    torch.manual_seed(0)
    rows, parameters = torch.randn(9, WIDTH), swiglu_parameters(5)
    index = torch.rand(9, 5).argsort(-1)[:, :2]
    arguments = (parameters, 5, SWIGLU, WIDTH)
    assert torch.equal(fixed_k_outputs([rows], index.int(), *arguments), fixed_k_outputs([rows], index, *arguments))


@pytest.mark.parametrize("slope", [False, True])
def test_schema_and_fake_of_refresh(slope):
    torch.library.opcheck(refresh_fixed_k, make_case(slope=slope).arguments(), test_utils=CHECKS)


def test_schema_and_fake_of_outputs():
    case = make_case()
    rows, index = case.rows, case.index.flatten(0, 1)
    arguments = (rows, index, case.parameters, case.experts, SWIGLU, WIDTH)
    torch.library.opcheck(fixed_k_outputs, arguments, test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor")
"""What applies to ops without an autograd formula."""
