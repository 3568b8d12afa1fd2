"""Models that are gone. Dynamo counts what it compiled for them against its limit of 8 compilations of a function, so
the ninth model of a class would run in eager mode. So it is made to forget that function now and then.

What it compiled for models that live is then forgotten, too: they are captured again at their next call, which takes
seconds, and get the engines that they had.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType
from weakref import WeakKeyDictionary

from torch import nn

from moeca_compile._torch_private import dynamo_is_running, forget_code

_MOST_DEAD = 3
"""So many models may be gone. Each has a compiled form or two, for inference mode or sizes that vary."""


@dataclass
class _Models:
    """How many models that ran a function live, and how many have gone since it was last forgotten."""

    code: CodeType
    living: int = 0
    gone: int = 0


_models: dict[int, _Models] = {}
"""By the identity of their code: code objects that look alike are equal."""
_watched: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


def forget_when_gone(modules: Iterable[nn.Module], code: CodeType | None) -> None:
    """Note that Dynamo compiled this code for these modules."""
    for module in modules:
        known = _watched.setdefault(module, set())
        if code is not None and id(code) not in known:
            known.add(id(code))
            _models.setdefault(id(code), _Models(code)).living += 1
            weakref.finalize(module, _gone, id(code)).atexit = False


def _gone(key: int) -> None:
    _models[key].living -= 1
    _models[key].gone += 1
    if dynamo_is_running():  # Python may collect garbage at any time. The next one to go comes here again.
        return
    for models in list(_models.values()):
        if models.gone >= min(max(models.living, 1), _MOST_DEAD):
            models.gone = 0
            forget_code(models.code)
