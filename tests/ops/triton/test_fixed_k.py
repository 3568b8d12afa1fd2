"""`fixed_k_outputs` and `refresh_fixed_k` by kernels against the ATen functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeca_compile.ops import fixed_k as reference
from tests.ops.triton.cases import (
    BODIES,
    BODY_ROUNDINGS,
    DEVICE,
    DTYPES,
    WIDTH,
    Body,
    assert_within,
    random,
)

kernels = pytest.importorskip("moeca_compile.ops.triton.fixed_k")
from moeca_compile.ops.triton import fallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:moeca")  # a fall-back is a failure


@dataclass(frozen=True)
class Case:
    """Arguments of refresh_fixed_k, in its order."""

    ring: list[Tensor]
    rows: list[Tensor]
    index: Tensor
    mask: Tensor
    chosen: Tensor
    weight: Tensor
    history: Tensor | None
    forecast: Tensor | None
    parameters: list[Tensor]
    experts: int
    body: str

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def copy(self) -> Case:
        return replace(self, ring=[slot.clone() for slot in self.ring])


def make_case(
    batch: int = 2,
    tokens: int = 7,
    chosen: int = 3,
    k: int = 2,
    experts: int = 5,
    slots: int = 2,
    body: Body = BODIES["swiglu"],
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    share: float = 0.5,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, device=DEVICE)  # noqa: E731
    stored = cache_dtype or dtype
    return Case(
        ring=[random((batch, tokens, k, WIDTH), stored) for _ in range(slots)],
        rows=[random((batch * chosen, WIDTH), dtype) for _ in range(body.rows)],
        index=torch.randint(experts, (batch, chosen, k), device=DEVICE),
        mask=rand(batch, chosen, k) < share,
        chosen=rand(batch, tokens).argsort(-1)[:, :chosen],
        weight=rand(batch, tokens, k).to(dtype),
        history=torch.randint(1, slots + 1, (batch, tokens, k), device=DEVICE).int() if slots > 1 else None,
        forecast=forecast_of(slots) if slots > 1 else None,
        parameters=body.parameters(experts, dtype),
        experts=experts,
        body=body.key(dtype),
    )


def recomputed(case: Case) -> Tensor:
    """Which slots of the cache are written, (B, N, k)."""
    where = torch.zeros(case.ring[0].shape[:3], dtype=torch.bool, device=DEVICE)
    for b, c, q in case.mask.nonzero().tolist():
        where[b, case.chosen[b, c], q] = True
    return where


def assert_as_the_reference(case: Case) -> None:
    """Ring, output and norms; the kernels round an output once on its way to the ring, ATen thrice."""
    found, expected = case.copy(), case.copy()
    out, norms = kernels.refresh_fixed_k(*found.arguments())
    wanted_out, wanted_norms = reference.refresh_fixed_k(*expected.arguments())
    rough = max((case.rows[0].dtype, case.ring[0].dtype), key=lambda dtype: torch.finfo(dtype).eps)
    for one, other in zip(found.ring, expected.ring, strict=True):
        assert_within(one, other, BODY_ROUNDINGS + 3, rough)
    assert out.dtype == wanted_out.dtype and norms.dtype == torch.float32
    assert out.is_contiguous() and norms.is_contiguous(), "as the fakes say"
    k = case.index.shape[-1]  # the reference rounds after each of 2 * k sums
    assert_within(out, wanted_out, BODY_ROUNDINGS + 3 + 2 * k, rough)
    assert_within(norms, wanted_norms, BODY_ROUNDINGS + 1, rough)
    assert torch.equal(norms == 0, wanted_norms == 0)
    stays = ~recomputed(case)
    assert all(torch.equal(one[stays], other[stays]) for one, other in zip(found.ring, case.ring, strict=True))


cases = st.builds(
    lambda batch, tokens, share_chosen, **rest: make_case(
        batch, tokens, max(1, round(share_chosen * tokens)), **rest
    ),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.4, 1.0]),
    k=st.integers(1, 8),
    experts=st.integers(1, 7),
    slots=st.integers(1, 3),
    body=st.sampled_from(list(BODIES.values())),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(cases)
def test_any_refresh(case: Case):
    assert_as_the_reference(case)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("name", list(BODIES))
def test_refresh_of_every_body(name, slots):
    assert_as_the_reference(make_case(slots=slots, body=BODIES[name]))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("k", range(1, 9))
def test_refresh_at_every_k(k):
    assert_as_the_reference(make_case(k=k, experts=9))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_refresh_of_no_branch_and_of_all(share):
    assert_as_the_reference(make_case(share=share))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_refresh_with_one_expert_taking_all(number):
    case = make_case(share=1.0)
    assert_as_the_reference(replace(case, index=torch.full_like(case.index, number)))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16])
def test_refresh_of_a_cache_of_lower_precision(cache_dtype):
    assert_as_the_reference(make_case(cache_dtype=cache_dtype))


def test_refresh_with_strides_and_other_integers():
    case = make_case()
    by_slot = [
        value.movedim(-1, 0).contiguous().movedim(0, -1)
        for value in (case.index, case.mask, case.weight, case.history)
    ]
    index, mask, weight, history = by_slot
    assert not index.is_contiguous()
    rows, chosen = [random((WIDTH, 6)).t()], case.chosen.t().contiguous().t()
    forecast = case.forecast.t().contiguous().t()
    strided = replace(case, index=index.int(), mask=mask, weight=weight, rows=rows, chosen=chosen)
    assert_as_the_reference(replace(strided, history=history, forecast=forecast))


def test_what_is_not_recomputed_keeps_its_bits():
    case = make_case(dtype=torch.bfloat16)
    after = case.copy()
    kernels.refresh_fixed_k(*after.arguments())
    stays = ~recomputed(case)
    assert all(torch.equal(one[stays], other[stays]) for one, other in zip(after.ring, case.ring, strict=True))


def test_a_slot_that_does_not_count_may_hold_anything():
    case = make_case(slots=2)
    case = replace(case, history=torch.ones_like(case.history))  # only the last slot counts
    rubbish = replace(case, ring=[torch.full_like(case.ring[0], float("nan")), case.ring[1].clone()])
    wanted, found = (kernels.refresh_fixed_k(*each.arguments()) for each in (case.copy(), rubbish))
    assert all(map(torch.equal, found, wanted))
    assert found[0].isfinite().all() and rubbish.ring[1].isfinite().all()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from(list(BODIES.values())),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)
def test_any_full_step(tokens, k, experts, body, dtype, seed):
    torch.manual_seed(seed)
    assert_outputs(body, dtype, torch.randint(experts, (tokens, k), device=DEVICE), experts)


def forecast_of(slots: int) -> Tensor:
    """Weights that sum to 1 for each history: the newest slot is the last one."""
    rows = torch.zeros(slots, slots)
    for known in range(1, slots + 1):
        rows[known - 1, slots - known :] = torch.randn(known)
        rows[known - 1, -1] += 1 - rows[known - 1].sum()
    return rows.to(DEVICE)


def assert_outputs(body: Body, dtype: torch.dtype, index: Tensor, experts: int) -> None:
    rows = [random((len(index), WIDTH), dtype) for _ in range(body.rows)]
    arguments = (rows, index, body.parameters(experts, dtype), experts, body.key(dtype), WIDTH)
    found, expected = kernels.fixed_k_outputs(*arguments), reference.fixed_k_outputs(*arguments)
    assert found.dtype == expected.dtype and found.is_contiguous()
    assert_within(found, expected, BODY_ROUNDINGS)
    out = torch.empty(1, *found.shape, dtype=dtype, device=DEVICE)
    kernels.fixed_k_outputs_into(out, *arguments[:-1])
    assert torch.equal(out[0], found)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", list(BODIES))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_step_of_every_body(name, dtype):
    torch.manual_seed(0)
    assert_outputs(BODIES[name], dtype, torch.randint(4, (9, 2), device=DEVICE), 4)


def test_packed_parameters_are_slices_of_one_tensor():
    torch.manual_seed(0)
    body, experts = BODIES["packed"], 3
    both, down = (random((experts, *shape)) for shape in body.shapes)
    parameters = [value for e in range(experts) for value in (both[e], down[e])]
    rows, index = [random((8, WIDTH))], torch.randint(experts, (8, 2), device=DEVICE)
    arguments = (rows, index, parameters, experts, body.key(torch.float32), WIDTH)
    assert_within(kernels.fixed_k_outputs(*arguments), reference.fixed_k_outputs(*arguments), BODY_ROUNDINGS)


def test_new_and_changed_parameters_are_noticed():
    torch.manual_seed(0)
    case = make_case()
    assert_as_the_reference(case)
    with torch.no_grad():
        for parameter in case.parameters:
            parameter.mul_(2)  # in place: same addresses
    assert_as_the_reference(case)
    case.parameters[:] = [parameter.clone() for parameter in case.parameters]
    assert_as_the_reference(case)
    case.parameters[3].set_(torch.randn_like(case.parameters[3]))  # one tensor's storage, swapped under it
    assert_as_the_reference(case)


def test_bodies_without_a_plan_run_by_aten_and_say_so():
    case = make_case(dtype=torch.float32)
    wide = replace(
        case,
        ring=[slot.double() for slot in case.ring],
        weight=case.weight.double(),
        rows=[row.double() for row in case.rows],
        parameters=[parameter.double() for parameter in case.parameters],
        body=BODIES["swiglu"].key(torch.float64),
    )
    fallback._warned.clear()
    with pytest.warns(UserWarning, match="refresh_fixed_k runs without kernels.*operands in float64"):
        found = kernels.refresh_fixed_k(*wide.copy().arguments())
    for one, other in zip(found, reference.refresh_fixed_k(*wide.copy().arguments()), strict=True):
        assert torch.equal(one, other)
    assert fallback.why_not(wide.body, wide.rows, wide.parameters, wide.experts) == (
        "a product in an expert's body has operands in float64, float64"
    )


def test_experts_that_lie_differently_run_by_aten_and_say_so():
    case = make_case()
    parameters = list(case.parameters)
    parameters[3] = parameters[3].t().contiguous().t()
    case = replace(case, parameters=parameters)
    fallback._warned.clear()
    with pytest.warns(UserWarning, match="differ in shape, strides or dtype"):
        assert_as_the_reference(case)
    assert "differ" in fallback.why_not(case.body, case.rows, parameters, case.experts)


def test_why_not_is_silent_where_kernels_run():
    case = make_case()
    assert fallback.why_not(case.body, case.rows, case.parameters, case.experts) is None
