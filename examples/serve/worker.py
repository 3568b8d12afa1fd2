"""Requests wait in a bounded queue; one thread samples them in batches of one shape.

A batch takes requests with the same number of steps, since its rows share timesteps and full steps. Rows that are
left are filled with pictures that nobody asked for, so that one shape is all that is compiled. Nobody joins a batch
that has begun: its caches hold what the rows computed at earlier steps.

A few batches run at a time, and the thread takes one step of each in turn. So a short request ends soon beside a long
one, at the price of a set of caches for each batch. Which batch a step belongs to is told by its handle.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from queue import Full
from statistics import median
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

import moeca_compile
from examples.digits.testbed import DIGITS
from examples.testbed.sampling import NULL_CLASS, guided_velocity, make_scheduler

logger = logging.getLogger("uvicorn.error")
WARMUP_STEPS = 20


@dataclass(eq=False)
class Request:
    """One picture. `send` gets previews and then a last line, with `picture` or `error`, in the worker's thread."""

    label: int
    seed: int
    steps: int
    guidance: float
    previews: int
    """A preview after every so many steps; 0: none."""
    send: Callable[[dict[str, Any]], None]
    id: str = field(default_factory=lambda: uuid4().hex)
    since: float = field(default_factory=time.monotonic)


def nobody(steps: int) -> Request:
    """What fills the rows of a batch that are left."""
    return Request(NULL_CLASS, seed=0, steps=steps, guidance=1.0, previews=0, send=lambda _: None)


def sampled(model: nn.Module, requests: Sequence[Request], rows: int) -> Generator[Tensor]:
    """Yields the pictures [rows, 1, 8, 8], the first ones those of `requests`, after each Euler step.

    The batch has caches of its own until the last step, or until the iterator is closed.
    """
    steps, device = requests[0].steps, next(model.parameters()).device
    filled = [*requests, *[nobody(steps)] * (rows - len(requests))]
    noise = [torch.randn(DIGITS.image_shape, generator=torch.Generator().manual_seed(each.seed)) for each in filled]
    x = torch.stack(noise).to(device)  # [B, 1, 8, 8]
    labels = torch.tensor([each.label for each in filled], device=device)  # [B]
    guidance = torch.tensor([each.guidance for each in filled], device=device)[:, None, None, None]
    scheduler, handle = make_scheduler("euler", steps), moeca_compile.generation(model, steps=steps)
    try:
        for timestep, time_ in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
            with handle, torch.no_grad():
                velocity = guided_velocity(model, x, time_, labels, guidance)
            x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
            yield x
    finally:
        handle.close()


@dataclass(eq=False)
class Batch:
    requests: Sequence[Request]
    pictures: Generator[Tensor]
    done: int = 0
    """Steps that were taken."""


class Worker:
    """Samples by a compiled model: `rows` pictures a batch, `batches` in turns, and up to `queue` requests wait."""

    def __init__(self, model: nn.Module, rows: int = 4, batches: int = 2, queue: int = 32) -> None:
        self.model, self.rows, self.batches, self.queue = model, rows, batches, queue
        self._changed = threading.Condition()
        self._open: dict[str, Request] = {}
        """Requests that have not got their last line, by id: those that wait and those in a batch."""
        self._waiting: deque[Request] = deque()
        self._running: list[Batch] = []
        """Of the thread alone."""
        self._ended: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=1000)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="sampling", daemon=True)

    def start(self) -> None:
        """Compile everything, then take requests."""
        for _ in sampled(self.model, [nobody(WARMUP_STEPS)], self.rows):
            pass
        self._thread.start()

    def stop(self) -> None:
        """End all requests and the thread. Returns when it has ended. Again is no error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, request: Request) -> None:
        """Raises Full."""
        with self._changed:
            if len(self._waiting) >= self.queue or self._stopping:
                self._ended["refused"] += 1
                raise Full
            self._open[request.id] = request
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, id: str) -> bool:
        """End a request, wherever it is. False if there is none that waits or runs."""
        request = self._open.get(id)
        return request is not None and self._end(request, "cancelled", {"error": "cancelled"})

    def usual_seconds(self) -> float:
        """The median of the last requests, from their arrival on; 1 before the first has ended."""
        with self._changed:
            return median(self._seconds or [1.0])

    def report(self) -> dict[str, Any]:
        found = moeca_compile.report(self.model)
        with self._changed:
            ended = {how: self._ended[how] for how in ("done", "cancelled", "failed", "refused")}
            seconds = sorted(self._seconds or [0.0])
            return {
                "waiting": len(self._waiting),
                "running": len(self._open) - len(self._waiting),
                **ended,
                "median_seconds": round(median(seconds), 3),
                "95th_seconds": round(seconds[int(0.95 * len(seconds))], 3),
                "cache_bytes": found.cache_bytes,
                "steps": found.steps,
                "warnings": found.warnings,
            }

    def _end(self, request: Request, how: str, line: dict[str, Any]) -> bool:
        """Send a request's last line, unless it has ended before."""
        with self._changed:
            if self._open.pop(request.id, None) is None:
                return False
            if request in self._waiting:
                self._waiting.remove(request)
            self._ended[how] += 1
            if how == "done":
                self._seconds.append(time.monotonic() - request.since)
        request.send(line)
        return True

    def _run(self) -> None:
        while self._admit():
            self._running = [batch for batch in self._running if self._advance(batch)]
        for batch in self._running:
            batch.pictures.close()
        for request in list(self._open.values()):
            self._end(request, "failed", {"error": "the service is stopping: ask again later"})

    def _admit(self) -> bool:
        """Begin batches while there is room; wait where there is nothing to do. False when the service stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            while self._waiting and len(self._running) < self.batches:
                steps = self._waiting[0].steps
                chosen = [request for request in self._waiting if request.steps == steps][: self.rows]
                for request in chosen:
                    self._waiting.remove(request)
                self._running.append(Batch(chosen, sampled(self.model, chosen, self.rows)))
            return not self._stopping

    def _advance(self, batch: Batch) -> bool:
        """Take a batch's next step. False after its last, after an error, and where nobody waits for it any more."""
        if not any(request.id in self._open for request in batch.requests):
            batch.pictures.close()
            return False
        try:
            pictures = next(batch.pictures)
        except Exception as error:
            logger.exception("a batch failed")
            for request in batch.requests:
                self._end(request, "failed", {"error": f"sampling failed: {error!r}"})
            return False
        batch.done += 1
        for request, picture in zip(batch.requests, pictures, strict=False):
            self._show(request, batch.done, picture)
        return batch.done < batch.requests[0].steps

    def _show(self, request: Request, done: int, picture: Tensor) -> None:
        """Send the picture [1, 8, 8] after `done` steps, if it is the last or a preview that was asked for."""
        if done == request.steps:
            self._end(request, "done", {"step": done, "picture": picture[0].tolist()})
        elif request.previews and done % request.previews == 0 and request.id in self._open:
            request.send({"step": done, "preview": picture[0].tolist()})
