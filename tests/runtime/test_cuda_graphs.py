"""Recorded steps on a CPU, with a tape in place of CUDA graphs: what is copied, kept, recorded again, and refused."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph
from moeca_compile.lower.program import CompiledStep, trace_step
from moeca_compile.notes import Notes
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import CacheSpec, StepKind
from moeca_compile.passes.rewrite.step_function import StepResult
from moeca_compile.plan import Plan
from moeca_compile.runtime import cuda_graphs
from moeca_compile.runtime import loop as step_loop
from moeca_compile.runtime.cuda_graphs import Buffers, CudaGraphs, write_into
from moeca_compile.runtime.engine import Engine
from moeca_compile.runtime.schedule import EVERYTHING
from moeca_compile.runtime.scope import generation, stream
from moeca_compile.runtime.streams import Stream
from tests.harness import Captured
from tests.models import TinyDiTMoE, make_inputs
from tests.runtime.tape import TapeRecorder

CPU = torch.device("cpu")
FULL, CACHE = StepKind(), StepKind(False, False)
WEIGHTS = torch.zeros(2, 2, 2)


# --- whole generations ---------------------------------------------------------------------------------------


@pytest.fixture
def model(small_model: TinyDiTMoE) -> TinyDiTMoE:
    """Two blocks have all that is recorded."""
    return small_model


@pytest.fixture
def graph(small_graph: Captured) -> Captured:
    return small_graph


@pytest.fixture
def on_tape(without_inductor, monkeypatch, graph: Captured):
    """Makes an engine whose steps are recorded on a tape; the ops of the package count as the device's own."""
    monkeypatch.setattr(cuda_graphs, "ops_without_kernel", lambda graph, device: [])
    taped: set[int] = set()
    monkeypatch.setattr(CompiledGraph, "recorded", property(lambda compiled: id(compiled) in taped))

    def make(**options) -> tuple[Engine, TapeRecorder]:
        engine, recorder = graph.engine(**options), TapeRecorder()
        loop = engine.loop_for(graph.inputs)
        compare = loop.same_replay if engine.config.validate else None
        taped.add(id(loop.compiled))
        loop.graphs = CudaGraphs(loop.compiled, recorder, engine.notes, compare)
        loop.streams.recycles = True
        return engine, recorder

    return make


def generate(engine: Engine, graph: Captured, model: TinyDiTMoE, seed: int = 1, steps: int = 13) -> list[Tensor]:
    (x, y), results = make_inputs(model, seed=seed), []
    with torch.no_grad():
        for number in range(steps):
            t = torch.full((len(x),), 1 - number / steps)
            results.append(engine(*graph.arguments(x=x, t=t, y=y))[0])
            x = x - results[-1] / steps
    return results


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.25},
        {"recipe": "moeca-forecast", "budget": 0.25, "score": "staleness"},
        {"recipe": "moeca-forecast"},
        {"recipe": "moeca-forecast", "budget": 0.25, "overwrite": False},
        {"recipe": "moeca-forecast", "budget": 0.25, "forecast_order": 3},
        {"recipe": "stack-forecast"},
        {"recipe": "stack-forecast", "forecast_order": 2, "corrector": True},
        {"recipe": "stack-forecast", "corrector": True, "schedule": "power"},
        {"recipe": "fora", "attention_every": 2},
        {"recipe": "delta"},
        {"recipe": "toca", "fresh_ratio": 0.3},
        {"recipe": "duca", "token_score": "random"},
        {"recipe": "teacache", "reuse_threshold": 0.2},
        {"recipe": "block-cache", "reuse_threshold": 0.3},
        {"recipe": "magcache", "reuse_threshold": 0.3},
        {"recipe": "none"},
        {"recipe": "stack", "max_error": 0.2},
        {"recipe": "fora-forecast", "max_error": 0.2},
        {"recipe": "stack-forecast", "corrector": True, "max_error": 0.2},
    ],
    ids=str,
)
def test_recorded_generations_equal_those_that_run_op_by_op(on_tape, graph, model, options):
    """Bit by bit, three generations long: the last two start in the memory of the one before."""
    engine, recorder = on_tape(**options)
    plain = graph.engine(**options)
    for seed in (1, 2, 1):
        found, expected = (generate(each, graph, model, seed) for each in (engine, plain))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    (loop,) = engine.loops.values()
    kinds = len(loop.tallies.by_kind) + (loop.tallies.probes > 0)
    slots = max((len(ring) for ring in loop.streams.new_caches().rings.values()), default=1)
    assert [text for text in engine.notes.warnings if "measures them" not in text] == []
    assert recorder.events.count("rehearse") == kinds
    assert recorder.events.count("record") == kinds + slots - 1  # full steps once for each slot that they fill
    assert (loop.tallies.corrections > 0) == engine.config.corrector
    assert recorder.events.count("replay") == 3 * 13 + loop.tallies.forecasts + loop.tallies.probes - kinds
    assert engine.notes.errors["replayed"] == 0.0


