"""`CudaRecorder` with a stand-in for torch.cuda that notes what it is asked for: the order of streams and events."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moeca_compile.runtime.cuda_graphs import CudaRecorder

DEVICE = torch.device("cuda", 0)


class Cuda:
    """Streams and events are their names; `current` is the stream that work goes to. `notes` tell what happened."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.current: Any = _Stream(self, "caller's")
        self.capturing = False

    def work(self, name: str) -> str:
        self.notes.append(f"{name} on {self.current.name}")
        return name

    @contextmanager
    def device(self, device: torch.device):
        assert device == DEVICE
        yield

    @contextmanager
    def stream(self, stream: _Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: _Graph, **options: Any):
        inspect.signature(self.real_graph).bind(graph, **options)  # torch's takes these options
        self.notes.append(f"begins in {options['pool']}, {options['capture_error_mode']}")
        before, self.current = self.current, options["stream"]
        yield
        # As torch's own, which does not get so far where the work or the end of the recording fails.
        self.notes.append("ends")
        self.current = before


class _Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: _Stream) -> None:
        self.cuda.notes.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.cuda.notes.append(f"{self.name} waits for {event}")

    def record_event(self, event: str) -> None:
        self.cuda.notes.append(f"{self.name} records {event}")


class _Graph:
    def replay(self) -> None:
        """Nothing to replay."""


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    found = Cuda()
    found.real_graph = torch.cuda.graph
    names = {
        "device": found.device,
        "graph_pool_handle": lambda: "the pool",
        "Stream": lambda: _Stream(found, "aside"),
        "Event": lambda: "the last turn",
        "current_stream": lambda: found.current,
        "set_stream": lambda stream: setattr(found, "current", stream),
        "stream": found.stream,
        "CUDAGraph": _Graph,
        "graph": found.graph,
        "is_current_stream_capturing": lambda: found.capturing,
    }
    for name, value in names.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_ordered_work_comes_one_after_the_other(cuda):
    with CudaRecorder(DEVICE).ordered_on_stream():
        cuda.work("a step")
    with pytest.raises(KeyboardInterrupt), CudaRecorder(DEVICE).ordered_on_stream():
        raise KeyboardInterrupt
    turn = ["caller's waits for the last turn", "caller's records the last turn"]
    assert cuda.notes == [turn[0], "a step on caller's", turn[1], *turn]


def test_a_rehearsal_runs_aside_between_the_caller_s_work(cuda):
    assert CudaRecorder(DEVICE).rehearse(lambda: cuda.work("a step")) == "a step"
    assert cuda.notes == ["aside waits for caller's", "a step on aside", "caller's waits for aside"]
    assert cuda.current.name == "caller's"


def test_a_recording_is_made_on_the_stream_of_the_rehearsal(cuda):
    """There libraries have their workspaces by then, outside the pool."""
    recording, result = CudaRecorder(DEVICE).record(lambda: cuda.work("a step"))
    assert isinstance(recording, _Graph) and result == "a step"
    assert cuda.notes == ["begins in the pool, thread_local", "a step on aside", "ends"]


def test_a_recording_that_fails_leaves_the_caller_s_stream(cuda):
    def fails() -> None:
        raise RuntimeError("not while recording")

    with pytest.raises(RuntimeError, match="not while recording"):
        CudaRecorder(DEVICE).record(fails)
    assert cuda.current.name == "caller's"


def test_it_is_busy_while_the_caller_records(cuda):
    assert not CudaRecorder(DEVICE).busy()
    cuda.capturing = True
    assert CudaRecorder(DEVICE).busy()
