"""A rewrite that is wrong is found, named and left out; a right one passes with its error noted."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from moeca_compile import backend
from moeca_compile.lower import parts, teacher
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite import rows as rows_module
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.rows import NotRowWiseError, Rows
from moeca_compile.policies.cached import Cached
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.streams import Stream
from tests.harness import Captured, captured
from tests.models import TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("eager_steps")
RECIPES = ["moeca", "moeca-forecast", "fora", "fora-forecast", "stack", "stack-forecast"]


def calls(model: TinyDiTMoE, steps: int = 5) -> Iterator[dict[str, torch.Tensor]]:
    x, y = make_inputs(model)
    for number in range(steps):
        yield {"x": x * (1 - number / 10), "t": torch.full((len(x),), 1 - number / steps), "y": y}


def assert_full_steps_are_the_model(engine: Engine, graph: Captured, model: TinyDiTMoE) -> None:
    for arguments in calls(model):
        (found,) = engine(*graph.arguments(**arguments))
        if float(arguments["t"][0]) == 1:
            torch.testing.assert_close(found, model(**arguments), atol=1e-5, rtol=0)


def prepared(graph: Captured, **options: Any) -> tuple[Engine, StepLoop, list[str]]:
    """(engine, its shapes, the warnings of preparing them)."""
    engine = graph.engine(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = engine.loop_for(graph.inputs)
    return engine, loop, [str(warning.message) for warning in caught]


def regions_of(graph: Captured) -> Regions:
    return graph.loop(validate=False).compiled.regions


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", [*RECIPES, "teacache"])
def test_validation_leaves_no_values_for_the_garbage_collector(graph, recipe, monkeypatch):
    """A cycle would keep its caches, as large as those of a stream, until Python looks for cycles."""
    left, original = [], backend.sound_regions

    def watched(*arguments: Any) -> Regions:
        gc.collect()
        gc.disable()
        try:
            known = {id(each) for each in gc.get_objects()}
            found = original(*arguments)
            left.extend(each for each in gc.get_objects() if type(each) is Tensor and id(each) not in known)
        finally:
            gc.enable()
        return found

    monkeypatch.setattr(backend, "sound_regions", watched)
    prepared(graph, recipe=recipe)
    assert [tuple(each.shape) for each in left] == []


@pytest.mark.parametrize("recipe", ["moeca", "fora-forecast"])
def test_no_layer_runs_again_for_what_its_values_are_compared_with(graph, recipe, monkeypatch):
    """Values that a check reads are dropped after it, not before: to get them back would run the model anew."""
    ran: list[fx.Node] = []
    original = teacher.layer_output

    def noted(step: Any, marker: fx.Node) -> Any:
        ran.append(marker)
        return original(step, marker)

    monkeypatch.setattr(teacher, "layer_output", noted)
    _, loop, _ = prepared(graph, recipe=recipe)
    assert len(ran) == len(loop.compiled.regions.bodies) > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_right_rewrite_passes(graph, recipe):
    engine, loop, warned = prepared(graph, recipe=recipe)
    assert warned == []
    assert loop.compiled.regions.skipped == ()
    recomputes = {"recomputed"} if loop.compiled.plan.recomputes else set()
    assert set(engine.notes.errors) == {"rewritten", "reused"} | recomputes
    assert all(error < 1e-5 for error in engine.notes.errors.values())


def test_without_validation_nothing_is_checked(graph):
    engine, _, warned = prepared(graph, validate=False)
    assert warned == []
    assert engine.notes.errors == {}


def wrong_at(monkeypatch: pytest.MonkeyPatch, *nodes: fx.Node) -> None:
    """What is read from the cache for these nodes is off by a little."""
    read = Cached.read
    monkeypatch.setattr(Cached, "read", lambda self, step: read(self, step) + 0.1 * (self.node in nodes))


@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "fora"])
def test_a_region_that_is_wrong_is_named_and_the_others_stay(graph, model, monkeypatch, recipe):
    regions = regions_of(graph)
    wrong = regions.feedforwards[1]
    wrong_at(monkeypatch, wrong.output)
    engine, loop, warned = prepared(graph, recipe=recipe)
    (skipped,) = loop.compiled.regions.skipped
    assert (skipped.kind, skipped.name) == ("feedforward", wrong.name)
    assert "exceeds" in skipped.reason
    assert len(warned) == 1
    assert wrong.name in warned[0]
    assert loop.compiled.regions.attentions == regions.attentions
    assert loop.compiled.regions.experts == regions.experts
    assert loop.compiled.regions.feedforwards == regions.feedforwards[:1]
    assert loop.compiled.caching
    assert_full_steps_are_the_model(engine, graph, model)


def test_what_stays_is_computed_at_every_step(graph, model, monkeypatch):
    """With every attention, feed-forward and MoE layer wrong, the model runs uncached, and says so."""
    regions = regions_of(graph)
    wrong_at(
        monkeypatch, *(r.output for r in regions.residuals), *(s.output for e in regions.experts for s in e.shared)
    )
    engine, loop, warned = prepared(graph, recipe="fora")
    assert not loop.compiled.caching
    assert warned
    assert len(loop.compiled.regions.skipped) == 8
    for arguments in calls(model):
        (found,) = engine(*graph.arguments(**arguments))
        torch.testing.assert_close(found, model(**arguments), atol=1e-5, rtol=0)


def test_a_rewrite_that_raises_is_a_reason_too(graph, monkeypatch):
    regions, evaluate = regions_of(graph), Rows._evaluate
    stopped = regions.feedforwards[0]

    def refuse(self: Rows, node: fx.Node) -> None:
        if node is stopped.output:
            raise NotRowWiseError("a convolution has no token axis")
        evaluate(self, node)

    monkeypatch.setattr(Rows, "_evaluate", refuse)
    _, loop, warned = prepared(graph)
    (skipped,) = loop.compiled.regions.skipped
    assert skipped.name == stopped.name
    assert "a convolution has no token axis" in skipped.reason
    assert len(warned) == 1


def test_rows_of_the_wrong_tokens_are_found(graph, monkeypatch):
    """A table by position that is cut instead of gathered: right for the first tokens in their order alone."""

    def cut(value, layout, chosen):
        return value.narrow(layout.token, 0, chosen.shape[1])

    take = rows_module.take_rows
    monkeypatch.setattr(
        rows_module, "take_rows", lambda v, layout, chosen: (take if v.ndim == 3 else cut)(v, layout, chosen)
    )
    _, loop, warned = prepared(graph)
    assert {skipped.kind for skipped in loop.compiled.regions.skipped} == {"attention"}
    assert len(loop.compiled.regions.skipped) == len(warned) == 4


def test_the_tolerance_is_the_users(graph):
    _, loop, warned = prepared(graph, tolerance=1e-30)
    assert len(warned) == len(loop.compiled.regions.skipped) > 0  # all but what is equal to the last bit
    _, loop, warned = prepared(graph, tolerance=0.5)
    assert not warned
    assert loop.compiled.caching


def test_code_that_lowering_got_wrong_is_not_used(graph, model, monkeypatch):
    monkeypatch.undo()  # traced programs, not eager steps
    monkeypatch.setattr(parts, "compile_graph", lambda gm, *_: lambda *args: [gm(*args)[0] + 1, *gm(*args)[1:]])
    engine, loop, warned = prepared(graph)
    assert warned == []
    with pytest.warns(UserWarning, match="Inductor"):
        for arguments in calls(model, 2):
            (found,) = engine(*graph.arguments(**arguments))
    assert set(loop.steps) >= {StepKind()}
    expected = graph.engine(validate=False, lowering="eager")
    for arguments in calls(model, 2):
        (right,) = expected(*graph.arguments(**arguments))
    torch.testing.assert_close(found, right, atol=1e-5, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "fora"])
def test_caches_in_a_narrower_dtype_are_no_fault(recipe):
    """Sharp attention makes much of the rounding of keys; the noise of validation knows the caches' dtype."""
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.mul_(16)
    x, y = make_inputs(model)
    graph = captured(model, x, torch.full((len(x),), 0.5), y)
    _, loop, warned = prepared(graph, recipe=recipe, cache_dtype="bfloat16")
    assert warned == []
    assert loop.compiled.regions.skipped == ()


def test_weights_of_forecasts_lie_on_the_cpu_whatever_the_default_device(graph):
    loop = graph.loop(recipe="fora-forecast")
    with torch.device("meta"):
        weights = loop.weights(Stream(loop.streams.new_caches(), full_at=[[0.25, 0.75], [0.25, 0.75]]), 3, 0.125)
    assert weights.device.type == "cpu"
