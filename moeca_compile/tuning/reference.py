"""The uncached runs that everything is compared with, and what they show: calls, steps, times, trajectories."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from moeca_compile.runtime.scope import current_time
from moeca_compile.tuning.quality import REPEATABLE, psnr_of_each

Sample = Callable[[Any, int], Tensor]
"""The user's sampling loop: (model, seed) -> outputs [B, ...]."""

NOT_CALLED = (
    "sample(model, seed) never called the model that it was given: call that one, not another of the same name"
)
NO_TENSOR = "sample(model, seed) returned a {0}: let it return a tensor, the first dimension of which counts pictures"
NOT_FINITE = "sample(model, seed={0}) returned values that are not finite, so nothing can be compared with them"
NOT_REPEATED = (
    "sample(model, seed) returned other outputs for the same seed ({0:.0f} dB apart): draw all its noise from "
    "torch.Generator().manual_seed(seed)"
)
NO_SEED = "sample(model, seed) returned the same outputs for all seeds: draw its noise from the seed"
UNEVEN = "generations differ in their calls of the model ({0}): the number of steps must not depend on the seed"
NOT_STEPS = (
    "steps={0} does not fit the {1} calls of the model in a generation: they are no whole number for each step"
)

_MOST = 1 << 16
"""So many elements of each output of the model are kept for inner products, evenly spread."""


@dataclass
class _Generation:
    """What the model was called with and returned, call by call."""

    numbers: list[dict[Any, float]] = field(default_factory=list)
    """The arguments that are one number, or one for each sample (their mean), by place or name."""
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """What uncached runs have shown.

    Attributes:
        outputs: by seed, on the CPU.
        calls, steps: of a generation.
        times: of the steps, where an argument of the model says them.
        gram: [S, S] inner products of the model's outputs by step, summed over seeds; None where calls do not make
            steps.
        data_range: the largest minus the smallest output.
    """

    outputs: Mapping[int, Tensor]
    calls: int
    steps: int
    times: tuple[float, ...] | None
    gram: NDArray[np.float64] | None
    data_range: float

    @property
    def weights(self) -> NDArray[np.float64]:
        """[S] the time that each step takes, of a sum of 1. The last one is like the one before."""
        if self.times is None or self.steps < 3:
            return np.full(self.steps, 1 / self.steps)
        taken = np.abs(np.diff(np.array(self.times)))
        taken = np.append(taken, taken[-1])
        return taken / taken.sum()


def run(sample: Sample, model: Any, seed: int, device: torch.device) -> tuple[Tensor, float]:
    """The outputs of one generation on the CPU, and its wall-clock seconds. Raises ValueError for no outputs."""
    _wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        outputs = sample(model, seed)
    _wait(device)
    seconds = time.perf_counter() - start
    if not isinstance(outputs, Tensor) or not outputs.ndim:
        raise ValueError(NO_TENSOR.format(type(outputs).__name__ if not isinstance(outputs, Tensor) else "number"))
    outputs = outputs.detach().to("cpu", torch.float32, copy=True)  # a loop may fill one buffer again
    return outputs, seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reference_runs(
    model: nn.Module,
    sample: Sample,
    seeds: Sequence[int],
    kept: Sequence[int],
    steps: int | None,
    device: torch.device,
    done: Callable[[], None],
) -> Reference:
    """Run each seed uncached, op by op, and the first one again; `done` is called after each run.

    The trajectories of `kept` seeds go into the inner products.

    Raises ValueError where the outputs are no reference: not finite, not a matter of the seed alone, of generations
    that differ in their steps.
    """
    outputs: dict[int, Tensor] = {}
    found: set[tuple[int, int]] = set()
    gram, times = None, None
    for seed in seeds:
        with _recorded(model, seed in kept) as generation:
            outputs[seed], _ = run(sample, model, seed, device)
        done()
        if not outputs[seed].isfinite().all():
            raise ValueError(NOT_FINITE.format(seed))
        if not generation.numbers:
            raise ValueError(NOT_CALLED)
        calls = len(generation.numbers)
        times = _times(generation.numbers)
        count = steps or (len(times) if times is not None else calls)
        found.add((calls, count))
        if len(found) > 1:
            raise ValueError(UNEVEN.format(" and ".join(f"{a} calls in {b} steps" for a, b in sorted(found))))
        if steps is not None and calls % steps:
            raise ValueError(NOT_STEPS.format(steps, calls))
        if generation.outputs and calls % count == 0:
            inner = _inner_products(generation.outputs, count)
            gram = inner if gram is None else gram + inner
    again, _ = run(sample, model, seeds[0], device)
    done()
    span = torch.cat([each.flatten() for each in outputs.values()])
    data_range = float(span.max() - span.min())
    _check_seeds(outputs, seeds, again, data_range)
    ((calls, count),) = found
    fitting = times if times is not None and len(times) == count else None
    return Reference(outputs, calls, count, fitting, gram, data_range)


