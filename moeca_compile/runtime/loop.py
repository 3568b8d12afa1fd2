"""The step loop of one compiled graph: finds the generation and stream of each call, and runs one kind of step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeca_compile._torch_private import compiling
from moeca_compile.lower.background import EarlyStep
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep
from moeca_compile.lower.upload import upload, upload_all
from moeca_compile.lower.validate import run_eagerly, same_values
from moeca_compile.notes import Notes
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import PROBE, REUSING, STEP_SCALARS, StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult
from moeca_compile.policies.criterion import Criterion, StepAt
from moeca_compile.runtime.arguments import mark
from moeca_compile.runtime.capacities import Capacities
from moeca_compile.runtime.corrector import corrected, gain
from moeca_compile.runtime.cuda_graphs import CudaGraphs, CudaRecorder
from moeca_compile.runtime.error_control import ErrorControl, relative_error
from moeca_compile.runtime.late import LateCopy, recording
from moeca_compile.runtime.layouts import in_one_layout
from moeca_compile.runtime.ranks import DIFFERENT, SEVERAL, Ranks
from moeca_compile.runtime.schedule import EVERYTHING, RefreshPlan
from moeca_compile.runtime.streams import Bounds, Stream, Streams
from moeca_compile.runtime.tallies import Counted, Tallies
from moeca_compile.runtime.timesteps import Timestep, TimestepReader
from moeca_compile.runtime.tracing import OPEN, Tracer, is_traced
from moeca_compile.runtime.tracks import Call, Position

_log = logging.getLogger(__name__)


_SPARED = 0.02
"""The share of rows in which a replay may differ. It runs the same kernels, but sums by atomics come in another order
each time, and in 16 bits that sends a token to another expert here and there."""


@lru_cache(256)
def _on_cpu(weights: tuple[tuple[tuple[float, ...], ...], ...]) -> Tensor:
    """Forecast weights as a tensor that is kept: making one takes 20 us, and generations have the same times.

    On an accelerator none is kept: there a tensor belongs to the CUDA stream, or the recording, that it came from.
    """
    with torch.inference_mode(False):  # it serves calls outside inference mode too
        return torch.tensor(weights, dtype=torch.float32, device="cpu")


class UseOfError(NamedTuple):
    """What a full step does with the error that a cache step in its place would have made: nothing, most often.

    Attributes:
        correction: the weight of the error in the step's outputs (runtime.corrector).
        measures: whether the next full step depends on its size (runtime.error_control).
    """

    correction: float = 0.0
    measures: bool = False


NO_USE = UseOfError()


class Given(NamedTuple):
    """What all that runs at a step is given: the inputs on the device, and the forecast weights (2, K, K)."""

    inputs: Sequence[Any]
    weights: Tensor


def write_step_scalars(state: Caches, share: float, number: int) -> None:
    """Write the numbers of a cache step that recomputes tokens (kinds.STEP_SCALARS), before it is compiled, validated
    or run. The host does not wait, and the tensor keeps its address."""
    for index, value in enumerate((share, number)):
        state[STEP_SCALARS.name][index].fill_(value)


def _nothing() -> float:
    raise LookupError("no probe runs before steps of this recipe")


class StepLoop:
    """Runs calls at one set of input shapes.

    Args:
        compiled: the graph and its plan.
        compile_step: compiles a kind of step when it is first needed (`backend.compile_step`).
        notes: where timings, errors and warnings go.
        bounds: of the model's caches, with its requests.
    """

    def __init__(
        self, compiled: CompiledGraph, compile_step: Callable[..., StepFunction], notes: Notes, bounds: Bounds
    ) -> None:
        self.compiled, self.compile_step, self.notes = compiled, compile_step, notes
        plan, config, device = compiled.plan, compiled.config, compiled.device
        self.streams = Streams(bounds, config, plan.caches, plan.parts, device)
        self.may_predict = config.corrector or self.streams.follows_sampler or config.max_error is not None
        self.times = TimestepReader(compiled, notes)
        self.ranks = Ranks(compiled.groups, device)
        self.capacities = Capacities(plan, device, self.ranks)
        self.steps: dict[StepKind, StepFunction] = {}
        self.early: dict[StepKind, EarlyStep] = {}
        """The steps that run while another process compiles them."""
        self.tallies = Tallies()
        self.graphs = self._cuda_graphs() if compiled.recorded else None
        self.stateless = Stream(Caches((), device))
        """The stream of all calls where nothing is cached."""
        self.validated_with: tuple[Any, ...] | None = None
        """The versions of the weights, where they decide when to validate again (runtime.revalidation)."""
        self.tracer: Tracer | None = None
        """The trace so far; None where nobody has asked for one."""
        self.always_traced = compiled.config.trace
        self._lock = threading.RLock()

    def __call__(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """One call of the model."""
        if not self.compiled.caching and not self.ranks.joined:
            return self._run(StepKind(), self.stateless, inputs, self._given(self.stateless, 0, 0.0, inputs))
        with self._lock:
            position, stream, refresh = self.enter(inputs)
        try:
            given = self._given(stream, position.number, position.time, inputs)
            if self.ranks.joined:
                refresh = self.agreed(refresh, position, stream)
            if stream.criterion is not None:
                refresh = self.decided(stream.criterion, refresh, position, stream, given)
            kind = self.kind(refresh, stream, given)
            if refresh.share:
                with self.graphs.ordered() if self.graphs is not None else nullcontext():
                    write_step_scalars(stream.state, refresh.share, position.number)
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s step at time %g", kind.name, position.time)
            use = self.use_of_error(refresh, position, stream) if self.may_predict else NO_USE
            outputs = self._run(kind, stream, inputs, given, use, position)
            if self.streams.sees_sampler and self.compiled.picture is not None and not self.ranks.joined:
                self.streams.see_sampler(position, inputs[self.compiled.picture], outputs)
            if stream.criterion is not None:
                self.measure(stream.criterion, refresh, position, stream, given)
            stream.note_refreshed(refresh, position.number, position.time)
        except BaseException:
            self.streams.requests.interrupted(position)
            raise
        self.streams.finished(position)
        return outputs

    # --- a call, stage by stage -----------------------------------------------------------------------------

    def enter(self, inputs: Sequence[Any]) -> tuple[Position, Stream, RefreshPlan]:
        """The position and stream of a call, and what it computes anew: everything, until the timestep is known."""
        before = self.times.input.found
        time = self.times.read(inputs)
        found = self.times.input.found != before
        requests = self.streams.requests
        if found:
            requests.reset()  # earlier calls were cached without a time
        position = requests.enter(self.brought(time, inputs))
        stream = self.streams.of(position)
        self.streams.warn_if_caches_unused(self.notes)
        self.streams.warn_if_other_steps(position, self.notes)
        if time is None or self.times.unclear_on_ranks:
            return position, stream, EVERYTHING
        if found:
            position.request.direction = self.times.direction
        return position, stream, self.streams.refresh_plan(position, stream)

    def brought(self, time: Timestep | None, inputs: Sequence[Any]) -> Call:
        """What a call brings that tells whose it is."""
        compiled = self.compiled
        if self.ranks.joined:  # what differs from rank to rank tells nothing
            return Call(time, self.streams, {}, None, torch.is_inference_mode_enabled())
        picture = inputs[compiled.picture] if compiled.picture is not None and compiled.config.check_inputs else None
        own = self.times.position
        marks = {name: mark(inputs[i]) for name, i in compiled.told_by.items() if i != own}
        return Call(time, self.streams, marks, picture, torch.is_inference_mode_enabled())

    def agreed(self, refresh: RefreshPlan, position: Position, stream: Stream) -> RefreshPlan:
        """What the step computes anew where other ranks must compute the same."""
        if stream.alike is None:
            plan, options = self.compiled.plan, replace(self.compiled.config, dump=None)
            cached = [(each.node.name, each.part.name, each.group) for each in plan.replacements]
            stream.alike = self.ranks.alike((cached, options, position.time, position.request.expected))
            if len(self.ranks.groups) > 1:
                self.notes.warn(SEVERAL.format(len(self.ranks.groups)))
            elif not stream.alike:
                self.notes.warn(DIFFERENT.format(f"{len(cached)} values from time {position.time:g} on"))
        return refresh if stream.alike else EVERYTHING

    def decided(
        self, criterion: Criterion, refresh: RefreshPlan, position: Position, stream: Stream, given: Given
    ) -> RefreshPlan:
        """What the step computes anew where the data decide: everything if it must, or if the criterion says so.

        The probe runs before every step, since the step may go on from it. Its signal is copied while the host goes
        on, which waits for it only where the criterion asks.
        """
        probe = self.compiled.plan.probe
        signal = self._probed(stream, given) if probe is not None and not probe.after else None
        at = StepAt(position.number, position.request.expected, position.time)
        if refresh == EVERYTHING or recording(self.compiled.device):
            criterion.forced(at)
            return EVERYTHING
        full = criterion.is_full(at, _nothing if signal is None else lambda: self.ranks.mean(signal.number()))
        if criterion.remark:
            self.notes.warn(criterion.remark)
        return EVERYTHING if full else refresh

    def measure(
        self, criterion: Criterion, refresh: RefreshPlan, position: Position, stream: Stream, given: Given
    ) -> None:
        """Let the criterion know what a probe finds after a full step, if it has one that runs then."""
        probe = self.compiled.plan.probe
        if probe is None or not probe.after or refresh != EVERYTHING:
            return
        signal = self._probed(stream, given)
        if signal is not None:
            at = StepAt(position.number, position.request.expected, position.time)
            criterion.measured(at, lambda: self.ranks.mean(signal.number()))

    def kind(self, refresh: RefreshPlan, stream: Stream, given: Given) -> StepKind:
        """The step kind. A stream's first cache step runs a trial step to find the capacity it needs."""

        def counts(trial: StepKind) -> Tensor | None:
            inputs, weights = given
            return run_eagerly(self.compiled, trial, inputs, stream.state, weights, updates=False).counts

        return self.capacities.kind(refresh, stream, counts)

    def use_of_error(self, refresh: RefreshPlan, position: Position, stream: Stream) -> UseOfError:
        """What the error that a cache step would have made is for, where this step is full."""
        if refresh != EVERYTHING or stream.empty or (self.ranks.joined and not stream.alike):
            return NO_USE
        config, deterministic, control = self.compiled.config, self.streams.deterministic(position), stream.criterion
        if self.streams.sees_sampler:
            deterministic = self.ranks.all_say(deterministic)
        measures = isinstance(control, ErrorControl) and control.measures and deterministic is not False
        correction = 0.0
        if config.corrector or deterministic:
            order = stream.rule.order if config.forecast else 0
            correction = gain(stream.full_at[0][: order + 1], stream.passed, position.time)
        return UseOfError(correction, measures) if correction or measures else NO_USE

    def note_error(
        self, criterion: Criterion, position: Position, outputs: Sequence[Any], predicted: Sequence[Any]
    ) -> None:
        """Let error control know the error of a full step's forecast. It is copied while the host goes on."""
        error = relative_error(outputs, predicted, self.compiled.plan.sizes[0])
        if error is None:
            return
        copy, at = LateCopy(error), StepAt(position.number, position.request.expected, position.time)
        criterion.measured(at, lambda: self.tallies.errors.add(self.ranks.most(copy.number())))

    def step(self, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor) -> StepFunction:
        """The step of this kind: compiled when it is first needed, or until then the step function."""
        step = self.steps.get(kind)
        return self._made(kind, inputs, state, weights) if step is None else step

    def _made(self, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor) -> StepFunction:
        early = self.early.get(kind)
        if early is not None and early.waits:  # another process compiles it
            return early
        with compiling():
            if kind not in self.steps:  # another thread may have compiled it meanwhile
                early = self.early.get(kind)
                if early is not None and early.waits:
                    return early
                with self.notes.progress.of(f"{kind.name} step"):
                    if early is None:
                        step = self.compile_step(self.compiled, kind, inputs, state, weights, self.notes)
                    else:
                        step = early.finished(inputs, state, weights)
                if isinstance(step, EarlyStep):
                    self.early[kind] = step
                    return step
                self.steps[kind] = step
                self.early.pop(kind, None)
            return self.steps[kind]

    def weights(self, stream: Stream, number: int, time: float) -> Tensor:
        """The forecast weights of step `number` at `time` (passes.rewrite.step.Step), on the model's device."""
        values, device = stream.weights(number, time), self.compiled.device
        if device.type == "cpu":
            return _on_cpu(tuple(tuple(map(tuple, part)) for part in values))
        return upload(torch.tensor(values, dtype=torch.float32), device)

    def eager(self, kind: StepKind, inputs: Sequence[Any], state: Caches, weights: Tensor) -> StepResult:
        """Run a step without compilation on copies of the state."""
        return run_eagerly(self.compiled, kind, inputs, state, weights)

    def _run(
        self,
        kind: StepKind,
        stream: Stream,
        inputs: Sequence[Any],
        given: Given,
        use: UseOfError = NO_USE,
        position: Position | None = None,
    ) -> tuple[Any, ...]:
        """Run a step on the stream's caches, apply its updates to them, and count it."""
        predicted = self._predicted(stream, given) if use is not NO_USE else ()
        # Not a call is spent on a step that nobody traces.
        tracer = self._tracer() if (OPEN or self.always_traced) and position is not None else None
        if tracer is None or position is None:
            result = self._result(kind, stream, *given)
        else:
            self.step(kind, given.inputs, stream.state, given.weights)  # so that compiling is not timed
            tracer.observe(kind, position.number, position.time, stream, *given)
            result = tracer.run(kind, position.number, partial(self._result, kind, stream, *given))
        self.tallies.add(kind, result.counts)
        self.capacities.promote(stream, result.counts)
        outputs = self.compiled.write_back(inputs, result.outputs)
        if use.measures and position is not None and stream.criterion is not None:
            self.note_error(stream.criterion, position, outputs, predicted)
        if not use.correction:
            return outputs
        self.tallies.corrections += 1
        return corrected(outputs, predicted, use.correction)

    def _tracer(self) -> Tracer | None:
        """What collects the trace of a step; None unless it was asked for."""
        if not (self.always_traced or is_traced(self.notes)):
            return None
        if self.graphs is not None and self.graphs.recorder.busy():
            return None  # the user records the step: what ran beside it would be recorded too
        if self.tracer is None:
            self.tracer = Tracer(self.compiled, self.notes)
        return self.tracer

    def forget_trace(self) -> None:
        """Drop what was traced so far, and what the next traced steps would be compared with."""
        self.tracer = None
        for stream in self.streams.held():
            stream.traced.clear()

    def _predicted(self, stream: Stream, given: Given) -> tuple[Any, ...]:
        """The outputs that a cache step would give here. It changes no cache, and is no step of its own."""
        self.tallies.forecasts += 1
        return self._result(REUSING, stream, *given).outputs[len(self.compiled.mutated) :]

    def _probed(self, stream: Stream, given: Given) -> LateCopy | None:
        """Run the probe. Its signal comes while the host goes on; None where the caller records a CUDA graph."""
        (signal,) = self._result(PROBE, stream, *given).outputs
        self.tallies.probes += 1
        return None if recording(self.compiled.device) else LateCopy(signal)

    def _given(self, stream: Stream, number: int, time: float, inputs: Sequence[Any]) -> Given:
        """What all that runs at step `number` is given."""
        return Given(self._placed(inputs), self.weights(stream, number, time))

    def _result(self, kind: StepKind, stream: Stream, placed: Sequence[Any], weights: Tensor) -> StepResult:
        """Run a step on the stream's caches, and apply its updates to them."""
        step = self.step(kind, placed, stream.state, weights)
        if self.graphs is not None:
            return self.graphs.run(kind, stream, step, placed, weights)
        stream.state.release(kind)
        result = step(placed, stream.state, weights)
        if result.updates:
            stream.state.store(result.updates)
        return result

    def _placed(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs in the layout that is compiled, with those that the graph needs on the device copied there."""
        inputs = in_one_layout(inputs, self.compiled.tensor_arguments)
        return upload_all(inputs, self.compiled.uploaded, self.compiled.device)

    def _cuda_graphs(self) -> CudaGraphs:
        compiled = self.compiled
        compare = self.same_replay if compiled.config.validate else None
        recorder = CudaRecorder(compiled.device)
        return CudaGraphs(compiled, recorder, self.notes, compare)

    def same_replay(self, found: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Raise ValidationError where the replay of a recorded step differs from the step itself."""
        dtypes = {*self.compiled.regions.token_dtypes, *(spec.dtype for spec in self.compiled.plan.caches)}
        same_values("replayed", found, wanted, dtypes, self.compiled.config, self.notes, spared=_SPARED)

    def counted(self) -> Counted:
        """What this loop has counted so far."""
        beside = [PROBE] * (self.tallies.probes > 0) + [REUSING] * (self.tallies.forecasts > 0)
        flops = {kind: self.flops(kind) for kind in (StepKind(), *self.tallies.by_kind, *beside)}
        probe = self.compiled.plan.probe
        handed_on = flops.get(PROBE, 0.0) if probe is not None and probe.handed_on else 0.0
        filling = self.compiled.plan.filling_flops
        return Counted(self.tallies, flops, flops[StepKind()] + handed_on - filling)

    def flops(self, kind: StepKind) -> float:
        """FLOPs of a step of a kind, on average: all kinds as they were traced, else all as they were planned."""
        traced = not self.early and all(isinstance(step, CompiledStep) for step in self.steps.values())
        try:
            return self.tallies.flops(kind, self.steps.get(kind) if traced else None, self.compiled)
        except Exception:  # an op that torch's counter fails on must not keep the user from the report
            _log.debug("counting the FLOPs of %s steps failed", kind.name, exc_info=True)
            return self.tallies.flops(kind, None, self.compiled)
