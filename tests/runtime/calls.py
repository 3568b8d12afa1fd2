"""Calls of a model as its requests see them, without a model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part
from moeca_compile.runtime.arguments import mark
from moeca_compile.runtime.schedule import RefreshPlan
from moeca_compile.runtime.streams import Stream, Streams, bounds_of
from moeca_compile.runtime.tracks import Call, Position

SPECS = [CacheSpec("a", (2, 3), torch.float32), CacheSpec("b", (4,), torch.int32)]
EVERYTHING, NOTHING = RefreshPlan(True, True), RefreshPlan(False, False)


def make_streams(other: Streams | None = None, **options) -> Streams:
    """The streams of a model at one set of shapes, or of the model of others at another one."""
    config = MoecaConfig(**{"recipe": "moeca", **options})
    bounds = bounds_of(config) if other is None else other.bounds
    return Streams(bounds, config, SPECS, {Part.ATTENTION, Part.EXPERTS}, torch.device("cpu"))


def picture(seed: int = 0, moved: float = 0.0, samples: int = 2) -> Tensor:
    """Noise of a seed, moved a little."""
    noise = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return noise * (1 - moved)


@dataclass(frozen=True)
class Made:
    """A call that was made: where it belongs, its stream, and what it computed anew."""

    position: Position
    stream: Stream
    refresh: RefreshPlan

    @property
    def number(self) -> int:
        return self.position.number

    @property
    def time(self) -> float:
        return self.position.time


def enter(streams: Streams, *timestep: float, x: Tensor | None = None, **arguments: Tensor) -> Made:
    """A call that is about to run. Its picture goes on from that of the last call, unless one is given."""
    if x is None:
        x = picture(moved=abs(1 - timestep[0]) / 100 if timestep else 0.0)
    marks = {name: mark(value) for name, value in arguments.items()}
    call = Call(timestep or None, streams, marks, x, torch.is_inference_mode_enabled())
    position = streams.requests.enter(call)
    found = streams.of(position)
    return Made(position, found, streams.refresh_plan(position, found))


def call(streams: Streams, *timestep: float, **brought: Tensor) -> Made:
    """A call that is then run, as the step loop does."""
    made = enter(streams, *timestep, **brought)
    assert all(made.stream.state[spec.name] is not None for spec in SPECS), "read, and so allocated"
    made.stream.note_refreshed(made.refresh, made.number, made.time)
    streams.finished(made.position)
    return made


COND, UNCOND = torch.tensor([3, 4]), torch.tensor([10, 10])


def numbers(positions: list[Made]) -> list[int]:
    return [position.number for position in positions]


def streams(positions: list[Made]) -> list[int]:
    """Streams by the order in which they were first met."""
    known: list[int] = []
    for position in positions:
        if id(position.stream) not in known:
            known.append(id(position.stream))
    return [known.index(id(position.stream)) for position in positions]


def in_thread(function, *args, **kwargs):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args, **kwargs)))
    thread.start()
    thread.join()
    return found[0]


def in_thread_of():
    """Runs calls in a thread that stays the same."""
    pool = ThreadPoolExecutor(1)
    return lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
