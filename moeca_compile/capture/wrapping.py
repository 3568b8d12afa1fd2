"""What stands for a method that is MoE dispatch, or a layer's forward with dispatch in it.

In eager, under other backends, with gradients and in training mode it runs the original. For a backend of ours
Dynamo traces an equivalent in its place, once numbers have confirmed it: that of an idiom, which reads the code, or
else the one that running the layer has found.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from moeca_compile._torch_private import hold_while, traced_anew, traced_self
from moeca_compile.capture import suspects
from moeca_compile.capture.gate import tracing_for_moeca
from moeca_compile.capture.idioms.bank import Bank
from moeca_compile.capture.idioms.base import Dispatch, Facts, Trusted
from moeca_compile.capture.idioms.held import BANK
from moeca_compile.capture.idioms.inline import Inline
from moeca_compile.capture.numerics import NoExpertsError, UntrustedError, autocast
from moeca_compile.capture.python_values import held_by_experts
from moeca_compile.capture.refusals import Refusal, refuse
from moeca_compile.capture.running import Asked, Asking, Running, Watch, holds_experts, isolated, may_run
from moeca_compile.capture.source import innermost
from moeca_compile.capture.structure import structure
from moeca_compile.capture.trust import eagerly, vouch
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)
ORIGINAL = "_moeca_original"  # the attribute of a wrapper that holds what it wraps
_KNOWN = "_moeca_known"  # the attribute of a wrapper whose method an idiom has recognized
_RUNS = "_moeca_runs"  # the attribute of a wrapper that runs its layer
_IDIOMS, _RUNNING = 0, 1
UNGUARDED = "its experts' code reads numbers that may change, and this version of torch would not notice"
_REWRITE = "Write it so that this no longer holds (docs/capture.md), or add an idiom (docs/extending/idiom.md)"


class Reason(str):
    """Why there is no equivalent; `routes`: although there are experts, for all that is known."""

    routes: bool

    def __new__(cls, text: object, routes: bool = False) -> Reason:
        made = super().__new__(cls, text)
        made.routes = routes
        return made


class _Called(NamedTuple):
    """A call of a method that idioms have recognized."""

    recognized: tuple[Dispatch, ...]
    original: Callable[..., Any]
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Noted(threading.local):
    """The calls of recognized methods while a layer is run."""

    calls: list[_Called] | None = None


_noted = _Noted()
_orders: WeakKeyDictionary[type, dict[Any, tuple[int, ...]]] = WeakKeyDictionary()
_ran: WeakKeyDictionary[nn.Module, Reason] = WeakKeyDictionary()  # what running said of layers


def forget_orders() -> None:
    """Forget what is tried first for which layer, so that it is found out again. For tests."""
    _orders.clear()


def marked_as_known(kind: type) -> bool:
    """Whether a class has a method that an idiom knows."""
    return bool(_marked(kind, _KNOWN))


def with_equivalent(
    original: Callable[..., Any], recognized: tuple[Dispatch, ...], lists: tuple[str, ...], running: Running | None
) -> Callable[..., Any]:
    """recognized: by idioms, and numbers tell which is right; lists: of self, that suspects.py takes for experts."""
    parts: tuple[tuple[Any, ...], tuple[Any, ...]] = (recognized, (running,) if running else ())
    written: Any = innermost(original)
    where, name = f"{written.__code__.co_filename}:{written.__code__.co_firstlineno}", written.__qualname__
    reasons: dict[int, str] = {}

    @torch.compiler.assume_constant_result
    def order(identity: int, facts: Facts | str) -> tuple[int, ...]:
        module = traced_self(identity)
        known, key = _orders.setdefault(type(module), {}), (original, structure(module), facts, autocast())
        if key not in known:
            try:
                known[key] = _order(module, original, running, recognized, facts)
            except Exception:  # of the layer's own code, on random arguments
                _log.debug("running %s on random arguments failed", type(module).__name__, exc_info=True)
                known[key] = (_IDIOMS,)
        return known[key]

    @torch.compiler.assume_constant_result
    def vouched(identity: int, part: int, facts: tuple[Facts | str, ...]) -> tuple[int, Trusted] | None:
        module = traced_self(identity)
        found = _confirmed(parts[part], original, module, facts)
        if not isinstance(found, str) and not _holds_while_alike(module):
            found = Reason(UNGUARDED, True)
        if not isinstance(found, str):
            return found
        if part == _RUNNING:
            _ran[module] = found
        elif found:
            reasons[identity] = found
        return None

    @torch.compiler.assume_constant_result
    def left_as_it_is(identity: int) -> bool:
        module, reason = traced_self(identity), reasons.pop(identity, None)
        ran = _ran.get(module)
        more = f". It was run to see what it does: {ran}" if ran else ""
        if reason is not None:
            refuse(Refusal(where, name, reason + more), module, _REWRITE)
        elif suspects.holds_modules(module, lists) or (ran and ran.routes and not _others_are_wrapped(module)):
            refuse(Refusal(where, name, suspects.REASON + more), module, suspects.ADVICE)
        return True

    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and _caching_is_wanted(self) and tracing_for_moeca():
            for part in order(id(self), running.facts(args, kwargs, False) if running is not None else ()):
                found = vouched(id(self), part, tuple([each.facts(args, kwargs) for each in parts[part]]))
                if found is not None:
                    number, trusted = found
                    return parts[part][number].equivalent(trusted, self, args, kwargs)
            left_as_it_is(id(self))
        elif not torch.compiler.is_dynamo_compiling() and _noted.calls is not None and recognized:
            _noted.calls.append(_Called(recognized, original, self, args, kwargs))
        return original(self, *args, **kwargs)

    wrapper = _dressed_as(original, dispatch)
    if recognized:
        setattr(wrapper, _KNOWN, True)
    if running is not None:
        setattr(wrapper, _RUNS, True)
    return wrapper


def with_single_experts(original: Callable[..., Any], bank: Bank) -> Callable[..., Any]:
    """A bank that runs one expert on all rows for a caller that asks for it, in the caller's trace or check."""

    def run_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        asked = bank.asked(args, kwargs)
        return original(self, *args, **kwargs) if asked is None else bank.expert(asked, self, args, kwargs)

    wrapper = _dressed_as(original, run_experts)
    setattr(wrapper, BANK, bank)
    setattr(wrapper, _KNOWN, True)
    return wrapper


