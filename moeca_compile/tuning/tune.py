"""The public `tune`: options for one model and one sampling loop, found by measuring."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile._torch_private import compiled_module, dynamo_is_running, forget_code
from moeca_compile.config import MoecaConfig
from moeca_compile.policies import RECIPES as POLICIES
from moeca_compile.policies.policy import SPACED
from moeca_compile.tuned_file import fingerprint
from moeca_compile.tuning.calibrate import tables
from moeca_compile.tuning.measure import Measure, Metric, environment, usual_options
from moeca_compile.tuning.reference import Reference, Sample, reference_runs
from moeca_compile.tuning.rows import Store
from moeca_compile.tuning.search import search
from moeca_compile.tuning.shown import Shown
from moeca_compile.tuning.tuned import Tuned
from moeca_compile.tuning.wish import Wish, wish_of

BELOW = ". The uncached model itself, compiled, is at {0:.1f} dB by rounding alone"
NOT_HELD_UP = (
    "moeca: on the seeds that were held back, the chosen {0!r} is worse than the default candidate {1!r}. Give more "
    "seeds, or look at tuned.frontier"
)
NOT_CALIBRATED = (
    "moeca: no schedule was calibrated: the {0} calls of the model are no whole number for each of {1} steps (give "
    "steps=...), or it returns no floating-point tensor"
)
UNCACHED = "moeca: speed-ups are over an uncached model that is not as fast as it could be: {0}"
SCHEDULED = tuple(recipe for recipe, policy in POLICIES.items() if "schedule" in policy.options)
"""The recipes that can be tried: those with full steps at places that a schedule says."""
UNSCHEDULED = "recipes: {0!r} has no schedule of full steps. tune tries recipes with a schedule: {1}"
RECIPES = ("stack-forecast", "fora-forecast")
"""The recipes that are tried: docs/recipes.md says which model wants which."""
COMPILED = "the model is compiled already: pass the module itself, not what torch.compile returned"
TRAINING = "the model is in training mode: call model.eval() first"
NO_MODULE = "tune(model, ...): the model is a {0}, and must be an nn.Module"
SEEDS = "seeds={0!r}: a number of seeds >= 2, or a list of at least two different whole numbers"
DECIDED = "options={{{0!r}: ...}}: the tuner decides on {0}"
NOT_MET = (
    "moeca: the wish {0}={1:g} was not met. The nearest of what was tried, {2!r}, has a speed-up of {3:.2f} and "
    "{4:.1f} dB; tuned.frontier has the others"
)
_VALUES = 2048
"""So many values of the uncached outputs tell whether a file of rows is of this loop."""
_COMPILATIONS = 64
"""So many times Dynamo may compile the model's code in a tune; it gives up after 8 by itself."""


