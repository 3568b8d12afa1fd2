"""For methods in which experts take tokens: any (token, expert) pairs, as `moeca::experts_variable_k` has them.

As with inline.py, the method is traced as it is written but for its dispatch. The check finds out by numbers, too,
how ids and weights lie (routing.py), and whether the routing of a sample depends on the others in its batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.dataflow import Flow
from moeca_compile.capture.idioms.base import Facts, Trusted
from moeca_compile.capture.idioms.choices import MisreadError
from moeca_compile.capture.idioms.inline import DTYPES_OF, SEEN, TRIAL_SEED, Inline
from moeca_compile.capture.idioms.marking import Markers
from moeca_compile.capture.idioms.meaning import Meaning, RoutingAlone
from moeca_compile.capture.idioms.routing import NO_READING, Reading, readings
from moeca_compile.capture.idioms.trials import cloned, equal, finite, kind, leaves, without_side_effects
from moeca_compile.capture.numerics import UntrustedError, autocast, tolerance_for, with_random_parameters
from moeca_compile.capture.pair_site import find_pair_site
from moeca_compile.capture.rewriting import rewritten
from moeca_compile.capture.roles import Item
from moeca_compile.capture.source import Method

_LARGE = 4.0  # times random arguments of size 1: scores far apart, experts that take many tokens or none

_COARSE = (torch.bfloat16, torch.float16)

Arguments = tuple[list[Any], dict[str, Any]]
Verdict = tuple[torch.dtype, Reading, bool]
"""The dtype of the result, how ids and weights lie, whether samples of a batch depend on each other."""


@dataclass(frozen=True)
class Pairs(Inline):
    """A method in which experts take tokens."""

    def compared(self, original: Callable[..., Any], module: nn.Module, facts: Facts) -> Any:
        if not any(fact[1] for fact in facts):
            raise UntrustedError("none of its arguments is a tensor")
        tolerance = tolerance_for([*module.parameters(), *self._tensors(facts)])
        dtypes = {each.dtype for each in (*module.parameters(), *self._tensors(facts))} | {d for _, d in autocast()}
        if not self.method.by_ids and not dtypes.isdisjoint(_COARSE):
            return self._compared_in_float32(original, module, facts)
        trials = list(self._trials(facts, 1))
        for layer in self._candidates(module):
            verdict = self._verdict(original, layer, trials, tolerance)
            if verdict is not None:
                return *verdict, self._coupled(with_random_parameters(module), trials[0], verdict[1], tolerance)
        raise UntrustedError("its experts hardly change what it returns, so nothing can be told from numbers")

    def _compared_in_float32(self, original: Callable[..., Any], module: nn.Module, facts: Facts) -> Any:
        """In coarse types many scores tie, and among those a top-k and a sort choose as they like."""
        wide = tuple((*fact[:3], _widened(fact[3]), fact[4]) if fact[1] else fact for fact in facts)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            _, reading, coupled = self.compared(original, copy.deepcopy(module).float(), wide)
        args, kwargs = next(self._trials(facts, 1))
        want = [kind(each) for each in without_side_effects(original, module, args, kwargs)]
        for dtype_of in DTYPES_OF:
            meaning = Meaning(dtype_of, 1.0, float("inf"), reading)
            got = leaves(self.method.function(meaning, module, *cloned(args), **kwargs))
            if [kind(each) for each in got] == want:
                return meaning.dtype, reading, coupled
        raise UntrustedError("it returns another shape or type than its experts' weighted outputs have")

    def equivalent(self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        paths, (dtype, reading, coupled) = trusted
        return self.method.function(Markers(paths, dtype, False, reading, coupled), module, *args, **kwargs)

    def _meaning(self, dtype_of: str, verdict: Any) -> Meaning:
        return Meaning(dtype_of, 1.0, float("inf"), verdict[1])

    def _trials(self, facts: Facts, num_experts: int) -> Iterator[Arguments]:
        """Random arguments, then large ones: choices among tokens that are alike are the op's own affair."""
        for number, scale in enumerate((1.0, _LARGE)):
            args, kwargs = self._arguments(facts, num_experts, False, TRIAL_SEED + number)
            self._choose(args, kwargs)
            yield [_times(each, scale) for each in args], {name: _times(each, scale) for name, each in kwargs.items()}

    def _choose(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Distinct token ids, where the method is handed them."""
        held: list[tuple[Any, Any]] = [(args, number) for number in range(len(args))]
        held += [(kwargs, name) for name in kwargs]
        rows = [place[key] for place, key in held if isinstance(place[key], Tensor) and place[key].dim() > 1]
        for place, key in held:
            if self.method.index is not None and self._name(key) == self.method.index:
                ids, tokens = place[key], min(each.shape[-2] for each in rows if each.dtype.is_floating_point)
                order = torch.rand(ids.numel() // ids.shape[-1], max(tokens, ids.shape[-1])).argsort(-1)
                place[key] = (order[:, : ids.shape[-1]] % tokens).reshape(ids.shape).to(ids)

    def _verdict(
        self, original: Callable[..., Any], module: nn.Module, trials: list[Arguments], tolerance: float
    ) -> tuple[torch.dtype, Reading] | None:
        """What all trials agree in; None if the numbers cannot tell. Raises UntrustedError where they differ."""
        known: tuple[str, Reading] | None = None
        dtype = None
        for args, kwargs in trials:
            want = without_side_effects(original, module, args, kwargs)
            known = self._reading(module, args, kwargs, want, tolerance, known)
            meaning = Meaning(known[0], 0.0, tolerance, known[1])
            rest = leaves(self.method.function(meaning, module, *cloned(args), **kwargs))
            told = any(not equal(a, b, SEEN * tolerance) for a, b in zip(rest, want, strict=True))
            if not told or not all(finite(each) for each in want):
                return None
            dtype = meaning.dtype
        return (dtype, known[1]) if known is not None and dtype is not None else None

    def _reading(
        self,
        module: nn.Module,
        args: list[Any],
        kwargs: dict[str, Any],
        want: list[Any],
        tolerance: float,
        known: tuple[str, Reading] | None,
    ) -> tuple[str, Reading]:
        """(dtype_of, reading) with which the meaning is what the original returned. Raises UntrustedError."""
        kinds = set()
        possible = readings() if self.method.by_ids else [NO_READING]
        for reading in possible if known is None else [known[1]]:
            for dtype_of in DTYPES_OF if known is None else [known[0]]:
                meaning = Meaning(dtype_of, 1.0, tolerance, reading)
                try:
                    got = leaves(self.method.function(meaning, module, *cloned(args), **kwargs))
                except MisreadError:
                    break
                alike = [kind(each) for each in got] == [kind(each) for each in want]
                kinds.add(alike)
                if not alike:
                    continue
                if all(equal(a, b, tolerance) for a, b in zip(got, want, strict=True)):
                    return dtype_of, reading
                break
        if True in kinds:
            raise UntrustedError("its result is not the sum of its experts' weighted outputs")
        raise UntrustedError("it returns another shape or type than its experts' weighted outputs have")

    def _coupled(self, module: nn.Module, trial: Arguments, reading: Reading, tolerance: float) -> bool:
        """Whether the routing of the first half of a batch changes with the second."""
        if self.method.index is not None and not reading[1]:
            return True  # ids that count through the batch were chosen elsewhere
        args, kwargs = trial
        seen = []
        for scale in (None, *_OTHER_SCALES):
            meaning = RoutingAlone("product", 1.0, tolerance, reading)
            given = [_other_half(each, scale) for each in args]
            named = {name: _other_half(each, scale) for name, each in kwargs.items()}
            self.method.function(meaning, module, *cloned(given), **named)
            half = len(meaning.routed) // 2
            seen.append((meaning.routed[:half], (meaning.weight * meaning.routed)[:half]))
        if meaning.counted_by_data and any(_samples(each) > 1 for each in [*args, *kwargs.values()]):
            return True  # whatever the numbers are now
        (routed, weight), *others = seen
        return any(not torch.equal(routed, r) or not equal(weight, w, tolerance) for r, w in others)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _COARSE else dtype


def _samples(value: Any) -> int:
    return len(value) if isinstance(value, Tensor) and value.dim() > 0 else 1


def _times(value: Any, scale: float) -> Any:
    return value * scale if isinstance(value, Tensor) and value.dtype.is_floating_point else value


_OTHER_SCALES = (1.5, -1.5, 8.0, -8.0)
"""A choice among few tokens may come out the same by chance, hardly so under all of these."""


def _other_half(value: Any, scale: float | None) -> Any:
    """Other numbers in the second half of the first dimension; the same ones where there is no scale."""
    if scale is None or not isinstance(value, Tensor) or value.dim() == 0 or not value.dtype.is_floating_point:
        return value
    changed = value.clone()
    first = len(value) - len(value) // 2
    changed[first:] = scale * value[first:].flip(-1) + 0.5
    return changed


def recognized_pairs(method: Method, flow: Flow, items: dict[int, Item]) -> Pairs | None:
    """The dispatch by token ids in `method`, found by pair_site.py and rewritten, else None."""
    site = find_pair_site(flow, method.tree, items)
    found = rewritten(site, method.function) if site else None
    return Pairs(found, flow.parameters) if found else None
