"""The calls by which a layer is found out and checked: random arguments of the kinds that its call has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.idioms.base import Facts
from moeca_compile.capture.idioms.trials import arguments_like, one_apart, random_argument, with_rows
from moeca_compile.capture.running.trace import Call

LARGE = 4.0


def ids_for(layer: nn.Module) -> int:
    """How many experts there may be, for arguments that may be their ids."""
    sizes = [len(held) for held in layer.children() if isinstance(held, (nn.ModuleList, nn.ModuleDict))]
    sizes += [len(each) for each in layer.parameters(recurse=False) if each.dim() == 3]
    return max(sizes, default=2)


@dataclass(frozen=True)
class Drawn:
    """Random arguments.

    ids: how many experts there may be, for integers that may be their ids
    numbers: with which the layer compares integers, such as a label that stands for none
    """

    ids: int
    numbers: tuple[int, ...] = ()

    def calls(self, facts: Facts) -> Iterator[Call]:
        """Random arguments, large ones of which some come often, and rows that are all the same: experts with any
        number of rows, with one, and with none.

        Then all integers are one of the numbers, or none of them is.
        """
        yield self.call(facts, 0)
        yield uneven(self.call(facts, 1, scale=LARGE))
        yield self.call(facts, 2, same=True)
        for number in self.numbers:
            yield Drawn(self.ids, (number, number)).call(facts, 3)
        if self.numbers:
            yield Drawn(self.ids).call(facts, 4)

    def call(self, facts: Facts, seed: int, same: bool = False, scale: float = 1.0) -> Call:
        generator = torch.Generator().manual_seed(seed)

        def random(_: int | str, described: Sequence[Any]) -> Tensor:
            integers = not described[1].is_floating_point and described[1] != torch.bool
            value = random_argument(described, self.ids if integers else None, same, generator)
            value = self.with_numbers(value) if integers and self.numbers else value
            return value * scale if value.dtype.is_floating_point else value

        return Call(*arguments_like(facts, random))

    def with_numbers(self, value: Tensor) -> Tensor:
        """The numbers in turn, with others between them unless there is but one number, named twice."""
        numbers = torch.tensor(self.numbers, dtype=value.dtype, device=value.device)
        place = torch.arange(value.numel(), device=value.device)
        every = len(self.numbers) > 1 and len(set(self.numbers)) == 1
        picked = numbers[place // 2 % len(numbers)]
        return (picked if every else torch.where(place % 2 == 0, picked, value.flatten())).view(value.shape)


def uneven(call: Call) -> Call:
    """The first row of each tensor once, the second two times, the third four times, and so on."""
    return _with_rows(call, lambda count: torch.arange(1, count + 1).log2().long())


def single(call: Call) -> Call:
    """The first row of each tensor once, the second in the place of all others."""
    return _with_rows(call, one_apart)


def _with_rows(call: Call, numbers: Callable[[int], Tensor]) -> Call:
    tensors = [with_rows(each, numbers) if each.dtype.is_floating_point else each for each in call.tensors()]
    return call.with_tensors(tensors)


def other_half(value: Tensor, scale: float | None) -> Tensor:
    """The tensor with the second half of its rows changed by a scale; as it is where that is None."""
    if scale is None or value.dim() == 0 or not value.dtype.is_floating_point:
        return value
    changed = value.clone()
    first = len(value) - len(value) // 2
    changed[first:] = scale * value[first:].flip(-1) + 0.5
    return changed
