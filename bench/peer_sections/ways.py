"""The ways to sample that are compared on each subject: tools with their settings, in eager and compiled."""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.peer_sections import code
from bench.peer_sections.code import Step
from bench.peer_sections.subjects import Subject
from bench.peer_sections.user_code import lines_of

EAGER, COMPILED = "eager", "torch.compile"
OURS, CACHE_DIT, DIFFUSERS = "moeca_compile", "cache-dit", "diffusers"
Prepare = Callable[..., Any]


@dataclass(frozen=True)
class Way:
    """One way to sample.

    Attributes:
        tool: whose it is.
        prepare: what is done to the model, in order, with settings.
        call: calls the model at a step; None calls it as it is.
        begin: runs before each generation.
        written: the code of the user in `prepare`, where that is more or less than its functions.
        compiled: whether torch.compile is part of it.
        needs: the package that must be installed.
    """

    name: str
    tool: str
    prepare: tuple[Prepare, ...] = ()
    call: Callable[..., Any] | None = None
    begin: Callable[[Any], None] | None = None
    written: tuple[Callable[..., Any], ...] = ()
    compiled: bool = False
    needs: str = "torch"
    settings: str = "defaults"

    @property
    def label(self) -> str:
        return f"{self.name}, compiled" if self.compiled and self.tool not in (OURS, COMPILED) else self.name

    @property
    def lines(self) -> int:
        """Lines of code that its user writes."""
        pieces = [*(self.written or self.prepare), *filter(None, (self.call, self.begin))]
        return lines_of([piece.func if isinstance(piece, partial) else piece for piece in pieces])

    @property
    def missing(self) -> str:
        return "" if find_spec(self.needs) else f"{self.needs.replace('_', '-')} is not installed"


@dataclass
class Running:
    """A way that is set up: called as the model by the sampling loop of its subject."""

    way: Way
    model: Any
    total: int
    step: int = field(default=0)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        at = Step(self.step, 1 - self.step / self.total, self.total)
        self.step += 1
        if self.way.call is None:
            return self.model(*arguments, **named)
        return self.way.call(self.model, at, *arguments, **named)

    def begin(self) -> None:
        self.step = 0
        if self.way.begin is not None:
            self.way.begin(self.model)


def set_up(way: Way, subject: Subject) -> Running:
    model = subject.make()
    for prepare in way.prepare:
        model = prepare(model)
    return Running(way, model, subject.steps)


@torch.no_grad()
def generate(running: Running, subject: Subject, seed: int) -> Tensor:
    running.begin()
    return subject.sample(running, seed)


# --- which ways ---------------------------------------------------------------------------------------------

Groups = Sequence[tuple[Way, ...]]
"""Ways with the same settings, in eager and perhaps compiled. A group is measured together."""


def groups(subject: Subject) -> Groups:
    return [
        (Way(EAGER, EAGER), Way(COMPILED, COMPILED, (code.compiled,), compiled=True)),
        *((each,) for each in ours()),
        *(both(way, code.cache_dit_compiled) for way in cache_dit(subject)),
        *(both(way, code.compiled) for way in hooks(subject)),
    ]


def groups_in_eager(subject: Subject) -> Groups:
    """The same without compilation. Ours runs its steps op by op, which gives its pictures and not its times."""
    unlowered = {"lowering": "eager", "validate": False, "disk_cache": False, "progress": False}
    mine = ((replace(way, prepare=(partial(way.prepare[0], **unlowered),)),) for way in ours())
    theirs = (group[:1] for group in groups(subject)[1:] if group[0].tool != OURS)
    return [(Way(EAGER, EAGER),), *mine, *theirs]


ALSO_COMPILED = (
    "cache-dit DBCache F1B0, threshold, TaylorSeer",
    "FirstBlockCache, threshold",
    "TaylorSeer, whole stack",
    "MagCache, threshold",
    "SeaCache",
)
"""What is measured under torch.compile, too: of each method the settings with fewest full steps."""


def both(way: Way, compile_it: Prepare) -> tuple[Way, ...]:
    if way.name not in ALSO_COMPILED:
        return (way,)
    written = (*(way.written or way.prepare), compile_it)
    return way, replace(way, prepare=(*way.prepare, compile_it), written=written, compiled=True)


def ours() -> list[Way]:
    chosen: list[Mapping[str, Any]] = [{}]
    chosen += [{"sampler": "deterministic", "full_every": every} for every in (3, 4, 6)]
    return [
        Way(
            f"moeca auto{', N = ' + str(options['full_every']) if options else ''}",
            OURS,
            (partial(code.moeca, **options),),
            compiled=True,
            settings=told(options),
        )
        for options in chosen
    ]


def told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "defaults"


_CACHE_DIT = {
    "testbed": code.cache_dit_testbed,
    "hidream": code.cache_dit_hidream,
    "nucleus": code.cache_dit_nucleus,
}
_FIRST = {"Fn_compute_blocks": 1}
_CLOSE: dict[str, float] = {"digits": 0.2, "mnist": 0.2, "hidream": 0.9, "nucleus": 0.59}
"""The threshold of DBCache at which about a quarter of the steps is full."""