def tune(
    model: nn.Module,
    sample: Sample,
    *,
    speedup: float | None = None,
    psnr: float | None = None,
    seconds: float | None = None,
    seeds: int | Sequence[int] = 8,
    recipes: Sequence[str] = RECIPES,
    steps: int | None = None,
    metric: Metric | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
) -> Tuned:
    """Find options for this model and this sampling loop, by measuring.

        def sample(model, seed):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            return my_loop(model, noise)

        tuned = moeca_compile.tune(model, sample, speedup=4.0)
        tuned.save("tuned.json")
        fast = torch.compile(model, backend="moeca", options={"tuned": "tuned.json"})

    Runs uncached first, which gives the outputs to come near to, the number of steps, and by the inner products of
    the model's outputs calibrated schedules. Then it measures a dozen candidates, each in turns with the uncached
    model, and takes the best that fits the wish. A quarter of the seeds, at least one, is held back: of what meets
    the wish, what is no worse on them than the default candidate (`stack-forecast`, tapered schedule, corrector)
    goes first; for a wish of quality, meeting the wish on them is enough. What is taken because nothing such is
    there, or because nothing meets the wish, may be worse on them than the default: `Tuned.held_up` and a warning say
    so. Whether the wish is met is not measured again after the choice.

    Args:
        model: the uncompiled model, in eval mode.
        sample: (model, seed) -> outputs [B, ...]: one generation with the model that it is given, compiled or not,
            whose noise depends on the seed alone. It is called without gradients. PSNR is of what it returns: latents
            or, decoded, pictures.
        speedup: wish for a generation so many times faster than uncached; exactly one of this and the next two.
        psnr: wish for so many dB to the uncached outputs, and the fastest that has them.
        seconds: wish for a generation of at most so many seconds.
        seeds: how many, from 0 on, or which.
        recipes: those to try. The first that caches anything in this model is tried in more ways.
        steps: of a generation; None finds them by the model's argument that says the time.
        metric: (outputs, uncached outputs) -> number, the higher the better, in place of the PSNR to choose by.
        options: of all candidates, such as {"max_cache_bytes": ...}; they are saved with the chosen ones.
        progress: show how far it is, where rich is installed and stderr is a terminal; else the log has it.
        resume: a JSON file where each row is kept as soon as it is measured. Started again with the same file, a tune
            goes on where it was.

    Returns the outcome; it warns where nothing that was tried meets the wish. Raises ValueError for wrong arguments,
    outputs that cannot be compared and a `resume` file of another tune, ConfigError for a wrong option, and
    NothingCachedError (a RuntimeError) where no recipe can cache anything.
    """
    wish, names = wish_of(speedup, psnr, seconds), _seeds(seeds)
    _check(model, recipes, options or {}, resume)
    given = _plain(dict(options or {}))
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    held = max(1, len(names) // 4)
    decisive, held_back = names[:-held], names[-held:]
    with Shown(progress) as shown, _compilations_of(model):
        shown.begin("uncached", len(names) + 1)
        known = reference_runs(model, sample, names, decisive, steps, device, shown.advance)
        calibrated = tables(known.gram, known.weights) if known.gram is not None else {}
        store = Store(resume, _subject(model, known, names, given, metric, device), _some(known.outputs.values()))
        measure = Measure(
            model,
            sample,
            known,
            decisive,
            held_back,
            given,
            metric,
            calibrated,
            store,
            device,
            shown,
        )
        try:
            found = search(measure, wish, recipes)
        finally:
            measure.release()
    outcome = Tuned(
        wish={wish.kind: wish.value},
        met=found.met,
        chosen=found.chosen.name,
        default=found.default.name,
        rows=tuple(store.asked.values()),
        steps=known.steps,
        calls=known.calls,
        seeds=decisive,
        held_back=held_back,
        schedules=calibrated[found.kind or next(iter(calibrated))] if calibrated else {},
        model=fingerprint(model),
        environment=environment(model, device),
    )
    for text in _warnings(outcome, wish, known, calibrated, measure.uncached_warnings):
        warnings.warn(text, stacklevel=2)
    return outcome


def _warnings(
    found: Tuned, wish: Wish, known: Reference, calibrated: Mapping[str, Any], uncached: Sequence[str]
) -> Iterator[str]:
    """What the user should know of an outcome."""
    row, floor = found.row, found.uncached_psnr
    if not found.met:
        text = NOT_MET.format(wish.kind, wish.value, row.name, row.speedup, row.psnr)
        yield text + (BELOW.format(floor) if wish.is_quality and floor is not None and floor < wish.value else "")
    if not found.held_up:
        yield NOT_HELD_UP.format(found.chosen, found.default)
    if not calibrated and known.gram is None:
        yield NOT_CALIBRATED.format(known.calls, known.steps)
    if uncached:
        yield UNCACHED.format(uncached[0])


def _check(
    model: Any, recipes: Sequence[str], options: Mapping[str, Any], resume: str | os.PathLike[str] | None
) -> None:
    """Raise what is wrong with the arguments, before any work."""
    if compiled_module(model) is not None:
        raise ValueError(COMPILED)
    if not isinstance(model, nn.Module):
        raise ValueError(NO_MODULE.format(type(model).__name__))
    if model.training:
        raise ValueError(TRAINING)
    if isinstance(recipes, str) or not recipes:
        raise ValueError(f"recipes={recipes!r}: a list of at least one name")
    for name in ("recipe", "tuned", *sorted(SPACED)):
        if name in options:
            raise ValueError(DECIDED.format(name))
    for recipe in recipes:
        MoecaConfig.from_options({"recipe": recipe})
        if recipe not in SCHEDULED:
            raise ValueError(UNSCHEDULED.format(recipe, ", ".join(SCHEDULED)))
        MoecaConfig.from_options({**usual_options(recipe, options), "schedule": {"steps": 2, "full_steps": [0]}})
    place = None if resume is None else Path(resume).expanduser()
    if place is not None and (not place.parent.is_dir() or place.is_dir()):
        raise ValueError(f"resume={os.fspath(place)!r}: name a file in a folder that exists")


@contextmanager
def _compilations_of(model: nn.Module) -> Iterator[None]:
    """Let Dynamo compile a model often, inside. It forgets before and after, else it would not compile any more."""
    config: Any = import_module("torch.compiler.config")
    _forget_compiled(model)  # it may have given up on the model before
    try:
        with config.patch(recompile_limit=_COMPILATIONS):
            yield
    finally:
        _forget_compiled(model)


def _forget_compiled(model: nn.Module) -> None:
    forwards = (inspect.unwrap(type(module).forward) for module in model.modules())
    codes = {code for each in forwards if (code := getattr(each, "__code__", None)) is not None}
    for code in codes if not dynamo_is_running() else ():
        forget_code(code)


def _plain(value: Any) -> Any:
    """Options as JSON has them."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, os.PathLike)) else value


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    wrong = ValueError(SEEDS.format(seeds))
    if isinstance(seeds, bool) or not isinstance(seeds, (int, list, tuple, range)):
        raise wrong
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(found)) != len(found) or len(found) < 2 or not all(type(seed) is int for seed in found):
        raise wrong
    return found


def _subject(
    model: nn.Module,
    known: Reference,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    metric: Metric | None,
    device: torch.device,
) -> dict[str, Any]:
    """What rows depend on, beside the values of the outputs. A metric is known by its name alone."""
    return {
        "model": list(fingerprint(model)),
        "steps": known.steps,
        "seeds": list(seeds),
        "options": dict(options),
        "environment": environment(model, device),
        "shape": list(known.outputs[seeds[0]].shape),
        "metric": _name_of(metric),
    }


def _name_of(metric: Metric | None) -> str | None:
    if metric is None:
        return None
    named: Any = metric if hasattr(metric, "__qualname__") else type(metric)
    return f"{named.__module__}.{named.__qualname__}"


def _some(outputs: Iterable[Tensor]) -> list[float]:
    """At most some thousand values, spread evenly."""
    flat = torch.cat([each.flatten() for each in outputs])
    found: list[float] = flat[:: -(-len(flat) // _VALUES)].tolist()
    return found
