"""The reuse decision: equations by hand, matching as a permutation, ranks and ties."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.policies import decision as decide


@st.composite
def routings(draw) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, cached ids), each (B, N, k); the ids of a token are distinct."""
    batch, tokens, k = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.integers(k, k + 4))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def ids() -> Tensor:
        return torch.rand(batch, tokens, experts, generator=seed).argsort(-1)[..., :k]

    return ids(), torch.rand(batch, tokens, k, generator=seed), ids()


@settings(max_examples=100, deadline=None)
@given(routings())
def test_matching_permutes_the_branches_into_slots(routing):
    index, weight, cached = routing
    found = decide.match(index, weight, cached)
    # the same branches, each with its weight
    order, by_slot = index.sort(-1), found.index.sort(-1)
    assert torch.equal(order.values, by_slot.values)
    torch.testing.assert_close(weight.gather(-1, order.indices), found.weight.gather(-1, by_slot.indices))
    # a slot is matched exactly where it holds an expert that the token has now, and then it keeps it
    assert torch.equal(found.matched, (cached[..., None] == index[..., None, :]).any(-1))
    assert torch.equal(found.index[found.matched], cached[found.matched])
    # the others take the free slots in order
    for b, n in ((b, n) for b in range(len(index)) for n in range(index.shape[1])):
        held = cached[b, n].tolist()
        assert found.index[b, n][~found.matched[b, n]].tolist() == [e for e in index[b, n].tolist() if e not in held]


def test_matching_by_hand():
    found = decide.match(
        torch.tensor([[[2, 0], [1, 2], [3, 4]]]),
        torch.tensor([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]]),
        torch.tensor([[[0, 2], [0, 1], [0, 1]]]),
    )
    assert found.index.tolist() == [[[0, 2], [2, 1], [3, 4]]]
    assert found.matched.tolist() == [[[True, True], [False, True], [False, False]]]
    torch.testing.assert_close(found.weight, torch.tensor([[[0.4, 0.6], [0.3, 0.7], [0.9, 0.1]]]))


def test_matching_takes_int32_ids_of_the_cache():
    index, weight = torch.tensor([[[5, 1]]]), torch.rand(1, 1, 2)
    found = decide.match(index, weight, torch.tensor([[[1, 5]]], dtype=torch.int32))
    assert found.index.tolist() == [[[1, 5]]]
    assert found.index.dtype == torch.int64
    assert found.matched.all()


def test_score_of_equation_9():
    weight, cached, norms = (
        torch.tensor([[[0.7, 0.3]]]),
        torch.tensor([[[0.6, 0.4]]]),
        torch.tensor([[[3.0, 1.0]]]),
    )
    age = torch.tensor([[[1.0, 3.0]]])

    def score(**options) -> list[float]:
        return (
            decide.score(MoecaConfig(**{"recipe": "moeca", **options}), weight, cached, norms, age).flatten().tolist()
        )

    assert score() == pytest.approx([0.7 + 0.1 + 0.6 * 0.75, 0.3 + 0.1 + 0.6 * 0.25])
    assert score(lambda1=2.0, lambda2=0) == pytest.approx([0.9, 0.5])
    assert score(score="drift") == pytest.approx([0.1, 0.1])
    assert score(score="staleness", lambda1=0, lambda2=0) == pytest.approx([0.7 + 1 / 16, 0.3 + 3 / 16])
    assert score(score="staleness", lambda1=0, lambda2=0, full_every=2) == pytest.approx([0.7 + 1 / 8, 0.3 + 3 / 8])


def test_a_contribution_of_nothing_is_zero():
    zero = torch.zeros(1, 1, 2)
    assert decide.score(MoecaConfig(recipe="moeca"), zero, zero, zero, zero).tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_of_nothing_are_zero_in_16_bits_too(dtype):
    """In float16 a small number to divide by is 0."""
    nothing = torch.zeros(1, 2, 3, dtype=dtype)
    assert torch.equal(decide.normalized(nothing), nothing)
    options = MoecaConfig(recipe="moeca")
    assert decide.score(options, nothing, nothing, nothing, nothing).eq(0).all()
    for entropy in ("log", "minmax"):
        assert decide.thresholds(MoecaConfig(recipe="moeca", entropy=entropy), nothing).isfinite().all()


