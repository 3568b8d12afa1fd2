"""The callable behind one captured graph: a step loop for each set of input shapes, compiled at the first call."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeca_compile._torch_private import compiling, is_fake, numeric_modes
from moeca_compile.config import MoecaConfig
from moeca_compile.lower.compiled import CapturedGraph, CompiledGraph
from moeca_compile.notes import Notes
from moeca_compile.options import ConfigError
from moeca_compile.passes.analysis.graph import groups_in
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.runtime import scope
from moeca_compile.runtime.layouts import in_one_layout, shape_key
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.original import Original, warn_of_failure
from moeca_compile.runtime.revalidation import call_unproven
from moeca_compile.runtime.streams import Bounds
from moeca_compile.runtime.tallies import Counted

_log = logging.getLogger(__name__)

MANY_SHAPES = (
    "more input shapes alternate than stay compiled (max_shapes = {0}), so steps are compiled anew again and again. "
    "Raise max_shapes, or bring the inputs to fewer sizes"
)


class Stages(NamedTuple):
    """How graphs and steps are compiled: `backend.compile_graph` and `backend.compile_step`, or a test's own."""

    compile_graph: Callable[[CapturedGraph, Sequence[Any], MoecaConfig, Notes], CompiledGraph]
    compile_step: Callable[..., StepFunction]


