"""What an idiom is: a way of writing MoE dispatch, recognized in code, and its traceable equivalent.

There are two kinds of equivalents: `routed.Routed` for methods that are handed rows, expert ids and weights and
do nothing but dispatch, and `inline.Inline` for all others, whose code is kept around the dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import CodeType
from typing import Any, Protocol

from torch import Tensor, nn

from moeca_compile._torch_private import has_static_value
from moeca_compile.capture.source import Method
from moeca_compile.capture.structure import Path

Paths = tuple[tuple[Path, ...], ...]

Trusted = tuple[Paths, Any]
"""What an equivalent needs of a layer: the paths of its tensors in each item, and what the check found out of it,
the dtype of the result and more (pairs.py)."""

Facts = tuple[Any, ...]
"""Constants about the arguments of one call, known while tracing: sizes, dtypes, layouts, device."""


def facts_of_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool = False) -> Facts | str:
    """Traceable: the kind of each argument, or why such a call is not supported.

    Of a tensor its sizes, where one that varies is None, or the size of this call where they are wanted `whole`.
    """
    given: list[tuple[Any, ...]] = []
    for key, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor):
            sizes = [len(range(size)) if whole or has_static_value(size) else None for size in value.shape]
            if 0 in sizes:
                return "an argument has no rows"
            given.append((key, True, tuple(sizes), value.dtype, value.device))
        elif value is None or isinstance(value, (bool, int, float, str)):
            given.append((key, False, value))
        else:
            return f"one of its arguments is a {type(value).__name__}, neither a tensor nor a number"
    return tuple(given)


@dataclass(frozen=True)
class Layout:
    """Where a layer keeps its experts' tensors, and all that has to be equal for a check to hold for another."""

    paths: Paths
    structure: Hashable


class Dispatch(Protocol):
    """A recognized method. `facts` and `equivalent` are traced by Dynamo."""

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts | str:
        """What the check must know about a call, or why it is not supported."""

    def layout(self, module: nn.Module) -> Layout:
        """Where `module` keeps its experts. Raises UntrustedError where they cannot stand for each other."""

    def compared(self, original: Callable[..., Tensor], module: nn.Module, facts: Facts) -> Any:
        """Compare original and meaning on random calls; the result's dtype and more. Raises UntrustedError."""

    def equivalent(self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The method's result, through markers."""


@dataclass(frozen=True)
class Idiom:
    """One way of writing MoE dispatch.

    name: for messages
    plausible: a cheap test on a method's code object, before its source is read
    recognize: the Dispatch (or the Bank, bank.py) in a method's code, None where it is no such method; never by
        names of classes
    """

    name: str
    plausible: Callable[[CodeType], bool]
    recognize: Callable[[Method], Any]


def uses(*names: str) -> Callable[[CodeType], bool]:
    """A test for code in which all these names occur (attributes, methods, globals)."""
    return lambda code: set(names).issubset(code.co_names)