def _holds_while_alike(module: nn.Module) -> bool:
    """Let what is traced hold only while the numbers in all experts are what they were when they were compared."""
    held = held_by_experts(module)
    return not held or hold_while(lambda: all(each.same() for each in held), "numbers that experts hold")


def _confirmed(
    dispatches: tuple[Any, ...], original: Callable[..., Any], module: nn.Module, facts: tuple[Facts | str, ...]
) -> tuple[int, Trusted] | Reason:
    """(which of the equivalents is right, what it needs), or why none is."""
    reason = Reason("")
    for number, (dispatch, of_call) in enumerate(zip(dispatches, facts, strict=True)):
        try:
            if isinstance(of_call, str):
                raise UntrustedError(of_call)
            return number, vouch(dispatch, original, module, of_call)
        except NoExpertsError as error:
            reason = reason or Reason(error)
        except UntrustedError as error:
            reason = reason if reason.routes else Reason(error, True)
        except Exception as error:
            _log.debug("checking %s failed", getattr(original, "__qualname__", original), exc_info=True)
            reason = reason if reason.routes else Reason(f"checking it failed ({first_line(error)})", True)
    return reason


def _order(
    module: nn.Module,
    original: Callable[..., Any],
    running: Running | None,
    recognized: tuple[Dispatch, ...],
    facts: Facts | str,
) -> tuple[int, ...]:
    """What is tried, in turn. Running comes first where code that no idiom knows asks the host, too."""
    if running is None or isinstance(facts, str) or not may_run(module):
        return (_IDIOMS,)
    calls: list[_Called] = []
    _noted.calls = calls
    try:
        with eagerly(module):
            call = running.random_call(module, facts)
            asked = running.asked(module, call)
    finally:
        _noted.calls = None
    if recognized:
        calls.append(_Called(recognized, original, module, tuple(call.args), call.kwargs))
    refused = {innermost(each.original) for each in calls if not _reads_it_whole(each)}
    unknown = [each for each in asked.asking if not _is_known(each, asked.layer, refused)]
    if any(not each.grouped for each in unknown):
        return (_RUNNING, _IDIOMS)
    read = any(innermost(each.original) not in refused for each in calls)
    unread = asked.chooses and not read and holds_experts(module)  # no router, which would be run at each size
    return (_IDIOMS, _RUNNING) if recognized or unknown or unread else (_IDIOMS,)


