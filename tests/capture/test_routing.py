"""Ids and weights in all orders, masks, ranks: to the same (tokens, experts) mask and weights."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.capture.idioms.choices import Choices, MisreadError, masks_of
from moeca_compile.capture.idioms.routing import readings, routing

B, N, E, C = 2, 7, 3, 4
LAID_OUT = {
    "BEC": lambda t: t,
    "BCE": lambda t: t.transpose(1, 2),
    "EBC": lambda t: t.transpose(0, 1),
    "EC": lambda t: t.transpose(0, 1).reshape(E, B * C),
    "CE": lambda t: t.permute(0, 2, 1).reshape(B * C, E),
}


def choice() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (B, E, N), and each expert's best tokens of a sample with their scores, (B, E, C)."""
    scores = torch.rand(B, E, N, generator=torch.Generator().manual_seed(0))
    return scores, *reversed(scores.topk(C, dim=-1))


def expected(index: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    routed, weights = torch.zeros(B * N, E, dtype=torch.bool), torch.zeros(B * N, E)
    for b in range(B):
        for e in range(E):
            for c in range(C):
                routed[b * N + index[b, e, c], e] = True
                weights[b * N + index[b, e, c], e] = weight[b, e, c]
    return routed, weights


@pytest.mark.parametrize("order", LAID_OUT)
@pytest.mark.parametrize("within", [False, True])
def test_every_order_of_ids_and_weights(order, within):
    if within and order in ("EC", "CE"):
        return  # without samples there is nothing to count within
    _, index, weight = choice()
    counted = index if within else index + torch.arange(B)[:, None, None] * N
    for of_weight in LAID_OUT:
        given = LAID_OUT[order](counted), LAID_OUT[of_weight](weight)
        got = routing(*given, (order, within, of_weight), B * N, E)
        if {order, of_weight} <= {"BEC", "EBC", "EC"} or order == of_weight:  # the choices of an expert in one order
            for mine, wanted in zip(got, expected(index, weight), strict=True):
                assert torch.equal(mine, wanted)
        assert torch.equal(got[0], expected(index, weight)[0])


@pytest.mark.parametrize(("order", "turned"), [("TE", (0, 2, 1)), ("ET", (1, 0, 2)), ("BEN", (0, 1, 2))])
def test_weights_of_all_tokens(order, turned):
    scores, index, weight = choice()
    given = scores.permute(turned)
    given = given.reshape(B * N, E) if order == "TE" else given.reshape(E, B * N) if order == "ET" else given
    routed, weights = routing(index, given, ("BEC", True, order), B * N, E)
    wanted = expected(index, weight)
    assert torch.equal(routed, wanted[0]) and torch.equal(weights * routed, wanted[1])


def test_what_cannot_lie_so_is_misread():
    _, index, weight = choice()
    with pytest.raises(MisreadError):
        routing(index[..., :3], weight, ("BEC", True, "BEC"), B * N, E)
    with pytest.raises(MisreadError):
        routing(index, weight, ("BEC", True, "TE"), B * N, E)
    with pytest.raises(MisreadError):  # ids of one sample, weights (experts, choices) taken for those of three
        routing(index[:1, :, :E], weight[0, :, :E], ("BEC", True, "BEC"), N, E)
    assert len(set(readings())) == len(list(readings()))


@pytest.mark.parametrize("counts", [(0, 3, 14), (5, 1, 0)])
def test_a_rank_under_a_count_is_a_top_k(counts):
    scores = torch.rand(E, B * N, generator=torch.Generator().manual_seed(1))
    ranked = [Choices().top(scores[e], torch.tensor(k)).indices for e, k in enumerate(counts)]
    sliced = [Choices().first(scores[e].argsort(descending=True), torch.tensor(k)) for e, k in enumerate(counts)]
    fixed = [Choices().top(scores[e], k).indices for e, k in enumerate(counts)]
    for chosen in (ranked, sliced, fixed):
        masks = masks_of(chosen, B * N)
        for e, k in enumerate(counts):
            assert masks[:, e].nonzero().flatten().tolist() == sorted(scores[e].topk(k).indices.tolist())


def test_sorted_values_go_back_to_their_tokens():
    scores = torch.rand(B * N)
    values, order = scores.sort(descending=True)
    assert torch.equal(Choices().placed(values, order), scores)


@pytest.mark.parametrize(("a", "b"), [(2, 5), (5, 2)])
def test_the_larger_and_the_smaller_of_numbers_and_tensors(a, b):
    ops, tensor = Choices(), torch.tensor
    for first, second in ((a, b), (tensor(a), b), (a, tensor(b)), (tensor(a), tensor(b))):
        assert int(ops.max(first, second)) == 5 and int(ops.min(first, second)) == 2
    assert ops.number(3.7) == 3 and ops.number(tensor(3)).item() == 3