def cache_dit(subject: Subject) -> list[Way]:
    """DBCache at its defaults, with one block as the condition, and by steps that are given, with a calibrator."""
    close = _CLOSE[subject.name]
    warm = {"max_warmup_steps": 4, "residual_diff_threshold": close}
    named: dict[str, tuple[dict[str, Any], int]] = {
        "DBCache": ({}, 0),
        "DBCache F1B0": ({**_FIRST}, 0),
        "DBCache F1B0, threshold": ({**_FIRST, **warm}, 0),
        "DBCache F1B0, threshold, TaylorSeer": ({**_FIRST, **warm}, 1),
        "DBCache F1B0, fewer, TaylorSeer": ({**_FIRST, **warm, "residual_diff_threshold": round(1.5 * close, 3)}, 1),
        "DBCache F1B0, fast steps, TaylorSeer": ({**_FIRST, "steps_computation_policy": "static"}, 1),
    }
    return [
        Way(
            f"{CACHE_DIT} {name}",
            CACHE_DIT,
            (partial(_with_cache_dit, _CACHE_DIT[subject.kind], subject.steps, settings, order),),
            begin=code.cache_dit_begin,
            written=(_CACHE_DIT[subject.kind],),
            needs="cache_dit",
            settings=told({**settings, **({"taylorseer_order": order} if order else {})}),
        )
        for name, (settings, order) in named.items()
    ]


def _with_cache_dit(enable: Prepare, steps: int, settings: Mapping[str, Any], order: int, model: Any) -> Any:
    """What needs the package to be written down: the calibrator, and its own choice of steps."""
    import cache_dit

    given = dict(settings)
    if given.get("steps_computation_policy"):
        given["steps_computation_mask"] = cache_dit.steps_mask(mask_policy="fast", total_steps=steps)
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    return enable(model, steps, calibrator, **given)


_KNOWN = {"testbed": code.known_testbed, "hidream": code.known_hidream, "nucleus": code.known_nucleus}
_FIRST_BLOCK = {"hidream": code.first_block_cache_hidream}
_SEA = {"nucleus": code.seacache_tokens}
_WHOLE_STACK = {
    "testbed": {"skip_predict_identifiers": [r"blocks\.\d+"], "cache_identifiers": ["final_layer"]},
    "hidream": {
        "skip_predict_identifiers": [r"(double|single)_stream_blocks\.\d+"],
        "cache_identifiers": ["final_layer"],
    },
    "nucleus": {"use_lite_mode": True},
}
_FIRST_BLOCK_CLOSE: dict[str, float] = {"digits": 0.15, "mnist": 0.2, "hidream": 0.9, "nucleus": 0.59}
_MAG_CLOSE: dict[str, float] = {"digits": 0.2, "mnist": 0.2, "hidream": 0.2, "nucleus": 0.2}


def hooks(subject: Subject) -> list[Way]:
    """The hooks of diffusers at their defaults, and at settings with about a quarter of the steps full."""
    known, kind = _KNOWN[subject.kind], subject.kind
    named = partial(Way, tool=DIFFUSERS, needs="diffusers", begin=code.hooks_begin)
    lists = (code.single_stream_as_layers,) if kind == "hidream" else ()
    first = _FIRST_BLOCK.get(kind, code.first_block_cache)
    close = {"threshold": _FIRST_BLOCK_CLOSE[subject.name]}
    stack = {"cache_interval": 4, "taylor_factors_dtype": torch.float32, **_WHOLE_STACK[kind]}
    mag = {"threshold": _MAG_CLOSE[subject.name], "max_skip_steps": 4, "retention_ratio": 0.1}
    return [
        named("FirstBlockCache", prepare=(known, first), call=code.in_context),
        named(
            "FirstBlockCache, threshold",
            prepare=(known, partial(first, **close)),
            call=code.in_context,
            settings=told(close),
        ),
        named("TaylorSeer", prepare=(code.taylorseer,), call=code.in_context),
        named(
            "TaylorSeer, whole stack",
            prepare=(partial(code.taylorseer, **stack),),
            call=code.in_context,
            settings=told(stack),
        ),
        named(
            "TaylorSeer, whole stack, fewer",
            prepare=(partial(code.taylorseer, **{**stack, "cache_interval": 6}),),
            call=code.in_context,
            settings=told({**stack, "cache_interval": 6}),
        ),
        _mag(subject, named, (known, *lists), {}, "MagCache"),
        _mag(subject, named, (known, *lists), mag, "MagCache, threshold"),
        named(
            "SeaCache",
            prepare=(known, *lists, _SEA.get(kind, code.seacache_pictures)),
            call=code.in_context_with_step,
        ),
    ]


def _mag(subject: Subject, named: Any, known: tuple[Prepare, ...], settings: dict[str, Any], name: str) -> Way:
    prepare = (*known, partial(_with_ratios, subject, known, settings))
    written = (*known, code.magcache_calibration, code.magcache)
    return named(name, prepare=prepare, begin=None, written=written, settings=told(settings))


@torch.no_grad()
def _with_ratios(subject: Subject, known: tuple[Prepare, ...], settings: Mapping[str, Any], model: Any) -> Any:
    """Calibrate on another seed, as its user would, and copy what it prints."""
    other = subject.make()
    for prepare in known:
        other = prepare(other)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        subject.sample(code.magcache_calibration(other, subject.steps), 999)
    ratios = ast.literal_eval(printed.getvalue().strip().splitlines()[-1])
    return code.magcache(model, subject.steps, mag_ratios=ratios, **settings)
