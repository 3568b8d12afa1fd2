"""`moeca bench`: the user's model and sampling function, with each recipe beside plain torch.compile and eager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.command import ways
from moeca_compile.command.env import environment
from moeca_compile.command.given import Recipes
from moeca_compile.command.likeness import Likeness, likeness, pictures
from moeca_compile.command.named import CommandError, called, function_named, raised
from moeca_compile.command.own_code import with_own_code
from moeca_compile.command.ways import Sample, Way

NO_MODEL = "{0} returned a {1}. Let it return the model, an nn.Module"
NO_SAMPLE = "{0}{1} cannot be called as sample(model, seed). Let it take these two and return the result, a tensor"
NO_TENSOR = "{0} returned a {1}. Let it return the result of one generation, a tensor"
NOT_CALLED = (
    "{0} never called the model that it was given, so nothing can be compared. Call its first argument at each step "
    "in place of a model of its own"
)
DIFFERS = (
    "two calls of {0} with seed {1} returned different results, so nothing can be compared. Draw all random numbers "
    "from torch.Generator().manual_seed(seed), and change nothing that the next call reads"
)
NOT_FINITE = (
    "{0} returned values that are not finite for seed {1}, so nothing can be compared. The uncached model does that "
    "by itself; float16 overflows where bfloat16 does not (--dtype)"
)
NO_PICTURES = (
    "--picture: {0} returned values of the shape {1}. Let it return pictures, (batch, channels, height, width) with "
    "1 or 3 channels, or leave out --picture"
)
STILL_COMPILING = (
    "something was compiled in each of {0} runs of a generation, and the last one counts: its time is too long"
)
NO_COPY = "the model cannot be copied for each way to run it: it {0}"


@dataclass(frozen=True)
class Subject:
    """What is compared: a model on its device, and what samples from it."""

    model: nn.Module
    sample: Sample
    name: str
    seeds: tuple[int, ...]
    recipes: Recipes
    device: torch.device


@dataclass(frozen=True)
class Row:
    """What was measured of one way to sample.

    Attributes:
        options: of the recipe; empty where nothing is cached.
        first_seconds: of the first generation, with nearly all compilation.
        later_compile_seconds: of compilation in later ones, which were run again.
        seconds: of a generation, the median over seeds.
        over_compile, over_eager: median over seeds of the seconds of plain torch.compile, or of eager, over these.
        likeness: to the results of eager; None where there are none.
        calls: of the model in one generation by kind of step, a mean over seeds.
        cache_bytes: the most that all caches took after a generation, and at least those of one stream.
        peak_bytes: the most that a generation took beside the weights; None where the device does not say.
        remarks: what went wrong, and all warnings.
    """

    name: str
    options: Mapping[str, Any]
    first_seconds: float
    later_compile_seconds: float
    seconds: float | None
    over_compile: float | None
    over_eager: float | None
    likeness: Likeness | None
    calls: Mapping[str, float]
    cache_bytes: int
    peak_bytes: int | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured on.

    Attributes:
        shape, dtype: of the result of one generation.
        results: of each way that ran to the end, a tensor a seed, on the CPU.
    """

    model: str
    parameters: int
    shape: tuple[int, ...]
    dtype: str
    device: str
    seeds: tuple[int, ...]
    machine: Mapping[str, str]
    rows: tuple[Row, ...]
    results: Mapping[str, Sequence[Tensor]]


def subject_named(
    factory: str, sample: str, seeds: tuple[int, ...], recipes: Recipes, device: torch.device, dtype: str | None
) -> Subject:
    """The model that `factory` makes, in eval mode, on the device and in the dtype, and what samples from it.

    Raises CommandError where a name leads nowhere, a function raises, or returns something else.
    """
    function_named(factory)
    function = function_named(sample)
    try:
        inspect.signature(function).bind(None, seeds[0])
    except TypeError as error:
        raise CommandError(NO_SAMPLE.format(sample, inspect.signature(function))) from error
    except ValueError:  # nothing says what it takes
        pass
    with torch.device(device), torch.no_grad():
        made = called(factory)
    model = made[0] if isinstance(made, tuple) and len(made) == 2 else made  # as for `moeca explain`
    if not isinstance(model, nn.Module):
        raise CommandError(NO_MODEL.format(factory, type(model).__name__))
    model = model.to(device, getattr(torch, dtype) if dtype else None).eval()
    try:
        with_own_code(model)
    except Exception as error:
        raise CommandError(NO_COPY.format(raised(error))) from error
    return Subject(model, function, sample, seeds, recipes, device)


