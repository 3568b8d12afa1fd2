"""What a layer holds of its experts: their tensors' paths, and all that has to be equal among layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moeca_compile.capture.numerics import NoExpertsError, UntrustedError
from moeca_compile.capture.source import innermost
from moeca_compile.capture.structure import Path, alive, structure, tensor_paths, unlike

BANK = "_moeca_bank"  # the attribute of a method that runs all experts of its module (idioms/bank.py)


class ExpertOf:
    """One expert of a module that holds them all: calling it runs that expert on all rows.

    It stands for the module, and among its arguments for whatever would tell which rows are whose. `items` are the
    packed tensors of all experts and `own` this expert's slices, once it was called.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        self.module, self.number = module, number
        self.items: list[Tensor] = []
        self.own: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def expert_of(item: Any, number: int) -> Any:
    """Traceable: what expert `number` owns of an item."""
    if isinstance(item, nn.Module) and not isinstance(item, (nn.ModuleList, nn.ParameterList)):
        return ExpertOf(item, number)
    return item[number]


def banks_of(module: Any) -> Iterator[Any]:
    """The methods of a module that run all its experts, as idioms/bank.py knows them."""
    for owner in type(module).__mro__ if isinstance(module, nn.Module) else ():
        yield from (vars(each)[BANK] for each in vars(owner).values() if BANK in getattr(each, "__dict__", {}))


def representative(item: Any) -> Any:
    """What tells one item from another: its first expert, or the module that runs all experts."""
    return item[0] if isinstance(item, (Tensor, nn.ModuleList, nn.ParameterList)) else item


def count(item: Any) -> int:
    """Traceable: how many experts an item is of."""
    return item.shape[0] if isinstance(item, Tensor) else len(item)


def counted(item: Any) -> int:
    """The same for a module that runs all experts. Raises NoExpertsError where an item holds none."""
    if isinstance(item, (Tensor, nn.ModuleList, nn.ParameterList)):
        return count(item)
    for bank in banks_of(item):
        return count(getattr(item, bank.items[0]))
    if _reads_on_host(item):
        raise UntrustedError("it hands sorted rows to a module whose code no idiom knows")
    raise NoExpertsError


def _reads_on_host(module: Any) -> bool:
    """Whether a module's own code asks the host for a tensor's value, as a loop over segments does."""
    methods = (each for owner in type(module).__mro__ if owner is not nn.Module for each in vars(owner).values())
    codes = (getattr(innermost(each), "__code__", None) for each in methods if callable(each))
    return any(code and not {"tolist", "item", "numpy"}.isdisjoint(code.co_names) for code in codes)


def item_paths(item: Any) -> tuple[Path, ...]:
    if isinstance(item, Tensor):
        return ((),)
    if isinstance(item, nn.ParameterList) and len({structure_of(each) for each in item}) == 1:
        return ((),)
    if isinstance(item, nn.ModuleList) and len(item):
        reason = unlike(item)
        if reason:
            raise UntrustedError(reason)
        return tensor_paths(item[0])
    if any(True for _ in banks_of(item)):
        return ()
    raise NoExpertsError


def shared_paths(shared: Any, layer: nn.Module) -> tuple[Path, ...]:
    if isinstance(shared, Tensor):
        return ((),)
    if isinstance(shared, nn.Module):
        reason = alive(shared)
        if reason:
            raise UntrustedError(f"what its experts share {reason}")
        return tensor_paths(shared)
    if getattr(shared, "__self__", None) is layer:
        raise UntrustedError("its experts' code calls a method of the layer")
    return ()


def structure_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    return structure(value) if isinstance(value, nn.Module) else repr(type(value))