def _check_seeds(outputs: Mapping[int, Tensor], seeds: Sequence[int], again: Tensor, data_range: float) -> None:
    first, second = outputs[seeds[0]], outputs[seeds[1]]
    if first.shape == second.shape and torch.equal(first, second):
        raise ValueError(NO_SEED)
    apart = min(psnr_of_each(again, first, data_range)) if again.shape == first.shape else 0.0
    if apart < REPEATABLE:
        raise ValueError(NOT_REPEATED.format(apart))


@contextmanager
def _recorded(model: nn.Module, outputs: bool) -> Iterator[_Generation]:
    """Record the calls of a model inside; its outputs only where they are asked for."""
    generation = _Generation()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        first = _first_tensor(result)
        samples = len(first) if first is not None and first.ndim else 1
        given = [*enumerate(args), *kwargs.items()]
        numbers = {name: number for name, value in given if (number := _number(value, samples)) is not None}
        marked = current_time()
        generation.numbers.append(numbers if marked is None else {"marked": marked})
        if outputs and first is not None:
            generation.outputs.append(_spread(first))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield generation
    finally:
        handle.remove()


def _first_tensor(result: Any) -> Tensor | None:
    """The first floating-point tensor of what a model returns: a tensor, a tuple, a dict, or an object of these."""
    if isinstance(result, Tensor):
        return result if result.is_floating_point() else None
    if isinstance(result, Mapping):
        result = list(result.values())
    elif is_dataclass(result):
        result = [getattr(result, each.name) for each in fields(result)]
    if isinstance(result, (tuple, list)):
        return next((found for each in result if (found := _first_tensor(each)) is not None), None)
    return None


def _number(value: Any, samples: int) -> float | None:
    """A number, or the mean of a tensor with one for all samples or one for each."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.dtype is not torch.bool and value.numel() in (1, samples):
        return float(value.detach().double().mean()) if not value.is_complex() else None
    return None


def _spread(output: Tensor) -> Tensor:
    flat = output.detach().flatten()
    return flat[:: -(-flat.numel() // _MOST)].to("cpu", torch.float32)


def _times(calls: Sequence[Mapping[Any, float]]) -> tuple[float, ...] | None:
    """The times of the steps: of the arguments that go on in one direction, the one that changes most often."""
    names = [name for name in calls[0] if all(name in call for call in calls)]
    series = [[value for value, _ in groupby(call[name] for call in calls)] for name in names]
    moving = [values for values in series if len(values) > 1 and _monotone(values)]
    best = max(moving, key=len, default=None)
    return None if best is None else tuple(best)


def _monotone(values: Sequence[float]) -> bool:
    steps = [later - now for now, later in pairwise(values)]
    return all(step > 0 for step in steps) or all(step < 0 for step in steps)


def _inner_products(outputs: Sequence[Tensor], steps: int) -> NDArray[np.float64]:
    """[S, S] of one trajectory; the calls of one step count as one output."""
    each = len(outputs) // steps
    rows = torch.stack([torch.cat([*outputs[i * each : (i + 1) * each]]) for i in range(steps)]).double()
    found: NDArray[np.float64] = (rows @ rows.T).numpy()
    return found
