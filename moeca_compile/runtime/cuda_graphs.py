"""Steps as CUDA graphs: each kind of step is recorded once over a stream's caches, then replayed as one launch.

A replay reads and writes the addresses that the step was recorded with. Therefore:
- Arguments of the model and forecast weights are copied into *buffers* before a replay.
- A stream's caches keep their memory. A step writes new values into them (lower.in_place), and those that it returns
  are copied, as a part of the recording. A step that fills the slots of rings is recorded once for each slot.
- Outputs are copied before they are returned, since the next replay overwrites them.
- Weights are read at their own addresses. If one has moved, the step is recorded again.
Recordings belong to the stream whose caches they use (`Stream.graphs`).

The first call of a kind runs op by op (kernels are built and tuned). For each slot of the rings that it fills, the
next call is recorded and replayed, and the one after that is replayed and compared with the step run op by op. A kind
that cannot be recorded runs op by op, with a warning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moeca_compile._torch_private import copy_all
from moeca_compile.lower.compiled import CompiledGraph
from moeca_compile.lower.program import CompiledStep
from moeca_compile.lower.random_state import undisturbed
from moeca_compile.lower.rounding import ValidationError
from moeca_compile.notes import Notes
from moeca_compile.passes.analysis.host_ops import host_ops, ops_without_kernel, runs_experts
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.passes.rewrite.step_function import StepFunction, StepResult
from moeca_compile.runtime.streams import Stream
from moeca_compile.text import first_line

T = TypeVar("T")
Compare = Callable[[Sequence[Any], Sequence[Any]], None]
"""Compares the results of a replay with the expected ones; raises ValidationError if they differ."""

_recording = threading.Lock()
"""torch can record only one graph at a time in a process."""


class Recording(Protocol):
    """A recorded graph of kernels on fixed addresses."""

    def replay(self) -> None:
        """Run it."""


class Recorder(Protocol):
    """What `CudaGraphs` needs of the device."""

    def busy(self) -> bool:
        """Whether the caller is recording a graph of its own. This step then becomes a part of it."""

    def ordered_on_stream(self) -> AbstractContextManager[None]:
        """Work inside runs after all earlier work in this context, on whatever CUDA streams that was."""

    def rehearse(self, function: Callable[[], T]) -> T:
        """Run a step on the recording's CUDA stream, as torch requires once before recording."""

    def record(self, function: Callable[[], T]) -> tuple[Recording, T]:
        """Record a step without running it; returns the recording, and the tensors that a replay writes to."""


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`. All graphs share a memory pool, since they never run concurrently."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.side_stream, self.last = torch.cuda.Stream(), torch.cuda.Event()

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
        self.side_stream.wait_stream(current)
        with torch.cuda.stream(self.side_stream):
            result = function()
        current.wait_stream(self.side_stream)
        return result

    def record(self, function: Callable[[], T]) -> tuple[Recording, T]:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads may allocate while this one records.
            with (
                _recording,
                torch.cuda.graph(graph, pool=self.pool, stream=self.side_stream, capture_error_mode="thread_local"),
            ):
                result = function()
        finally:
            torch.cuda.set_stream(current)  # a failed recording leaves the side stream current
        return graph, result


@dataclass(eq=False)
class Recorded:
    """A recorded step. Every replay writes `result` to the same memory."""

    recording: Recording
    result: StepResult
    buffers: Buffers
    replays: int = 0

    def replay(self) -> StepResult:
        self.recording.replay()
        self.replays += 1
        return self.result


class Buffers:
    """What recorded steps read besides caches: copies of the model's arguments, and its weights in place.

    Args:
        inputs: one value for each input of the graph.
        arguments: which inputs are arguments of the model; the others are its weights.
        weights: (2, K, K) forecast weights of a step (passes.rewrite.step.Step).
    """

    def __init__(self, inputs: Sequence[Any], arguments: Sequence[bool], weights: Tensor) -> None:
        self.copied = [i for i, (v, a) in enumerate(zip(inputs, arguments, strict=True)) if a and _is_tensor(v)]
        self.fixed = [i for i, v in enumerate(inputs) if i not in set(self.copied) and _is_tensor(v)]
        self.addresses = self._addresses(inputs)
        with torch.inference_mode(False):  # inference tensors could not be written to outside inference mode
            own = {i: _empty_like(inputs[i]) for i in self.copied}
            self.weights = _empty_like(weights)
        self.inputs = [own.get(i, value) for i, value in enumerate(inputs)]

    def fit(self, inputs: Sequence[Any]) -> bool:
        """Whether all weights are still at the same addresses."""
        return self._addresses(inputs) == self.addresses

    def fill(self, inputs: Sequence[Any], weights: Tensor) -> None:
        """Copy the arguments and weights of this call into the buffers."""
        for i in self.copied:
            _distinct(self.inputs[i]).copy_(_distinct(inputs[i]))
        self.weights.copy_(weights)

    def _addresses(self, inputs: Sequence[Any]) -> list[int]:
        return [inputs[i].data_ptr() for i in self.fixed]


class CudaGraphs:
    """The recorded steps of one graph at one set of input shapes.

    Args:
        compiled: the graph.
        recorder: the device, or a test's stand-in for it.
        notes: where warnings go.
        compare: checks a replay; None for no check.
    """

    def __init__(self, compiled: CompiledGraph, recorder: Recorder, notes: Notes, compare: Compare | None) -> None:
        self.arguments, self.device = list(compiled.captured.arguments), compiled.device
        self.recorder, self.notes, self.compare, self.waits = recorder, notes, compare, compiled.waits
        self.probed = compiled.plan.probe is not None and not compiled.plan.probe.after
        """Whether a probe runs before each step."""
        self.buffers: Buffers | None = None
        self.rehearsed: set[StepKind] = set()
        self.compared: set[Hashable] = set()
        self.refused: set[StepKind] = set()
        self._lock = threading.RLock()

    def run(
        self, kind: StepKind, stream: Stream, program: StepFunction, inputs: Sequence[Any], weights: Tensor
    ) -> StepResult:
        """Run a step and write its updates to the stream's caches; the result's `updates` are empty."""
        if self.recorder.busy():
            self._clear(kind, stream)
            return _in_place(program, inputs, stream.state, weights)
        with self.ordered():
            self._clear(kind, stream)
            if kind in self.refused or self._refuses(kind, program, inputs):
                return _in_place(program, inputs, stream.state, weights)
            return self._run(kind, stream, program, self._filled(inputs, weights))

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Work inside is ordered with replays: it writes nothing that an earlier one still reads. A graph that the
        caller records has an order of its own."""
        if self.recorder.busy():
            yield
            return
        with self._lock, self.recorder.ordered_on_stream():
            yield

    def _run(self, kind: StepKind, stream: Stream, program: StepFunction, buffers: Buffers) -> StepResult:
        def step() -> StepResult:
            return _in_place(program, buffers.inputs, stream.state, buffers.weights)

        if kind not in self.rehearsed:
            self.rehearsed.add(kind)
            return _copied_out(self.recorder.rehearse(step))
        key = kind, stream.state.slots_filled_by(kind)
        recorded = stream.graphs.get(key)
        if recorded is None or recorded.buffers is not buffers:
            recorded = self._recorded(kind, step, buffers)
            if recorded is None:
                return step()
            stream.graphs[key] = recorded
        elif self.compare is not None and key not in self.compared:
            self.compared.add(key)
            return self._compared(kind, stream, program, recorded)
        return _copied_out(recorded.replay())

    def _clear(self, kind: StepKind, stream: Stream) -> None:
        """Prepare caches without valid values: they may still hold those of an ended generation.

        Not after the probe of a first step, which has just filled some of them.
        """
        if stream.empty and (kind.probe or not self.probed):
            stream.state.prepare()

    def _filled(self, inputs: Sequence[Any], weights: Tensor) -> Buffers:
        """The buffers with this call's values. If a weight has moved, they are new, and steps are recorded again."""
        if self.buffers is None or not self.buffers.fit(inputs):
            self.buffers = Buffers(inputs, self.arguments, weights)
            self.rehearsed.clear()  # kernels may cache the addresses of weights
        self.buffers.fill(inputs, weights)
        return self.buffers

    def _refuses(self, kind: StepKind, program: StepFunction, inputs: Sequence[Any]) -> bool:
        """Whether a kind cannot be recorded; looked at before its first run."""
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
        self.notes.warn(
            f"{kind.name} steps are not recorded as a CUDA graph ({reason}), so the host launches their kernels one "
            "by one, which is slower. docs/gpu.md says what can be recorded; cuda_graphs=False turns recording and "
            "this warning off"
        )

    def _recorded(self, kind: StepKind, step: Callable[[], StepResult], buffers: Buffers) -> Recorded | None:
        try:
            return Recorded(*self.recorder.record(step), buffers)
        except Exception as error:
            cause = error.__context__ or error  # ending a failed recording raises once more
            self._refuse(kind, first_line(cause))
            return None

    def _compared(self, kind: StepKind, stream: Stream, program: StepFunction, recorded: Recorded) -> StepResult:
        """Replay with new arguments, and compare with the step run op by op."""
        assert self.compare is not None
        expected_state = stream.state.cloned()
        with undisturbed(self.device):
            expected = _in_place(program, recorded.buffers.inputs, expected_state, recorded.buffers.weights)
        found = _copied_out(recorded.replay())
        try:
            self.compare(
                [*found.outputs, *stream.state.values()],
                [*expected.outputs, *(expected_state[name] for name in stream.state)],
            )
        except ValidationError as error:
            self._refuse(kind, f"its replay is wrong: {error}")
            copy_all(list(stream.state.values()), [expected_state[name] for name in stream.state])
            return expected
        return found


def write_into(state: Caches, updates: Mapping[str, Tensor]) -> None:
    """Copy a step's updates into the caches, which keep their addresses."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    changed = [(state[name], value) for name, value in updates.items() if value is not state[name]]
    # An update that is a view of some cache must be read before any cache is written.
    fresh = [v.clone() if v.untyped_storage().data_ptr() in storages else v for _, v in changed]
    if fresh:
        copy_all([cache for cache, _ in changed], fresh)


def _in_place(program: StepFunction, inputs: Sequence[Any], state: Caches, weights: Tensor) -> StepResult:
    """Run a step op by op, with all new values in the memory of the caches."""
    result = program(inputs, state, weights)
    write_into(state, result.updates)
    return StepResult(result.outputs, {}, result.counts)


def _copied_out(result: StepResult) -> StepResult:
    """Copies of a recorded step's results, which the next replay does not overwrite."""
    outputs = tuple(value.clone() if _is_tensor(value) else value for value in result.outputs)
    return StepResult(outputs, {}, None if result.counts is None else result.counts.clone())


def _empty_like(value: Tensor) -> Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _distinct(value: Tensor) -> Tensor:
    """The distinct elements of a tensor: expanded dims are reduced to one entry."""
    for dim in range(value.ndim):
        if value.stride(dim) == 0 and value.shape[dim] > 1:
            value = value.narrow(dim, 0, 1)
    return value


def _overlaps(value: Tensor) -> bool:
    """Whether elements of a tensor may share memory, apart from expanded dims."""
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if stride and size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
