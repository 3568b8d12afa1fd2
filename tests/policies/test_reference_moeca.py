"""The simulation itself: equations by hand, the ends where it must equal the model, and what lies between."""

import math

import pytest
import torch

from moeca_compile.config import MoecaConfig
from tests.models import Sizes, make_inputs, make_model
from tests.policies.reference_moeca import (
    Cached,
    Simulation,
    branch_scores,
    expert_thresholds,
    match,
    normalized_entropy,
    over_threshold,
    score_weights,
    simulate,
    update_statistic,
    within_budget,
    within_capacity,
)

STEPS = 12
ALL = ("attention", "experts", "shared")
FRESH = {
    "recipe": "moeca",
    "keys_values": "all",
    "shared": "any",
}  # everything that a chosen token's recomputation can refresh


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def start(model):
    return make_inputs(model)


def uncached(model, start, steps=STEPS):
    x, labels = start
    for step in range(steps):
        x = x - model(x, torch.full((len(x),), 1 - step / steps), labels) / steps
    return x


# Equations by hand: one sample, 2 tokens, 3 experts, top 2.


def test_matching_keeps_slots_and_fills_the_free_ones_in_order():
    ids = torch.tensor([[[2, 0], [1, 2], [3, 4]]])
    cached = torch.tensor([[[0, 2], [0, 1], [0, 1]]])
    slots, matched = match(ids, cached)
    assert slots.tolist() == [[[1, 0], [1, 0], [0, 1]]]
    assert matched.tolist() == [[[True, True], [True, False], [False, False]]]


def test_score_of_equation_9():
    weights, cached_weights = torch.tensor([[[0.7, 0.3]]]), torch.tensor([[[0.4, 0.6]]])
    contributions, ages = torch.tensor([[[0.25, 0.75]]]), torch.tensor([[[3, 1]]])
    slots = torch.tensor([[[1, 0]]])

    def scores(**options):
        config = MoecaConfig(**{"recipe": "moeca", **options})
        return branch_scores(weights, cached_weights, contributions, ages, slots, config).flatten().tolist()

    # slot of the first branch: w 0.6, o 0.75; of the second: w 0.4, o 0.25
    assert scores() == pytest.approx([0.7 + 0.1 + 0.6 * 0.75, 0.3 + 0.1 + 0.6 * 0.25])
    assert scores(lambda1=2.0, lambda2=0) == pytest.approx([0.9, 0.5])
    assert scores(score="drift") == pytest.approx([0.1, 0.1])
    assert scores(score="staleness", lambda1=0, lambda2=0) == pytest.approx([0.7 + 1 / 16, 0.3 + 3 / 16])


def test_score_weights():
    weights = torch.tensor([[[0.9, 0.3]]])
    normalized = score_weights(weights, MoecaConfig(recipe="moeca"))
    torch.testing.assert_close(normalized, torch.tensor([[[0.75, 0.25]]]))
    assert score_weights(weights, MoecaConfig(recipe="moeca", score_weights="raw")) is weights


def test_statistic_of_equation_10():
    config = MoecaConfig(recipe="moeca", beta=0.65)
    first = update_statistic(0.0, torch.tensor([[[0, 1], [0, 2]]]), 3, config)
    torch.testing.assert_close(first, torch.tensor([[[0.35, 0.35], [0.35, 0.0], [0.0, 0.35]]]))
    second = update_statistic(first, torch.tensor([[[0, 2], [1, 2]]]), 3, config)
    torch.testing.assert_close(second[0, 1], torch.tensor([0.65 * 0.35, 0.35]))
    batch = update_statistic(0.0, torch.tensor([[[0]], [[1]]]), 2, MoecaConfig(recipe="moeca", statistic="batch"))
    torch.testing.assert_close(batch, torch.full((1, 2, 1), 0.175))


