"""The tensors of all experts of a list, without Dynamo's walk through every expert.

Dynamo takes some 3 ms for each parameter that it reads through modules: with 6 layers of 48 experts 2.6 s of the
6.6 s (processor time) that it needs for the whole model. This reads them where those of the first expert lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from moeca_compile._torch_private.lookup import Private

_SLOWER = "Dynamo walks through every expert, some 3 ms for each of their parameters"
_HANDLERS = Private("torch._dynamo.variables.torch.TorchInGraphFunctionVariable._get_handlers", _SLOWER)
_FUNCTION = Private("torch._dynamo.variables.functions.UserFunctionVariable", _SLOWER)
_BUILDER = Private("torch._dynamo.variables.builder.VariableBuilder", _SLOWER)
_LIST = Private("torch._dynamo.variables.lists.ListVariable", _SLOWER)
_ATTRIBUTE = Private("torch._dynamo.source.AttrSource", _SLOWER)
_ITEM = Private("torch._dynamo.source.DictGetItemSource", _SLOWER)
_INSTALL_GUARD = Private("torch._dynamo.guards.install_guard", _SLOWER)
_TYPE_MATCH = Private("torch._dynamo.guards.GuardBuilder.TYPE_MATCH", _SLOWER)
_ALL = (_HANDLERS, _FUNCTION, _BUILDER, _LIST, _ATTRIBUTE, _ITEM, _INSTALL_GUARD, _TYPE_MATCH)


def _traced_tensors_of_others(_: Any, tx: Any, modules: Any, paths: Any, firsts: Any) -> Any:
    """What Dynamo does in place of `tensors_of_others`. Inputs and guards are those that tracing it gives."""
    try:
        found = _read_beside_the_first(tx, modules, paths, firsts)
    except (AttributeError, TypeError):  # torch has these names, but they are no longer what they were
        found = None
    return found if found is not None else _FUNCTION.value(_plain).call_function(tx, [modules, paths, firsts], {})


def _read_beside_the_first(tx: Any, modules: Any, paths: Any, firsts: Any) -> Any:
    """The list for Dynamo; None where the first module's tensors are not read through the list."""
    sources = [first.realize().source for first in firsts.realize().items]
    place = _place_of_first(modules.realize().source, sources)
    if place is None:
        return None
    values = iter(_plain(modules.value, paths.as_python_constant(), ()))
    found, guarded = [], set()
    for number in range(1, len(modules.value)):
        beside = replace(place, index=str(number))
        for source in sources:
            moved = _moved(source, place, beside)
            for module in _modules_on_the_way(moved, beside):
                if module not in guarded:
                    guarded.add(module)
                    _INSTALL_GUARD.value(module.make_guard(_TYPE_MATCH.value))
            found.append(_BUILDER.value(tx, moved)(next(values)))
    return _LIST.value(found)


def _place_of_first(modules: Any, sources: Sequence[Any]) -> Any:
    """The source of the list's first module where all of `sources` are read through it; None where one is not."""
    if modules is None or not sources:
        return None
    place = _ITEM.value(_ATTRIBUTE.value(modules, "_modules"), "0")
    return place if all(place in _chain(source) for source in sources) else None


def _chain(source: Any) -> Iterator[Any]:
    """A source, what it is read from, and so on."""
    while source is not None:
        yield source
        source = getattr(source, "base", None)


def _moved(source: Any, old: Any, new: Any) -> Any:
    """The source with `new` in the place of `old` in its chain."""
    return new if source == old else replace(source, base=_moved(source.base, old, new))


def _modules_on_the_way(source: Any, start: Any) -> Iterator[Any]:
    """The modules that `source` is read through, back to `start`."""
    for each in _chain(source):
        if "NNModule" in type(each).__name__:
            yield each
        if each == start:
            return


def _with_handler(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in place of which Dynamo calls our handler, unless a name for that is missing."""
    if any(each.value is None for each in _ALL):
        return function
    torch.compiler.allow_in_graph(function)
    _HANDLERS.value()[function] = _traced_tensors_of_others
    return function


def _plain(
    modules: torch.nn.ModuleList, paths: Sequence[Sequence[str]], firsts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    found = []
    for module in list(modules)[1:]:
        for path in paths:
            value: Any = module
            for name in path:
                value = getattr(value, name)
            found.append(value)
    return found


@_with_handler
def tensors_of_others(
    modules: torch.nn.ModuleList, paths: Sequence[Sequence[str]], firsts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The tensors at `paths` in every module of a list but the first, module by module.

    Where Dynamo traces this, it does not go through the modules, which takes it 3 ms a parameter. `firsts` are the
    tensors at `paths` in the first module: those of the others are read from the same places beside it.
    """
    return _plain(modules, paths, firsts)
