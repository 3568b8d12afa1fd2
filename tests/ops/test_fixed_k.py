"""fixed_k_outputs and refresh_fixed_k against plain loops over tokens and slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops import bodies

moeca = torch.ops.moeca
fixed_k_outputs, refresh_fixed_k = moeca.fixed_k_outputs, moeca.refresh_fixed_k
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
    body: str = SWIGLU

    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def copy(self) -> Case:
        return replace(self, ring=[slot.clone() for slot in self.ring])

    def weights(self, place: tuple[int, int, int]) -> Tensor:
        """The weights of the slots of one branch."""
        if self.history is None or self.forecast is None:
            return torch.ones(1)
        return self.forecast[int(self.history[place]) - 1]


def forecast_of(slots: int) -> Tensor:
    """Weights that sum to 1 for each history: the newest slot is the last one."""
    rows = torch.zeros(slots, slots)
    for known in range(1, slots + 1):
        rows[known - 1, slots - known :] = torch.randn(known)
        rows[known - 1, -1] += 1 - rows[known - 1].sum()
    return rows


def swiglu_parameters(experts: int) -> list[Tensor]:
    shapes = [(HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN)] * experts
    return [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]


def make_case(
    batch: int = 2,
    tokens: int = 7,
    chosen: int = 3,
    k: int = 2,
    experts: int = 5,
    slots: int = 1,
    seed: int = 0,
) -> Case:
    torch.manual_seed(seed)
    return Case(
        ring=[torch.randn(batch, tokens, k, WIDTH) for _ in range(slots)],
        rows=[torch.randn(batch * chosen, WIDTH)],
        index=torch.rand(batch, chosen, experts).argsort(-1)[..., :k],
        mask=torch.rand(batch, chosen, k) < 0.5,
        chosen=torch.rand(batch, tokens).argsort(-1)[:, :chosen],
        weight=torch.rand(batch, tokens, k),
        history=torch.randint(1, slots + 1, (batch, tokens, k), dtype=torch.int32) if slots > 1 else None,
        forecast=forecast_of(slots) if slots > 1 else None,
        parameters=swiglu_parameters(experts),
        experts=experts,
    )


def expert(case: Case, number: int, rows: list[Tensor]) -> Tensor:
    each = len(case.parameters) // case.experts
    body = {SWIGLU: swiglu, SCALED: scaled}[case.body]
    return body(*rows, *case.parameters[number * each : (number + 1) * each])


def loop(case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(output, norms, ring) afterwards, one branch at a time."""
    ring = [slot.clone() for slot in case.ring]

    def value(place: tuple[int, int, int]) -> Tensor:
        terms = zip(case.weights(place), ring, strict=True)
        return sum((w * slot[place] for w, slot in terms if w != 0), torch.zeros(WIDTH))

    norms = torch.zeros(case.mask.shape)
    for b, c, q in case.mask.nonzero().tolist():
        row = b * case.mask.shape[1] + c
        place = (b, int(case.chosen[b, c]), q)
        fresh = expert(case, int(case.index[b, c, q]), [value[row] for value in case.rows])
        norms[b, c, q] = fresh.norm()
        moved = fresh - value(place)
        for slot in ring:
            slot[place] += moved
    output = torch.zeros_like(ring[0][:, :, 0])
    for b, n, q in torch.ones(ring[0].shape[:3]).nonzero().tolist():
        output[b, n] += case.weight[b, n, q] * value((b, n, q))
    return output, norms, ring


def assert_as_the_loop(case: Case) -> None:
    output, norms, ring = loop(case)
    case = case.copy()
    found, found_norms = refresh_fixed_k(*case.arguments())
    for one, other in ((found, output), (found_norms, norms), *zip(case.ring, ring, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "tokens", "chosen"), [(1, 1, 1), (2, 7, 3), (3, 13, 13)])
def test_refresh_at_odd_sizes(batch, tokens, chosen, k, slots):
    assert_as_the_loop(make_case(batch, tokens, chosen, k, slots=slots))


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("every", [False, True])
def test_refresh_of_no_branch_and_of_all(every, slots):
    case = make_case(slots=slots)
    case = replace(case, mask=torch.full_like(case.mask, every))
    assert_as_the_loop(case)
    after = case.copy()
    _, norms = refresh_fixed_k(*after.arguments())
    assert torch.equal(after.ring[0], case.ring[0]) is not every
    assert bool(norms.any()) is every


def test_refresh_with_one_expert_taking_all_and_the_others_empty():
    case = make_case(k=1, experts=6)
    for number in (0, 3, 5):
        assert_as_the_loop(replace(case, index=torch.full_like(case.index, number), mask=torch.ones_like(case.mask)))