def test_thresholds_of_equations_11_and_12():
    # expert 0 uniform over 2 tokens (H = 1), expert 1 on one of them (H = 0), expert 2 on 3 to 1
    statistic = torch.tensor([[[0.2, 0.2], [0.4, 0.0], [0.3, 0.1]]])
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    torch.testing.assert_close(
        normalized_entropy(statistic, MoecaConfig(recipe="moeca")), torch.tensor([[1.0, 0.0, h]])
    )
    expected = [0.8 * 1.6, 0.8 * 0.4, 0.8 * (1 + 0.6 * (2 * h - 1))]
    torch.testing.assert_close(expert_thresholds(statistic, MoecaConfig(recipe="moeca")), torch.tensor([expected]))


def test_minmax_entropy_spans_the_layer_s_experts():
    statistic = torch.tensor([[[0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0]]])
    log = normalized_entropy(statistic, MoecaConfig(recipe="moeca"))
    torch.testing.assert_close(log, torch.tensor([[1.0, 0.5, 0.0]]))
    torch.testing.assert_close(
        normalized_entropy(statistic[:, :2], MoecaConfig(recipe="moeca", entropy="minmax")), log[:, ::2]
    )


def test_recomputed_are_the_unmatched_and_those_over_their_expert_s_threshold():
    scores, ids = torch.tensor([[[0.5, 0.5], [0.1, 0.5]]]), torch.tensor([[[0, 1], [1, 2]]])
    matched = torch.tensor([[[True, True], [False, True]]])
    wanted = over_threshold(scores, ids, matched, torch.tensor([[0.4, 0.6, 0.5]]))
    assert wanted.tolist() == [[[True, False], [True, False]]]  # a score at the threshold is reused


def test_budget_ranks_unmatched_first_then_by_score():
    scores = torch.tensor([[[0.9, 0.2], [0.3, 0.9], [0.1, 0.8]]])
    matched = torch.tensor([[[True, True], [True, True], [False, True]]])
    assert within_budget(scores, matched, 1 / 3).tolist() == [[[True, False], [False, False], [True, False]]]
    assert within_budget(scores, matched, 1.0).all()
    assert not within_budget(scores, matched, 0.0).any()


def test_capacity_drops_the_lowest_ranked_tokens():
    scores = torch.tensor([[[0.9, 0.2], [0.3, 0.8], [0.1, 0.8], [0.99, 0.98]]])
    matched = torch.tensor([[[True, True], [True, True], [False, True], [True, True]]])
    wanted = torch.tensor([[[True, False], [False, True], [True, False], [False, False]]])
    kept = [within_capacity(wanted, scores, matched, c).any(-1).flatten().tolist() for c in range(5)]
    assert kept[0] == [False, False, False, False]
    assert kept[1] == [False, False, True, False]
    assert kept[2] == [True, False, True, False]
    assert kept[3] == kept[4] == [True, True, True, False]


def test_a_forecast_tensor_extrapolates_and_takes_refreshed_entries():
    cached = Cached(forecast=True)
    cached.store(torch.tensor([1.0, 1.0]), gap=0)
    assert cached.at(3).tolist() == [1.0, 1.0]
    cached.store(torch.tensor([5.0, 1.0]), gap=4)
    assert cached.at(2).tolist() == [7.0, 1.0]
    cached.put((0,), torch.tensor(10.0), d=2)
    assert cached.at(2).tolist() == [10.0, 1.0]
    assert cached.at(3).tolist() == [11.0, 1.0]


# Whole generations.


@pytest.mark.parametrize("forecast", [(), ALL])
def test_full_steps_only_are_the_model(model, start, forecast):
    x, results = simulate(model, MoecaConfig(recipe="moeca", forecast=forecast, full_every=1), *start, STEPS)
    torch.testing.assert_close(x, uncached(model, start), atol=1e-5, rtol=0)
    assert {result.kind for result in results} == {"full"}
    assert all(result.match_ratio is None for result in results)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("forecast", [(), ALL])
