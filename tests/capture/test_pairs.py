"""Layers in which experts take tokens: one graph, one `moeca::experts_variable_k` a layer, eager's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from moeca_compile import capture
from moeca_compile._torch_private import export_functional
from moeca_compile.capture.idioms import expert_choice, expert_loop
from moeca_compile.capture.source import read_method
from tests.capture.layers import WIDTH, stack, tokens
from tests.capture.loop_layers import DYNAMIC, THRESHOLDS, DiffMoE, FixedInTheLoop, OfTheBatch, Predicted, Threshold
from tests.capture.pair_layers import (
    OVER_THE_BATCH,
    PER_SAMPLE,
    Choice,
    FlatLoop,
    GatherStack,
    OneHot,
    PackedBmm,
    PackedEinsum,
)
from tests.harness import RecordingBackend, captured, nodes_of
from tests.models import Sizes, make_inputs, make_model
from tests.references import run_with_markers

PAIRS = torch.ops.moeca.experts_variable_k


def captured_pairs(model: nn.Module, *inputs: torch.Tensor, layers: int = 1, **tolerance: float) -> list[fx.Node]:
    """The markers of the one graph, whose meaning is what eager returns."""
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        want = model(*inputs)
        got = torch.compile(model, backend=backend)(*inputs)
    assert capture.refusals() == ()
    assert len(backend.graphs) == 1
    markers = nodes_of(backend.graphs[0], PAIRS)
    assert len(markers) == layers
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **tolerance)
    return markers


@pytest.mark.sampled(3)
@pytest.mark.smoke
@pytest.mark.parametrize("layer", PER_SAMPLE)
def test_choice_within_a_sample(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (2 * 4 * 4, False)


@pytest.mark.smoke
@pytest.mark.parametrize("layer", OVER_THE_BATCH)
def test_choice_over_the_batch(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (4 * 8, True)


@pytest.mark.smoke
@pytest.mark.parametrize("layer", DYNAMIC)
def test_a_capacity_that_is_predicted(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (0, True)


@pytest.mark.smoke
@pytest.mark.parametrize("layer", THRESHOLDS)
def test_a_threshold(layer):
    (marker,) = captured_pairs(stack(layer()), tokens())
    assert marker.args[6:] == (0, False)


def test_a_threshold_that_the_batch_makes():
    (marker,) = captured_pairs(stack(OfTheBatch()), tokens())
    assert marker.args[6:] == (0, True)


def test_a_top_k_of_fixed_size_in_the_loop():
    (marker,) = captured_pairs(stack(FixedInTheLoop()), tokens())
    assert marker.args[6:] == (5 * 8, True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [GatherStack, PackedEinsum, DiffMoE, Threshold])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(layer, dtype):
    captured_pairs(stack(layer()).to(dtype), tokens(dtype), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layer", [GatherStack, OneHot, PackedBmm])
def test_one_sample_is_not_coupled(layer):
    (marker,) = captured_pairs(stack(layer()), tokens()[:1])
    assert marker.args[6:] == (4 * 4, False)


@pytest.mark.parametrize("layer", [FlatLoop, DiffMoE, Threshold])
def test_two_dimensional_inputs(layer):
    captured_pairs(stack(layer()), tokens()[0])


@pytest.mark.parametrize("layer", [GatherStack, DiffMoE])
def test_several_layers(layer):
    captured_pairs(stack(layer(), layer()), tokens(), layers=2)


def test_routed_and_weight_are_what_the_layer_chose():
    layer, seen = GatherStack(factor=0.5).eval(), []

    def run(gm):
        def up_to_marker(*args):
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            with pytest.raises(Exception, match="only stands for the layer until a pass replaces it"):
                interpreter.run(*args)
            (marker,) = nodes_of(gm, PAIRS)
            seen.extend(interpreter.env[node] for node in marker.args[1:3])
            return (tokens(),)

        return up_to_marker

    with torch.no_grad():
        torch.compile(layer, backend=RecordingBackend(run=run))(tokens())
        scores = layer.router(tokens()).softmax(-1)
    routed, weight = seen
    for sample in range(2):
        for expert in range(4):
            chosen = scores[sample, :, expert].topk(2).indices
            rows = slice(10 * sample, 10 * (sample + 1))
            assert routed[rows, expert].nonzero().flatten().tolist() == sorted(chosen.tolist())
            torch.testing.assert_close(weight[rows, expert][chosen], scores[sample, chosen, expert])
    assert not routed.any(1).all()  # some tokens are taken by no expert


@pytest.mark.parametrize("layer", [GatherStack, PackedEinsum, DiffMoE])
def test_the_functional_export_keeps_the_marker(layer):
    model, x = stack(layer()), tokens()
    backend = RecordingBackend(run=lambda gm: lambda *args: (x,))
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
        exported = export_functional(backend.graphs[0], backend.inputs[0])
        want = model(x)
    assert len(nodes_of(exported, PAIRS)) == 1
    torch.testing.assert_close(run_with_markers(exported, backend.inputs[0])[0], want)


class ElsewherePut(Choice):
    """Outputs are added to other tokens than those they are of."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        gate, ids = self.router(rows).softmax(-1).t().topk(8, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, ids[e].flip(0), expert(rows[ids[e]]) * gate[e, :, None])
        return out.view_as(x)


