"""Steps that write new values where they stay: what a full step reads and writes, op by op and by Inductor."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from moeca_compile.lower.in_place import write_in_place
from moeca_compile.lower.partition import partition_graph
from moeca_compile.lower.program import CompiledStep, TracedStep, trace_step
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, StepKind, ring_specs
from moeca_compile.passes.rewrite.step_function import StepResult
from tests.harness import Captured, caches_of, lower_alone, ops
from tests.models import make_inputs

aten, moeca = torch.ops.aten, torch.ops.moeca
CPU, WEIGHTS = torch.device("cpu"), torch.zeros(2, 2, 2)
RING = re.compile(r"\.\d$")
FULL = StepKind()

pytestmark = pytest.mark.usefixtures("eager_steps")


def traced_pair(graph: Captured, kind: StepKind, **options) -> tuple[TracedStep, TracedStep, Caches, Tensor]:
    """The step as it hands over new tensors, and as it writes them, with caches for it."""
    loop = graph.loop(validate=False, **options)
    state, weights = caches_of(loop)
    function = loop.compiled.function(kind)
    steps = [trace_step(function, graph.inputs, state, weights) for _ in range(2)]
    return steps[0], write_in_place(steps[1], state), state, weights


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["moeca-forecast", "fora-forecast", "stack-forecast", "block-forecast", "moeca"])
def test_a_full_step_reads_no_old_values(graph, recipe):
    """Nor does it read weights. What it reads are statistics and routings, as small as the router's output."""
    loop = graph.loop(validate=False, recipe=recipe)
    state, weights = caches_of(loop)
    traced = trace_step(loop.compiled.function(FULL), graph.inputs, state, weights)
    assert not [name for name in traced.state_names if RING.search(name)]
    assert all(state.specs[name].part is None for name in traced.state_names)
    assert dict(state) == {}, "nor was anything allocated to trace it"
    last = [node for node in traced.graph.graph.nodes if node.op == "placeholder"][-1]
    assert not last.users, "the weights"


def test_inputs_that_are_numbers_stay_constants(graph):
    loop = graph.loop(validate=False, recipe="stack")
    state, weights = caches_of(loop)

    def function(inputs, state, weights):
        return StepResult((inputs[1] + inputs[0],), {"stack": state["stack"] * 0 + inputs[0]}, None)

    traced = write_in_place(trace_step(function, [4, torch.ones(3)], state, weights), state)
    step = lower_alone(traced, "eager", whole=True)
    assert step([4, torch.ones(3)], state, weights).outputs[0].tolist() == [5.0] * 3


@pytest.mark.parametrize("recipe", ["moeca-forecast", "block-forecast"])
def test_what_is_written_in_place_is_written_where_it_is_computed(graph, recipe):
    _, written, _, _ = traced_pair(graph, FULL, recipe=recipe)
    calls = partition_graph(written.graph)
    owner = {node: number for number, call in enumerate(calls) for node in call.nodes}
    copies = [node for node in owner if node.target is aten.copy_.default]
    assert copies
    assert all(owner[node] == owner[node.args[1]] for node in copies if node.args[1] in owner)


@pytest.mark.parametrize("recipe", ["fora", "stack", "block"])
def test_with_a_forecast_a_full_step_does_what_it_does_without(graph, recipe):
    plain, forecast = (
        trace_step(loop.compiled.function(FULL), graph.inputs, *caches_of(loop))
        for loop in (graph.loop(validate=False, recipe=f"{recipe}{suffix}") for suffix in ("", "-forecast"))
    )
    assert ops(plain.graph) == ops(forecast.graph)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["moeca-forecast", "fora-forecast", "stack-forecast", "fora"])
def test_what_a_full_step_writes_is_what_it_would_return(graph, recipe):
    plain, written, state, weights = traced_pair(graph, FULL, recipe=recipe)
    assert set(written.changed) == set(plain.update_names)
    assert all(state.specs[name].part is None for name in written.update_names), "it returns what it also reads"
    state.prepare()
    for name in state:
        if state.specs[name].dtype.is_floating_point and state.specs[name].part is not None:
            state[name].fill_(float("nan"))
    before = {name: tensor.data_ptr() for name, tensor in state.items()}
    want = CompiledStep(plain, plain.graph)(graph.inputs, state.cloned(), weights)
    found = CompiledStep(written, written.graph)(graph.inputs, state, weights)
    assert all(map(torch.equal, found.outputs, want.outputs))
    for name, value in want.updates.items():
        assert torch.equal(found.updates.get(name, state[name]), value), name
    assert before == {name: tensor.data_ptr() for name, tensor in state.items()}
    others = [spec.name for ring in state.rings.values() for spec in ring[1:]]
    assert all(state[name].isnan().all() for name in others), "the other slots stay as they are"


