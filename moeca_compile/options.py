"""The options of `torch.compile(model, backend="moeca", options={...})`: each with its check, default and text.

`config.MoecaConfig` completes them with what the recipe sets, and refuses what the recipe would ignore.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

CACHE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET"})()

Check = Callable[[Any], Any]  # gives the value in its kept form; raises NotAllowedError


class ConfigError(ValueError):
    """An option that does not exist, a value that an option does not take, or an option that the recipe ignores.

    `field`, `value` and `reason` hold what the message says.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        self.field, self.value, self.reason = field, value, reason
        super().__init__(f"moeca option {field!r} = {value!r}: {reason}")


class NotAllowedError(ValueError):
    """Raised by a check; its message says what is allowed."""


def one_of(*names: str, formerly: Mapping[str, str] | None = None) -> Check:
    """One of some names; `formerly` maps what a name was called before to what it is called now."""

    def check(value: Any) -> str:
        if formerly and isinstance(value, str):
            value = formerly.get(value, value)
        if not isinstance(value, str) or value not in names:
            raise NotAllowedError(" | ".join(repr(name) for name in names))
        return value

    return check


def whole(minimum: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
            raise NotAllowedError(f"a whole number >= {minimum}")
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
    """A list or tuple whose every item passes `inner`; kept as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)):
            raise NotAllowedError("a list or tuple")
        try:
            return tuple(inner(item) for item in value)
        except NotAllowedError as error:
            raise NotAllowedError(f"a list or tuple, each item {error}") from None

    return check


def folder(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise NotAllowedError("the path of a folder")
    return os.path.abspath(os.fspath(value))


def step_list(value: Any) -> tuple[int, ...]:
    steps = tuple(sorted(set(each(whole(0))(value))))
    if 0 not in steps:
        raise NotAllowedError(
            "a list or tuple of step numbers that contains 0, since a generation starts with a full step"
        )
    return steps


def capacity_buckets(value: Any) -> tuple[float, ...]:
    buckets = each(real(0, 1, open_low=True))(value)
    ascending = all(low < high for low, high in itertools.pairwise(buckets))
    if not buckets or not ascending or buckets[-1] != 1.0:
        raise NotAllowedError("ascending fractions in (0, 1] that end in 1.0")
    return buckets


def activation_dtype(value: Any) -> torch.dtype | None:
    dtype = CACHE_DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in (None, *CACHE_DTYPES.values()):
        raise NotAllowedError("None or " + " | ".join(f"torch.{name}" for name in CACHE_DTYPES))
    return dtype


def setting(default: Any, check: Check, group: str, doc: str) -> Any:
    """An option that, left unset, takes its recipe's value, else `default`."""
    metadata = {"default": default, "check": check, "group": group, "doc": " ".join(doc.split())}
    return dataclasses.field(default=UNSET, metadata=metadata)


SCHEDULE, THRESHOLD, SCORE = "Schedule", "Threshold, equations 10 and 12", "Score, equation 9"
REUSE, STATE, COMPILATION = (
    "Reuse, equation 8 and section 4.1",
    "Static shapes and state",
    "Compilation and validation",
)


@dataclass(frozen=True)
class Options:
    """What a user may set, one field each. The fields' metadata hold default, check, group and documentation.

    Equation numbers are those of MoECa, section 4. A *branch* is one (token, expert) pair; a *slot* is one of the k
    places that a token has in the branch cache. Steps are counted from 0 in each generation.
    """

    recipe: str = "moeca"
    full_every: int = setting(4, whole(1), SCHEDULE, "A full step every N steps (N in the paper).")
    full_steps: tuple[int, ...] | None = setting(
        None,
        optional(step_list),
        SCHEDULE,
        """The full steps one by one, in place of full_every. Must contain 0; a step that is not listed is a cache
        step.""",
    )
    attention_every: int | None = setting(
        None, optional(whole(1)), SCHEDULE, "Refresh all attention at this interval instead of full_every."
    )
    experts_every: int | None = setting(
        None, optional(whole(1)), SCHEDULE, "Refresh all experts at this interval instead of full_every."
    )
    tau0: float = setting(0.8, real(0), THRESHOLD, "Base threshold, eq. 12. At 0 every branch is recomputed.")
    alpha: float = setting(
        0.6, real(0, 1, open_high=True), THRESHOLD, "Strength of the expert-aware part of the threshold, eq. 12."
    )
    beta: float = setting(
        0.65, real(0, 1, open_high=True), THRESHOLD, "Memory of the spatial activation statistic, eq. 10."
    )
    entropy: str = setting(
        "log",
        one_of("log", "minmax"),
        THRESHOLD,
        """How H_e of eq. 11 comes to [0, 1]: "log" divides by log(tokens); "minmax" maps the layer's smallest to 0
        and its largest to 1, per sample.""",
    )
    statistic: str = setting(
        "sample",
        one_of("sample", "batch"),
        THRESHOLD,
        """"sample" keeps one statistic per sample; "batch" one for all, so that samples depend on each other.""",
    )
    lambda1: float = setting(1.0, real(0), SCORE, "Weight of the temporal drift.")
    lambda2: float = setting(0.6, real(0), SCORE, "Weight of the historical contribution.")
    score: str = setting(
        "paper",
        one_of("paper", "drift", "staleness"),
        SCORE,
        """"paper" is eq. 9; "drift" is |w - w_cached| alone; "staleness" adds to eq. 9 the steps since the slot was
        last computed, times 0.25 / full_every.""",
    )
    score_weights: str = setting(
        "normalized",
        one_of("normalized", "raw", formerly={"normalised": "normalized"}),
        SCORE,
        """w in eq. 9 is "normalized" over the token's branches, or the model's "raw" weight. The output, eq. 8, has
        the model's own weights either way.""",
    )
    budget: float | None = setting(
        None,
        optional(real(0, 1)),
        SCORE,
        """Recompute this fraction of a sample's branches, rounded: the highest-ranked ones (unmatched before
        matched, then by score). None recomputes what exceeds the threshold.""",
    )
    keys_values: str = setting(
        "chosen",
        one_of("all", "chosen", "none"),
        REUSE,
        """Of which tokens a cache step computes keys and values anew: "all", the "chosen" ones (those with a
        recomputed branch), or "none".""",
    )
    mask_source: str = setting(
        "probe",
        one_of("probe", "previous"),
        REUSE,
        """"probe" decides on the layer's router on x + gate * cached attention, then refreshes the attention of the
        chosen tokens; "previous" refreshes that of the previous MoE layer's chosen tokens, then routes and decides
        (the first layer has a probe either way).""",
    )
    shared: str = setting(
        "never",
        one_of("any", "always", "never"),
        REUSE,
        """On which tokens a cache step runs the shared expert: those with "any" recomputed branch, "always" all, or
        "never" any.""",
    )
    overwrite: bool = setting(True, flag, REUSE, "Recomputed branches replace their slot in the cache.")
    forecast: tuple[str, ...] = setting(
        (),
        each(one_of("attention", "experts", "shared", "stack", "blocks")),
        REUSE,
        """Which cached tensors are extrapolated to first order in the timestep, from the last two full steps. For
        the moeca recipes "attention" (attention outputs), "experts" (branch outputs, and outputs of dense
        feed-forwards) and "shared"; for fora "attention" and "experts" (whole feed-forward outputs); for stack
        "stack"; for block "blocks".""",
    )
    capacities: tuple[float, ...] = setting(
        (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0),
        capacity_buckets,
        STATE,
        """Capacity buckets: the most tokens that a cache step may recompute, as fractions of a sample's tokens. Each
        that is needed is a compiled graph.""",
    )
    branches_per_token: float = setting(
        2.0,
        real(0, open_low=True),
        STATE,
        """How many branches a token are cached, on average, of a layer whose capacity only the data tell (dynamic
        capacity). Branches beyond it are computed at every step.""",
    )
    max_generations: int = setting(
        8,
        whole(1),
        STATE,
        """How many (generation, stream) caches are held at a time; the one unused for longest goes first.""",
    )
    cache_dtype: torch.dtype | None = setting(  # noqa: RUF009
        None,
        activation_dtype,
        STATE,
        """Dtype of cached activations; None is the model's own. A name such as "bfloat16" is taken too.""",
    )
    cuda_graphs: bool = setting(
        True,
        flag,
        STATE,
        """On CUDA, record each kind of step once a stream as a CUDA graph and replay it. Caches of ended generations
        are then kept for the next ones, up to max_generations. Without effect on other devices.""",
    )
    validate: bool = setting(
        True, flag, COMPILATION, "Check each rewritten graph against the original on the first inputs."
    )
    tolerance: float | None = setting(
        None,
        optional(real(0, open_low=True)),
        COMPILATION,
        "Greatest error that validation lets pass, relative to the output's scale; None goes by the dtype.",
    )
    lowering: str = setting(
        "inductor",
        one_of("inductor", "eager"),
        COMPILATION,
        """"inductor" compiles the traced steps; "eager" runs them op by op: ready in seconds rather than minutes, and
        slow. For looking for a fault.""",
    )
    dump: str | None = setting(
        None,
        optional(folder),
        COMPILATION,
        """A folder into which the graph is written after each stage, readable, with an index page.""",
    )