def test_normalized_weights():
    torch.testing.assert_close(decide.normalized(torch.tensor([[0.9, 0.3]])), torch.tensor([[0.75, 0.25]]))
    assert decide.normalized(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def _routed(ids: list[list[int]]) -> Tensor:
    """Ids of one sample's tokens, of 3 experts, as which experts each is routed to."""
    return decide.routed_by_expert(torch.tensor([ids]), 3)


def test_statistic_of_equation_10():
    config = MoecaConfig(recipe="moeca", beta=0.65)
    first = decide.activation(config, torch.zeros(1, 2, 3), _routed([[0, 1], [0, 2]]))
    torch.testing.assert_close(first, torch.tensor([[[0.35, 0.35, 0.0], [0.35, 0.0, 0.35]]]))
    second = decide.activation(config, first, _routed([[0, 2], [1, 2]]))
    torch.testing.assert_close(second[0, 1], torch.tensor([0.65 * 0.35, 0.35, 0.65 * 0.35 + 0.35]))


# Experts over 2 tokens: 0 uniform (H = 1), 1 on one token (H = 0), 2 at 3 to 1, 3 never (H = 0).
STATISTIC = torch.tensor([[[0.2, 0.4, 0.3, 0.0], [0.2, 0.0, 0.1, 0.0]]])
H2 = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)


def test_thresholds_of_equations_11_and_12():
    expected = [0.8 * 1.6, 0.8 * 0.4, 0.8 * (1 + 0.6 * (2 * H2 - 1)), 0.8 * 0.4]
    torch.testing.assert_close(decide.thresholds(MoecaConfig(recipe="moeca"), STATISTIC), torch.tensor([expected]))
    flat = decide.thresholds(MoecaConfig(recipe="moeca", alpha=0.0, tau0=0.5), STATISTIC)
    torch.testing.assert_close(flat, torch.full((1, 4), 0.5))


def test_thresholds_with_entropy_by_the_layer_s_extremes():
    statistic = STATISTIC[:, :, [0, 2]]  # H = 1 and H2: mapped to 1 and 0
    found = decide.thresholds(MoecaConfig(recipe="moeca", entropy="minmax"), statistic)
    torch.testing.assert_close(found, torch.tensor([[0.8 * 1.6, 0.8 * 0.4]]))


def test_minmax_where_all_entropies_are_equal():
    found = decide.thresholds(MoecaConfig(recipe="moeca", entropy="minmax"), STATISTIC[:, :, [0, 0]])
    torch.testing.assert_close(found, torch.full((1, 2), 0.8 * 0.4))


def test_one_statistic_for_the_batch():
    both = torch.cat([STATISTIC, STATISTIC.flip(1)])
    batch = decide.thresholds(MoecaConfig(recipe="moeca", statistic="batch"), both)
    assert torch.equal(batch[0], batch[1])
    torch.testing.assert_close(batch[0, :3], torch.full((3,), 0.8 * 1.6))  # over both each expert is uniform
    sample = decide.thresholds(MoecaConfig(recipe="moeca"), both)
    torch.testing.assert_close(sample[:1], decide.thresholds(MoecaConfig(recipe="moeca"), STATISTIC))


def test_a_score_at_the_threshold_is_reused():
    scores, index = torch.tensor([[[0.5, 0.5], [0.4, 0.5]]]), torch.tensor([[[0, 1], [0, 2]]])
    over = decide.over_threshold(scores, torch.tensor([[0.4, 0.6, 0.5]]), index)
    assert over.tolist() == [[[True, False], [False, False]]]


SCORES = torch.tensor([[[0.9, 0.2], [0.3, 0.9], [0.1, 0.8]]])
MATCHED = torch.tensor([[[True, True], [True, True], [False, True]]])


