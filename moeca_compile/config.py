"""The options of `torch.compile(model, backend="moeca", options={...})`: one frozen, checked dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

# What each recipe sets for the fields that the user leaves unset; fields not named here take the default that
# stands beside them in MoecaConfig.
RECIPES: dict[str, dict[str, Any]] = {
    # captured and lowered without any cache: the base line
    "none": {},
    # branch-wise caching, the paper's method
    "moeca": {},
    # the same with first-order forecast; recomputing branches bought nothing beside it (docs/policies.md)
    "moeca-forecast": {"forecast": ("attention", "experts", "shared"), "budget": 0.0},
    # layer-wise caching: attention and feed-forward outputs of every block
    "fora": {},
    "fora-forecast": {"forecast": ("attention", "experts")},
    # the residual of the whole block stack, h_L - h_0
    "stack": {},
    "stack-forecast": {"forecast": ("stack",)},
}

# The cached tensors that each family of recipes keeps, and so can forecast.
FORECASTABLE: dict[str, tuple[str, ...]] = {
    "none": (),
    "moeca": ("attention", "experts", "shared"),
    "fora": ("attention", "experts"),
    "stack": ("stack",),
}

CACHE_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET"})()

Check = Callable[[Any], Any]  # gives the value in its kept form; raises NotAllowedError


class ConfigError(ValueError):
    """An option that MoecaConfig does not have, or a value that an option does not take.

    `field`, `value` and `allowed` (text) hold what the message says.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"moeca option {field!r} = {value!r}: allowed is {allowed}")


class NotAllowedError(ValueError):
    """Raised by a check; its message says what is allowed."""


def one_of(*names: str) -> Check:
    def check(value: Any) -> str:
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


def step_list(value: Any) -> tuple[int, ...]:
    steps = tuple(sorted(set(each(whole(0))(value))))
    if 0 not in steps:
        raise NotAllowedError(
            "a list or tuple of step numbers that contains 0, since a generation starts with a full step"
        )
    return steps


def capacity_ladder(value: Any) -> tuple[float, ...]:
    ladder = each(real(0, 1, open_low=True))(value)
    ascending = all(low < high for low, high in itertools.pairwise(ladder))
    if not ladder or not ascending or ladder[-1] != 1.0:
        raise NotAllowedError("ascending fractions in (0, 1] that end in 1.0")
    return ladder


def activation_dtype(value: Any) -> torch.dtype | None:
    dtype = CACHE_DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value
    if dtype not in (None, *CACHE_DTYPES.values()):
        raise NotAllowedError("None or " + " | ".join(f"torch.{name}" for name in CACHE_DTYPES))
    return dtype


def setting(default: Any, check: Check) -> Any:
    """A field that, left unset, takes its recipe's value, else `default`."""
    return dataclasses.field(default=UNSET, metadata={"default": default, "check": check})


