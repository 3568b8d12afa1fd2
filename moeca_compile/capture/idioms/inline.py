"""For methods that do more than dispatch, such as a whole `forward` with its router.

The method is traced as it is written but for its dispatch, which becomes the marker ops (rewriting.py). The
check runs the original and the rewritten method on random arguments; in the rewritten one the dispatch is the
marker ops' meaning, as a plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.dataflow import Flow
from moeca_compile.capture.idioms.base import Facts, Layout, Trusted, facts_of_arguments
from moeca_compile.capture.idioms.held import counted, item_paths, representative, shared_paths, structure_of
from moeca_compile.capture.idioms.marking import Markers
from moeca_compile.capture.idioms.meaning import Meaning
from moeca_compile.capture.idioms.trials import (
    arguments_like,
    cloned,
    equal,
    finite,
    kind,
    leaves,
    one_apart,
    random_argument,
    with_rows,
    without_side_effects,
)
from moeca_compile.capture.numerics import UntrustedError, tolerance_for, with_random_parameters
from moeca_compile.capture.rewriting import Rewritten, rewritten
from moeca_compile.capture.roles import IndexOf, ItemsOf, loop_items
from moeca_compile.capture.site import find_site
from moeca_compile.capture.source import Method

TRIAL_SEED = 0
# The experts' part in what a method returns has to be so many times the tolerance for the check to see a fault.
SEEN = 3.0
LOUD = 4.0  # what experts' random parameters are multiplied by where a shared expert drowns them
DTYPES_OF = ("accumulator", "product", "branch")  # what the result's dtype may be that of (meaning.py)


@dataclass(frozen=True)
class Inline:
    """A method whose dispatch was found and rewritten; `parameters` are its own, in order, without self."""

    method: Rewritten
    parameters: tuple[str, ...]

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts | str:
        """Traceable: what kind of argument each is, or why a call is not supported."""
        return facts_of_arguments(args, kwargs)

    def layout(self, module: nn.Module) -> Layout:
        items, shared = self._held(module)
        counts = {counted(item) for item in items}
        if len(counts) != 1 or 0 in counts:
            raise UntrustedError("self holds no experts, or not as many of one kind as of another")
        paths = tuple(item_paths(item) for item in items) + tuple(shared_paths(each, module) for each in shared)
        structures = tuple(structure_of(each) for each in [*map(representative, items), *shared])
        return Layout(paths, (counts.pop(), structures))

    def compared(self, original: Callable[..., Any], module: nn.Module, facts: Facts) -> torch.dtype:
        devices = [fact[4] for fact in facts if fact[1]]
        tolerance = tolerance_for([*module.parameters(), *self._tensors(facts)])
        trials = list(self._trials(facts, counted(self._held(module)[0][0])))
        if not devices:
            raise UntrustedError("none of its arguments is a tensor")
        for layer in self._candidates(module):
            verdicts = [self._compared_once(original, layer, *trial, tolerance) for trial in trials]
            if all(verdict is not None for verdict in verdicts):
                return verdicts[0]  # type: ignore[return-value]
        raise UntrustedError("its experts hardly change what it returns, so nothing can be told from numbers")

    def equivalent(self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traceable: what the method returns, its dispatch as marker ops."""
        return self.method.function(Markers(*trusted, self.method.may_miss), module, *args, **kwargs)

    def meant(self, trusted: Trusted, module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Run the rewritten method once, with its markers' meaning: what else it asks the host is left to Dynamo."""
        for dtype_of in DTYPES_OF:
            meaning = self._meaning(dtype_of, trusted[1])
            with suppress(Exception):  # of a dtype that does not fit
                self.method.function(meaning, module, *cloned(args), **kwargs)
                return

    def _meaning(self, dtype_of: str, _: Any) -> Meaning:
        return Meaning(dtype_of, 1.0, float("inf"))

    def _candidates(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module, and copies for where its numbers tell nothing: random ones, with loud experts at last."""
        yield module
        yield with_random_parameters(module)
        copied = with_random_parameters(module)
        for item in self._held(copied)[0]:
            for parameter in [item] if isinstance(item, Tensor) else item.parameters():
                parameter.mul_(LOUD)
        yield copied

    def _held(self, module: nn.Module) -> tuple[list[Any], list[Any]]:
        """What the attributes hold: the experts' own, and what they share."""
        try:
            items, shared = (
                [attrgetter(n)(module) for n in names] for names in (self.method.items, self.method.shared)
            )
        except AttributeError as error:
            raise UntrustedError(f"an attribute that its experts read is missing: {error}") from error
        return items, shared

    # the comparison

    def _compared_once(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: list[Any],
        kwargs: dict[str, Any],
        tolerance: float,
    ) -> torch.dtype | None:
        """The dispatch's dtype; None if the numbers cannot tell. Raises UntrustedError where they differ."""
        want = without_side_effects(original, module, args, kwargs)
        for dtype_of in DTYPES_OF:
            meaning = Meaning(dtype_of, 1.0, tolerance)
            got = leaves(self.method.function(meaning, module, *cloned(args), **kwargs))
            if [kind(each) for each in got] == [kind(each) for each in want]:
                break
        else:
            raise UntrustedError("it returns another shape or type than its experts' weighted outputs have")
        if not all(equal(a, b, tolerance) for a, b in zip(got, want, strict=True)):
            raise UntrustedError("its result is not the sum of its experts' weighted outputs")
        without = Meaning(dtype_of, 0.0, tolerance)
        rest = leaves(self.method.function(without, module, *cloned(args), **kwargs))
        told = any(not equal(a, b, SEEN * tolerance) for a, b in zip(rest, want, strict=True))
        return meaning.dtype if told and all(finite(each) for each in want) else None

    def _trials(self, facts: Facts, num_experts: int) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Random arguments; then experts with as many rows as can be and with none, as tokens are all the same; then
        experts with a single row, as all tokens but one are."""
        for same in (False, True):
            yield self._arguments(facts, num_experts, same, TRIAL_SEED)
        args, kwargs = self._arguments(facts, num_experts, False, TRIAL_SEED)
        apart = {name: with_rows(value, one_apart) for name, value in kwargs.items()}
        yield [with_rows(value, one_apart) for value in args], apart

    def _arguments(self, facts: Facts, num_experts: int, same: bool, seed: int) -> tuple[list[Any], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)

        def random(key: int | str, described: Sequence[Any]) -> Tensor:
            ids = self._name(key) is not None and self._name(key) == self.method.index
            return random_argument(described, num_experts if ids else None, same, generator)

        return arguments_like(facts, random)

    def _name(self, key: int | str) -> str | None:
        if isinstance(key, str):
            return key
        return self.parameters[key] if key < len(self.parameters) else None

    def _tensors(self, facts: Facts) -> list[Tensor]:
        return [torch.empty(0, dtype=fact[3], device=fact[4]) for fact in facts if fact[1]]


def recognized(
    method: Method, flow: Flow, index_of: IndexOf, items_of: ItemsOf = loop_items, dense: bool = False
) -> Inline | None:
    """The dispatch in `method`, found by site.py and rewritten, None where there is none that is understood."""
    site = find_site(flow, method.tree, index_of, items_of, dense)
    found = rewritten(site, method.function) if site else None
    return Inline(found, flow.parameters) if found else None
