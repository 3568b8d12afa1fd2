"""Puts traceable equivalents of MoE dispatch before Dynamo, for this package's backend alone.

After `install()` each compilation begins with a look through the subclasses of nn.Module that are new, and the
methods that an idiom recognizes are wrapped. Installing itself reads no class. A wrapped method runs its original
code, in eager and under every other backend; only where Dynamo traces it for a backend of ours, without gradients,
in eval mode, and its check passed (trust.py), it is traced as its equivalent.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any
from weakref import ref

from torch import nn

from moeca_compile._torch_private import not_on_compile_start, on_every_compile_start
from moeca_compile.capture import suspects
from moeca_compile.capture.idioms import IDIOMS
from moeca_compile.capture.idioms.bank import Bank
from moeca_compile.capture.idioms.base import Dispatch, Idiom
from moeca_compile.capture.running import Running
from moeca_compile.capture.source import Method, innermost, read_method
from moeca_compile.capture.wrapping import ORIGINAL, runs_layers, with_equivalent, with_single_experts
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_seen: dict[int, ref[type]] = {}  # by identity: a class may be of a metaclass that cannot be hashed
UNREAD = "looking for MoE dispatch failed ({0}), so new MoE layers run as under plain torch.compile. Please report it"


def install() -> None:
    """Before each compilation, wrap the MoE dispatch of every nn.Module class that is new since the last one."""
    on_every_compile_start(wrap_new_classes)


def uninstall() -> None:
    """Give every class its own methods back."""
    not_on_compile_start(wrap_new_classes)
    with _lock:
        for owner in [found for known in _seen.values() if (found := known()) is not None]:
            for name, function in _methods(owner):
                if hasattr(function, ORIGINAL):
                    setattr(owner, name, getattr(function, ORIGINAL))
        _seen.clear()


def wrap_new_classes(*_: Any) -> None:
    """Wrap the MoE dispatch of the classes that have come since the last time."""
    with _lock:
        try:
            for owner in _subclasses(nn.Module):
                if id(owner) not in _seen:
                    _seen[id(owner)] = ref(owner, functools.partial(_forget, id(owner)))
                    _wrap_methods(owner)
        except Exception as error:  # this is called in each compilation of the process, for whatever backend
            _log.debug("looking through the classes failed", exc_info=True)
            _warn_once(UNREAD.format(first_line(error)))


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(f"moeca: {text}", stacklevel=3)


def _forget(number: int, _: ref[type]) -> None:
    """A class is gone, and another one may get its number."""
    _seen.pop(number, None)


def _subclasses(root: type) -> Iterator[type]:
    """Every subclass once, torch's own excepted."""
    met: set[int] = set()
    pending: list[type] = [root]
    while pending:
        children: list[type] = type.__subclasses__(pending.pop())
        for owner in children:
            if id(owner) not in met:
                met.add(id(owner))
                pending.append(owner)
                if not _module_of(owner).startswith("torch."):
                    yield owner


def _module_of(owner: type) -> str:
    return str(_namespace(owner).get("__module__", ""))


def _namespace(owner: type) -> Mapping[str, Any]:
    """What a class's body defined, whatever its metaclass answers."""
    namespace: Mapping[str, Any] = type.__dict__["__dict__"].__get__(owner)
    return namespace


def _methods(owner: type) -> list[tuple[str, FunctionType]]:
    return [(name, value) for name, value in _namespace(owner).items() if isinstance(value, FunctionType)]


def _wrap_methods(owner: type) -> None:
    """Wrap a class's MoE dispatch. Every class of the process comes by here: one that cannot be read stays as it
    is, and neither its compilation nor those of others fail for it."""
    for name, function in _methods(owner):
        try:
            wrapper = _wrapper(function) if not hasattr(function, ORIGINAL) else None
            if wrapper is not None:
                setattr(owner, name, wrapper)
        except Exception:
            _log.debug("the method %s of a class stays as it is: reading it failed", name, exc_info=True)
    try:
        _let_run(owner)
    except Exception:
        _log.debug("the forward of a class stays as it is", exc_info=True)


def _wrapper(function: Callable[..., Any], runs: bool = False) -> Callable[..., Any] | None:
    """What stands for `function` if it is, or looks like, MoE dispatch, or if it is a forward that may be run."""
    code = getattr(innermost(function), "__code__", None)
    if code is None:
        return None
    idioms = [idiom for idiom in IDIOMS if idiom.plausible(code)]
    method = read_method(function) if idioms or suspects.may_be_suspect(code) else None
    recognized: list[Dispatch | Bank] = []
    lists: tuple[str, ...] = ()
    if method is not None:
        recognized = [each for each in (_recognized(idiom, method) for idiom in idioms) if each is not None]
        lists = suspects.expert_lists(method)
    dispatches = tuple(each for each in recognized if not isinstance(each, Bank))
    banks = [each for each in recognized if isinstance(each, Bank)]
    if banks and not dispatches:
        return with_single_experts(function, banks[0])
    if dispatches or lists or runs:
        return with_equivalent(function, dispatches, lists, Running(function) if runs else None)
    return None


def _let_run(owner: type) -> None:
    """Have the forward of a class run, if methods of its own ask the host about tensors (running/)."""
    if not any(suspects.may_ask_the_host(innermost(function)) for _, function in _methods(owner)):
        return
    base = next(each for each in owner.__mro__ if "forward" in _namespace(each))
    forward = _namespace(base)["forward"]
    if _module_of(base).startswith("torch.") or not isinstance(forward, FunctionType) or runs_layers(forward):
        return
    wrapper = _wrapper(getattr(forward, ORIGINAL, forward), runs=True)
    if wrapper is not None:
        setattr(base, "forward", wrapper)  # noqa: B010  (a type has no forward, says mypy)


def _recognized(idiom: Idiom, method: Method) -> Dispatch | Bank | None:
    """The idiom's answer; None where it fails, which must not keep the other idioms from answering."""
    try:
        return idiom.recognize(method)
    except Exception:
        _log.debug("%s: reading %s for the idiom %r failed", method.where, method.name, idiom.name, exc_info=True)
        return None
