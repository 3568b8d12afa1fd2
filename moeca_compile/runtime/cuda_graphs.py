"""Steps as CUDA graphs: each kind of step is recorded once over a stream's caches, then replayed as one launch.

A recorded step reads and writes the memory that it was recorded with. So what changes from call to call is copied
into *buffers*; a stream's caches stay where they are, and what a step gives anew is copied into them within the
recording; what the caller gets is copied out. Weights are read where they lie: if one has moved, a step is recorded
again. A recording lives with the stream whose caches it knows (`Stream.graphs`).

Call 1 of a kind runs as it is (kernels are built and tuned), call 2 is recorded and replayed, call 3 is compared
with the step as it is. What cannot be recorded runs as it is, with a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moeca_compile._torch_private import copy_all, zero_all
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep
from moeca_compile.lower.validate import ValidationError, undisturbed
from moeca_compile.notes import Notes, first_line
from moeca_compile.passes.analysis.host_ops import host_ops, ops_without_kernel, runs_experts
from moeca_compile.passes.rewrite.kinds import Role, StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult
from moeca_compile.runtime.session import Stream

T = TypeVar("T")
Compare = Callable[[Sequence[Any], Sequence[Any]], None]
"""Compares what a replay gave with what it should have; raises ValidationError."""

_recording = threading.Lock()
"""torch records one graph at a time in a process."""


class Recording(Protocol):
    """Work on fixed memory that can be done again."""

    def replay(self) -> None:
        """Do it again."""


class Recorder(Protocol):
    """The device as `CudaGraphs` needs it."""

    def busy(self) -> bool:
        """Whether the caller records a graph of its own, of which this step then becomes a part."""

    def ordered_on_stream(self) -> AbstractContextManager[None]:
        """Work inside comes after all earlier work that was ordered so, whatever CUDA streams they ran on."""

    def rehearse(self, function: Callable[[], T]) -> T:
        """Run a step in earnest, as it has to run once before it is recorded."""

    def record(self, function: Callable[[], T]) -> tuple[Recording, T]:
        """Record a step without running it; returns what replays it, and its results as a replay leaves them."""


class CudaRecorder:
    """`torch.cuda.CUDAGraph`. All graphs share one pool of memory, since they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.aside, self.last = torch.cuda.Stream(), torch.cuda.Event()

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def ordered_on_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            current.wait_event(self.last)
            try:
                yield
            finally:
                current.record_event(self.last)

    def rehearse(self, function: Callable[[], T]) -> T:
        current = torch.cuda.current_stream()
        self.aside.wait_stream(current)
        with torch.cuda.stream(self.aside):
            result = function()
        current.wait_stream(self.aside)
        return result

    def record(self, function: Callable[[], T]) -> tuple[Recording, T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may go on allocating while this one records.
            with (
                _recording,
                torch.cuda.graph(graph, pool=self.pool, stream=self.aside, capture_error_mode="thread_local"),
            ):
                result = function()
        finally:
            torch.cuda.set_stream(current)  # a recording that failed leaves the other one in place
        return graph, result


@dataclass(eq=False)
class Recorded:
    """A recorded step: its results lie in the same place after every replay."""

    recording: Recording
    result: StepResult
    buffers: Buffers
    replays: int = 0

    def replay(self) -> StepResult:
        self.recording.replay()
        self.replays += 1
        return self.result


class Buffers:
    """What recorded steps read besides caches: arguments of the model, which are copied in, and its weights.

    Args:
        inputs: one value for each input of the graph; arguments: which of them change from call to call.
        coefficients: the coefficients of a step (passes.rewrite.step.Step).
    """

    def __init__(self, inputs: Sequence[Any], arguments: Sequence[bool], coefficients: Tensor) -> None:
        self.copied = [i for i, (v, a) in enumerate(zip(inputs, arguments, strict=True)) if a and _is_tensor(v)]
        self.fixed = [i for i, v in enumerate(inputs) if i not in set(self.copied) and _is_tensor(v)]
        self.addresses = self._addresses(inputs)
        with torch.inference_mode(False):  # else only calls in inference mode could write to them
            own = {i: _alike(inputs[i]) for i in self.copied}
            self.coefficients = _alike(coefficients)
        self.inputs = [own.get(i, value) for i, value in enumerate(inputs)]

    def fit(self, inputs: Sequence[Any]) -> bool:
        """Whether all weights lie where they did."""
        return self._addresses(inputs) == self.addresses

    def fill(self, inputs: Sequence[Any], coefficients: Tensor) -> None:
        """Copy in what is new at this call."""
        for i in self.copied:
            _distinct(self.inputs[i]).copy_(_distinct(inputs[i]))
        self.coefficients.copy_(coefficients)

    def _addresses(self, inputs: Sequence[Any]) -> list[int]:
        return [inputs[i].data_ptr() for i in self.fixed]


class CudaGraphs:
    """The recorded steps of one graph at one set of input shapes.

    Args:
        compiled: the graph, which tells which inputs change from call to call and where the model lies.
        recorder: the device, or what stands for it in tests.
        notes: where warnings go.
        compare: how to check a replay; None checks nothing.
    """

    def __init__(self, compiled: CompiledGraph, recorder: Recorder, notes: Notes, compare: Compare | None) -> None:
        self.arguments, self.device = list(compiled.captured.arguments), compiled.device
        self.recorder, self.notes, self.compare, self.waits = recorder, notes, compare, compiled.waits
        self.slopes = {spec.name for spec in compiled.plan.caches if spec.role is Role.SLOPE}
        self.buffers: Buffers | None = None
        self.rehearsed: set[StepKind] = set()
        self.compared: set[StepKind] = set()
        self.refused: set[StepKind] = set()
        self._lock = threading.RLock()

    def run(
        self, kind: StepKind, stream: Stream, program: StepFunction, inputs: Sequence[Any], coefficients: Tensor
    ) -> StepResult:
        """Run a step; it has changed the stream's caches when this returns, so no updates are left to adopt."""
        if self.recorder.busy():
            _clear(stream)
            return _in_place(program, inputs, stream, coefficients)
        with self._lock, self.recorder.ordered_on_stream():
            _clear(stream)
            if kind in self.refused or self._refuses(kind, program, inputs):
                return _in_place(program, inputs, stream, coefficients)
            return self._run(kind, stream, program, self._filled(inputs, coefficients))

    def _run(self, kind: StepKind, stream: Stream, program: StepFunction, buffers: Buffers) -> StepResult:
        def step() -> StepResult:
            return _in_place(program, buffers.inputs, stream, buffers.coefficients)

        if kind not in self.rehearsed:
            self.rehearsed.add(kind)
            return _handed_out(self.recorder.rehearse(step))
        recorded = stream.graphs.get(kind)
        if recorded is None or recorded.buffers is not buffers:
            recorded = self._recorded(kind, step, buffers)
            if recorded is None:
                return step()
            stream.graphs[kind] = recorded
        elif self.compare is not None and kind not in self.compared:
            return self._compared(kind, stream, program, recorded)
        return _handed_out(recorded.replay())

    def _filled(self, inputs: Sequence[Any], coefficients: Tensor) -> Buffers:
        """The buffers with this call's values; new ones where a weight has moved, to which no recording belongs."""
        if self.buffers is None or not self.buffers.fit(inputs):
            self.buffers = Buffers(inputs, self.arguments, coefficients)
            self.rehearsed.clear()  # kernels may keep tables of where the weights lie
        self.buffers.fill(inputs, coefficients)
        return self.buffers

    def _refuses(self, kind: StepKind, program: StepFunction, inputs: Sequence[Any]) -> bool:
        """Whether something is found, before a kind's first run, for which it cannot be recorded."""
        if kind in self.rehearsed:
            return False
        reason = self._obstacle(program, inputs)
        if reason is not None:
            self._refuse(kind, reason)
        return reason is not None

    def _obstacle(self, program: StepFunction, inputs: Sequence[Any]) -> str | None:
        if not isinstance(program, CompiledStep):
            return "they run op by op"
        graph = program.traced.graph.graph
        found = host_ops(graph, self.device)
        found += [self.waits] if self.waits is not None and runs_experts(graph) else []
        found += [f"{op} has no kernel of its own there" for op in ops_without_kernel(graph, self.device)]
        arguments = [v for v, argument in zip(inputs, self.arguments, strict=True) if argument and _is_tensor(v)]
        found += ["an argument overlaps with itself in memory"] * any(map(_overlaps, arguments))
        return found[0] if found else None

    def _refuse(self, kind: StepKind, reason: str) -> None:
        self.refused.add(kind)
        self.notes.warn(f"{kind.name} steps are not recorded as a CUDA graph ({reason}), so they run op by op")

    def _recorded(self, kind: StepKind, step: Callable[[], StepResult], buffers: Buffers) -> Recorded | None:
        try:
            return Recorded(*self.recorder.record(step), buffers)
        except Exception as error:
            cause = error.__context__ or error  # the end of a recording that was broken off fails too
            self._refuse(kind, first_line(cause))
            return None

    def _compared(self, kind: StepKind, stream: Stream, program: StepFunction, recorded: Recorded) -> StepResult:
        """Replay on other arguments than those it was recorded with, and compare with the step as it is."""
        assert self.compare is not None
        state = {name: tensor.clone() for name, tensor in stream.state.items()}
        with undisturbed(self.device):
            expected = program(recorded.buffers.inputs, state, recorded.buffers.coefficients)
        found = _handed_out(recorded.replay())
        # The scale of a slope says nothing of the error of what it is the difference of.
        names = [name for name in expected.updates if name not in self.slopes]
        try:
            self.compare(
                [*found.outputs, *(stream.state[name] for name in names)],
                [*expected.outputs, *(expected.updates[name] for name in names)],
            )
        except ValidationError as error:
            self._refuse(kind, f"its replay is wrong: {error}")
            del stream.graphs[kind]
            write_into(stream.state, {**state, **expected.updates})
            return StepResult(expected.outputs, {}, expected.counts)
        self.compared.add(kind)
        return found


def write_into(state: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> None:
    """Copy what a step gives anew into the caches, whose place in memory recorded steps know."""
    places = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    changed = {name: value for name, value in updates.items() if value is not state[name]}
    # A value that is a view of some cache is read before any cache is written.
    fresh = [v.clone() if v.untyped_storage().data_ptr() in places else v for v in changed.values()]
    if fresh:
        copy_all([state[name] for name in changed], fresh)


def _clear(stream: Stream) -> None:
    """Caches that hold nothing are 0: they may be those of a generation that has ended."""
    if stream.empty and stream.state:
        zero_all(list(stream.state.values()))


def _in_place(program: StepFunction, inputs: Sequence[Any], stream: Stream, coefficients: Tensor) -> StepResult:
    """A step as it is, its updates copied into the caches."""
    result = program(inputs, stream.state, coefficients)
    write_into(stream.state, result.updates)
    return StepResult(result.outputs, {}, result.counts)


def _handed_out(result: StepResult) -> StepResult:
    """Copies of what a recorded step gave, which the next replay does not overwrite."""
    outputs = tuple(value.clone() if _is_tensor(value) else value for value in result.outputs)
    return StepResult(outputs, {}, None if result.counts is None else result.counts.clone())


def _alike(value: Tensor) -> Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _distinct(value: Tensor) -> Tensor:
    """What an expanded tensor holds in memory, each value once."""
    for dim in range(value.ndim):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value


def _overlaps(value: Tensor) -> bool:
    """Whether different places of a tensor may share memory, those that were expanded left out."""
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride and size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
