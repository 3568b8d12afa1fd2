"""Running as a `Dispatch`: a layer is run, its graph taken apart and put together, and compared with the layer.

What the host read must have been different among the random calls, one of which has NaN in it, at each line that
reads: else nobody knows what the layer does when it is. Calls of all layers are compared, by their own numbers;
those of the first one of a structure by random parameters too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moeca_compile._torch_private import groups_held, has_forward_hooks, outermost_module
from moeca_compile.capture.idioms.base import Facts, Layout, Trusted, facts_of_arguments
from moeca_compile.capture.idioms.routed import tensor_at
from moeca_compile.capture.idioms.trials import equal, finite, kind, leaves
from moeca_compile.capture.numerics import (
    NoExpertsError,
    UntrustedError,
    autocast,
    require_row_wise,
    tolerance_for,
    with_random_parameters,
)
from moeca_compile.capture.running.build import Meaning, Replacement, build
from moeca_compile.capture.running.dense import on_all_rows
from moeca_compile.capture.running.drawn import LARGE, Drawn, ids_for, other_half, single, uneven
from moeca_compile.capture.running.find import find
from moeca_compile.capture.running.graph import Graph
from moeca_compile.capture.running.own_code import (
    attributes_read,
    is_same,
    nothing_left,
    numbers_read,
    reached_from,
)
from moeca_compile.capture.running.trace import Call, counted, run, traced, written
from moeca_compile.capture.running.watch import Asked
from moeca_compile.capture.source import functions_of
from moeca_compile.capture.structure import named_tensors, structure, trains
from moeca_compile.ops.exchange import sizes_noted

_SEEDS = (0, 1, 2, 3)
_MORE_SEEDS = range(10, 40)  # until each expert has been compared
_SINGLE_SEEDS = range(40, 48)  # until an expert had a single row
_OTHERS = (1.5, -1.5, 8.0)
_ROWS = 8  # more than the call may have, to tell whether experts look at others
_COUNTS = (*range(1, 18), 49, 99, 999, 10**6)  # of earlier calls
_NUMBERS = 3  # that arguments are compared with: each makes one more call


class _Functions:
    """The replacements' functions as attributes: Dynamo guards the one that it reads, and not how many there are."""


FUNCTIONS = _Functions()
_built: WeakKeyDictionary[type, dict[Any, tuple[Replacement, str, Drawn] | Exception]] = WeakKeyDictionary()


