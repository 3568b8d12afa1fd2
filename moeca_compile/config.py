"""The options in force: complete, checked, and only those that the recipe uses."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moeca_compile.options import UNSET, Check, ConfigError, NotAllowedError, Options, one_of
from moeca_compile.policies import RECIPES
from moeca_compile.policies.policy import Policy, ignored_by_all


@dataclass(frozen=True)
class MoecaConfig(Options):
    """`Options` with every unset field filled in by the recipe.

    Hashable; `MoecaConfig(**dataclasses.asdict(config))` equals `config`. Raises ConfigError for a value that is not
    allowed, and for an option that the recipe ignores, unless it has its default value.
    """

    def __post_init__(self) -> None:
        self._set("recipe", one_of(*RECIPES), self.recipe)
        for field in self._settings():
            self._complete(field, getattr(self, field.name))
        self._set("forecast", self._forecastable, self.forecast)
        for name, reason in {**ignored_by_all(self, self.policy), **self.policy.ignored(self)}.items():
            self._reject(name, reason)

    @property
    def policy(self) -> Policy:
        """The policy behind the recipe."""
        return RECIPES[self.recipe]

    def records_on(self, device: torch.device) -> bool:
        """Whether steps on this device are recorded as CUDA graphs, which know caches by their addresses."""
        return self.cuda_graphs and device.type == "cuda"

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
        field = next(field for field in self._settings() if field.name == name)
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
