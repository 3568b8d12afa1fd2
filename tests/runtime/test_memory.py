"""What steps keep and allocate: as much cache as was planned, no copy of a branch cache, nothing that grows."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import moeca_compile
from examples import families
from moeca_compile.passes.rewrite import step_function
from moeca_compile.passes.rewrite.caches import Caches, Untouched
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.replacement import Cache
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.forecast import rule_of, weights_after_one
from tests.models import make_inputs

RECIPES = ("moeca", "moeca-forecast", "fora", "stack-forecast")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("cache_dtype", [None, "bfloat16"])
def test_allocated_is_what_was_planned(graph, model, eager_steps, recipe, cache_dtype):
    engine = graph.engine(recipe=recipe, cache_dtype=cache_dtype, validate=False, full_every=2)
    x, y = make_inputs(model)
    for number in range(5):
        engine(*graph.arguments(x=x, t=torch.full((len(x),), 1 - number / 8), y=y))
    (loop,) = engine.loops.values()
    planned = sum(spec.nbytes for spec in loop.compiled.plan.caches)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for stream in loop.streams.held()
        for tensor in stream.state.values()
    }
    assert sum(storages.values()) == loop.streams.nbytes == planned


def test_a_smaller_dtype_of_the_caches_halves_them(graph):
    full, half = (
        graph.loop(recipe="moeca", validate=False, cache_dtype=dtype).compiled.plan.caches
        for dtype in (None, "bfloat16")
    )
    activations = [(a.nbytes, b.nbytes) for a, b in zip(full, half, strict=True) if a.name.endswith("branches")]
    assert activations
    assert all(small * 2 == large for large, small in activations)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_eager_step_leaves_nothing_behind_but_its_result(graph, model, recipe):
    """Not even until the garbage collector comes."""
    compiled = graph.loop(recipe=recipe, validate=False).compiled
    state = Caches(compiled.plan.caches, torch.device("cpu"))
    state.prepare()
    weights = weights_after_one(rule_of(compiled.config).slots, state.device)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
        for kind in (StepKind(), StepKind(False, False, compiled.plan.capacities[-1])):
            with torch.no_grad():
                compiled.function(kind)(graph.inputs, state, weights)
        after = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    finally:
        gc.enable()
    assert after == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_that_only_serves_a_comparison_keeps_no_new_values_of_caches(graph, recipe, monkeypatch):
    """They are as large as the caches, and dropped one by one."""
    compiled = graph.loop(recipe=recipe, validate=False).compiled
    weights = weights_after_one(rule_of(compiled.config).slots, torch.device("cpu"))
    state, most = Caches(compiled.plan.caches, torch.device("cpu")), 0

    def noted(step: Step, cache: Cache) -> None:
        nonlocal most
        most = max(most, sum(value.nbytes for value in step.updates.values()))
        drop_updates(step, cache)

    drop_updates = step_function._drop_updates
    monkeypatch.setattr(step_function, "_drop_updates", noted)
    for kind in (StepKind(), StepKind(False, False, compiled.plan.capacities[-1])):
        kept, dropped = (
            compiled.function(kind, updates)(graph.inputs, Untouched(state), weights) for updates in (True, False)
        )
        torch.testing.assert_close(dropped.outputs, kept.outputs, atol=0, rtol=0)
        assert dropped.counts is kept.counts is None or dropped.counts.equal(kept.counts)
        assert dropped.updates == {}
        state.store(kept.updates)
    assert 0 < most <= 2 * max(sum(spec.nbytes for spec in each.specs) for each in compiled.plan.replacements)


@pytest.mark.slow
def test_nothing_grows_over_a_thousand_steps(graph, model, without_inductor):
    engine = graph.engine(recipe="moeca-forecast", validate=False)
    x, y = make_inputs(model)

    def steps(count: int) -> tuple[int, int]:
        """Live tensors, and blocks that Python holds, after so many steps of generations of 50."""
        for number in range(count):
            engine(*graph.arguments(x=x, t=torch.full((len(x),), 1 - number % 50 / 50), y=y))
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects()), sys.getallocatedblocks()

    steps(300)
    (tensors, blocks), (later_tensors, later_blocks) = steps(50), steps(650)
    assert later_tensors == tensors
    assert later_blocks - blocks < 650  # one a step would be as many


@pytest.mark.slow
def test_a_compiled_cache_step_copies_no_cache_of_branches():
    """With Inductor: nothing that a cache step allocates is as large as the smallest cache of branch outputs."""
    family = families.FAMILIES["DSMoE"]
    sizes = replace(family.reduced, side=32)  # so many tokens that nothing else is as large
    model = families.assemble(family, sizes)
    x, t, y = families.inputs_for(model, batch=2)
    compiled = torch.compile(model, backend="moeca", options={"recipe": "moeca", "budget": 0.1, "full_every": 100})
    with torch.no_grad():
        for number in range(3):
            compiled(x, t - number, y)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
            compiled(x, t - 3, y)
    assert moeca_compile.report(compiled).steps["full"] == 1
    events = taken.profiler.kineto_results.events()
    largest = max(event.nbytes() for event in events if event.name() == "[memory]")
    tokens = (sizes.side // sizes.patch) ** 2
    assert 0 < largest < 2 * tokens * sizes.top_k * sizes.width * 4
