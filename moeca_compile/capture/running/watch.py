"""What a call asks the host for: by which numbers its Python may have gone another way, and at which lines."""

from __future__ import annotations

import operator
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from traceback import walk_stack
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moeca_compile._torch_private import before_each_op
from moeca_compile.capture.numerics import autocast
from moeca_compile.capture.running.conversions import converted
from moeca_compile.capture.running.numbers import calls, decides, noting
from moeca_compile.capture.source import functions_of

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
_WATCHING = (
    os.path.dirname(torch.__file__) + os.sep,
    __file__,
    noting.__code__.co_filename,
    converted.__wrapped__.__code__.co_filename,  # type: ignore[attr-defined]
    before_each_op.__code__.co_filename,
)


_OF_NONZERO = (torch.ops.aten.where.default, torch.ops.aten.nonzero_numpy.default, torch.ops.aten.argwhere.default)
_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_NUMBERS = frozenset({"item", "tolist", "numpy"})

_UNKNOWN = "does not say what it is compared with"

Place = tuple[tuple[str, int], ...]
"""Where something was asked: ("file:line", the instruction), and where that was called, and so on."""


class Asking(NamedTuple):
    """Who asked.

    code, module: the layer's own function, and the module of which it is a method or was called by one
    direct: whether it asked itself, and no code of this package that stands for a part of it
    grouped: whether it asked for a product by groups of rows, which reads their sizes where the host does not see it
    """

    code: CodeType
    module: nn.Module | None
    direct: bool
    grouped: bool


class Asked:
    """What calls asked, place by place.

    layer: the copy that was called last
    read: the values of tensors that became Python's there, and the outcomes of comparing these
    sizes: the sizes of tensors that are as large as the data say
    compared: numbers that integers among the arguments, such as labels, were compared with
    other_modes: whether some ops ran under another autocast than the call
    chooses: whether integers or truths were computed from numbers with a fraction, as a router's choice is
    """

    def __init__(self) -> None:
        self.layer = nn.Module()
        self.read: dict[Place, set[Any]] = defaultdict(set)
        self.sizes: dict[Place, set[Any]] = defaultdict(set)
        self.asking: list[Asking] = []
        self.compared: set[int] = set()
        self.other_modes = self.chooses = False

    def one_sided(self) -> str | None:
        """What it reads in a way that tells nothing of other calls, and where; None where there is no such line.

        A line that always read the same, or read what does not say what it is compared with. A size counts as such
        only where there never was anything: `if found.numel():`.
        """
        lines = [(where, values) for where, values in self.read.items() if len(values) == 1]
        lines += [(where, each) for where, each in self.sizes.items() if len(each) == 1 and 0 in next(iter(each))]
        if not lines:
            return None
        where, values = min(lines, key=operator.itemgetter(0))
        if _UNKNOWN in values:
            return f"a number that it reads at {where[0][0]} {_UNKNOWN}: read it by .item() or .tolist()"
        return f"what it reads at {where[0][0]} was the same in all random calls: nothing is known of others"


