"""Looks up a private name of torch when it is first needed, and says once what is lost where it is missing."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from functools import cached_property
from typing import Any, ClassVar

_log = logging.getLogger(__name__)


class Private:
    """A private name of torch.

    Args:
        path: where it is, such as "torch._dynamo.guards.install_guard".
        before: where older versions of torch have it, if that is elsewhere.
        loses: what happens without it, as the end of "..., so ".
        parameters: those that are passed by name; a callable without one of them counts as missing.
        required: whether nothing can be cached without it (`missing()`); all others have a fallback.
    """

    known: ClassVar[list[Private]] = []

    def __init__(
        self, path: str, loses: str, parameters: tuple[str, ...] = (), required: bool = False, before: str = ""
    ) -> None:
        self.path, self.loses, self.parameters, self.required = path, loses, parameters, required
        self.before = before
        Private.known.append(self)

    @cached_property
    def value(self) -> Any:
        """What stands at the path; None where this version of torch has nothing there, or something else."""
        found = _resolved(self.path)
        if found is None and self.before:
            found = _resolved(self.before)
        if found is None or not self._takes_our_parameters(found):
            _log.warning("torch has no %s as moeca_compile knows it, so %s", self.path, self.loses)
            return None
        return found

    def _takes_our_parameters(self, found: Any) -> bool:
        return not self.parameters or set(self.parameters) <= set(inspect.signature(found).parameters)


def _resolved(path: str) -> Any:
    """What stands at a path, or None."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


def missing() -> tuple[str, ...]:
    """The names that this version of torch lacks and without which nothing can be cached."""
    return tuple(api.path for api in Private.known if api.required and api.value is None)