def test_branch_outputs_are_written_by_the_op_itself(graph):
    _, written, _, _ = traced_pair(graph, FULL, recipe="moeca-forecast")
    count = ops(written.graph)
    assert count["fixed_k_outputs_into"] == 2 and count["fixed_k_outputs"] == 0
    copied = [n.args[0].name for n in written.graph.graph.nodes if n.target is aten.copy_.default]
    assert len(copied) == len(written.written_names) - 2


def test_outputs_in_another_dtype_are_copied(graph):
    _, written, _, _ = traced_pair(graph, FULL, recipe="moeca", cache_dtype="bfloat16")
    assert ops(written.graph)["fixed_k_outputs_into"] == 0 and not set(written.update_names) - {
        name for name in written.update_names if name.endswith("activation")
    }


def test_each_part_is_written_to_its_own_slot(graph):
    """Attention anew for the second time, experts from their caches."""
    kind = StepKind(attention=True, experts=False)
    _, written, state, _ = traced_pair(graph, kind, recipe="fora-forecast", attention_every=2)
    state.filled = [1, 1]
    assert written.written_names
    for name in written.written_names:
        assert state.rings[name][0].part is Part.ATTENTION
        assert state[name] is state[f"{name}.1"]
    assert {RING.sub("", name) for name in written.state_names}.isdisjoint(written.written_names)


# --- small steps ---------------------------------------------------------------------------------------------


def small(function, *specs: CacheSpec, x: Tensor) -> tuple[TracedStep, Caches]:
    state = Caches(specs, CPU)
    return write_in_place(trace_step(function, [x], state, WEIGHTS), state), state


def of_ring(name: str, slots: int, *shape: int) -> list[CacheSpec]:
    return ring_specs(name, slots, shape, torch.float32, Part.ATTENTION)


def test_a_cache_that_the_step_reads_is_returned():
    def step(inputs, state, weights):
        return StepResult((inputs[0] + state["a.1"],), {"a": inputs[0] * 2, "b": inputs[0] * 3}, None)

    traced, _ = small(step, *of_ring("a", 2, 3), *of_ring("b", 2, 3), x=torch.ones(3))
    assert (traced.update_names, traced.written_names) == (("a",), ("b",))


def test_an_input_and_one_value_twice_are_written_too():
    def step(inputs, state, weights):
        double = inputs[0] * 2
        return StepResult((double + 1,), {"a": inputs[0], "b": double, "c": double}, None)

    x = torch.arange(3.0)
    traced, state = small(step, *(spec for name in "abc" for spec in of_ring(name, 1, 3)), x=x)
    assert traced.written_names == ("a", "b", "c")
    result = CompiledStep(traced, traced.graph)([x], state, WEIGHTS)
    assert result.updates == {} and torch.equal(result.outputs[0], 2 * x + 1)
    assert [state[name].tolist() for name in "abc"] == [[0, 1, 2], [0, 2, 4], [0, 2, 4]]


@pytest.mark.slow
def test_inductor_writes_what_it_would_return(graph, model):
    """The form that CUDA graphs are recorded from, with the copies fused and our ops functionalized."""
    plain, written, state, weights = traced_pair(graph, FULL, recipe="moeca-forecast")
    state.prepare()
    noise, _ = make_inputs(model, seed=4)
    inputs = graph.arguments(x=noise)
    with torch.no_grad():
        want = CompiledStep(plain, plain.graph)(inputs, state.cloned(), weights)
        compiled = lower_alone(written, "inductor", whole=False)
        for slot in (0, 1):
            state.filled = [slot, slot]
            found = compiled(inputs, state, weights)
            torch.testing.assert_close(found.outputs, want.outputs, atol=1e-5, rtol=1e-4)
            for name, value in want.updates.items():
                now = found.updates.get(name, state[name])
                torch.testing.assert_close(now, value, atol=1e-4, rtol=1e-3)
            assert state["attention.0"] is state[f"attention.0.{slot}"]
