"""Measuring candidates: each compiled once, timed in turns with the uncached model, compared from the same seeds."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.config import MoecaConfig
from moeca_compile.options import ConfigError
from moeca_compile.reporting.collect import report
from moeca_compile.reporting.found import record_of
from moeca_compile.reporting.report import Report
from moeca_compile.runtime.record import forget
from moeca_compile.runtime.schedule import CURVED, power_steps
from moeca_compile.tuned_file import versions
from moeca_compile.tuning import reference as runs
from moeca_compile.tuning.quality import BEST, psnr_of_each, ssim
from moeca_compile.tuning.reference import Reference, Sample
from moeca_compile.tuning.rows import Row, Store
from moeca_compile.tuning.shown import Shown

Metric = Callable[[Tensor, Tensor], float]
"""(outputs, uncached outputs) -> a number, the higher the better."""

ROUNDS = 3
"""So many generations of each candidate are timed, in turns with the uncached model. All of its generations count for
the median of its seconds."""
_EXPONENT = MoecaConfig().schedule_exponent
"""Of the schedules that have one: what the option is by default."""
_OF_UNCACHED = ("lowering", "validate", "tolerance", "cuda_graphs", "disk_cache", "dynamic_batch", "max_shapes")
"""The options of candidates that the uncached model has, too."""
_OF_ALL = {"progress": False, "background": False}
"""Nothing that is timed may run before it is compiled."""
CACHED_NOTHING = "all its steps were full: {0}"
FAILED = "a cached step failed, and the rest ran uncached: {0}"
NOT_COMPARABLE = "its outputs were not finite, or of another shape than the uncached ones"
_WORST = {
    "psnr": -BEST,
    "psnr_worst": -BEST,
    "held_back_psnr": -BEST,
    "ssim": None,
    "metric": None,
    "held_back_metric": None,
}
_NO_REASON = "see moeca_compile.report"


@dataclass(frozen=True)
class Candidate:
    """One way to cache.

    Attributes:
        schedule: "uniform", "power", "tapered", or a kind of calibrated schedule.
        full: how many steps are full.
        more: other options, with the words that name them.
    """

    recipe: str
    schedule: str
    full: int
    more: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def name(self) -> str:
        return ", ".join([self.recipe, f"{self.schedule} {self.full}", *(words for words, _ in self.more)])


class Measure:
    """Measures candidates of one model.

    Args:
        model, sample, metric: the user's.
        known: the uncached runs.
        seeds, held_back: those that decide, and those that check the decision.
        options: of all candidates.
        tables: the calibrated schedules, by kind and number of full steps.
        store: where rows go.
        shown: says how far it is.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sample,
        known: Reference,
        seeds: Sequence[int],
        held_back: Sequence[int],
        options: Mapping[str, Any],
        metric: Metric | None,
        tables: Mapping[str, Mapping[int, tuple[int, ...]]],
        store: Store,
        device: torch.device,
        shown: Shown,
    ) -> None:
        self.model, self.sample, self.known, self.metric = model, sample, known, metric
        self.seeds, self.held_back, self.options, self.tables = seeds, held_back, options, tables
        self.store, self.device, self.shown = store, device, shown
        self.uncached_warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.known.steps

    @cached_property
    def uncached(self) -> Any:
        """The uncached model as one graph, compiled and run once."""
        chosen = {name: self.options[name] for name in _OF_UNCACHED if name in self.options}
        options = {"recipe": "none", **chosen, **_OF_ALL}
        compiled = torch.compile(self.model, backend="moeca", options=options)
        vars(self)["uncached"] = compiled  # so that it is released also where its first run fails
        self.shown.begin("compile the uncached model", 1)
        self._run(compiled, self.seeds[0])
        self.uncached_warnings = report(compiled).warnings
        return compiled

    def release(self) -> None:
        """Drop the compiled uncached model."""
        if "uncached" in vars(self):
            _release(vars(self).pop("uncached"))

    def options_of(self, candidate: Candidate) -> dict[str, Any]:
        """The options of a candidate, in plain values."""
        if candidate.schedule == "uniform":
            listed = power_steps(self.steps, candidate.full, 1.0)
        elif candidate.schedule in CURVED:
            listed = CURVED[candidate.schedule](self.steps, candidate.full, _EXPONENT)
        else:
            listed = self.tables[candidate.schedule][candidate.full]
        found = usual_options(candidate.recipe, self.options)
        found["schedule"] = {"steps": self.steps, "full_steps": list(listed)}
        for _, more in candidate.more:
            found |= more
        return found

    def row(self, candidate: Candidate) -> Row:
        """What is known of a candidate; measured now if it was not before."""
        options = self.options_of(candidate)
        known = self.store.known(candidate.name, options)
        if known is None:
            alike = self.store.alike(options)
            known = self._measured(candidate, options) if alike is None else replace(alike, name=candidate.name)
            self.store.add(known)
            figures = f"{known.speedup:.2f} times as fast, {known.psnr:.1f} dB"
            self.shown.say(f"{known.name}: {known.note or figures}")
        return known

    def _measured(self, candidate: Candidate, options: dict[str, Any]) -> Row:
        uncached = self.uncached
        rounds = self.seeds[:ROUNDS]
        self.shown.begin(candidate.name, 1 + len(rounds) + len(self.seeds) + len(self.held_back))
        compiled = torch.compile(self.model, backend="moeca", options={**options, **_OF_ALL})
        outputs, times, uncached_outputs, uncached_times = {}, [], {}, []
        with _released(compiled):
            first = self._run(compiled, self.seeds[0])[1]
            for seed in (*self.seeds, *self.held_back):
                if seed in rounds:
                    uncached_outputs[seed], seconds = self._run(uncached, seed)
                    uncached_times.append(seconds)
                outputs[seed], seconds = self._run(compiled, seed)
                times.append(seconds)
            found = report(compiled)
            note = self._note(compiled, found, outputs)
        return Row(
            name=candidate.name,
            options=options,
            full_steps=candidate.full,
            seconds=median(times),
            uncached_seconds=median(uncached_times),
            speedup=median(slow / fast for slow, fast in zip(uncached_times, times, strict=False)),
            times=tuple(times),
            uncached_times=tuple(uncached_times),
            compile_seconds=max(0.0, first - median(times)),
            flops_speedup=found.flops.speedup if found.flops is not None else None,
            cache_bytes=found.planned_cache_bytes,
            **(self._qualities(outputs) if self._comparable(outputs) else _WORST),
            environment=environment(self.model, self.device),
            note=note,
            warnings=found.warnings,
            uncached_psnr=self._psnr(uncached_outputs) if self._comparable(uncached_outputs) else None,
        )

    def _note(self, compiled: Any, found: Report, outputs: Mapping[int, Tensor]) -> str:
        """Why a candidate cannot be chosen, "" where it can."""
        reason = found.warnings[-1] if found.warnings else _NO_REASON
        record = record_of(compiled)
        if record is not None and any(engine.failed for engine in record.engines):
            return FAILED.format(reason)
        if all(kind == "full" for kind in found.steps):
            return CACHED_NOTHING.format(found.warnings[0] if found.warnings else _NO_REASON)
        return "" if self._comparable(outputs) else NOT_COMPARABLE

    def _psnr(self, outputs: Mapping[int, Tensor]) -> float:
        wanted, span = self.known.outputs, self.known.data_range
        return fmean(value for seed in outputs for value in psnr_of_each(outputs[seed], wanted[seed], span))

    def _comparable(self, outputs: Mapping[int, Tensor]) -> bool:
        wanted = self.known.outputs
        return all(each.shape == wanted[seed].shape and each.isfinite().all() for seed, each in outputs.items())

    def _run(self, model: Any, seed: int) -> tuple[Tensor, float]:
        found = runs.run(self.sample, model, seed, self.device)
        self.shown.advance()
        return found

    def _qualities(self, outputs: Mapping[int, Tensor]) -> dict[str, Any]:
        wanted, span = self.known.outputs, self.known.data_range
        by_seed = {seed: psnr_of_each(outputs[seed], wanted[seed], span) for seed in outputs}
        metrics: dict[int, float] = {}
        if self.metric is not None:
            metrics = {seed: float(self.metric(outputs[seed], wanted[seed])) for seed in outputs}
        decisive = [value for seed in self.seeds for value in by_seed[seed]]
        return {
            "psnr": fmean(decisive),
            "psnr_worst": min(decisive),
            "held_back_psnr": fmean(value for seed in self.held_back for value in by_seed[seed]),
            "ssim": ssim([outputs[s] for s in self.seeds], [wanted[s] for s in self.seeds], span),
            "metric": fmean(metrics[seed] for seed in self.seeds) if metrics else None,
            "held_back_metric": fmean(metrics[seed] for seed in self.held_back) if metrics else None,
        }


def usual_options(recipe: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The user's options with a recipe, and the corrector where the recipe takes it."""
    plain, corrected = {"recipe": recipe, **options}, {"recipe": recipe, "corrector": True, **options}
    try:
        MoecaConfig.from_options(corrected)
    except ConfigError as error:
        return plain if error.field == "corrector" and "corrector" not in options else corrected
    return corrected


def _release(compiled: Any) -> None:
    """Drop what is known of a compiled model."""
    record = record_of(compiled)
    if record is not None:
        forget(record)


@contextmanager
def _released(compiled: Any) -> Iterator[None]:
    """Release a compiled candidate after the block, also where it fails."""
    try:
        yield
    finally:
        _release(compiled)


def environment(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What a measurement depends on beside the model."""
    on_gpu = device.type == "cuda"
    dtypes = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "python": platform.python_version(),
        **versions(),
    }
