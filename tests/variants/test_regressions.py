"""Models that were once missed or wrong, each as small as it shows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moeca_compile
from tests.harness import eager_backend
from tests.variants.attention import Attending
from tests.variants.blocks import Block, Blocking, Modelling, make_inputs, make_model, timestep
from tests.variants.check import check
from tests.variants.dispatch import Layering
from tests.variants.expectations import IDLE
from tests.variants.routing import Routing


class WithoutResidual(Block):
    def forward(self, h, context):
        parts = self.modulations(context)
        h = self.join(h, self.attn(self.attention_input(h, parts), context.rope, None, None), parts[0])
        x = self.mlp_input(h, parts)
        return self.called(x, x, context), None


@pytest.mark.sampled(3)
@pytest.mark.parametrize("extra", ["time", "context"])
@pytest.mark.parametrize("dispatch", ["sorted_extra", "mask_extra"])
def test_experts_that_take_a_further_row_a_token_are_cached(dispatch, extra):
    """Rows that carry no tokens of the stream's could not be taken for chosen tokens, so the layer was kept."""
    layer = Layering(dispatch, extra=extra, flat=extra == "time")
    outcome = check(Modelling((Blocking(feedforward=layer),), side=4), {"budget": 0.3, "keys_values": "all"})
    assert outcome.steps == 6


@pytest.mark.parametrize("dispatch", ["grouped_private", "put_back"])
def test_rows_sorted_by_expert_are_not_taken_for_tokens(dispatch):
    """With one expert a token there are as many, and full steps were right; cached outputs were other tokens'."""
    layer = Layering(dispatch, Routing(3, 1), beside=("counter",))
    check(Modelling((Blocking(feedforward=layer),), side=4), {"budget": 0.5, "keys_values": "chosen"})


def test_a_router_in_float32_does_not_refuse_a_float64_model():
    """Validation held rounding of float32 against the tolerance of float64."""
    layer = Layering("mask_all", Routing(4, 4, wide=True), shared=(8, 20), hidden=24)
    how = Modelling((Blocking(feedforward="mlp"), Blocking(feedforward=layer)), side=4, batch=1, dtype=torch.float64)
    assert check(how, {"budget": 0.5}).steps == 6


def test_what_is_kept_because_no_experts_are_cached_says_so():
    """The report sent its reader to warnings that were none."""
    how = Modelling((Blocking(feedforward="mlp"), Blocking()))
    model = make_model(how)
    model.blocks[1] = WithoutResidual(how.blocks[1], how).eval().requires_grad_(False)
    compiled = torch.compile(model, backend=eager_backend, options={"recipe": "moeca", "lowering": "eager"})
    noise, inputs = make_inputs(how)
    t = timestep(how, 0, 6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(noise, t, *inputs), model(noise, t, *inputs))
    report = moeca_compile.report(compiled)
    assert {region.reason for region in report.regions if region.kind == "attention"} == {IDLE}
    assert report.warnings == ()


def test_two_shared_experts_of_other_widths_and_a_long_skip():
    layer = Layering("boolean_mask", Routing(8, 3, "sigmoid", "groups"), shared=(8, 20), reads="both")
    block = Blocking(Attending(rope="interleaved", norm="rms", kv_heads=2), layer)
    how = Modelling((block, Blocking(feedforward="swiglu"), block), skip="cat", chunks=4, gate="tanh")
    assert check(how, {"tau0": 0.8, "shared": "any", "forecast": ("attention", "experts", "shared")}).steps > 0


def test_experts_that_a_shared_expert_drowns_in_low_precision_are_cached():
    """Norms in the experts keep their outputs small, so that the check of capture could not tell them in bfloat16."""
    layer = Layering("choice_normalized", Routing(3, 1, "sigmoid"), "rms", 8, shared=(8,), reads="both")
    check(Modelling((Blocking(feedforward=layer),), dtype=torch.bfloat16), {})  # raises where the layer is kept


def test_a_choice_over_the_batch_is_told_whatever_the_first_try_chose():
    """With other numbers in half of the batch the experts happened to take the same of the few tokens."""
    layer = Layering("choice_over_batch", Routing(3, 2, "sigmoid", "raw", wide=True), "normed", hidden=24)
    other = Layering("mask_hit", Routing(4, 1, wide=True), "mlp", 8, shared=(20,), reads="unmodulated")
    second = Attending(fused=False, rope="half", heads=4, kv_heads=2)
    blocks = (Blocking(Attending(heads=4, kv_heads=4, rope=None), layer), Blocking(second, other))
    kind = {"chunks": 4, "gate": "clamp", "label": "text", "timestep": "scalar"}
    check(Modelling(blocks, width=24, side=2, batch=3, **kind, dtype=torch.float16, seed=2), {})


