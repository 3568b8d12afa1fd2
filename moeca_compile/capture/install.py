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

import torch
from torch import nn

from moeca_compile._torch_private import (
    not_on_compile_start,
    on_every_compile_start,
    traced_anew,
    traced_self,
)
from moeca_compile.capture import suspects
from moeca_compile.capture.gate import tracing_for_moeca
from moeca_compile.capture.idioms import IDIOMS
from moeca_compile.capture.idioms.bank import Bank
from moeca_compile.capture.idioms.base import Dispatch, Facts, Idiom, Trusted
from moeca_compile.capture.idioms.held import BANK
from moeca_compile.capture.numerics import NoExpertsError, UntrustedError
from moeca_compile.capture.refusals import Refusal, refuse
from moeca_compile.capture.source import Method, innermost, read_method
from moeca_compile.capture.trust import vouch
from moeca_compile.text import first_line

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_seen: dict[int, ref[type]] = {}  # by identity: a class may be of a metaclass that cannot be hashed
UNREAD = "looking for MoE dispatch failed ({0}), so new MoE layers run as under plain torch.compile. Please report it"
_ORIGINAL = "_moeca_original"  # the attribute of a wrapper that holds what it wraps


def install() -> None:
    """Before each compilation, wrap the MoE dispatch of every nn.Module class that is new since the last one."""
    on_every_compile_start(wrap_new_classes)


def uninstall() -> None:
    """Give every class its own methods back."""
    not_on_compile_start(wrap_new_classes)
    with _lock:
        for owner in [found for known in _seen.values() if (found := known()) is not None]:
            for name, function in _methods(owner):
                if hasattr(function, _ORIGINAL):
                    setattr(owner, name, getattr(function, _ORIGINAL))
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
            wrapper = _wrapper(function) if not hasattr(function, _ORIGINAL) else None
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
    suspicious = suspects.may_be_suspect(code)
    method = read_method(function) if idioms or suspicious else None
    if method is None:
        return None
    recognized = [each for each in (_recognized(idiom, method) for idiom in idioms) if each is not None]
    dispatches = tuple(each for each in recognized if not isinstance(each, Bank))
    if dispatches:
        return _with_equivalent(function, method, dispatches)
    for bank in recognized:
        return _with_single_experts(function, bank)  # type: ignore[arg-type]
    lists = suspects.expert_lists(method)
    return _with_warning(function, method, lists) if lists else None


def _recognized(idiom: Idiom, method: Method) -> Dispatch | Bank | None:
    """The idiom's answer; None where it fails, which must not keep the other idioms from answering."""
    try:
        return idiom.recognize(method)
    except Exception:
        _log.debug("%s: reading %s for the idiom %r failed", method.where, method.name, idiom.name, exc_info=True)
        return None


def _with_equivalent(
    original: Callable[..., Any], method: Method, recognized: tuple[Dispatch, ...]
) -> Callable[..., Any]:
    """Several idioms may see their dispatch in a method: numbers tell which of them is right."""

    @torch.compiler.assume_constant_result
    def vouched(identity: int, facts: tuple[Facts | str, ...]) -> tuple[int, Trusted] | None:
        module, reasons = traced_self(identity), []
        for number, dispatch in enumerate(recognized):
            try:
                of_call = facts[number]
                if isinstance(of_call, str):
                    raise UntrustedError(of_call)
                return number, vouch(dispatch, original, module, of_call)
            except NoExpertsError:
                continue
            except UntrustedError as reason:
                reasons.append(str(reason))
            except Exception as error:
                _log.debug("%s: checking %s failed", method.where, method.name, exc_info=True)
                reasons.append(f"checking it failed ({first_line(error)})")
        if reasons:
            advice = "Write it so that this no longer holds, or add an idiom (docs/extending/idiom.md)."
            refuse(Refusal(method.where, method.name, reasons[0]), advice)
        return None

    def dispatch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and _caching_is_wanted(self) and tracing_for_moeca():
            found = vouched(id(self), tuple([each.facts(args, kwargs) for each in recognized]))
            if found is not None:
                number, trusted = found
                return recognized[number].equivalent(trusted, self, args, kwargs)
        return original(self, *args, **kwargs)

    return _dressed_as(original, dispatch)


def _with_single_experts(original: Callable[..., Any], bank: Bank) -> Callable[..., Any]:
    """A bank that runs one expert on all rows for a caller that asks for it, in the caller's trace or check."""

    def run_experts(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        asked = bank.asked(args, kwargs)
        return original(self, *args, **kwargs) if asked is None else bank.expert(asked, self, args, kwargs)

    wrapper = _dressed_as(original, run_experts)
    setattr(wrapper, BANK, bank)
    return wrapper


def _with_warning(original: Callable[..., Any], method: Method, lists: tuple[str, ...]) -> Callable[..., Any]:
    @torch.compiler.assume_constant_result
    def warned(identity: int) -> bool:
        if suspects.holds_modules(traced_self(identity), lists):
            refuse(Refusal(method.where, method.name, suspects.REASON), suspects.ADVICE)
        return True

    def suspect(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and _caching_is_wanted(self) and tracing_for_moeca():
            warned(id(self))
        return original(self, *args, **kwargs)

    return _dressed_as(original, suspect)


def _caching_is_wanted(module: nn.Module) -> bool:
    return not torch.is_grad_enabled() and not module.training


def _dressed_as(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """functools.wraps, without the marks by which Dynamo would skip the wrapper as it does the original."""
    functools.update_wrapper(wrapper, original)
    setattr(wrapper, _ORIGINAL, original)
    return traced_anew(wrapper)
