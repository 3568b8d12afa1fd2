"""`torch.compile(model, backend="moeca")`: the pipeline, one stage a line.

Capture (capture/) makes MoE dispatch traceable, so that Dynamo captures the model as one graph. `compile_graph`
exports, normalizes, matches, validates and plans that graph for one set of input shapes. `compile_step` rewrites,
traces, lowers and checks one kind of step, when the runtime first needs it.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from moeca_compile import capture, compiler_ready, fallback
from moeca_compile._torch_private import (
    graphs_from_disk,
    is_module_state,
    make_cpp_compiler_ready,
    own_modules,
    root_module,
    trace_anew_for_ours,
    traced_code,
    traced_wrapper,
    wait_for_cpp_compiler,
)
from moeca_compile.config import MoecaConfig
from moeca_compile.disk.keys import rewrite_facts
from moeca_compile.fit import config_that_fits
from moeca_compile.lower.background import EarlyStep, begin
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph, device_of, stream_dtype
from moeca_compile.lower.found_before import (
    check_key,
    exported,
    keep_traced,
    rewrite_key,
    step_key,
    traced_before,
    validated,
)
from moeca_compile.lower.in_place import write_in_place
from moeca_compile.lower.passed_sizes import sized_graph
from moeca_compile.lower.program import PartedStep, lower_parts, part_step, trace_step
from moeca_compile.lower.upload import upload_all
from moeca_compile.lower.validate import same_step, sound_regions
from moeca_compile.lower.waits import why_experts_wait
from moeca_compile.notes import Notes
from moeca_compile.ops.cpu.library import library
from moeca_compile.ops.exchange import alone
from moeca_compile.options import ConfigError
from moeca_compile.passes.analysis.graph import placeholders
from moeca_compile.passes.dump import open_dump
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.passes.match.match_regions import match_regions
from moeca_compile.passes.normalize.scalar_inputs_to_tensors import scalar_inputs_to_tensors
from moeca_compile.passes.normalize.to_one_device import to_one_device
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.passes.runner import normalize
from moeca_compile.passes.unused_numbers import called_with, called_without, without_unused_numbers
from moeca_compile.plan import plan_steps, regions_that_pay
from moeca_compile.runtime.dead_models import forget_when_gone
from moeca_compile.runtime.engine import Engine, Stages
from moeca_compile.runtime.original import Original, warn_of_failure
from moeca_compile.runtime.record import Record, keep_with, record_for
from moeca_compile.runtime.streams import bounds_of
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)


def moeca_backend(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """The backend function that torch.compile calls with each graph that Dynamo captured.

    Args:
        gm, inputs: the graph and its example inputs (parameters, buffers and arguments).
        options: fields of MoecaConfig by name.
        mode: what torch.compile's `mode` says to Inductor; it has no effect here, and a warning says so.

    Returns the callable that runs in place of the graph. Raises ConfigError for an unknown option or a value that is
    not allowed.
    """
    config = MoecaConfig.from_options(options)
    trace_anew_for_ours()
    return compile_captured(gm, inputs, config, Stages(compile_graph, compile_step), mode)


moeca_backend._moeca_backend = True  # type: ignore[attr-defined]
capture.install()
compiler_ready.install()


def backend_with(stages: Stages) -> Callable[..., Callable[..., Any]]:
    """`moeca_backend` with other stages, for tests and benchmarks that observe or replace some of them."""

    def backend(
        gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any
    ) -> Callable[..., Any]:
        return compile_captured(gm, inputs, MoecaConfig.from_options(options), stages)

    backend._moeca_backend = True  # type: ignore[attr-defined]
    return backend


def compile_captured(
    gm: fx.GraphModule, inputs: Sequence[Any], config: MoecaConfig, stages: Stages, mode: str | None = None
) -> Callable[..., Any]:
    """The callable that replaces Dynamo's graph: an engine, or the original graph as torch.compile compiles it."""
    record = record_for(traced_wrapper(), root_module(), config)
    if mode is not None:
        record.notes.warn(fallback.MODE.format(mode))
    original = Original(gm, config.lowering)
    try:
        reason = fallback.why_original(gm, inputs, record)
        if reason is None:
            fallback.note_breaks(record)
            fallback.check_tuned(record, root_module())
            if fallback.worth_rewriting(gm):
                return _cached(gm, inputs, record, stages, original)
    except ConfigError:
        raise
    except Exception as error:
        warn_of_failure("compiling the model's graph", error, record.notes)
        return original
    if reason is not None:
        record.notes.warn(reason)
    return fallback.compile_original(gm, inputs, record, original)