class Running:
    """The forward of a class as a `Dispatch` (idioms/base.py)."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any], whole: bool = True) -> Facts | str:
        """Traceable: the kind of each argument; all sizes as numbers where `whole`, None for one that varies else."""
        return facts_of_arguments(args, kwargs, whole)

    def layout(self, module: nn.Module) -> Layout:
        for each in module.modules():
            if trains(each):
                raise UntrustedError("a part of it is in training mode")
            if has_forward_hooks(each):
                raise UntrustedError("a part of it has forward hooks")
        return Layout((), (id(module), structure(module), repr(numbers_read(module))))

    def random_call(self, module: nn.Module, facts: Facts) -> Call:
        return Drawn(ids_for(module)).call(facts, 0)

    def asked(self, module: nn.Module, call: Call) -> Asked:
        """What a call asks the host for."""
        asked = Asked()
        with suppress(UntrustedError):  # of side effects, once it ran
            run(module, self.forward, call, asked)
        return asked

    def compared(self, original: Callable[..., Any], module: nn.Module, facts: Facts) -> Any:
        if not any(fact[1] for fact in facts):
            raise UntrustedError("none of its arguments is a tensor")
        tolerance = tolerance_for(
            [*module.parameters(), *(torch.empty(0, dtype=f[3], device=f[4]) for f in facts if f[1])]
        )
        built = _built.setdefault(type(module), {})
        plain = numbers_read(module)
        groups = tuple(groups_held(module).items())
        key = (self.forward, structure(module), repr(plain), groups, facts, autocast())
        if key not in built:
            try:
                built[key] = self._build(module, facts, tolerance)
            except (UntrustedError, NoExpertsError) as reason:
                built[key] = type(reason)(*reason.args)  # without the frames that it was raised in, and their model
        found = built[key]
        if isinstance(found, Exception):
            raise type(found)(*found.args)
        replacement, name, drawn = found
        for call in drawn.calls(facts):
            self._compare(replacement, module, call, tolerance)
        return name, tuple(tuple(each.split(".")) for each in replacement.names), plain

    def equivalent(self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traceable: what the layer returns, through a marker op."""
        _, (name, paths, plain) = trusted
        for path, value in plain:  # Dynamo guards what is read
            assert is_same(tensor_at(module, path), value)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        return getattr(FUNCTIONS, name)(None, *tensors, *[tensor_at(module, path) for path in paths])

    # building

    def _build(self, module: nn.Module, facts: Facts, tolerance: float) -> tuple[Replacement, str, Drawn]:
        other = with_random_parameters(module)
        drawn = Drawn(ids_for(module))
        drawn = Drawn(drawn.ids, tuple(sorted(self.asked(module, drawn.call(facts, 0)).compared)[:_NUMBERS]))
        candidates = self._candidates(module, other, facts, drawn, tolerance)
        replacement = next(candidates)
        asked = Asked()
        for layer in (module, other):
            for call in drawn.calls(facts):
                with nothing_left(self.forward, type(module)):
                    _, after = run(layer, self.forward, call, asked)
                self._require_harmless(layer, after)
        without_numbers = _without_numbers(drawn.call(facts, 0))
        expected = self._returned_for(without_numbers, module, asked)
        if asked.other_modes:
            raise UntrustedError("a part of it runs under another autocast than the rest")
        reason = asked.one_sided()
        if reason is not None:
            raise UntrustedError(reason)
        replacement, rows = self._agreeing(chain([replacement], candidates), other, facts, drawn, tolerance)
        if expected is not None:
            self._compare_known(replacement, module, without_numbers, expected, tolerance)
        self._require_forgetful(module, list(drawn.calls(facts)), tolerance)
        for seed in _MORE_SEEDS:
            if bool(torch.stack(rows).any(0).all()):
                break
            other = other if seed % 10 else with_random_parameters(module)  # one that never chooses it may be unlucky
            rows.append(self._compare(replacement, other, drawn.call(facts, seed, scale=LARGE), tolerance))
        for seed in _SINGLE_SEEDS:
            if bool((torch.stack(rows) == 1).any()):
                break
            call = single(drawn.call(facts, seed, scale=LARGE))
            rows.append(self._compare(replacement, other, call, tolerance))
        idle = torch.stack(rows).any(0).logical_not().nonzero()
        if len(idle):
            raise UntrustedError(f"expert {int(idle[0])} got no rows in random calls, so nothing is known of it")
        name = f"replacement_{len(vars(FUNCTIONS))}"
        setattr(FUNCTIONS, name, type(replacement.module).forward)
        return replacement, name, drawn

    def _candidates(
        self, module: nn.Module, other: nn.Module, facts: Facts, drawn: Drawn, tolerance: float
    ) -> Iterator[Replacement]:
        """From each random call in which all experts have rows: by the layer's own router, or by another.

        Raises NoExpertsError or UntrustedError where there is none.
        """
        error: Exception = NoExpertsError()
        found = False
        for seed in _SEEDS:
            for layer in (module, other):
                try:
                    yield self._built_from(layer, drawn.call(facts, seed), tolerance)
                    found = True
                except UntrustedError as reason:
                    error = reason
                except NoExpertsError as reason:
                    error = error if isinstance(error, UntrustedError) else reason
                except Exception as reason:  # the layer's own: these are no numbers for it
                    error = NoExpertsError(f"on random rows it raised {type(reason).__name__}: {reason}")
            if not found and not str(error):
                break
        if not found:
            raise error

    def _agreeing(
        self, candidates: Iterable[Replacement], layer: nn.Module, facts: Facts, drawn: Drawn, tolerance: float
    ) -> tuple[Replacement, list[Tensor]]:
        """The first candidate that all random calls agree with, and the experts' rows in each.

        One call's numbers can mean two things by chance: weights that are one where no token was taken twice.
        """
        first: UntrustedError | None = None
        for replacement in candidates:
            try:
                return replacement, [
                    self._compare(replacement, layer, call, tolerance) for call in drawn.calls(facts)
                ]
            except UntrustedError as reason:
                first = first or reason
        assert first is not None
        raise first

    def _returned_for(self, call: Call, module: nn.Module, asked: Asked) -> list[Any] | None:
        """What the layer returns for a call, None where it raises."""
        try:
            return leaves(run(module, self.forward, call, asked)[0])
        except Exception:  # the layer's own
            return None

    def _compare_known(
        self, replacement: Replacement, module: nn.Module, call: Call, want: list[Any], tolerance: float
    ) -> None:
        """Where the layer returned numbers for what is none, the replacement must return the same."""
        got = leaves(Meaning(replacement).run(*call.tensors(), *_state(module, replacement)))
        for a, b in zip(got, want, strict=True):
            if isinstance(b, Tensor) and b.dtype.is_floating_point:
                known = b.isfinite()
                if not equal(a.where(known, 0), b.where(known, 0), tolerance):
                    raise UntrustedError("what it does with what is no number (NaN) was not found by running it")

    def _built_from(self, layer: nn.Module, call: Call, tolerance: float) -> Replacement:
        trace = traced(layer, self.forward, call)
        graph = Graph(trace, len(call.tensors()))
        try:
            return self._put_together(graph, layer, call, tolerance)
        except (UntrustedError, NoExpertsError):
            whole = on_all_rows(graph, trace, tolerance)
            if whole is None:
                raise
        return self._put_together(Graph(whole, len(call.tensors())), layer, call, tolerance)

    def _put_together(self, graph: Graph, layer: nn.Module, call: Call, tolerance: float) -> Replacement:
        found = find(graph, layer, tolerance)
        rows = graph.values[found.stream].reshape(-1, graph.values[found.stream].shape[-1])
        generator = torch.Generator().manual_seed(0)
        rows = torch.cat([rows, torch.randn(_ROWS, rows.shape[1], generator=generator).to(rows)])
        own = [
            graph.values[node] if part is None else graph.values[node][part] for node, part in found.experts.own[0]
        ]
        require_row_wise(lambda x: found.experts.body(x, *own), [rows], lambda: iter(own), tolerance)
        result = graph.output.args[0]
        coupled = False
        blocks = bool(found.experts.group) and self._sends_blocks(layer, call)
        replacement = build(graph, found, result, coupled, blocks)
        if not found.told.by_ids and self._coupled(replacement, layer, call, tolerance):
            replacement = build(graph, found, result, True, blocks)
        return replacement

    def _sends_blocks(self, layer: nn.Module, call: Call) -> bool:
        """Whether a layer sends as much to each rank whatever the rows are. By counts it may happen to."""
        with sizes_noted() as sizes:
            for each in (call, uneven(call), single(call)):
                run(layer, self.forward, each)
        return all(len({*each}) < 2 for each in sizes)

    def _coupled(self, replacement: Replacement, layer: nn.Module, call: Call, tolerance: float) -> bool:
        """Whether the routing of the first half of a batch changes with the second."""
        seen = []
        for scale in (None, *_OTHERS):
            tensors = [other_half(each, scale) for each in call.tensors()]
            meaning = Meaning(replacement)
            meaning.run(*tensors, *_state(layer, replacement))
            routed, weight = meaning.seen
            half = len(routed) // 2
            seen.append((routed[:half], (weight * routed)[:half]))
        (routed, weight), *others = seen
        return any(not torch.equal(routed, r) or not equal(weight, w, tolerance) for r, w in others)

    # checking

    def _compare(self, replacement: Replacement, layer: nn.Module, call: Call, tolerance: float) -> Tensor:
        """How many rows each expert got. Raises UntrustedError where the results differ."""
        result, after = run(layer, self.forward, call)
        want = leaves(result)
        meaning = Meaning(replacement)
        got = leaves(meaning.run(*call.tensors(), *_state(layer, replacement)))
        if [kind(each) for each in got] != [kind(each) for each in want]:
            raise UntrustedError("it returns another shape or type than was found by running it")
        if not all(finite(each) for each in want):
            raise UntrustedError("its numbers are not finite, so nothing can be told from them")
        if not all(equal(a, b, tolerance) for a, b in zip(got, want, strict=True)):
            raise UntrustedError("with other numbers its result is not what was found by running it")
        buffers = {name for held, name in written(layer, after)}
        read = {name for name in replacement.names if name.rpartition(".")[2] in buffers}
        if read:
            raise UntrustedError(f"its result depends on {min(read)}, which it changes")
        return meaning.rows

    def _require_harmless(self, before: nn.Module, after: nn.Module) -> None:
        """Tensors that a call leaves in attributes are not made when it is captured: nothing else may read them."""
        names = {name for _, name in written(before, after)}
        if not names:
            return
        root = outermost_module()
        own = reached_from(self.forward, type(before))
        for module in root.modules() if root is not None else [before]:
            for function in functions_of(type(module)):
                read = names & attributes_read(function.__code__)
                if read and function.__code__ not in own:
                    raise UntrustedError(f"it leaves a tensor in `{min(read)}`, which {function.__qualname__} reads")

    def _require_forgetful(self, layer: nn.Module, calls: list[Call], tolerance: float) -> None:
        """What a call leaves in the layer must not change what later calls return, nor may a count of calls."""

        def require(used: nn.Module, call: Call) -> nn.Module:
            want, (found, after) = run(layer, self.forward, call)[0], run(used, self.forward, call)
            if not all(equal(a, b, tolerance) for a, b in zip(leaves(found), leaves(want), strict=True)):
                raise UntrustedError("its result depends on what an earlier call left in it")
            return after

        used = layer
        for call in [*calls, calls[0]]:
            used = require(used, call)
        counts = list(counted(layer, used))
        for number in _COUNTS if counts else ():
            for held, name in counts:
                setattr(held, name, type(getattr(held, name))(number))
            require(used, calls[0])


def _without_numbers(call: Call) -> Call:
    """With NaN in it, where checks go the other way: some raise, and some make numbers of it."""
    for value in call.tensors():
        if value.dtype.is_floating_point and value.dim() > 0:
            value[-1:] = float("nan")
    return call


def _state(layer: nn.Module, replacement: Replacement) -> list[Tensor]:
    held = dict(named_tensors(layer))
    return [held[name] for name in replacement.names]