def test_a_budget_ranks_the_unmatched_first_then_by_score():
    def within(budget: float) -> list:
        return decide.within_budget(SCORES, MATCHED, budget)[0].tolist()

    assert within(0.0) == [[False, False]] * 3
    assert within(1 / 6) == [[False, False], [False, False], [True, False]]
    assert within(1 / 3) == [[True, False], [False, False], [True, False]]  # a tie goes to the first
    assert within(1 / 2) == [[True, False], [False, True], [True, False]]
    assert within(1.0) == [[True, True]] * 3


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_a_budget_is_kept_in_every_sample(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    scores, matched = torch.rand(3, 5, 2, generator=generator), torch.rand(3, 5, 2, generator=generator) < 0.7
    within = decide.within_budget(scores, matched, budget)
    assert within.flatten(1).sum(-1).tolist() == [round(budget * 10)] * 3
    rank = scores + 10 * ~matched
    for b in range(3):
        if within[b].any() and not within[b].all():
            assert rank[b][within[b]].min() >= rank[b][~within[b]].max()


def choose(recompute, matched, scores, capacity) -> list[int]:
    """The valid ones of the chosen tokens of the first sample, in their order."""
    chosen, valid = decide.choose_tokens(recompute, matched, scores, capacity)
    assert chosen.shape == valid.shape == (len(scores), min(capacity, scores.shape[1]))
    return chosen[0][valid[0]].tolist()


def test_tokens_with_an_unmatched_branch_come_first_then_by_their_best_score():
    recompute = torch.tensor([[[True, False], [False, True], [True, False], [False, False]]])
    scores = torch.tensor([[[0.5, 5.0], [0.3, 0.8], [0.1, 0.0], [9.0, 9.0]]])
    matched = torch.tensor([[[True, True], [True, True], [False, True], [True, False]]])
    assert choose(recompute, matched, scores, 4) == [2, 1, 0]
    assert choose(recompute, matched, scores, 2) == [2, 1]
    assert choose(recompute, matched, scores, 0) == []


def test_ties_go_to_the_lower_token():
    recompute, matched = torch.ones(1, 5, 2, dtype=torch.bool), torch.ones(1, 5, 2, dtype=torch.bool)
    assert choose(recompute, matched, torch.full((1, 5, 2), 0.7), 3) == [0, 1, 2]


def test_a_token_of_score_zero_is_chosen_too():
    """tau0 = 0 with a drift of exactly nothing: unmatched, with no score at all."""
    recompute = torch.tensor([[[False, False], [True, False]]])
    assert choose(recompute, ~recompute, torch.zeros(1, 2, 2), 2) == [1]


def test_scores_are_told_apart_among_the_unmatched():
    scores = torch.tensor([[[0.5], [0.50001], [0.49999]]])
    recompute, matched = torch.ones(1, 3, 1, dtype=torch.bool), torch.zeros(1, 3, 1, dtype=torch.bool)
    assert choose(recompute, matched, scores, 3) == [1, 0, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_chosen_tokens_are_distinct_and_none_is_missed(seed, capacity):
    generator = torch.Generator().manual_seed(seed)
    recompute = torch.rand(2, 6, 2, generator=generator) < 0.3
    scores, matched = torch.rand(2, 6, 2, generator=generator), torch.rand(2, 6, 2, generator=generator) < 0.7
    chosen, valid = decide.choose_tokens(recompute, matched, scores, capacity)
    needed = recompute.any(-1)
    for b in range(2):
        assert len(set(chosen[b].tolist())) == capacity
        assert needed[b, chosen[b][valid[b]]].all()
        assert int(valid[b].sum()) == min(capacity, int(needed[b].sum()))


def test_large_raw_weights_do_not_outrank_an_unmatched_branch():
    """Raw router weights may be scaled by some factor."""
    scores = torch.tensor([[[40.0, 0.0], [0.1, 0.0]]])
    recompute = torch.tensor([[[True, False], [True, False]]])
    matched = torch.tensor([[[True, True], [False, True]]])
    assert choose(recompute, matched, scores, 1) == [1]