def _reads_it_whole(call: _Called) -> bool:
    """Whether an idiom's equivalent is right, and asks the host for nothing."""
    facts = tuple(each.facts(call.args, call.kwargs) for each in call.recognized)
    found = _confirmed(call.recognized, call.original, call.module, facts)
    if isinstance(found, Reason):
        return False
    number, trusted = found
    dispatch, asked = call.recognized[number], Asked()
    if not isinstance(dispatch, Inline):  # nothing but dispatch
        return True
    with eagerly(call.module), Watch(asked):
        dispatch.meant(trusted, isolated(call.module), list(call.args), call.kwargs)
    return not any(each.direct for each in asked.asking)


def _is_known(asking: Asking, layer: nn.Module, refused: set[Any]) -> bool:
    """Whether an idiom knows the code that asks, or a module within is a layer itself: the smallest one decides."""
    inner = asking.module
    known = _known_codes(layer, refused)
    if inner is None or inner is layer:
        return id(asking.code) in known
    if id(asking.code) in _known_codes(inner, refused):
        return True
    if any(hasattr(each, BANK) for each in _marked(type(inner), _KNOWN)):
        return bool(known)
    runs = bool(_marked(type(inner), _RUNS)) and may_run(inner)
    return runs and (holds_experts(inner) or not holds_experts(layer))


def _known_codes(module: nn.Module, refused: set[Any]) -> set[int]:
    """The id() of the code of a module's methods whose dispatch idioms know, and of the functions in it."""
    marked = _marked(type(module), _KNOWN)
    if all(hasattr(each, BANK) for each in marked):  # they run experts for a caller that no idiom knows
        return set()
    written = (innermost(each) for each in marked)
    pending = [getattr(each, "__code__", None) for each in written if each not in refused]
    found: set[int] = set()
    while pending:
        code = pending.pop()
        if code is not None:
            found.add(id(code))
            pending += [each for each in code.co_consts if isinstance(each, CodeType)]
    return found


def _others_are_wrapped(module: nn.Module) -> bool:
    """Whether another method than the forward is one that is warned of where it stays as it is."""
    return any(each.__name__ != "forward" for each in _marked(type(module), ORIGINAL))


def _marked(kind: type, mark: str) -> list[Any]:
    values = (each for owner in kind.__mro__ for each in vars(owner).values())
    return [each for each in values if mark in getattr(each, "__dict__", {})]


def _caching_is_wanted(module: nn.Module) -> bool:
    return not torch.is_grad_enabled() and not module.training


def _dressed_as(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """functools.wraps, without the marks by which Dynamo would skip the wrapper as it does the original.

    Its code is its own: Dynamo keeps what it compiled, and counts how often, by code.
    """
    functools.update_wrapper(wrapper, original)
    code: Any = wrapper
    code.__code__ = code.__code__.replace(co_name=wrapper.__name__)
    setattr(wrapper, ORIGINAL, original)
    return traced_anew(wrapper)
