"""Puts traceable equivalents of MoE dispatch before Dynamo, for this package's backend alone.

After `install()` each compilation begins with a look through the subclasses of nn.Module that are new, and the
methods that an idiom recognizes are wrapped. So are the forwards of what may be MoE layers within the model that is
about to be compiled, which can then be run (running/). Installing itself reads no class. A wrapped method runs its
original code, in eager and under every other backend; only where Dynamo traces it for a backend of ours, without
gradients, in eval mode, and its check passed (trust.py), it is traced as its equivalent.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any
from weakref import ref

from torch import nn

from moeca_compile._torch_private import (
    compilation_at_start,
    not_on_compile_start,
    on_every_compile_start,
    pass_idle_logging,
    read_constants,
    trace_sdp_kernel,
)
from moeca_compile.capture import suspects
from moeca_compile.capture.idioms import IDIOMS
from moeca_compile.capture.idioms.bank import Bank
from moeca_compile.capture.idioms.base import Dispatch, Idiom
from moeca_compile.capture.refusals import warn_once
from moeca_compile.capture.running import Running, layers_within, modules_among
from moeca_compile.capture.source import Method, functions_of, innermost, is_torchs, namespace_of, read_method
from moeca_compile.capture.wrapping import ORIGINAL, marked_as_known, with_equivalent, with_single_experts
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_seen: dict[int, ref[type]] = {}  # by identity: a class may be of a metaclass that cannot be hashed
_routes: dict[int, bool] = {}  # of classes in `_seen`: whether methods may ask the host, or choose
UNREAD = "looking for MoE dispatch failed ({0}), so new MoE layers run as under plain torch.compile. Please report it"


def install() -> None:
    """Before each compilation, wrap the MoE dispatch of every nn.Module class that is new since the last one."""
    on_every_compile_start(wrap)
    read_constants()
    pass_idle_logging()
    trace_sdp_kernel()


def uninstall() -> None:
    """Give every class its own methods back."""
    not_on_compile_start(wrap)
    with _lock:
        for owner in [found for known in _seen.values() if (found := known()) is not None]:
            for name, function in _methods(owner):
                if hasattr(function, ORIGINAL):
                    setattr(owner, name, getattr(function, ORIGINAL))
        _seen.clear()


def wrap(*_: Any) -> None:
    """Wrap the MoE dispatch of the classes that have come since the last time, and what may be layers of the model
    whose compilation begins."""
    with _lock:
        try:
            for owner in _subclasses(nn.Module):
                if _note(owner):
                    _wrap_methods(owner)
            _let_layers_run()
        except Exception as error:  # this is called in each compilation of the process, for whatever backend
            _log.debug("looking through the classes failed", exc_info=True)
            warn_once(UNREAD.format(first_line(error)))


def _note(owner: type) -> bool:
    """Whether a class is new."""
    new = id(owner) not in _seen
    if new:
        _seen[id(owner)] = ref(owner, functools.partial(_forget, id(owner)))
    return new


def _forget(number: int, _: ref[type]) -> None:
    """A class is gone, and another one may get its number."""
    _seen.pop(number, None)
    _routes.pop(number, None)


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
                if not is_torchs(owner):
                    yield owner


def _methods(owner: type) -> list[tuple[str, FunctionType]]:
    return [(name, value) for name, value in namespace_of(owner).items() if isinstance(value, FunctionType)]


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


def _wrapper(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """What stands for `function` if it is, or looks like, MoE dispatch."""
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
    if dispatches or lists:
        running = Running(function) if function.__name__ == "forward" else None
        return with_equivalent(function, dispatches, lists, running)
    return None


def _let_layers_run() -> None:
    """Let the layers of the model that is about to be compiled be run.

    A forward that is running, or being compiled, stays as it is: its next call would be that of other code, which
    Dynamo would compile once more, for a model with caches of its own.
    """
    try:
        started = compilation_at_start()
        roots = list(modules_among(started.values)) if started is not None else []
        layers = [each for root in roots for each in layers_within(root, _may_route, marked_as_known)]
    except Exception:
        _log.debug("looking for layers of the model failed, so none is run", exc_info=True)
        return
    for layer in layers:
        try:
            _let_run(type(layer), started.codes if started is not None else ())
        except Exception:
            _log.debug("the forward of a class stays as it is", exc_info=True)


def _let_run(kind: type, codes: tuple[CodeType, ...]) -> None:
    owner = next(each for each in kind.__mro__ if "forward" in namespace_of(each))
    forward = namespace_of(owner)["forward"]
    if is_torchs(owner) or not isinstance(forward, FunctionType) or hasattr(forward, ORIGINAL):
        return
    code = getattr(innermost(forward), "__code__", None)
    if not any(code is each for each in codes):
        setattr(owner, "forward", with_equivalent(forward, (), (), Running(forward)))  # noqa: B010  (mypy: no forward)
        _note(owner)  # which may be no module


def _may_route(kind: type) -> bool:
    """Whether the methods of a class, inherited ones too, may ask the host about tensors, or choose by them."""
    if id(kind) not in _routes:
        _routes[id(kind)] = any(map(suspects.may_route, functions_of(kind)))
        _note(kind)
    return _routes[id(kind)]


def _recognized(idiom: Idiom, method: Method) -> Dispatch | Bank | None:
    """The idiom's answer; None where it fails, which must not keep the other idioms from answering."""
    try:
        return idiom.recognize(method)
    except Exception:
        _log.debug("%s: reading %s for the idiom %r failed", method.where, method.name, idiom.name, exc_info=True)
        return None
