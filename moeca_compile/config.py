"""The options in force: complete, checked, and only such as the recipe uses."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeca_compile.options import UNSET, Check, ConfigError, NotAllowedError, Options, one_of
from moeca_compile.policies import RECIPES
from moeca_compile.policies.policy import Policy


@dataclass(frozen=True)
class MoecaConfig(Options):
    """What the compiler is to do: `Options`, completed by the recipe. Hashable, and equal to
    `MoecaConfig(**dataclasses.asdict(config))`.

    Raises ConfigError for a value that an option does not take, and for an option that the recipe ignores and that
    is set to anything but its default.
    """

    def __post_init__(self) -> None:
        self._set("recipe", one_of(*RECIPES), self.recipe)
        for field in self._settings():
            self._complete(field, getattr(self, field.name))
        self._set("forecast", self._cached_here, self.forecast)
        for name, reason in self.policy.ignored(self).items():
            self._refuse(name, reason)

    @property
    def policy(self) -> Policy:
        """What the recipe does."""
        return RECIPES[self.recipe]

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

    @classmethod
    def _settings(cls) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(cls) if "check" in field.metadata]

    def _complete(self, field: dataclasses.Field[Any], value: Any) -> None:
        """Keep a value, or the recipe's where it is left unset. What the recipe ignores must be left so."""
        self._set(field.name, field.metadata["check"], self._default(field) if value is UNSET else value)
        if field.name not in self.policy.options:
            users = [recipe for recipe, policy in RECIPES.items() if field.name in policy.options]
            self._refuse(field.name, f"recipe {self.recipe!r} ignores it; it is for {', '.join(users)}")

    def _default(self, field: dataclasses.Field[Any]) -> Any:
        return self.policy.recipes[self.recipe].get(field.name, field.metadata["default"])

    def _refuse(self, name: str, reason: str) -> None:
        """Raise ConfigError for an option of no effect, unless it is as if it had been left unset."""
        field = next(field for field in self._settings() if field.name == name)
        if getattr(self, name) != field.metadata["check"](self._default(field)):
            raise ConfigError(name, getattr(self, name), reason)

    def _set(self, name: str, check: Check, value: Any) -> None:
        try:
            object.__setattr__(self, name, check(value))
        except NotAllowedError as error:
            raise ConfigError(name, value, f"allowed is {error}") from None

    def _cached_here(self, names: tuple[str, ...]) -> tuple[str, ...]:
        allowed = self.policy.forecasts
        if not set(names) <= set(allowed):
            text = "a subset of " + repr(allowed) if allowed else "()"
            raise NotAllowedError(f"{text} for recipe {self.recipe!r}")
        return tuple(name for name in allowed if name in names)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    return f"no option of this name{hint}; options are {', '.join(known)}"
