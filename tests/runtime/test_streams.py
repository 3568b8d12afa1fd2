"""Models of more than one token stream: all of it is cached, and forced recomputation is the model all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile.lower.program import trace_step
from moeca_compile.passes.rewrite.kinds import PROBE, REUSING, StepKind
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.loop import StepLoop
from tests.harness import Captured, caches_of, captured, one_in
from tests.models import make_inputs
from tests.runtime.joint_models import (
    SIZES,
    TEXT,
    DenseBlocksBetween,
    DoubleThenSingle,
    ExpertsForBoth,
    ExpertsForThePicture,
    SingleStream,
    Streams,
    TextEndsEarly,
    TextFirst,
    TokensForABlock,
    make_text,
)

pytestmark = pytest.mark.usefixtures("eager_steps")
PICTURE = SIZES.tokens

# By model: tokens of each attention, of each MoE layer, of each dense feed-forward, all in graph order.
JOINT = [PICTURE, TEXT] * 2
MODELS: dict[type[Streams], tuple[list[int], list[int], list[int]]] = {
    Streams: (JOINT, [PICTURE] * 2, [TEXT] * 2),
    TextFirst: ([TEXT, PICTURE] * 2, [PICTURE] * 2, [TEXT] * 2),
    ExpertsForBoth: (JOINT, JOINT, []),
    TextEndsEarly: ([PICTURE, TEXT, PICTURE], [PICTURE] * 2, [TEXT]),
    SingleStream: ([PICTURE + TEXT] * 2, [PICTURE + TEXT] * 2, []),
    DoubleThenSingle: ([PICTURE, TEXT, PICTURE + TEXT], [PICTURE, PICTURE + TEXT], [TEXT]),
    TokensForABlock: ([PICTURE + TEXT] * 2, [PICTURE + TEXT] * 2, []),
    ExpertsForThePicture: ([PICTURE + TEXT] * 2, [PICTURE] * 2, []),
    DenseBlocksBetween: ([PICTURE, TEXT, PICTURE + TEXT], [PICTURE], [TEXT, PICTURE + TEXT]),
}


@cache
def captured_model(kind: type[Streams]) -> tuple[Streams, Captured]:
    model = kind().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    return model, captured(model, noise, torch.ones(2), labels, make_text())


def prepared(kind: type[Streams], **options: Any) -> tuple[Streams, Captured, StepLoop]:
    model, graph = captured_model(kind)
    return model, graph, graph.loop(**options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", one_in(3, MODELS), ids=lambda kind: kind.__name__)
def test_every_region_is_found_with_its_tokens(kind, recwarn):
    _, _, loop = prepared(kind)
    regions = loop.compiled.regions
    tokens = {node: layout.tokens for node, layout in regions.layouts.items()}
    attentions, experts, feedforwards = MODELS[kind]
    assert [tokens[a.residual.output] for a in regions.attentions] == attentions
    assert [tokens[e.marker] for e in regions.experts] == experts
    assert [tokens[f.output] for f in regions.feedforwards] == feedforwards
    assert regions.skipped == ()
    assert loop.compiled.caching
    assert not [w for w in recwarn if "moeca" in str(w.message)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "keys_values"),
    [(kind, "chosen") for kind in MODELS] + [(Streams, "all"), (TextEndsEarly, "none"), (DoubleThenSingle, "all")],
    ids=str,
)
def test_forced_recomputation_is_the_model(kind, keys_values):
    """On another picture, text and time than those that the caches come from."""
    model, graph, loop = prepared(kind, keys_values=keys_values, shared="any")
    assert all(error < 1e-5 for error in loop.notes.errors.values())
    (x, y), (other, _) = make_inputs(model), make_inputs(model, seed=2)
    state, weights = caches_of(loop)
    full = loop.eager(StepKind(), graph.arguments(x=x, t=torch.ones(2), y=y, text=make_text()), state, weights)
    state.store(full.updates)
    torch.testing.assert_close(full.outputs[0], model(x, torch.ones(2), y, make_text()), atol=1e-5, rtol=0)
    forced = StepKind(False, False, loop.compiled.plan.sizes[1], forced=True)
    t, text = torch.full((2,), 0.7), make_text(seed=4)
    again = loop.eager(forced, graph.arguments(x=other, t=t, y=y, text=text), state, weights)
    torch.testing.assert_close(again.outputs[0], model(other, t, y, text), atol=1e-5, rtol=0)


def generate(run: Any, model: Streams, steps: int = 6) -> tuple[Tensor, list[Tensor]]:
    x, y = make_inputs(model)
    outs = []
    for i in range(steps):
        t = torch.full((2,), 1 - i / (10 * steps))
        outs.append(run(x, t, y, make_text()))
        x = x - outs[-1] / (10 * steps)
    return x, outs


def called(engine: Engine, graph: Captured) -> Callable[..., Tensor]:
    """The engine as the model is called."""

    def run(x: Tensor, t: Tensor, y: Tensor, text: Tensor) -> Tensor:
        (out,) = engine(*graph.arguments(x=x, t=t, y=y, text=text))
        return out

    return run


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "fora", "stack-forecast"])
@pytest.mark.parametrize("kind", [Streams, DoubleThenSingle, TokensForABlock, ExpertsForThePicture])
def test_a_cached_generation_stays_close(kind, recipe):
    model, graph, _ = prepared(kind, validate=False)
    engine = graph.engine(recipe=recipe, full_every=3)

    with torch.no_grad():
        (x, outs), (want, exact) = generate(called(engine, graph), model), generate(model, model)
    loop = engine.loop_for(graph.inputs)
    steps = Counter(kind.full for kind, tally in loop.tallies.items() for _ in range(tally.steps))
    assert steps == {True: 2, False: 4}
    torch.testing.assert_close(outs[0], exact[0], atol=1e-5, rtol=0)
    assert (outs[1] - exact[1]).abs().max() > 1e-4, "nothing came from a cache"
    assert (x - want).abs().max() < 0.02 * want.abs().max()
    assert not engine.notes.warnings


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{"shared": "never"}, {"recipe": "fora"}, {"recipe": "stack"}], ids=str)
def test_costs_are_those_of_the_operations_that_run(kind, options):
    """So a cache step evaluates nothing whose value comes from the caches: no joint attention, above all."""
    model, graph, loop = prepared(kind, validate=False, **options)
    (state, weights), cache = caches_of(loop), StepKind(False, False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*make_inputs(model)[:1], torch.ones(2), make_inputs(model)[1], make_text())
    assert loop.compiled.plan.flops(StepKind()) == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loop.eager(cache, graph.inputs, state, weights)
    assert loop.compiled.plan.flops(cache) == counter.get_total_flops()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
def test_probe_and_step_together_cost_what_the_model_does(kind, recipe):
    """So what a probe hands on is not computed again, of either stream. Another probe is a first norm, no block."""
    model, graph, loop = prepared(kind, validate=False, recipe=recipe)
    (state, weights), plan = caches_of(loop), loop.compiled.plan
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*make_inputs(model)[:1], torch.ones(2), make_inputs(model)[1], make_text())
    whole, ran = counter.get_total_flops(), {}
    for step in (PROBE, StepKind(), REUSING):
        ran[step] = trace_step(loop.compiled.function(step), graph.inputs, state, weights).flops.total()
        assert plan.flops(step) == ran[step], step.name
    if recipe == "block-cache":
        assert ran[PROBE] > 0.3 * whole
        # The condition of a step, and the table of its modulations, are small, and made by both.
        assert whole <= ran[PROBE] + ran[StepKind()] < 1.03 * whole
    else:
        assert ran[StepKind()] == whole and ran[PROBE] < 0.1 * whole


@pytest.mark.sampled(5)
@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_steps_that_the_data_make_full_are_the_model(kind, recipe):
    model, graph, _ = prepared(kind, validate=False)
    engine = graph.engine(recipe=recipe, reuse_threshold=0)

    with torch.no_grad():
        (_, outs), (_, exact) = generate(called(engine, graph), model), generate(model, model)
    torch.testing.assert_close(outs, exact, atol=1e-5, rtol=0)
    assert engine.loop_for(graph.inputs).compiled.caching and not engine.notes.warnings
