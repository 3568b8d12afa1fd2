"""The options in force: complete, checked, and only those that the recipe uses."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.options import (
    SCHEDULES,
    UNSET,
    Check,
    ConfigError,
    NotAllowedError,
    Options,
    one_of,
    tuned_options,
)
from moeca_compile.policies import RECIPES
from moeca_compile.policies.policy import SPACED, Policy, ignored_by_all
from moeca_compile.tuned_file import Calibrated, TunedFor, schedule_of


@dataclass(frozen=True)
class MoecaConfig(Options):
    """`Options` with every unset field filled in by the recipe.

    Hashable; `MoecaConfig(**dataclasses.asdict(config))` equals `config`. Raises ConfigError for a value that is not
    allowed, and for an option that the recipe ignores, unless it has its default value.
    """

    def __post_init__(self) -> None:
        known = self._from_file(self.tuned)
        beside = {name for name in known if getattr(self, name) is not UNSET}
        self._set("recipe", one_of(*RECIPES), known.get("recipe", "auto") if self.recipe is UNSET else self.recipe)
        for field in self._settings():
            value = getattr(self, field.name)
            self._complete(field, known.get(field.name, UNSET) if value is UNSET else value)
        self._set("forecast", self._forecastable, self.forecast)
        self._set("schedule", self._planned, self.schedule)
        for name, reason in {**ignored_by_all(self, self.policy), **self.policy.ignored(self)}.items():
            if name in known.keys() - beside:  # what is given beside the file goes before
                field = self._setting(name)
                self._set(name, field.metadata["check"], self._default(field))
            self._reject(name, reason)

    @property
    def policy(self) -> Policy:
        """The policy behind the recipe."""
        return RECIPES[self.recipe]

    @property
    def usual_steps(self) -> int | None:
        """How many steps generations are expected to have, as far as a schedule or a tuned file says."""
        if isinstance(self.schedule, Calibrated):
            return self.schedule.steps
        return self.tuned.steps if self.tuned is not None else None

    def records_on(self, device: torch.device) -> bool:
        """Whether steps on this device are recorded as CUDA graphs, which know caches by their addresses."""
        return self.cuda_graphs and device.type == "cuda"

    def all_sizes(self, device: torch.device) -> bool:
        """Whether one code may serve several batch sizes on this device."""
        return self.dynamic_batch if self.dynamic_batch is not None else device.type == "cpu"

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> MoecaConfig:
        """The config for the `options` given to `torch.compile`; None gives the defaults.

        Raises ConfigError for an unknown option, with the closest names, and for a value that is not allowed.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError("options", options, "allowed is a dict of options by name")
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise ConfigError(str(name), value, _nearest(str(name), known))
        return cls(**dict(options or {}))

    @classmethod
    def _settings(cls) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(cls) if "check" in field.metadata]

    @classmethod
    def _setting(cls, name: str) -> dataclasses.Field[Any]:
        return next(field for field in cls._settings() if field.name == name)

    def _from_file(self, tuned: Any) -> dict[str, Any]:
        """The options that a tuned file has; {} where there is no such file."""
        if tuned is UNSET or tuned is None:
            return {}
        self._set("tuned", tuned_options, tuned)
        known = dict(self.tuned.options) if self.tuned is not None else {}
        unknown = sorted(known.keys() - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise ConfigError(
                "tuned", tuned, f"the file has the option {unknown[0]!r}, which does not exist: tune again"
            )
        if self.recipe not in (UNSET, known.get("recipe")) and not isinstance(tuned, TunedFor):
            reason = f"the file is for recipe {known.get('recipe')!r}. Leave out tuned, or recipe = {self.recipe!r}"
            raise ConfigError("tuned", tuned, reason)
        given = any(getattr(self, name) is not UNSET for name in SPACED)
        if given and isinstance(known.get("schedule"), Calibrated):
            del known["schedule"]  # it says where all full steps are, so that nothing else could say it
        return known

    def _planned(self, schedule: str | Calibrated) -> str | Calibrated:
        """The schedule of a file, as many full steps as `full_every` asks for. Raises NotAllowedError."""
        if isinstance(schedule, Calibrated) or schedule in SCHEDULES:
            return schedule
        try:
            return schedule_of(schedule, self.full_every)
        except ValueError as error:
            raise NotAllowedError(f"the path of a JSON file that moeca_compile.tune wrote; {error}") from None

    def _complete(self, field: dataclasses.Field[Any], value: Any) -> None:
        """Set a field to `value`, or to the recipe's where that is unset. Ignored options must have their default."""
        self._set(field.name, field.metadata["check"], self._default(field) if value is UNSET else value)
        if field.name not in self.policy.options:
            users = [recipe for recipe, policy in RECIPES.items() if field.name in policy.options]
            self._reject(field.name, f"recipe {self.recipe!r} ignores it; it is for {', '.join(users)}")

    def _default(self, field: dataclasses.Field[Any]) -> Any:
        return self.policy.recipes[self.recipe].get(field.name, field.metadata["default"])

    def _reject(self, name: str, reason: str) -> None:
        """Raise ConfigError for an option that has no effect, unless it has its default value."""
        field = self._setting(name)
        if getattr(self, name) != field.metadata["check"](self._default(field)):
            raise ConfigError(name, getattr(self, name), reason)

    def _set(self, name: str, check: Check, value: Any) -> None:
        try:
            object.__setattr__(self, name, check(value))
        except NotAllowedError as error:
            raise ConfigError(name, value, f"allowed is {error}") from None

    def _forecastable(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names in the policy's order. Raises NotAllowedError for what the recipe does not cache."""
        allowed = self.policy.forecasts
        if not set(names) <= set(allowed):
            text = "a subset of " + repr(allowed) if allowed else "()"
            raise NotAllowedError(f"{text} for recipe {self.recipe!r}")
        return tuple(name for name in allowed if name in names)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"unknown option{hint}; the options are {', '.join(known)}"