def wrapped_parameters(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a forward that something wraps, without self; () where nothing does."""
    forward = type(module).forward
    original = inspect.unwrap(forward)
    return tuple(inspect.signature(original).parameters)[1:] if original is not forward else ()


def _cached(
    gm: fx.GraphModule, inputs: Sequence[Any], record: Record, stages: Stages, original: Original
) -> Callable[..., Any]:
    """The engine of a graph, called as Dynamo calls the graph."""
    arguments = [not is_module_state(node) for node in placeholders(gm.graph)]
    scalars = scalar_inputs_to_tensors(gm, inputs)
    modules = own_modules(placeholders(gm.graph)) if not record.partial else None  # a part may serve many blocks
    keep_with(record, modules or (), traced_wrapper())
    forget_when_gone(modules or (), traced_code())
    gm, kept = without_unused_numbers(gm, inputs)
    numbers, constants = (tuple(new for new, old in enumerate(kept) if old in which) for which in scalars)
    captured = CapturedGraph(
        gm,
        tuple(arguments[i] for i in kept),
        numbers,
        record.partial,
        bool(record.breaks),
        constants,
        tuple(map(weakref.ref, modules or ())),
        wrapped_parameters(modules[0]) if modules else (),
        record.parts,
        record.passed,
    )
    engine = _engine(captured, [inputs[i] for i in kept], record, stages, called_without(kept, inputs, original))
    run = fallback.noticing_parts(engine, record) if engine.partial else engine
    return run if len(kept) == len(inputs) else called_with(kept, run)


def _engine(
    captured: CapturedGraph, inputs: Sequence[Any], record: Record, stages: Stages, original: Callable[..., Any]
) -> Engine:
    """The engine of this graph. Dynamo may trace an equal graph again, for example when inputs become inference
    tensors: that one gets the engine that exists, and with it the caches."""
    # A part of a model is called once in each call of the model, and counts the calls by itself.
    bounds = bounds_of(record.config) if captured.in_parts else record.bounds
    engine = Engine(captured, inputs, record.config, record.notes, stages, bounds, original)
    engine.record = record  # it lives as long as what Dynamo calls
    known = next((other for other in record.engines if other.same_graph(engine)), None)
    if known is None:
        record.engines.append(engine)
    return known or engine


def compile_graph(
    captured: CapturedGraph,
    inputs: Sequence[Any],
    config: MoecaConfig,
    notes: Notes,
    export: Callable[[fx.GraphModule, Sequence[Any]], fx.GraphModule] = to_functional_aten,
) -> CompiledGraph:
    """Export, normalize, match, validate and plan a captured graph at the shapes of `inputs`.

    Args:
        export: Dynamo's graph and its inputs -> functional ATen.
    """
    device, dump = device_of(inputs), open_dump(config.dump)
    if config.lowering == "inductor" and device.type == "cpu":
        make_cpp_compiler_ready(then=partial(library, "grouped_linear"))
    with notes.timed("capture"):
        dump.graph("dynamo", captured.gm)
        graph = exported(export, captured.gm, inputs, config, device, notes)
        dump.graph("exported", graph)
        module, uploaded = to_one_device(graph, inputs, captured.arguments, device)
        inputs = upload_all(inputs, uploaded, device)
    with notes.timed("match"):
        notes.add_matches(normalize(module.graph, dump.after_pass))
        regions = match_regions(module.graph, captured.argument_nodes(module.graph))
        dtype = stream_dtype(regions, inputs)
        dump.regions("matched", module.graph, regions)
        config = config_that_fits(module.graph, regions, config, device, notes)
        regions = regions_that_pay(module.graph, regions, config)
    with notes.timed("validate"):
        matched = regions
        facts = rewrite_facts(module, matched, config, inputs, captured.arguments, device)
        sized = sized_graph(facts, module, inputs)
        check = partial(sound_regions, module.graph, matched, config, inputs, notes)
        if not captured.passed.cover(sized):
            with alone(), notes.watched() as outcome:  # another rank may find this on disk, or know the size
                key = rewrite_key(facts, config, inputs, device)
                regions = validated(key, notes, check, passed=matched)
            if regions == matched and not outcome.warned:
                captured.passed.note(sized)
    with notes.timed("plan"):
        plan = plan_steps(module.graph, regions, config)
        plan = fallback.uncached_without_timestep(plan, captured, module.graph, config, notes)
        dump.regions("planned", module.graph, plan.regions)
    waits = why_experts_wait(regions, device, notes)
    return CompiledGraph(captured, module, device, dtype, uploaded, plan, config, waits, dump)


def compile_step(
    compiled: CompiledGraph,
    kind: StepKind,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    notes: Notes,
) -> StepFunction:
    """Rewrite, trace, lower and check one kind of step. Returns the eager function, and warns, where Inductor's code
    gives other values. With the option `background` it may return an EarlyStep, which is not compiled yet.

    Args:
        inputs, state, weights: an example call: inputs of the graph, cached tensors by name, and the forecast weights
            (2, K, K).
    """
    function = compiled.function(kind)
    if not compiled.regions.finite:  # nothing could be compared: a later call compiles
        return function
    step = _parted(compiled, kind, inputs, state, weights, notes)
    all_sizes = compiled.config.all_sizes(compiled.device)
    if all_sizes:
        _note_other_capacity(compiled, kind, step, inputs, state, weights, notes)
    finish = partial(_lowered, compiled, kind, step, notes)
    if compiled.config.background:
        with notes.timed("lower"):
            job = begin(compiled, kind, step, check_key(compiled, kind, step, inputs), notes)
        if job is not None:
            return EarlyStep(kind.name, function, job, finish, notes)
    return finish(inputs, state, weights, all_sizes)


def _parted(
    compiled: CompiledGraph, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor, notes: Notes
) -> PartedStep:
    """A step, traced, with the parts as which it is compiled."""
    with notes.timed("rewrite"):
        key = step_key(compiled, kind, inputs, state, weights)
        traced = traced_before(key, notes)
        if traced is None:
            traced = trace_step(compiled.function(kind), inputs, state, weights)
            keep_traced(key, traced)
        names = compiled.input_names(traced.state_names, inputs)
        compiled.dump.graph(f"step {kind.name}", traced.graph, inputs=names)
    with notes.timed("lower"):
        if compiled.recorded:
            traced = write_in_place(traced, state)
        # A step that recomputes nothing is one chain of sums: partitioned, it took 1.5 times as long.
        whole = not (kind.attention or kind.experts or kind.capacity)
        return part_step(traced, compiled.config.lowering, whole)


def _note_other_capacity(
    compiled: CompiledGraph,
    kind: StepKind,
    step: PartedStep,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    notes: Notes,
) -> None:
    """Let the parts of a cache step be compiled for all capacities, by tracing it with another one that the plan has.

    A trace takes a tenth of what compiling takes.
    """
    other, parts = compiled.plan.other_capacity(kind.capacity), compiled.captured.parts
    if other is None or compiled.config.dump is not None or all(parts.joins(p, step.random) for p in step.subgraphs):
        return
    try:
        beside = _parted(compiled, replace(kind, capacity=other), inputs, state, weights, notes)
    except Exception as error:  # nobody has asked for that step
        _log.debug("%s steps are compiled for one capacity: %s", kind.name, first_line(error), exc_info=True)
        return
    for part in beside.subgraphs:
        parts.note(part, beside.random)


def _lowered(
    compiled: CompiledGraph,
    kind: StepKind,
    step: PartedStep,
    notes: Notes,
    inputs: Sequence[Any],
    state: Caches,
    weights: Tensor,
    all_sizes: bool,
    beside: int = 0,
) -> StepFunction:
    """Compile the parts of a step and check it.

    Args:
        all_sizes: whether one code may serve several sizes.
        beside: how many of the parts another process has compiled.
    """
    parts = compiled.captured.parts
    with notes.timed("lower"):
        before = graphs_from_disk(), parts.compiled
        code = lower_parts(step, parts, all_sizes, compiled.dump.code_of(kind.name), notes.progress.part)
        wait_for_cpp_compiler()  # from here on the kernels that it compiled run in every step
        found = graphs_from_disk() - before[0]
        notes.parts += parts.compiled - before[1]
        notes.parts_beside += min(beside, found)
        notes.from_disk["compiled parts"] += max(0, found - beside)
    with notes.timed("validate"):
        check = partial(same_step, compiled, kind, code, inputs, state, weights, notes)
        with alone():
            sound = validated(check_key(compiled, kind, step, inputs, code), notes, check, passed=True)
    return code if sound else compiled.function(kind)