class Watch(TorchFunctionMode):
    """Notes in an `Asked` what is asked while it is on."""

    def __init__(self, asked: Asked, arguments: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.asked = asked
        self.asks_value = self.asks_size = False
        self.ops = before_each_op(self.before_op)
        self.autocast = autocast()
        self.of_varying_size: dict[int, Tensor] = {}
        self.of_integers = {id(each): each for each in arguments if _is_integer(each)}

    def __enter__(self) -> Watch:
        kinds = {id(type(held)): type(held) for held in self.asked.layer.modules()}  # which may have no hash
        own = {id(each): each for kind in kinds.values() for each in functions_of(kind)}
        self.conversions = converted(own.values(), self.compared)
        self.conversions.__enter__()
        self.ops.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.ops.__exit__(*error)
        self.conversions.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.asks_value = self.asks_size = False
        self.asked.other_modes |= autocast() != self.autocast
        result = func(*args, **(kwargs or {}))
        varies = self.asks_size or any(id(each) in self.of_varying_size for each in _tensors((args, kwargs)))
        made = _tensors(result)
        self.asked.chooses |= any(is_choice(each) for each in made) and not all(map(is_choice, _tensors(args)))
        if args and id(args[0]) in self.of_integers:
            self.of_integers.update({id(each): each for each in made if _is_integer(each)})
            if func.__name__.strip("_") in _COMPARES:
                self.asked.compared |= {each for each in args[1:] if type(each) is int}
        if made and varies:
            self.of_varying_size.update({id(each): each for each in made})
        if self.asks_size:
            self.note(None, ())
        if self.asks_value or (isinstance(result, (list, np.ndarray)) and not made):
            self.note(self.asked.read, _UNKNOWN if _is_lost(func, result) else _plain(result))
            result = noting(result, self.compared) if func.__name__ in _NUMBERS else result
        elif varies and isinstance(result, (int, torch.Size)) and not isinstance(result, bool):
            self.note(self.asked.sizes, tuple(result) if isinstance(result, torch.Size) else (result,))
        return result

    def before_op(self, op: Any, args: tuple[Any, ...]) -> None:
        self.asks_value |= torch.Tag.data_dependent_output in op.tags
        self.asks_size |= size_by_data(op, args)
        if op is torch.ops.aten._grouped_mm.default:
            self.note(None, (), grouped=True)

    def compared(self, outcome: bool | None, truth: bool) -> None:
        frames = _frames()
        own = _own(frames)
        code, at = own[0].f_code, own[0].f_lasti
        if outcome is not None and decides(code, at, truth):
            self.asked.read[_place(own)].add(outcome)
        elif outcome is None and calls(code, at) and not _asked_by_torch():
            self.asked.read[_place(own)].add(_UNKNOWN)

    def note(self, kept: dict[Place, set[Any]] | None, value: Any, grouped: bool = False) -> None:
        frames = _frames()
        own = _own(frames)
        self.asked.asking.append(Asking(own[0].f_code, self.asking_module(own), own[0] is frames[0], grouped))
        if kept is not None:
            kept[_place(own)].add(value)

    def asking_module(self, frames: list[FrameType]) -> nn.Module | None:
        own = set(self.asked.layer.modules())
        for frame in frames:
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            value = frame.f_locals.get(names[0]) if names else None
            if isinstance(value, nn.Module) and value in own:
                return value
        return None


def _frames() -> list[FrameType]:
    return [each for each, _ in walk_stack(None) if not each.f_code.co_filename.startswith(_WATCHING)]


def _own(frames: list[FrameType]) -> list[FrameType]:
    return [each for each in frames if not each.f_code.co_filename.startswith(_PACKAGE + os.sep)]


def _place(frames: list[FrameType]) -> Place:
    return tuple((f"{each.f_code.co_filename}:{each.f_lineno}", each.f_lasti) for each in frames)


def size_by_data(op: Any, values: Any) -> bool:
    """Whether the size of an op's result is told by the data in its arguments."""
    if torch.Tag.dynamic_output_shape not in getattr(op, "tags", ()):
        return op in _OF_NONZERO
    if op is torch.ops.aten.one_hot.default:  # where nobody says how many classes there are
        return len(values) < 2 or values[1] < 0
    if op is torch.ops.aten.index.Tensor:  # by numbers, the result is as large as these are
        return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in values[1])
    return True


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for part in value for each in _tensors(part)] if isinstance(value, (tuple, list)) else []


def is_choice(value: Tensor) -> bool:
    """Whether it holds integers or truths."""
    return not value.dtype.is_floating_point


def _is_integer(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)


def _is_lost(func: Callable[..., Any], result: Any) -> bool:
    """Whether a number is read in a way that does not tell what it is compared with."""
    plain = isinstance(result, (int, float, np.ndarray)) and not isinstance(result, bool)
    return plain and func.__name__ not in _NUMBERS and func.__name__ != "__index__"


def _asked_by_torch() -> bool:
    asking = next(each for each, _ in walk_stack(None) if each.f_code.co_filename not in _WATCHING)
    return asking.f_code.co_filename.startswith(_WATCHING[0])


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return repr(value)
