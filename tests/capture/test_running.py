"""Layers whose code no idiom reads are run: one graph, a marker for what they computed, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeca_compile import capture
from tests.capture.layers import EXPERTS, WIDTH, stack, tokens
from tests.capture.running import FIXED, VARIABLE, assert_captured, compiled, refusal_of
from tests.capture.running_layers import (
    NONE,
    SPELLINGS,
    STATEMENTS,
    ChoiceOfSome,
    CountsUse,
    DenseTwice,
    Labelled,
    OfSamples,
    OnlyActive,
    Packed,
    PartOfAList,
    RouterOfSome,
    Split,
    Threshold,
    Viewed,
)
from tests.harness import RecordingBackend, nodes_of


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [*STATEMENTS, *SPELLINGS])
def test_what_stands_beside_a_dispatch_and_how_it_is_spelled_do_not_matter(layer):
    assert_captured(stack(layer(), layer()))


def test_half_precision():
    assert_captured(stack(Split()).bfloat16(), dtype=torch.bfloat16, rtol=0.05, atol=0.05)


class Mixing(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(-2, keepdim=True))


@pytest.mark.parametrize("seen", [lambda x, c: c, lambda x, c: x.mean(1), lambda x, c: c + x[:, 0]])
def test_experts_of_whole_samples(seen):
    assert_captured(OfSamples(seen).eval(), torch.randn(2, WIDTH))


def test_experts_of_whole_samples_that_mix_tokens():
    model = OfSamples(expert=lambda: Mixing(WIDTH, WIDTH)).eval()
    assert "depends on the other tokens" in refusal_of(model, torch.randn(2, WIDTH))


class DenseAndMean(DenseTwice):
    """Something else reads the experts' outputs."""

    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        each = torch.zeros(len(rows), EXPERTS).scatter(1, index, weight)
        return torch.einsum("ne,end->nd", each, made) + made.mean(0).tanh()


class Soft(DenseTwice):
    def route_to_experts(self, rows, index, weight):
        made = torch.stack([expert(rows) for expert in self.experts])
        return torch.einsum("ne,end->nd", self.router(rows).softmax(-1), made)


@pytest.mark.parametrize(("layer", "marker"), [(DenseTwice, FIXED), (PartOfAList, VARIABLE)])
def test_layers_that_ask_the_host_for_nothing(layer, marker):
    assert_captured(nn.Sequential(nn.LayerNorm(WIDTH), layer()).eval(), marker=marker)


@pytest.mark.parametrize("layer", [DenseAndMean, Soft])
def test_near_misses_of_layers_that_run_all_experts_on_all_rows(layer):
    """Plain torch.compile has them in one graph, too."""
    model = nn.Sequential(nn.LayerNorm(WIDTH), layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(found(tokens()), model(tokens()))
    (graph,) = backend.graphs
    assert not nodes_of(graph, FIXED) and not nodes_of(graph, VARIABLE)


def test_a_map_with_as_many_experts_as_there_are():
    assert_captured(stack(Threshold()), marker=VARIABLE)


@pytest.mark.parametrize("coupled", [False, True])
def test_whether_a_map_depends_on_the_other_samples(coupled):
    class Limited(Threshold):
        def limit(self, probs):
            return probs.mean(0) if coupled else 1 / EXPERTS

    found, backend = compiled(stack(Limited()))
    with torch.no_grad():
        found(tokens())
    (marker,) = nodes_of(backend.graphs[0], VARIABLE)
    assert marker.args[7] is coupled


@pytest.mark.parametrize("layer", [Packed, Viewed])
def test_packed_experts(layer):
    assert_captured(stack(layer(), layer()), rtol=1e-4, atol=1e-4)


def test_other_backends_and_training_run_the_original():
    model = stack(Split())
    backend = RecordingBackend(ours=False)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(tokens()), model(tokens()))
        found, ours = compiled(model.train())
        torch.testing.assert_close(found(tokens()), model(tokens()))
    assert not any(nodes_of(graph, FIXED) for graph in [*backend.graphs, *ours.graphs])
    assert capture.refusals() == ()


def test_running_changes_nothing_of_the_layer_and_draws_no_random_numbers():
    model = stack(CountsUse())
    found, _ = compiled(model)
    state = torch.get_rng_state()
    with torch.no_grad():
        found(tokens())
    assert not model[0].moe.used.any() and torch.equal(torch.get_rng_state(), state)


def test_branches_of_weight_zero_that_are_left_out():
    model, x = nn.Sequential(nn.LayerNorm(16), OnlyActive()).eval(), torch.randn(2, 10, 16)
    found, backend = compiled(model)
    with torch.no_grad():
        for each in (x, 5 * x):
            torch.testing.assert_close(found(each), model(each), rtol=0.05, atol=0.05)
    (graph,) = backend.graphs
    assert len([*nodes_of(graph, FIXED), *nodes_of(graph, VARIABLE)]) == 1 and capture.refusals() == ()


# rows and samples apart, by labels


@pytest.mark.parametrize(("layer", "marker"), [(RouterOfSome, FIXED), (ChoiceOfSome, VARIABLE)])
def test_what_runs_on_samples_with_a_label_runs_on_all_rows(layer, marker):
    model = Labelled(layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        for labels in ([3, NONE], [NONE, 0], [NONE, NONE], [1, 2]):
            given = torch.tensor(labels)
            torch.testing.assert_close(found(tokens(), given), model(tokens(), given))
    assert capture.refusals() == ()
    (graph,) = backend.graphs
    assert len(nodes_of(graph, marker)) == 1


class MixesPickedRows(RouterOfSome):
    """On all rows, it would see others."""

    def scores(self, rows):
        return self.router(rows - rows.mean(0)).softmax(-1)


class RareLabels(RouterOfSome):
    def scores(self, rows):
        return self.router(rows).softmax(-1)

    def forward(self, x, labels):
        return super().forward(x, labels) * (2 if labels.sum() > 1000 else 1)


@pytest.mark.parametrize("layer", [MixesPickedRows, RareLabels])
def test_near_misses_of_rows_apart(layer):
    """The router stays as it is, and the graph breaks there."""
    model = Labelled(layer()).eval()
    found, backend = compiled(model)
    with torch.no_grad():
        for labels in ([3, NONE], [NONE, NONE], [900, 900]):
            given = torch.tensor(labels)
            torch.testing.assert_close(found(tokens(), given), model(tokens(), given))
    assert len(backend.graphs) > 1


# near misses