@pytest.mark.parametrize("tau0", [0.0, 0.8, 100.0])
@pytest.mark.parametrize("keys_values", ["all", "chosen", "none"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_unchanged_input_gives_the_model_s_output_whatever_is_recomputed(
    model, start, forecast, tau0, keys_values, overwrite
):
    options = {"forecast": forecast, "tau0": tau0, "keys_values": keys_values, "overwrite": overwrite}
    simulation = Simulation(model, MoecaConfig.from_options({"recipe": "moeca", **options}))
    x, y = start
    t = torch.full((len(x),), 0.6)
    for kind in ["full", "cache", "cache", "cache", "full", "cache"]:
        result = simulation.step(x, t, y)
        assert result.kind == kind
        torch.testing.assert_close(result.output, model(x, t, y), atol=1e-5, rtol=0)
        assert result.match_ratio in (None, 1.0)
        if kind == "cache" and tau0 != 0.8:
            assert result.reuse_ratio == (0.0 if tau0 == 0 else 1.0)


@pytest.fixture(scope="module")
def moe_first():
    """A model without a block before its first MoE layer, which no mask could refresh."""
    model = make_model(Sizes(depth=4), seed=3)
    model.blocks = model.blocks[1:]
    return model


def test_everything_recomputed_and_rerouted_is_the_model(moe_first):
    noise, labels = make_inputs(moe_first)
    config = MoecaConfig(**FRESH, tau0=0.0, full_every=STEPS)
    x, results = simulate(moe_first, config, noise, labels, STEPS, reroute=True)
    torch.testing.assert_close(x, uncached(moe_first, (noise, labels)), atol=1e-5, rtol=0)
    assert [result.kind for result in results] == ["full"] + ["cache"] * (STEPS - 1)
    assert all(result.reuse_ratio == 0 for result in results[1:])


def test_everything_recomputed_without_rerouting_lacks_the_fresh_routing_alone(moe_first):
    noise, labels = make_inputs(moe_first)
    exact = uncached(moe_first, (noise, labels))

    def error(tau0):
        x, _ = simulate(moe_first, MoecaConfig(**FRESH, tau0=tau0, full_every=STEPS), noise, labels, STEPS)
        return (x - exact).norm().item()

    assert 0 < error(0.0) < 0.3 * error(100.0)


def test_rerouting_changes_chosen_tokens_only(model, start):
    config, (x, labels), t = MoecaConfig(recipe="moeca"), start, torch.tensor([0.9, 0.9])
    decisions = []
    for reroute in (False, True):
        simulation = Simulation(model, config, reroute=reroute)
        simulation.step(x, t, labels)
        decisions.append(simulation.step(x * 0.7, t - 0.2, labels).decisions[1])
    probed, rerouted = decisions
    chosen = probed.recomputed.any(-1)
    assert torch.equal(rerouted.recomputed.any(-1), chosen)
    assert torch.equal(rerouted.weights[~chosen], probed.weights[~chosen])
    assert not torch.allclose(rerouted.weights[chosen], probed.weights[chosen])


def test_recomputed_slots_are_the_mask_by_slot(model, start):
    _, results = simulate(model, MoecaConfig(recipe="moeca"), *start, STEPS)
    decision = results[1].decisions[1]
    by_slot = decision.recomputed_slots()
    assert torch.equal(by_slot.gather(-1, decision.slots), decision.recomputed)
    assert by_slot.sum() == decision.recomputed.sum()


def test_more_recomputation_comes_nearer_to_the_model(model, start):
    exact = uncached(model, start)
    configs = [
        MoecaConfig(recipe="moeca", budget=0.0),
        *(MoecaConfig(**FRESH, budget=budget) for budget in (0.25, 1.0)),
    ]
    errors = [(simulate(model, config, *start, STEPS)[0] - exact).norm().item() for config in configs]
    assert errors[0] > errors[1] > errors[2] > 0


def test_forecasting_comes_nearer_to_the_model(model, start):
    exact = uncached(model, start, 24)
    plain, _ = simulate(model, MoecaConfig(**FRESH, full_every=3), *start, 24)
    forecast, _ = simulate(model, MoecaConfig(**FRESH, forecast=ALL, full_every=3), *start, 24)
    assert (forecast - exact).norm() < (plain - exact).norm()


def test_counts_and_ratios_are_those_of_the_masks(model, start):
    _, results = simulate(model, MoecaConfig(recipe="moeca"), *start, STEPS)
    assert [result.kind for result in results] == ["full", "cache", "cache", "cache"] * 3
    for result in results:
        if result.kind == "full":
            continue
        assert sorted(result.decisions) == [1, 3]
        branches = sum(decision.ids.numel() for decision in result.decisions.values())
        assert result.recomputed_branches == pytest.approx((1 - result.reuse_ratio) * branches)
        assert 0 < result.reuse_ratio <= result.match_ratio < 1
        for decision in result.decisions.values():
            assert (decision.recomputed == decision.wanted).all()
            assert decision.recomputed[~decision.matched].all()


@pytest.mark.parametrize("capacity", [0, 3])
def test_capacity_bounds_the_tokens_of_every_sample_and_layer(model, start, capacity):
    _, results = simulate(model, MoecaConfig(recipe="moeca", tau0=0.0), *start, STEPS, capacity)
    for result in results:
        for decision in result.decisions.values():
            assert decision.recomputed.any(-1).sum(-1).tolist() == [capacity, capacity]


def test_capacity_only_drops(model, start):
    x, labels = start
    t = torch.tensor([0.9, 0.9])
    free, bounded = (
        Simulation(model, MoecaConfig(recipe="moeca")),
        Simulation(model, MoecaConfig(recipe="moeca"), capacity=2),
    )
    for simulation in (free, bounded):
        simulation.step(x, t, labels)
    many = free.step(x * 0.9, t - 0.05, labels).decisions[1]
    few = bounded.step(x * 0.9, t - 0.05, labels).decisions[1]
    assert torch.equal(many.wanted, few.wanted)
    assert (many.recomputed | ~few.recomputed).all()
    assert few.recomputed.sum() < many.recomputed.sum()


def test_budget_recomputes_a_fixed_number_of_branches(model, start):
    _, results = simulate(model, MoecaConfig(recipe="moeca", budget=0.25), *start, STEPS)
    for result in results:
        for decision in result.decisions.values():
            assert decision.recomputed.flatten(1).sum(-1).tolist() == [8, 8]  # a quarter of 16 tokens x 2


def test_full_steps_are_those_listed(model, start):
    _, results = simulate(model, MoecaConfig(recipe="moeca", full_steps=(0, 1, 7)), *start, STEPS)
    assert [i for i, result in enumerate(results) if result.kind == "full"] == [0, 1, 7]


def test_samples_do_not_depend_on_their_neighbors(model, start):
    noise, labels = start
    together, _ = simulate(model, MoecaConfig(recipe="moeca"), noise, labels, STEPS)
    alone, _ = simulate(model, MoecaConfig(recipe="moeca"), noise[1:], labels[1:], STEPS)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)


def test_each_option_changes_the_result(model, start):
    """An option that the simulation ignored would make every comparison with it worthless."""
    options = [
        {},
        {"keys_values": "chosen"},
        {"keys_values": "none"},
        {"mask_source": "previous"},
        {"shared": "always"},
        {"shared": "never"},
        {"entropy": "minmax"},
        {"statistic": "batch"},
        {"score_weights": "raw"},
        {"score": "drift", "tau0": 0.01},
        {"score": "staleness"},
        {"overwrite": False},
        {"forecast": ("attention",)},
        {"forecast": ("experts",)},
        {"forecast": ("shared",)},
    ]
    pictures = [simulate(model, MoecaConfig(**FRESH | option), *start, STEPS)[0] for option in options]
    for i, picture in enumerate(pictures):
        for j in range(i):
            assert not torch.allclose(picture, pictures[j], atol=1e-6), (options[i], options[j])


@pytest.mark.parametrize("options", [{"recipe": "fora"}, {"attention_every": 2}])
def test_what_it_does_not_simulate_is_an_error(model, options):
    with pytest.raises(ValueError, match="simulation"):
        Simulation(model, MoecaConfig(**{"recipe": "moeca", **options}))
