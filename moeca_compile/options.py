"""The options of `torch.compile(model, backend="moeca", options={...})`: each with its check, default and
documentation.

`config.MoecaConfig` fills in the recipe's values and rejects options that the recipe ignores.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from moeca_compile import tuned_file
from moeca_compile.tuned_file import Calibrated, TunedFor

CACHE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET"})()

Check = Callable[[Any], Any]  # returns the value in its normal form; raises NotAllowedError


class ConfigError(ValueError):
    """An unknown option, a value that is not allowed, or an option that the recipe ignores.

    `field`, `value` and `reason` are the parts of the message.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(f"moeca option {field!r} = {value!r}: {reason}")


class NotAllowedError(ValueError):
    """Raised by a check; its message says what is allowed."""


def one_of(*names: str, formerly: Mapping[str, str] | None = None) -> Check:
    """One of `names`; `formerly` maps old names, which are still accepted, to current ones."""

    def check(value: Any) -> str:
        if formerly and isinstance(value, str):
            value = formerly.get(value, value)
        if not isinstance(value, str) or value not in names:
            raise NotAllowedError(" | ".join(repr(name) for name in names))
        return value

    return check


def whole(minimum: int, maximum: float = math.inf) -> Check:
    allowed = f">= {minimum}" if maximum == math.inf else f"from {minimum} to {maximum}"

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or not minimum <= int(value) <= maximum:
            raise NotAllowedError(f"a whole number {allowed}")
        return int(value)

    return check


def real(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> Check:
    """A finite number between `low` and `high`; an open end is itself not allowed."""
    ends = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high or high == math.inf else ']'}"

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise NotAllowedError(f"a finite number in {ends}")
        number = float(value)
        below = number <= low if open_low else number < low
        above = number >= high if open_high else number > high
        if below or above:
            raise NotAllowedError(f"a finite number in {ends}")
        return number

    return check


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise NotAllowedError("True | False")
    return value


def optional(inner: Check) -> Check:
    def check(value: Any) -> Any:
        try:
            return None if value is None else inner(value)
        except NotAllowedError as error:
            raise NotAllowedError(f"None or {error}") from None

    return check


def each(inner: Check) -> Check:
    """A list or tuple whose items all pass `inner`; returned as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise NotAllowedError("a list or tuple")
        try:
            return tuple(inner(item) for item in value)
        except NotAllowedError as error:
            raise NotAllowedError(f"a list or tuple, each item {error}") from None

    return check


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotAllowedError("a name")
    return value


def folder(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise NotAllowedError("the path of a folder")
    path = os.path.abspath(os.path.expanduser(os.fspath(value)))
    if "\0" in path:
        raise NotAllowedError("the path of a folder")
    return path


def step_list(value: Any) -> tuple[int, ...]:
    steps = tuple(sorted(set(each(whole(0))(value))))
    if 0 not in steps:
        raise NotAllowedError(
            "a list or tuple of step numbers that contains 0, since a generation starts with a full step"
        )
    return steps


SCHEDULES = ("uniform", "power", "tapered", "toca")
WITH_EXPONENT = ("power", "tapered")
"""Those that schedule_exponent is for."""


def full_step_schedule(value: Any) -> str | Calibrated:
    """A name, a schedule, or the path of a file that has one for each `full_every` (`MoecaConfig` reads it)."""
    allowed = f"{' | '.join(map(repr, SCHEDULES))}, or the path of a file in '.json' that moeca_compile.tune wrote"
    if isinstance(value, (Calibrated, Mapping)):
        try:
            return tuned_file.calibrated(value)
        except (KeyError, TypeError, ValueError) as error:
            raise NotAllowedError(f"{allowed} ({error})") from None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise NotAllowedError(allowed)
    name = os.fspath(value)
    if name not in SCHEDULES and not name.endswith(".json"):
        raise NotAllowedError(allowed)
    return name


def tuned_options(value: Any) -> TunedFor | None:
    """The options of a file, with what they were tuned for."""
    allowed = "None, or the path of a JSON file that moeca_compile.tune wrote"
    if value is None or isinstance(value, TunedFor):
        return value
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise NotAllowedError(allowed)
    try:
        return tuned_file.tuned_for(value)
    except ValueError as error:
        raise NotAllowedError(f"{allowed}; {error}") from None


def polynomial(value: Any) -> tuple[float, ...]:
    coefficients = each(real(-math.inf))(value)
    if not coefficients:
        raise NotAllowedError("a list or tuple of at least one finite number")
    return coefficients


def magnitudes(value: Any) -> tuple[float, ...] | None:
    """Ratios as numbers, or from a JSON file that lists them."""
    if value is None:
        return None
    allowed = (
        "None, a list or tuple of at least two positive numbers (one for each step, the first is 1), or the path of "
        "a JSON file with such a list: without this option, report(model).magnitude_ratios has it after a generation"
    )
    found, kind = value, real(0, open_low=True)
    if isinstance(value, (str, os.PathLike)):
        try:
            with open(os.path.expanduser(os.fspath(value)), encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError) as error:
            raise NotAllowedError(f"{allowed} ({error})") from None
    try:
        ratios = each(kind)(found)
    except NotAllowedError:
        raise NotAllowedError(allowed) from None
    if len(ratios) < 2:
        raise NotAllowedError(allowed)
    return ratios


def capacity_buckets(value: Any) -> tuple[float, ...]:
    buckets = each(real(0, 1, open_low=True))(value)
    ascending = all(low < high for low, high in itertools.pairwise(buckets))
    if not buckets or not ascending or buckets[-1] != 1.0:
        raise NotAllowedError("ascending fractions in (0, 1] that end in 1.0")
    return buckets


def cache_bytes(value: Any) -> int | str | None:
    if value is None or value == "auto":
        return value
    try:
        return int(whole(0)(value))
    except NotAllowedError as error:
        raise NotAllowedError(f"None, 'auto' or {error}") from None


def activation_dtype(value: Any) -> torch.dtype | None:
    dtype = CACHE_DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in (None, *CACHE_DTYPES.values()):
        raise NotAllowedError("None or " + " | ".join(f"torch.{name}" for name in CACHE_DTYPES))
    return dtype


def setting(default: Any, check: Check, group: str, doc: str) -> Any:
    """An option. Where the user leaves it unset, it has the recipe's value, or else `default`."""
    metadata = {"default": default, "check": check, "group": group, "doc": " ".join(doc.split())}
    return dataclasses.field(default=UNSET, metadata=metadata)