class SquaredGates(Choice):
    """Weights taken twice."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows).sigmoid()
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token = torch.where(scores[:, e] > 0.5)[0]
            gate = scores[token, e, None]
            out.index_add_(0, token, expert(rows[token]) * gate * gate)
        return out.view_as(x)


class OverItsTokens(Choice):
    """What an expert makes of a token depends on the others that it takes."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        gate, ids = self.router(rows).softmax(-1).t().topk(8, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            taken = rows[ids[e]]
            out.index_add_(0, ids[e], expert(taken - taken.mean(0)) * gate[e, :, None])
        return out.view_as(x)


class OnlyHits(Predicted):
    """A loop over experts that some token wants."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        mask = self.capacity_predictor(rows).sigmoid() > self.threshold
        scores = self.router(rows).softmax(-1)
        out = torch.zeros_like(rows)
        for e in mask.any(0).nonzero().flatten().tolist():
            token = mask[:, e].nonzero().squeeze(1)
            out.index_add_(0, token, self.experts[e](rows[token]) * scores[token, e, None])
        return out.view_as(x)


class AtLeastThree(Predicted):
    """An expert that few tokens want is left out."""

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        capacity = self.capacity_predictor(rows).sigmoid()
        scores = self.router(rows).softmax(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            k = (capacity[:, e] > self.threshold[e]).sum().item()
            if k < 3:
                continue
            gate, token = scores[:, e].topk(k)
            out.index_add_(0, token, expert(rows[token]) * gate[:, None])
        return out.view_as(x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [ElsewherePut, SquaredGates, OverItsTokens, AtLeastThree])
def test_what_numbers_do_not_confirm_runs_as_it_is_with_one_warning(layer):
    model, backend = stack(layer(), layer()), RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match=f"{layer.__name__}.forward") as caught:
        got = torch.compile(model, backend=backend)(tokens())
        torch.testing.assert_close(got, model(tokens()))
    assert len([each for each in caught if each.category is capture.CaptureWarning]) == 1
    assert not any(nodes_of(gm, PAIRS) for gm in backend.graphs)


def test_a_loop_over_the_experts_that_were_hit_is_run():
    model = stack(OnlyHits(), OnlyHits())
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(tokens()), model(tokens()))
    assert len(nodes_of(backend.graphs[0], PAIRS)) == 2 and capture.refusals() == ()


def selected_tokens(self, x):
    """One network on some tokens: no experts."""
    ids = self.router(x).topk(8, dim=1).indices
    rows = x.gather(1, ids.expand(-1, -1, WIDTH))
    return torch.zeros_like(x).scatter_add(1, ids.expand(-1, -1, WIDTH), self.mlp(rows) * self.scale)


def best_images(self, x):
    """A loop over networks on what a sort picked, without weights."""
    order = self.score(x).argsort(0)
    return [network(x[order[:4]]) for network in self.networks]


def thresholded_pixels(self, x):
    """Masks in a loop, and no experts."""
    out = torch.zeros_like(x)
    for level in range(4):
        mask = x > self.levels[level]
        out[mask] += 0.5 * x[mask]
    return out


@pytest.mark.parametrize("near_miss", [selected_tokens, best_images, thresholded_pixels])
@pytest.mark.parametrize("idiom", [expert_choice, expert_loop])
def test_near_misses_are_not_recognized(near_miss, idiom):
    assert idiom.recognize(read_method(near_miss)) is None


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [GatherStack, PackedBmm, DiffMoE, Threshold])
def test_the_passes_match_what_is_captured(layer):
    model = make_model(Sizes(width=WIDTH, heads=1, depth=2))
    model.blocks[1].mlp = layer().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    regions = captured(model, noise, torch.ones(len(noise)), labels).loop().compiled.regions
    assert len(regions.experts) == 1
    assert not any(kept.kind == "experts" for kept in regions.skipped)
