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
from moeca_compile.passes.rewrite.step_function import StepFunction
from moeca_compile.runtime.loop import StepLoop
from moeca_compile.runtime.original import Original, warn_of_failure
from moeca_compile.runtime.streams import Bounds

_log = logging.getLogger(__name__)

MOST_SHAPES = 8
"""How many sets of input shapes stay compiled."""


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
        most_shapes: how many sets of input shapes stay compiled; the least recently used is dropped.
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
        most_shapes: int = MOST_SHAPES,
        original: Original | None = None,
    ) -> None:
        self.captured, self.config, self.notes = captured, config, notes
        self.stages, self.bounds, self.most_shapes = stages, bounds, most_shapes
        given = list(zip(inputs, captured.arguments, strict=True))
        self.weights = [_signature(value) for value, user in given if not user and isinstance(value, Tensor)]
        self.of_model = [
            i
            for i, (value, user) in enumerate(given)
            if user or not isinstance(value, Tensor) or i in captured.constants
        ]
        """The positions of arguments and numbers. Weights are hundreds, and are not looked at call by call."""
        keyed = set(self.of_model)
        self.first_weight = next((i for i in range(len(given)) if i not in keyed), None)
        self.weight_bytes = _distinct_bytes(value for value, user in given if not user)
        self.modes, self.partial = numeric_modes(), captured.partial
        self.loops: OrderedDict[tuple[Any, ...], StepLoop] = OrderedDict()
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
            return self.loop_for(given)(given)
        except ConfigError:
            raise
        except Exception as error:
            return self._run_original(error, inputs)

    def _run_original(self, error: Exception, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The model itself, now and from here on. If it raises as well, the error is its own, and nothing changes."""
        outputs = self.original(*inputs)
        with self._lock:
            if not self.failed:
                self.failed, self._last = True, None
                for loop in self.loops.values():
                    loop.streams.drop()
                self.loops.clear()
                warn_of_failure("a cached step, or compiling it,", error, self.notes)
        return outputs

    def loop_for(self, inputs: Sequence[Any]) -> StepLoop:
        """The step loop for the shapes of `inputs`; new shapes are compiled."""
        # The first weight's address distinguishes models that are passed to one compiled function.
        weight = inputs[self.first_weight].data_ptr() if self.first_weight is not None else 0
        key = (weight, *[_signature(inputs[i]) for i in self.of_model])
        last = self._last
        return last[1] if last is not None and last[0] == key else self._loop_of(key, inputs)

    def _loop_of(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> StepLoop:
        loop = self.loops.get(key) or self._compiled_loop(key, inputs)
        with self._lock:
            if key in self.loops:
                self.loops.move_to_end(key)
                self._last = key, loop
        return loop

    def _compiled_loop(self, key: tuple[Any, ...], inputs: Sequence[Any]) -> StepLoop:
        with compiling():  # not under our own lock: calls at other shapes go on meanwhile
            if key not in self.loops:
                _log.debug("compiling for new input shapes, number %d", len(self.loops) + 1)
                compiled = self.stages.compile_graph(self.captured, inputs, self.config, self.notes)
                loop = StepLoop(compiled, self.stages.compile_step, self.notes, self.bounds)
                with self._lock:
                    self.loops[key] = loop
                    if len(self.loops) > self.most_shapes:
                        self.loops.popitem(last=False)[1].streams.drop()
            return self.loops[key]

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
        return captured.gm.code, captured.arguments, captured.numbers, captured.constants, self.modes, self.weights

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