@pytest.mark.parametrize(("recipe", "written"), [("toca", 8), ("duca", 2)])
def test_numbers_of_a_step_are_written_in_the_order_of_replays(on_tape, graph, model, monkeypatch, recipe, written):
    """Else the last replay might still read them, on another CUDA stream. DuCa's aggressive steps read none."""
    (engine, recorder), inside, found = on_tape(recipe=recipe), [False], []
    write = step_loop.write_step_scalars

    @contextmanager
    def ordered():
        assert not recorder.outer, "a graph that the caller records must not wait for events outside of it"
        inside[0] = True
        yield
        inside[0] = False

    def observed(*arguments):
        found.append(inside[0])
        write(*arguments)

    monkeypatch.setattr(recorder, "ordered_on_stream", ordered)
    monkeypatch.setattr(step_loop, "write_step_scalars", observed)
    with generation(steps=14):
        generate(engine, graph, model, steps=14)
    assert found == [True] * written
    recorder.outer = True
    with generation(steps=14):
        generate(engine, graph, model, steps=14)
    assert found == [True] * written + [False] * written


def test_a_result_that_the_user_keeps_is_not_overwritten(on_tape, graph, model):
    engine, _ = on_tape(recipe="fora")
    results = generate(engine, graph, model)
    copies = [result.clone() for result in generate(graph.engine(recipe="fora"), graph, model)]
    assert all(torch.equal(one, other) for one, other in zip(results, copies, strict=True))
    assert len({result.data_ptr() for result in results}) == len(results)


def test_streams_have_recordings_of_their_own(on_tape, graph, model):
    """Conditional and unconditional calls: as if each had an engine to itself."""
    (engine, recorder), (x, y) = on_tape(recipe="fora-forecast"), make_inputs(model)
    labels = {"cond": y, "uncond": torch.full_like(y, model.sizes.classes)}
    alone = {name: graph.engine(recipe="fora-forecast") for name in labels}
    with torch.no_grad():
        for number in range(10):
            t = torch.full((len(x),), 1 - number / 10)
            for name, label in labels.items():
                arguments = graph.arguments(x=x, t=t, y=label)
                with stream(name):
                    (found,) = engine(*arguments)
                assert torch.equal(found, alone[name](*arguments)[0])
            x = 0.99 * x
    assert recorder.events.count("record") == 6  # over two streams: cache steps, and full steps for each of two slots
    assert recorder.events.count("rehearse") == 2  # kernels are built once


def test_marked_generations_go_on_with_the_recordings_of_ended_ones(on_tape, graph, model):
    engine, recorder = on_tape(recipe="fora", max_generations=2)
    expected = generate(graph.engine(recipe="fora"), graph, model)
    for _ in range(4):
        with generation():
            found = generate(engine, graph, model)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert recorder.events.count("record") == 2
    (loop,) = engine.loops.values()
    assert len(loop.streams.spare) == 1 and not loop.streams.requests.live


def test_recordings_go_with_the_caches_that_make_room(on_tape, graph, model):
    engine, _ = on_tape(recipe="fora", max_generations=2)
    (loop,), (x, y) = engine.loops.values(), make_inputs(model)
    known: weakref.WeakSet = weakref.WeakSet()
    with torch.no_grad():
        for name in "abcdef":
            for number in range(3):
                with stream(name):
                    engine(*graph.arguments(x=x, t=torch.full((2,), 1 - number / 10), y=y))
            known.update(recorded for s in loop.streams.held() for recorded in s.graphs.values())
    gc.collect()
    assert 0 < len(known) <= 2 * 2  # streams x kinds
    engine.reset()
    gc.collect()
    assert len(known) == 0
    assert loop.streams.nbytes == 0