SCHEDULE, THRESHOLD, SCORE = "Schedule", "Threshold, equations 10 and 12", "Score, equation 9"
DECISIONS = "Steps decided by the data"
REUSE, STATE, COMPILATION = (
    "Reuse, equation 8 and section 4.1",
    "Static shapes and state",
    "Compilation and validation",
)


@dataclass(frozen=True)
class Options:
    """The user's options, one field each. A field's metadata holds its default, check, group and documentation.

    Equation numbers are those of the MoECa paper, section 4. A *branch* is one (token, expert) pair; a *slot* of the
    cache holds one of a token's k branches. Steps count from 0 in each generation.
    """

    recipe: str = dataclasses.field(default=UNSET, metadata={"default": "auto"})
    tuned: TunedFor | None = setting(
        None,
        tuned_options,
        SCHEDULE,
        """The file that moeca_compile.tune(...).save(path) wrote: all options come from it, but for those that are
        given beside it. A model of another structure is an error; other versions and numbers of steps are warned
        of.""",
    )
    full_every: int = setting(4, whole(1), SCHEDULE, "A full step every N steps (N in the paper).")
    full_steps: tuple[int, ...] | None = setting(
        None,
        optional(step_list),
        SCHEDULE,
        """The numbers of the full steps, in place of full_every. Must contain 0. All other steps are cache steps.""",
    )
    schedule: str | Calibrated = setting(
        "uniform",
        full_step_schedule,
        SCHEDULE,
        """Where the full steps sit. "uniform" spaces them evenly; "power" takes as many and moves them toward the end
        of the generation, where the model's output changes faster; "tapered" does so too, but no gap at the start is
        longer than an even one; "toca" spaces them as that paper's code for DiT does, about N apart: some 4/3 as many
        at N = 4, and all steps at N = 1. The last three need the number of steps: what generation(model, steps=...)
        says, else that of the last generation; until it is known, steps are uniform.
        The path of a file that moeca_compile.tune(...).save(path) wrote takes as many where this model was found to
        need them ("calibrated"); in a generation of another length they are spread alike.""",
    )
    schedule_exponent: float = setting(
        1.45,
        real(1),
        SCHEDULE,
        """How far schedule="power" and "tapered" move full steps toward the end: of F full steps in S, number i is
        step S (1 - (1 - i/F)^exponent), with "tapered" S (1 - (1 - i/F)^exponent (1 + (exponent - 1) i/F)). 1 is
        uniform.""",
    )
    corrector: bool = setting(
        False,
        flag,
        SCHEDULE,
        """At each full step, find the error that the cache steps before it have made, and make up for it in this
        step's output. For deterministic samplers that add a multiple of the output to the picture (Euler on a flow
        or an ODE, DPM-Solver); not for stochastic ones. It costs one cache step at each full step.""",
    )
    max_error: float | None = setting(
        None,
        optional(real(0, open_low=True)),
        SCHEDULE,
        """Error control: at each full step, find the relative error that a cache step would have made in its place.
        Where that is above this number the next full step comes sooner, and where it is below later: 0.1 is 10 % at
        the end of a gap of average length; in longer gaps an error counts more. The worst sample of the batch
        decides, and each stream decides for itself. A gap is from half to twice as long as the schedule has it there.
        Smaller numbers make more full steps. It costs one cache step at each full step, the same one as the
        corrector's. For deterministic samplers. None keeps to the schedule.""",
    )
    sampler: str | None = setting(
        None,
        optional(one_of("deterministic", "stochastic")),
        SCHEDULE,
        """What the sampler is. With a "deterministic" one the corrector is on; of the change that a forecast foresees
        with a "stochastic" one half is believed. None: what generation(model, deterministic=...) says, and in an
        enabled pipeline of diffusers, whether it draws noise between its steps. Where nothing says, one without noise
        is seen from the first pictures of each generation.""",
    )
    attention_every: int | None = setting(
        None, optional(whole(1)), SCHEDULE, "Refresh all attention at this interval instead of full_every."
    )
    experts_every: int | None = setting(
        None, optional(whole(1)), SCHEDULE, "Refresh all experts at this interval instead of full_every."
    )
    warmup_steps: int = setting(
        0,
        whole(0),
        SCHEDULE,
        """So many steps at the beginning of a generation are full, one after the other. The other full steps are
        spaced from the last of these on. The first step is full in any case.""",
    )
    first_blocks: int = setting(
        1,
        whole(0),
        REUSE,
        """How many blocks, from the first on, run at every step (n; Fn in DBCache). block-cache decides by them, so
        it needs one at least.""",
    )
    last_blocks: int = setting(
        0, whole(0), REUSE, "How many blocks, up to the last, run at every step (m; Bn in DBCache)."
    )
    cached_blocks: float = setting(
        0.75,
        real(0, 1, open_low=True, open_high=True),
        REUSE,
        "The share of the blocks that a cache step of delta takes from the cache: at least one block, and not all.",
    )
    boundary: float = setting(
        0.5,
        real(0, 1),
        REUSE,
        """The share of a generation's steps before which delta caches the last blocks, and after which the first.
        That needs the number of steps, as schedule="power" does; until it is known, all steps count as early.""",
    )
    fresh_ratio: float = setting(
        0.07,
        real(0, 1),
        REUSE,
        """The share of the tokens that a cache step of toca recomputes, and every second one of duca, before the
        paper's factors: 2.5 for feed-forwards, one that grows from 0.6 to 1.4 over the generation, and one that falls
        from 1.8 to 0.2 over the layers. The second needs the number of steps, as schedule="power" does; until it is
        known it is 1. From 1/7 on, late steps share the bucket for all tokens: each of their layers runs as many as
        the last step recomputes there, rounded up to one of the capacities.""",
    )
    token_score: str = setting(
        "attention",
        one_of("attention", "value_norm", "random"),
        REUSE,
        """What ranks the tokens that toca and duca recompute, besides their age and place. "attention": how much
        attention a token gets from all others, which costs one more product of queries and keys at full steps, and
        the memory of the attention map. "value_norm": how small its values are, summed over heads. "random": chance,
        the same at each run.""",
    )
    reuse_threshold: float = setting(
        0.1,
        real(0),
        DECISIONS,
        """The error up to which a recipe that decides by the data reuses: for teacache, the relative changes of the
        first block's input since the last full step, added up; for block-cache, the relative change of the first
        blocks' residual since then; for magcache, the errors that the magnitude ratios foresee, added up since then.
        0 makes every step full. One decision is made for the whole batch.""",
    )
    max_reused: int | None = setting(
        None,
        optional(whole(0)),
        DECISIONS,
        "The most steps in a row that reuse, whatever the data say. None is no limit.",
    )
    rescale: tuple[float, ...] = setting(
        (1.0, 0.0),
        polynomial,
        DECISIONS,
        """The coefficients of TeaCache's polynomial, that of the highest power first, as numpy.polyfit returns them.
        It rescales each change of the first block's input before that is added up. The default changes nothing.""",
    )
    magnitude_ratios: tuple[float, ...] | None = setting(
        None,
        magnitudes,
        DECISIONS,
        """By how much the size of the stack's change grows at each step of a generation, for magcache: a number for
        each step, or a JSON file that lists them. For another number of steps the nearest ones are taken. None
        measures them in the first generation, which runs uncached.""",
    )
    retention: float = setting(
        0.2,
        real(0, 1),
        DECISIONS,
        "The share of a generation's steps, at its beginning, that magcache runs in full.",
    )
    tau0: float = setting(0.8, real(0), THRESHOLD, "Base threshold, eq. 12. At 0 every branch is recomputed.")
    alpha: float = setting(
        0.6, real(0, 1, open_high=True), THRESHOLD, "Strength of the expert-aware part of the threshold, eq. 12."
    )
    beta: float = setting(
        0.65,
        real(0, 1, open_high=True),
        THRESHOLD,
        "Decay of the spatial activation statistic, eq. 10: the weight of its previous value.",
    )
    entropy: str = setting(
        "log",
        one_of("log", "minmax"),
        THRESHOLD,
        """How H_e of eq. 11 is scaled to [0, 1]: "log" divides by log(tokens); "minmax" maps the layer's smallest
        value to 0 and its largest to 1, per sample.""",
    )
    statistic: str = setting(
        "sample",
        one_of("sample", "batch"),
        THRESHOLD,
        """"sample" has one statistic per sample. "batch" has one for the whole batch, so that a sample's result
        depends on the others.""",
    )
    lambda1: float = setting(1.0, real(0), SCORE, "Weight of the temporal drift.")
    lambda2: float = setting(0.6, real(0), SCORE, "Weight of the historical contribution.")
    score: str = setting(
        "paper",
        one_of("paper", "drift", "staleness"),
        SCORE,
        """"paper" is eq. 9; "drift" is |w - w_cached| alone; "staleness" adds 0.25 / full_every to eq. 9 for each
        step since the slot was last computed.""",
    )
    score_weights: str = setting(
        "normalized",
        one_of("normalized", "raw", formerly={"normalised": "normalized"}),
        SCORE,
        """w in eq. 9: "normalized" to sum to 1 over the token's branches, or the model's "raw" weight. The output,
        eq. 8, uses the model's weights either way.""",
    )
    budget: float | None = setting(
        None,
        optional(real(0, 1)),
        SCORE,
        """Recompute this fraction of a sample's branches, rounded to a whole number: unmatched branches first, then
        the highest scores. None decides by the threshold of eq. 12.""",
    )
    keys_values: str = setting(
        "chosen",
        one_of("all", "chosen", "none"),
        REUSE,
        """The tokens whose keys and values a cache step recomputes: "all", the "chosen" ones (those with a recomputed
        branch), or "none".""",
    )
    mask_source: str = setting(
        "probe",
        one_of("probe", "previous"),
        REUSE,
        """How the tokens are chosen whose attention is refreshed. "probe" runs the layer's router on
        x + gate * cached attention, chooses tokens, then refreshes their attention. "previous" refreshes the
        attention of the tokens that the previous MoE layer chose, then runs the router and chooses; the first MoE
        layer uses a probe.""",
    )
    shared: str = setting(
        "never",
        one_of("any", "always", "never"),
        REUSE,
        """The tokens on which a cache step runs the shared expert: "any" is those with any recomputed branch,
        "always" all tokens, "never" none.""",
    )
    overwrite: bool = setting(True, flag, REUSE, "Write recomputed branches back to their slots in the cache.")
    forecast: tuple[str, ...] = setting(
        (),
        each(text),
        REUSE,
        """Which cached tensors are extrapolated along the timestep, from the last full steps (forecaster). For the
        moeca recipes "attention" (attention outputs), "experts" (branch outputs, and outputs of dense
        feed-forwards) and "shared"; for fora "attention" and "experts" (whole feed-forward outputs); for stack
        "stack", as for teacache and block-cache; for block "blocks"; for deepcache "middle"; for delta "blocks".""",
    )
    forecaster: str = setting(
        "taylor",
        one_of("taylor", "taylorseer", "hermite", "adams-bashforth", "chebyshev"),
        REUSE,
        """How cached tensors are extrapolated. "taylor": the polynomial in the timestep through the last full steps.
        "taylorseer": the rule of that paper's code, in numbers of steps. "hermite" (HiCache): the same with Hermite
        polynomials. "adams-bashforth": the integral of the slopes between full steps. "chebyshev": a least-squares
        fit to more full steps, with a ridge penalty. At order 1 all but the last are the straight line, by time or
        by number of steps.""",
    )
    forecast_order: int = setting(
        1,
        whole(0, 4),
        REUSE,
        """The order of forecasts. A forecast of order n reads the last n + 1 full steps (for "chebyshev" 2 n + 1),
        which are all kept: 1 is the straight line, 0 holds the last value. While there are fewer full steps the order
        is lower.""",
    )
    forecast_slope: float = setting(
        1.0,
        real(0, 1),
        REUSE,
        """How much of the change that a forecast foresees is believed, beyond the value at the last full step. 0.5,
        half of its slope, is for stochastic samplers, whose noise is in the slope as well; 0 forecasts nothing.""",
    )
    capacities: tuple[float, ...] = setting(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        capacity_buckets,
        STATE,
        """Capacity buckets: the most tokens that a cache step may recompute, as fractions of a sample's tokens. Each
        one that is used costs a compiled graph.""",
    )
    branches_per_token: float = setting(
        2.0,
        real(0, open_low=True),
        STATE,
        """Cached branches per token, on average, in a layer whose number of branches depends on the data (dynamic
        capacity). Branches beyond that are computed at every step.""",
    )
    max_generations: int = setting(
        8,
        whole(1),
        STATE,
        """How many (generation, stream) caches exist at a time; the least recently used one is evicted first.""",
    )
    max_shapes: int = setting(
        32,
        whole(1),
        STATE,
        """How many sets of input shapes stay compiled, each with graphs and caches of its own; the least recently
        used one is dropped first.""",
    )
    max_cache_bytes: int | str | None = setting(
        "auto",
        cache_bytes,
        STATE,
        """The most bytes that all caches of one compiled graph take together. Streams are evicted to stay within it.
        Where the caches of a single stream are larger, see coarser_caches. "auto" asks that of half of the memory
        that is free on the device when the graph is compiled, and evicts no stream; None is no limit.""",
    )
    coarser_caches: bool = setting(
        True,
        flag,
        STATE,
        """Where the caches of one stream are larger than max_cache_bytes, take what fits: first the same caches in
        bfloat16 (unless cache_dtype is set), then a recipe that caches less; a warning says which. False runs the
        model uncached then.""",
    )
    check_inputs: bool = setting(
        True,
        flag,
        STATE,
        """Compare the picture of each call with that of the step before: another picture's caches are never read,
        whatever the order, the threads and the timesteps of calls say.""",
    )
    cache_dtype: torch.dtype | None = setting(
        None,
        activation_dtype,
        STATE,
        """Dtype of cached activations; None is the model's own. A name such as "bfloat16" works too.""",
    )
    cuda_graphs: bool = setting(
        True,
        flag,
        STATE,
        """On CUDA, record each kind of step as a CUDA graph, once for each stream (and each slot that it fills), and
        replay it. The next generations then reuse the caches of ended ones, up to max_generations. No effect on other
        devices.""",
    )
    validate: bool = setting(
        True, flag, COMPILATION, "Check each rewritten graph against the original on the first inputs."
    )
    tolerance: float | None = setting(
        None,
        optional(real(0, open_low=True)),
        COMPILATION,
        """The largest error of a row that validation accepts, relative to the row; None decides by dtype and by what
        rounding does to the model.""",
    )
    lowering: str = setting(
        "inductor",
        one_of("inductor", "eager"),
        COMPILATION,
        """"inductor" compiles the traced steps. "eager" runs them op by op, for debugging: it is ready in seconds
        rather than minutes, and slow.""",
    )
    dynamic_batch: bool | None = setting(
        None,
        optional(flag),
        COMPILATION,
        """At the second batch size, compile what differs from the first in that size alone for all sizes at once: a
        third one compiles nothing. So are cache steps with another number of recomputed tokens, from the first on.
        False compiles each size for itself. None is True on a CPU, False elsewhere.""",
    )
    disk_cache: bool = setting(
        True,
        flag,
        COMPILATION,
        """Keep traced steps and passed validations in Inductor's cache directory, for later processes with the same
        model, shapes, options, versions and machine. False finds them out anew.""",
    )
    background: bool = setting(
        False,
        flag,
        COMPILATION,
        """Run steps op by op until another process has compiled them, so that the first picture comes sooner. On a
        CPU, and where steps are kept on disk; else they are compiled first, as without it.""",
    )
    progress: bool = setting(
        True,
        flag,
        COMPILATION,
        """Show on a terminal how far compilation is, where rich is installed; else the log has it, at level INFO.""",
    )
    trace: bool = setting(
        False,
        flag,
        COMPILATION,
        """Collect at every step what the report draws: match and reuse by layer, recomputed tokens, routing, drift,
        times. Each step is run a second time for it, op by op; moeca_compile.trace(model) does so for a while.""",
    )
    dump: str | None = setting(
        None,
        optional(folder),
        COMPILATION,
        """The folder to write the graph to after each stage, as readable text with an index page.""",
    )