def compare(subject: Subject, say: Callable[[str], None], need_pictures: bool = False) -> Comparison:
    """Run all ways: each once, which compiles it, then all in turns, once a seed.

    Args:
        say: gets a line on what was done, and how long it took.
        need_pictures: whether results must be pictures.

    Raises CommandError where sampling from the model as it is fails, or gives nothing that can be compared.
    """
    eager = ways.eager(subject.model)
    calls = _try_out(eager, subject, need_pictures)
    say(f"{eager.name}: first generation in {eager.first_seconds:.1f} s")
    found = [eager, ways.compiled_plainly(subject.model)]
    found += [ways.compiled_with(subject.model, name, options) for name, options in subject.recipes.items()]
    for way in found[1:]:
        ways.warm_up(way, subject.sample, subject.seeds[0], subject.device)
        say(f"{way.name}: " + (way.failure or f"first generation in {way.first_seconds:.1f} s"))
    for seed in subject.seeds:
        for way in found:
            if not way.failure:
                ways.timed(way, subject.sample, seed, subject.device)
        say(f"seed {seed}: timed")
    if eager.failure:
        raise CommandError(f"{subject.name} {eager.failure}")
    return _comparison(found, calls, subject)


def _try_out(eager: Way, subject: Subject, need_pictures: bool) -> int:
    """Sample twice from the same seed. Returns the calls of the model in one generation."""
    seed = subject.seeds[0]
    try:
        with ways.counted_calls(eager.model) as calls:
            result, eager.first_seconds = ways.generation(eager, subject.sample, seed, subject.device)
        if not isinstance(result, Tensor):
            raise CommandError(NO_TENSOR.format(subject.name, type(result).__name__))
        if not calls():
            raise CommandError(NOT_CALLED.format(subject.name))
        if need_pictures and pictures(result) is None:
            raise CommandError(NO_PICTURES.format(subject.name, tuple(result.shape)))
        if not result.isfinite().all():
            raise CommandError(NOT_FINITE.format(subject.name, seed))
        result = result.detach().clone()  # the next call may fill the same buffer
        again, _ = ways.generation(eager, subject.sample, seed, subject.device)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(f"{subject.name} {raised(error)}") from error
    if result.shape != again.shape or not _close(again, result):
        raise CommandError(DIFFERS.format(subject.name, seed))
    return calls()


def _close(found: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ by no more than what kernels do that sum in any order, 1 % of their size."""
    error, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    return bool(torch.equal(found, wanted) or error <= 0.01 * size)


def _comparison(found: Sequence[Way], calls: int, subject: Subject) -> Comparison:
    eager, compiled = found[0], found[1]
    rows = tuple(_row(way, eager, compiled, calls) for way in found)
    return Comparison(
        model=type(subject.model).__name__,
        parameters=sum(weight.numel() for weight in subject.model.parameters()),
        shape=tuple(eager.results[0].shape),
        dtype=str(next(subject.model.parameters(), eager.results[0]).dtype).removeprefix("torch."),
        device=str(subject.device),
        seeds=subject.seeds,
        machine=environment(),
        rows=rows,
        results={way.name: way.results for way in found if not way.failure},
    )


def _row(way: Way, eager: Way, compiled: Way, calls: int) -> Row:
    report, seeds = way.report, len(eager.results)
    ran, near = not way.failure, None
    if ran and way is not eager:
        near = likeness(way.results, eager.results)
    remarks = [way.failure] if way.failure else []
    remarks += [STILL_COMPILING.format(ways.AGAIN + 1)] if way.still_compiling else []
    remarks += [*(report.warnings if report else ()), *(near.remarks if near else ())]
    return Row(
        name=way.name,
        options=dict(way.options or {}),
        first_seconds=way.first_seconds,
        later_compile_seconds=way.later_compile_seconds,
        seconds=median(way.seconds) if ran else None,
        over_compile=_speedup(compiled, way),
        over_eager=_speedup(eager, way),
        likeness=near,
        calls={kind: number / seeds for kind, number in way.steps.items()} if report else {"": calls},
        cache_bytes=max(way.cache_bytes, report.planned_cache_bytes) if report else 0,
        peak_bytes=(way.held_bytes or 0) + way.peak_bytes if ran and way.peak_bytes is not None else None,
        remarks=tuple(remarks),
    )


def _speedup(slow: Way, fast: Way) -> float | None:
    """The median of ratios of generations from the same seed."""
    if slow.failure or fast.failure:
        return None
    return median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))