def test_refresh_touches_the_recomputed_branches_only():
    case = make_case(slots=2)
    after = case.copy()
    refresh_fixed_k(*after.arguments())
    touched = torch.zeros(case.ring[0].shape[:3], dtype=torch.bool)
    for b, c, q in case.mask.nonzero().tolist():
        touched[b, case.chosen[b, c], q] = True
    for now, before in zip(after.ring, case.ring, strict=True):
        assert torch.equal((now != before).any(-1), touched)
        assert torch.equal(now[~touched], before[~touched])


def test_a_recomputed_branch_keeps_the_differences_between_its_slots():
    case = make_case(slots=3)
    case = replace(case, mask=torch.ones_like(case.mask))
    after = case.copy()
    refresh_fixed_k(*after.arguments())
    for one, other in ((0, 1), (1, 2)):
        differences = [each.ring[one] - each.ring[other] for each in (after, case)]
        torch.testing.assert_close(*differences, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])  # C++ for all but the second
def test_what_never_counts_may_hold_anything(dtype):
    """Of a new branch, and after a single full step, only the newest slot counts."""
    case, outputs = make_case(slots=2), []
    for value in (0.0, float("nan")):
        ring = [torch.full_like(case.ring[0], value).to(dtype), case.ring[1].to(dtype)]
        outputs.append(refresh_fixed_k(*replace(case, ring=ring, history=torch.ones_like(case.history)).arguments()))
    assert outputs[1][0].isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))


def test_a_body_that_takes_two_values_a_row():
    case = make_case(k=2, experts=3)
    rows = [torch.randn(6, WIDTH), torch.randn(6, WIDTH)]
    parameters = [torch.randn(WIDTH, WIDTH) for _ in range(3)]
    assert_as_the_loop(replace(case, rows=rows, parameters=parameters, body=SCALED))


@pytest.mark.parametrize("slots", [1, 2])
def test_a_cache_of_lower_precision_is_rounded_once(slots):
    case = make_case(slots=slots)
    low = [slot.bfloat16() for slot in case.ring]
    half = replace(case, ring=[slot.clone() for slot in low])
    refresh_fixed_k(*half.arguments())
    _, _, ring = loop(replace(case, ring=[slot.float() for slot in low]))
    for found, wanted in zip(half.ring, ring, strict=True):
        torch.testing.assert_close(found, wanted.bfloat16(), atol=0, rtol=1e-2)


def test_sums_over_slots_in_low_precision_are_taken_in_float32():
    """Two slots that nearly cancel out: a sum in bfloat16 would be off by a hundredth."""
    case = make_case(slots=2, k=1)
    forecast = torch.tensor([[0.0, 1.0], [-30.0, 31.0]])
    ring = [slot.bfloat16() for slot in case.ring]
    half = replace(case, ring=ring, mask=torch.zeros_like(case.mask), forecast=forecast)
    half.history.fill_(2)
    found, _ = refresh_fixed_k(*half.arguments())
    exact = 31 * ring[1].double() - 30 * ring[0].double()
    wanted = exact[:, :, 0] * case.weight.double()
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all()


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


def test_outputs_written_into_a_tensor_of_another_shape():
    torch.manual_seed(0)
    rows, parameters = torch.randn(9, WIDTH), swiglu_parameters(5)
    arguments = ([rows], torch.rand(9, 5).argsort(-1)[:, :2], parameters, 5, SWIGLU)
    out = torch.full((3, 3, 2, WIDTH), float("nan"))
    assert moeca.fixed_k_outputs_into(out, *arguments) is None
    assert torch.equal(out.view(9, 2, WIDTH), fixed_k_outputs(*arguments, WIDTH))


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


@pytest.mark.parametrize("slots", [1, 2])
def test_schema_and_fake_of_refresh(slots):
    torch.library.opcheck(refresh_fixed_k, make_case(slots=slots).arguments(), test_utils=CHECKS)


def test_schema_and_fake_of_outputs():
    case = make_case()
    rows, index = case.rows, case.index.flatten(0, 1)
    arguments = (rows, index, case.parameters, case.experts, SWIGLU, WIDTH)
    torch.library.opcheck(fixed_k_outputs, arguments, test_utils=CHECKS)
    out = torch.empty(*index.shape, WIDTH)
    torch.library.opcheck(moeca.fixed_k_outputs_into, (out, *arguments[:-1]), test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor")
"""What applies to ops without an autograd formula."""