def test_a_moved_weight_is_recorded_again(on_tape, graph, model):
    engine, recorder = on_tape(recipe="fora", validate=False)
    expected = generate(engine, graph, model)
    before = recorder.events.count("record")
    moved = Captured(graph.gm, list(graph.inputs), graph.user_inputs)
    place = next(i for i, v in enumerate(graph.inputs) if not graph.user_inputs[i] and isinstance(v, Tensor) and i)
    moved.inputs[place] = graph.inputs[place].clone()
    found = generate(engine, moved, model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert recorder.events.count("record") == before + 2
    assert recorder.events.count("rehearse") == 4
    generate(engine, moved, model)
    assert recorder.events.count("record") == before + 2


def test_an_interrupted_step_leaves_a_stream_that_starts_anew(on_tape, graph, model, monkeypatch):
    engine, recorder = on_tape(recipe="fora")
    generate(engine, graph, model)
    expected = generate(engine, graph, model)

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CudaGraphs, "_run", broken)
        generate(engine, graph, model)
    found = generate(engine, graph, model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert recorder.events.count("record") == 2


# --- what cannot be recorded -----------------------------------------------------------------------------------


class Stub(CompiledStep):
    """A compiled step that runs another function than was traced."""

    def __call__(self, inputs, state, weights) -> StepResult:
        return self.code(inputs, state, weights)


def caches(**tensors: Tensor) -> Caches:
    """Caches of which nothing is known but what they hold."""
    state = Caches([CacheSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()], CPU)
    state.update(tensors)
    return state


def stub(function, inputs, state) -> Stub:
    """A step that runs the function of (inputs, state, weights) that was traced."""
    return Stub(trace_step(function, inputs, state, WEIGHTS), function)


def counted(inputs, state, weights) -> StepResult:
    """Adds the input to the cache, and gives the sum."""
    total = state["sum"] + inputs[0]
    return StepResult((total,), {"sum": total}, None)


def graphs(recorder: TapeRecorder | None = None, compare=None, waits: str | None = None) -> CudaGraphs:
    """Recorded steps of a graph with one argument, which caches nothing by its plan."""
    captured = CapturedGraph(fx.GraphModule({}, fx.Graph()), (True,))
    plan = Plan(Regions(), (), (0,), {}, (1, 1))
    compiled = CompiledGraph(captured, captured.gm, CPU, torch.float32, (), plan, MoecaConfig(recipe="moeca"), waits)
    return CudaGraphs(compiled, recorder or TapeRecorder(), Notes(), compare)


def sums(steps_of: CudaGraphs, program, steps: int) -> list[float]:
    """The sums after adding 1, 2, ... one after the other."""
    place, found = Stream(caches(sum=torch.zeros(3))), []
    for number in range(1, steps + 1):
        result = steps_of.run(CACHE, place, program, [torch.full((3,), float(number))], WEIGHTS)
        place.note_refreshed(EVERYTHING, number, 0.0)
        assert not result.updates
        found.append(float(result.outputs[0][0]))
    return found


def test_a_stub_of_a_step_adds_up():
    recorder = TapeRecorder()
    example = [torch.zeros(3)]
    assert sums(graphs(recorder), stub(counted, example, caches(sum=torch.zeros(3))), 5) == [1, 3, 6, 10, 15]
    assert recorder.events == ["rehearse", "record", "replay", "replay", "replay", "replay"]


def test_an_op_that_needs_the_host_is_refused_with_its_name():
    program = stub(counted, [torch.zeros(3)], caches(sum=torch.zeros(3)))
    node = next(node for node in program.traced.graph.graph.nodes if node.op == "call_function")
    node.target = torch.ops.aten.masked_select.default
    recorder = TapeRecorder()
    with pytest.warns(UserWarning, match="cache steps are not recorded .* .aten.masked_select.default has"):
        assert sums(graphs(recorder), program, 4) == [1, 3, 6, 10]
    assert recorder.events == []


def test_a_recording_that_fails_is_warned_of_and_the_step_runs_as_it_is():
    def reads(inputs, state, weights) -> StepResult:
        total = state["sum"] + float(inputs[0].sum()) / 3
        return StepResult((total,), {"sum": total}, None)

    program = replace(stub(counted, [torch.zeros(3)], caches(sum=torch.zeros(3))), code=reads)
    each = graphs()
    with pytest.warns(UserWarning, match="RuntimeError: aten._local_scalar_dense.default while a graph is recorded"):
        assert sums(each, program, 4) == [1, 3, 6, 10]
    assert each.refused == {CACHE}


def test_a_wrong_replay_is_found_on_its_second_run_and_made_good():
    """A step that keeps a value of the host: the first replay is right, the next ones would not be."""
    calls = []

    def remembers(inputs, state, weights) -> StepResult:
        calls.append(1)
        total = state["sum"] + len(calls) * torch.ones(3)
        return StepResult((total,), {"sum": total}, None)

    program = replace(stub(counted, [torch.zeros(3)], caches(sum=torch.zeros(3))), code=remembers)

    def compare(found, wanted):
        if not all(map(torch.equal, found, wanted)):
            raise cuda_graphs.ValidationError("differs")

    each = graphs(compare=compare)
    with pytest.warns(UserWarning, match="its replay is wrong: differs"):
        assert sums(each, program, 4) == [1, 3, 6, 10]


def test_a_step_without_a_traced_graph_is_refused():
    with pytest.warns(UserWarning, match="full steps are not recorded .* run op by op"):
        graphs().run(FULL, Stream(caches(sum=torch.zeros(3))), counted, [torch.zeros(3)], WEIGHTS)


def test_ops_without_a_kernel_of_the_device_are_refused(graph, without_inductor):
    """As on a machine where the package has no kernels: the ops' reference code reads counts on the host."""
    engine, recorder = graph.engine(recipe="fora"), TapeRecorder()
    loop = engine.loop_for(graph.inputs)
    loop.graphs = CudaGraphs(loop.compiled, recorder, engine.notes, None)
    with (
        pytest.warns(UserWarning, match="moeca.fixed_k_outputs.default has no kernel of its own there"),
        torch.no_grad(),
    ):
        engine(*graph.inputs)
    assert recorder.events == []


def test_experts_that_wait_for_the_device_are_refused_where_they_run():
    waits = "the experts of blocks.0 wait for the device at every step: float64"
    each = graphs(waits=waits)
    without = stub(counted, [torch.zeros(3)], caches(sum=torch.zeros(3)))
    assert sums(each, without, 3) == [1, 3, 6]
    assert not each.refused
    node = next(node for node in without.traced.graph.graph.nodes if node.op == "call_function")
    node.target = torch.ops.moeca.fixed_k_outputs.default
    each = graphs(waits=waits)
    with pytest.warns(UserWarning, match=f"not recorded as a CUDA graph .*{waits}"):
        sums(each, without, 2)


def test_an_argument_that_overlaps_with_itself_is_refused():
    windows = torch.arange(4.0).unfold(0, 2, 1)

    def step(inputs, state, weights) -> StepResult:
        return StepResult((inputs[0] * 2,), {}, None)

    with pytest.warns(UserWarning, match="overlaps with itself"):
        result = graphs().run(FULL, Stream(caches()), stub(step, [windows], caches()), [windows], WEIGHTS)
    assert torch.equal(result.outputs[0], windows * 2)


def test_within_a_recording_of_the_caller_a_step_is_a_part_of_that():
    recorder = TapeRecorder()
    recorder.outer = True
    assert sums(graphs(recorder), stub(counted, [torch.zeros(3)], caches(sum=torch.zeros(3))), 3) == [1, 3, 6]
    assert recorder.events == []


# --- buffers and caches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).view(2, 3),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([7.0]).expand(4),
        torch.tensor(3.0),
    ],
    ids=["plain", "transposed", "expanded", "scalar"],
)
def test_buffers_hold_arguments_as_they_are_laid_out(value):
    weight = torch.ones(2)
    buffers = Buffers([value, weight, 5], [True, False, True], WEIGHTS)
    buffers.fill([value, weight, 5], torch.ones_like(WEIGHTS))
    held, same_weight, number = buffers.inputs
    assert torch.equal(held, value) and held.stride() == value.stride() and held.data_ptr() != value.data_ptr()
    assert same_weight is weight and number == 5
    assert torch.equal(buffers.weights, torch.ones_like(WEIGHTS))
    assert buffers.fit([value, weight, 5]) and not buffers.fit([value, weight.clone(), 5])


def test_buffers_made_in_inference_mode_serve_outside():
    with torch.inference_mode():
        value = torch.ones(2)
        buffers = Buffers([value], [True], WEIGHTS)
        buffers.fill([value], WEIGHTS)
    buffers.fill([torch.full((2,), 2.0)], WEIGHTS)
    assert buffers.inputs[0].tolist() == [2, 2]


def test_caches_are_read_before_any_is_written():
    """An update may be a view of another cache."""
    state = caches(a=torch.zeros(2), b=torch.ones(2), c=torch.full((2,), 5.0))
    places = {name: tensor.data_ptr() for name, tensor in state.items()}
    write_into(state, {"a": state["b"].view(2), "b": state["a"].flip(0), "c": state["c"]})
    assert state["a"].tolist() == [1, 1] and state["b"].tolist() == [0, 0] and state["c"].tolist() == [5, 5]
    assert places == {name: tensor.data_ptr() for name, tensor in state.items()}