@dataclass(frozen=True)
class MoecaConfig:
    """What the compiler is to do. Complete and checked once constructed, hashable, and equal to
    `MoecaConfig(**dataclasses.asdict(config))`.

    Equation numbers are those of MoECa, section 4. A *branch* is one (token, expert) pair of a token's
    top-k; a *slot* is one of the k places that a token has in the branch cache.

    recipe: which policy runs, and the values of the fields left unset (table RECIPES).

    Schedule, in steps counted from 0 in each generation:
    full_every: a full step every N steps (N in the paper).
    full_steps: the full steps one by one, instead of every N; it then replaces full_every. Sorted here;
        must contain 0; a step that is not listed is a cache step.
    attention_every, experts_every: refresh all attention (all experts) at this interval instead of
        full_every.

    Threshold, equations 10 and 12:
    tau0: base threshold, eq. 12, >= 0. At 0 every branch is recomputed.
    alpha: strength of the expert-aware part, eq. 12, in [0, 1).
    beta: memory of the spatial activation statistic, eq. 10, in [0, 1).
    entropy: how H_e of eq. 11 comes to [0, 1]: "log" divides by log(tokens); "minmax" maps the layer's
        smallest to 0 and its largest to 1, per sample.
    statistic: "sample" keeps one statistic per sample; "batch" one for all (samples then depend on
        neighbors).

    Score, equation 9:
    lambda1, lambda2: weight of the temporal drift and of the historical contribution, >= 0.
    score: "paper" is eq. 9; "drift" is |w - w_cached| alone; "staleness" adds to eq. 9 the steps since the
        slot was last computed, times 0.25 / full_every.
    score_weights: w in eq. 9 is "normalized" over the token's branches, or the model's "raw" weight. The
        output, eq. 8, has the model's own weights either way.
    budget: recompute this fraction of a sample's branches, rounded, the highest-ranked ones (unmatched before
        matched, then by score); None recomputes what exceeds the threshold.

    Reuse, equation 8 and section 4.1:
    keys_values: on a cache step keys and values are computed anew for "all" tokens, for the "chosen" ones
        (those with a recomputed branch), or for "none".
    mask_source: "probe" decides on the layer's router on x + gate * cached attention, then refreshes the
        attention of the chosen tokens; "previous" refreshes that of the previous MoE layer's chosen tokens,
        then routes and decides (the first layer has a probe either way).
    shared: the shared expert runs on tokens with "any" recomputed branch, "always" on all, or "never".
    overwrite: recomputed branches replace their slot in the cache.
    forecast: cached tensors that are extrapolated to first order in the timestep, from the last two
        full steps: "attention" (attention outputs), "experts" (branch outputs, and outputs of dense
        feed-forwards) and "shared" for the moeca recipes; "attention" and "experts" (whole feed-forward
        outputs) for fora; "stack" for stack. A name that the recipe does not cache is an error.

    Static shapes and state:
    capacities: ladder of the most tokens that a cache step may recompute, as fractions of a sample's
        tokens.
    branches_per_token: how many branches a token are kept, on average, of a layer whose capacity only the
        data tell (dynamic capacity), > 0. Branches beyond it are computed at every step.
    max_generations: how many (generation, stream) states are kept; the one unused for longest goes first.
        >= 1.
    cache_dtype: dtype of cached activations; None is the model's own. A name such as "bfloat16" is taken
        too.
    cuda_graphs: on CUDA, record each kind of step once a stream as a CUDA graph and replay it. Caches of ended
        generations are then kept for the next ones, up to max_generations. Without effect on other devices.

    Validation:
    validate: check each rewritten graph against the original on the first inputs.
    tolerance: greatest error there, relative to the output's largest magnitude; None goes by the dtype.

    Raises ConfigError for a value that a field does not take.
    """

    recipe: str = "moeca"
    full_every: int = setting(4, whole(1))
    full_steps: tuple[int, ...] | None = setting(None, optional(step_list))
    attention_every: int | None = setting(None, optional(whole(1)))
    experts_every: int | None = setting(None, optional(whole(1)))
    tau0: float = setting(0.8, real(0))
    alpha: float = setting(0.6, real(0, 1, open_high=True))
    beta: float = setting(0.65, real(0, 1, open_high=True))
    lambda1: float = setting(1.0, real(0))
    lambda2: float = setting(0.6, real(0))
    keys_values: str = setting("chosen", one_of("all", "chosen", "none"))
    mask_source: str = setting("probe", one_of("probe", "previous"))
    shared: str = setting("never", one_of("any", "always", "never"))
    entropy: str = setting("log", one_of("log", "minmax"))
    statistic: str = setting("sample", one_of("sample", "batch"))
    score_weights: str = setting("normalized", one_of("normalized", "raw"))
    score: str = setting("paper", one_of("paper", "drift", "staleness"))
    overwrite: bool = setting(True, flag)
    budget: float | None = setting(None, optional(real(0, 1)))
    forecast: tuple[str, ...] = setting((), each(one_of("attention", "experts", "shared", "stack")))
    capacities: tuple[float, ...] = setting((1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), capacity_ladder)
    branches_per_token: float = setting(2.0, real(0, open_low=True))
    max_generations: int = setting(8, whole(1))
    validate: bool = setting(True, flag)
    tolerance: float | None = setting(None, optional(real(0, open_low=True)))
    cache_dtype: torch.dtype | None = setting(None, activation_dtype)
    cuda_graphs: bool = setting(True, flag)

    def __post_init__(self) -> None:
        self._keep("recipe", one_of(*RECIPES), self.recipe)
        preset = RECIPES[self.recipe]
        for field in dataclasses.fields(self):
            if "check" in field.metadata:
                value = getattr(self, field.name)
                default = preset.get(field.name, field.metadata["default"])
                self._keep(field.name, field.metadata["check"], default if value is UNSET else value)
        self._keep("forecast", self._cached_here, self.forecast)

    def _keep(self, name: str, check: Check, value: Any) -> None:
        try:
            object.__setattr__(self, name, check(value))
        except NotAllowedError as error:
            raise ConfigError(name, value, str(error)) from None

    def _cached_here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        allowed = FORECASTABLE[self.family]
        if not set(names) <= set(allowed):
            text = "a subset of " + repr(allowed) if allowed else "()"
            raise NotAllowedError(f"{text} for recipe {self.recipe!r}")
        return tuple(name for name in allowed if name in names)

    @property
    def family(self) -> str:
        """The recipe without its forecast: "none", "moeca", "fora" or "stack"."""
        return self.recipe.removesuffix("-forecast")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> MoecaConfig:
        """The config of `torch.compile`'s `options`; None gives the defaults.

        Raises ConfigError, with the nearest names, for an option that does not exist.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise ConfigError(str(name), value, _nearest(str(name), known))
        return cls(**dict(options or {}))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"no option of this name{hint}; options are {', '.join(known)}"