class Engine:
    """Runs one graph of a model over the steps of its generations.

    Args:
        captured: Dynamo's graph.
        inputs: example inputs, of which only the model's weights are used.
        config, notes: the options, and where timings, errors and warnings go.
        stages: how to compile.
        bounds: of the model's caches, with its requests.
        original: runs in place of steps once anything of ours has failed; `captured` as it is if None.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        inputs: Sequence[Any],
        config: MoecaConfig,
        notes: Notes,
        stages: Stages,
        bounds: Bounds,
        original: Callable[..., Any] | None = None,
    ) -> None:
        self.captured, self.config, self.notes = captured, config, notes
        self.stages, self.bounds = stages, bounds
        given = list(zip(inputs, captured.arguments, strict=True))
        self.weights = [_signature(value) for value, user in given if not user and isinstance(value, Tensor)]
        self.of_model = [
            i
            for i, (value, user) in enumerate(given)
            if user or not isinstance(value, Tensor) or i in captured.constants
        ]
        """The positions of arguments and numbers. Weights are hundreds, and are not looked at call by call."""
        weights = (i for i in range(len(given)) if i not in set(self.of_model))
        self.first_weight = None if captured.modules else next(weights, None)
        self.weight_bytes = _distinct_bytes(value for value, user in given if not user)
        self.modes, self.partial = numeric_modes(), captured.partial
        self.record: object = None
        """What must live as long as this engine."""
        self.loops: OrderedDict[tuple[Any, ...], StepLoop] = OrderedDict()
        """By input shapes, the least recently used first; `max_shapes` of them stay."""
        self.dropped: dict[tuple[Any, ...], Counted] = {}
        """What loops have counted that are no longer there."""
        self.evicted: set[tuple[Any, ...]] = set()
        """The shapes that were dropped for others."""
        self._last: tuple[tuple[Any, ...], StepLoop] | None = None
        """The shapes that were used last, and their loop; replaced as a whole, so it is read without the lock."""
        self.original = original or Original(captured.gm, config.lowering)
        self.failed = False
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if self.failed:
            return self.original(*inputs)
        try:
            given = self._converted(inputs) if self.captured.numbers or self.captured.constants else inputs
            loop = self.loop_for(given)
            if loop.compiled.plan.untimed and scope.current_time() is not None:
                self.forget(loop)
                loop = self.loop_for(given)
            sure = loop.compiled.proven or loop.compiled.groups
            return loop(given) if sure else call_unproven(self, loop, given)
        except ConfigError:
            raise
        except Exception as error:
            if groups_in(self.captured.gm.graph):  # the model itself would not run in step with other ranks
                raise
            return self._run_original(error, inputs)

    def _run_original(self, error: Exception, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The model itself, now and from here on. If it raises as well, the error is its own, and nothing changes."""
        outputs: tuple[Any, ...] = self.original(*inputs)
        with self._lock:
            if not self.failed:
                self.failed, self._last = True, None
                for key in list(self.loops):
                    self._drop(key)
                warn_of_failure("a cached step, or compiling it,", error, self.notes)
        return outputs

    def loop_for(self, inputs: Sequence[Any]) -> StepLoop:
        """The step loop for the shapes of `inputs`; new shapes are compiled."""
        # Where one graph serves several models, the first weight's address tells them apart.
        weight = inputs[self.first_weight].data_ptr() if self.first_weight is not None else 0
        key = (weight, *[shape_key(inputs[i]) for i in self.of_model])
        last = self._last
        return last[1] if last is not None and last[0] == key else self._loop_of(key, inputs)

    def _loop_of(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> StepLoop:
        places = (0, *key[1:]), key  # where nothing is cached, one loop serves all weights
        if not any(place in self.loops for place in places):
            with compiling():  # not under our own lock: calls at other shapes go on meanwhile
                if not any(place in self.loops for place in places):
                    loop = self._compiled(key, inputs)
                    with self._lock:
                        self.loops[places[loop.compiled.caching]] = loop
                        self._make_room()
        with self._lock:
            place = next((place for place in places if place in self.loops), None)
            if place is not None:
                self.loops.move_to_end(place)
                self._last = key, self.loops[place]
                return self.loops[place]
        return self._loop_of(key, inputs)  # other threads' shapes took its room meanwhile

    def _compiled(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> StepLoop:
        """The step loop of new input shapes. If they were dropped before, it goes on counting."""
        _log.debug("compiling for new input shapes, number %d", len(self.loops) + 1)
        if key in self.evicted:
            self.notes.warn(MANY_SHAPES.format(self.config.max_shapes))
        given = in_one_layout(inputs, [i for i in self.of_model if isinstance(inputs[i], Tensor)])
        with self.notes.progress.of("model"):
            compiled = self.stages.compile_graph(self.captured, given, self.config, self.notes)
        loop = StepLoop(compiled, self.stages.compile_step, self.notes, self.bounds)
        if key in self.dropped:
            loop.tallies = self.dropped.pop(key).tallies
        return loop

    def forget(self, loop: StepLoop) -> None:
        """Drop a loop's compiled steps and caches, so that the next call compiles. Counters stay."""
        with self._lock:
            for key in [key for key, known in self.loops.items() if known is loop]:
                self._drop(key)
            self._last = None

    def _make_room(self) -> None:
        while len(self.loops) > self.config.max_shapes:
            key = next(iter(self.loops))
            self._drop(key)
            self.evicted.add(key)

    def _drop(self, key: tuple[Any, ...]) -> None:
        """Drop a loop with its caches. What it counted stays."""
        loop = self.loops.pop(key)
        loop.streams.drop()
        self.dropped[key] = loop.counted()

    def counted(self) -> list[Counted]:
        """What was counted at all input shapes."""
        return [*self.dropped.values(), *(loop.counted() for loop in list(self.loops.values()))]

    def same_graph(self, other: Engine) -> bool:
        """Whether the other engine's graph computes the same function of its inputs."""
        constants = any(node.op == "get_attr" for node in self.captured.gm.graph.nodes)
        return self._form() == other._form() and not constants

    def reset(self) -> None:
        """Drop all caches."""
        self.bounds.requests.reset()
        for loop in self.loops.values():
            loop.streams.drop()

    def _form(self) -> tuple[Any, ...]:
        captured = self.captured
        known = captured.arguments, captured.modules, captured.numbers, captured.constants
        return captured.gm.code, known, self.modes, self.weights

    def _converted(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The inputs, with numbers that vary as 0-dim tensors, and 0-dim tensors that must be numbers as these."""
        values = list(inputs)
        for i in self.captured.numbers:
            values[i] = torch.tensor(values[i])
        for i in self.captured.constants:
            values[i] = values[i].item()
        return tuple(values)


def _distinct_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among these; those in the same memory count once. Fake ones have no address."""
    sizes = {id(v) if is_fake(v) else v.data_ptr(): v.nbytes for v in values if isinstance(v, Tensor)}
    return sum(sizes.values())


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.stride()
    return value