def test_tokens_without_a_cached_branch_have_a_rank_in_float16():
    """Their share of the norms was not a number, so a budget took other branches."""
    layer = Layering("choice_normalized", Routing(6, 1, "sigmoid", "raw", wide=True), "normed", 8, True)
    attending = Attending(rope="interleaved", kv_heads=2, spread="expanded")
    block = Blocking(attending, replace(layer, reads="unmodulated"), "residual")
    other = Blocking(attending, Layering("beside", Routing(6, 2, "sigmoid", "scaled"), "mlp", 24, True), "residual")
    kind = {"chunks": 2, "gate": "tanh", "label": "none", "timestep": "long", "skip": "add"}
    model = Modelling((block, other), width=24, side=2, **kind, dtype=torch.float16)
    check(model, {"budget": 0.5, "score": "staleness", "mask_source": "previous", "shared": "always"})


def test_equal_weights_are_taken_by_token_and_not_as_they_are_sorted():
    """Where all are one number, only one that is none (NaN) tells the two orders apart."""
    layer = Layering("packed_split", Routing(8, 1, "sigmoid", "groups"), hidden=8, beside=("nested",))
    check(Modelling((Blocking(feedforward=layer),)), {})


def test_choices_that_are_also_a_map_have_a_cache_for_each_branch():
    """By the map, the number of branches is not known, and some of them were computed at every step."""
    layer = Layering("choice_normalized", Routing(6, 4, "sigmoid", "raw"), beside=("import",))
    check(Modelling((Blocking(feedforward=layer),), batch=1), {})


def test_a_layer_that_takes_no_token_of_the_first_picture_is_said_to_be_unproven():
    """The data tell how many tokens it takes, and with no branch nothing shows whether caching is right."""
    layer = Layering("predicted_topk", Routing(3, 3))
    outcome = check(Modelling((Blocking(feedforward=layer),), side=2, batch=1, seed=30), {})
    assert outcome.steps == 6


@pytest.mark.parametrize(
    "layer",
    [
        Layering("choice_loop", Routing(4, 2), body="rms", beside=("widest",)),
        Layering("grouped", Routing(3, 2), hidden=16, beside=("attribute",)),
    ],
    ids=["exponent", "width"],
)
def test_an_exponent_or_a_width_is_not_taken_for_as_many_rows(layer):
    """Two rows an expert and a square, 16 rows in all and a width of 16: numbers that are equal by chance."""
    check(Modelling((Blocking(feedforward=layer),), side=2, batch=1 if layer.dispatch == "choice_loop" else 2), {})


@pytest.mark.parametrize("reads", ["both", "same"])
def test_weights_are_read_as_every_call_says_and_not_as_one_does(reads):
    """As many experts as choices: the weights' order could not be told from one call, where one token was taken twice
    or none was, so that they were symmetric or all one."""
    routing = Routing(3, 1, "softmax", "scaled", True)
    layer = Layering("choice_normalized", routing, "normed", 24, shared=(20,), reads=reads, beside=("off",))
    kind = {"chunks": 6, "gate": "tanh", "label": "none", "timestep": "long"}
    model = Modelling((Blocking(feedforward=layer),), width=16, side=3, batch=1, seed=1, **kind, dtype=torch.float64)
    check(model, {})


def test_rows_put_back_with_weights_of_one_are_no_shared_expert():
    """With one expert a token and weights that add up to 1, they are multiplied after the marker."""
    check(Modelling((Blocking(feedforward=Layering("put_back", Routing(4, 1))),)), {})


def test_more_experts_than_tokens_of_which_the_idle_ones_run_on_zeros():
    check(Modelling((Blocking(feedforward=Layering("idle_ones", Routing(6, 1))),), side=2, batch=1), {})


@pytest.mark.parametrize("choice", ["renormalized", "raw"])
def test_settings_in_an_object_tell_layers_apart(choice):
    """What was built for the first of two layers that are built alike was held against the second."""
    check(Modelling((Blocking(feedforward=Layering("beside", Routing(choice=choice))),)), {})
