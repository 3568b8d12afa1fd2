"""The callable behind one captured graph: picks the step kind, binds the caches, runs the compiled graph."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private import numeric_modes
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.step import StepKind
from moeca_compile.runtime.record import Record
from moeca_compile.runtime.schedule import Fresh
from moeca_compile.runtime.session import Position
from moeca_compile.runtime.specialization import Specialization

_MOST_SHAPES = 8
"""Input shapes for which compiled graphs are kept."""


class Engine:
    """Runs one graph of a model over the steps of its generations.

    Args:
        gm: Dynamo's graph.
        inputs: example inputs; only what stands for the model's weights is looked at.
        user_inputs: which of its placeholders are arguments of the model.
        numbers: positions of inputs that come as Python numbers and go in as 0-dim tensors.
        config, record: options, and where to note what happens.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        user_inputs: Sequence[bool],
        numbers: Sequence[int],
        config: MoecaConfig,
        record: Record,
    ) -> None:
        self.gm, self.user_inputs, self.numbers = gm, list(user_inputs), list(numbers)
        self.weights = [_signature(v) for v, user in zip(inputs, self.user_inputs, strict=True) if not user]
        self.modes, self.partial = numeric_modes(), record.partial
        self.config, self.record = config, record
        self.by_shape: OrderedDict[tuple[Any, ...], Specialization] = OrderedDict()
        self._lock = threading.RLock()

    def same_graph(self, other: Engine) -> bool:
        """Whether the other engine's graph computes the same from the same inputs in the same order."""
        constants = any(node.op == "get_attr" for node in self.gm.graph.nodes)
        mine, theirs = ((e.gm.code, e.user_inputs, e.numbers, e.modes, e.weights) for e in (self, other))
        return mine == theirs and not constants

    def prepare(self, inputs: Sequence[Any]) -> Specialization:
        """Capture, match and plan for the shapes of `inputs`, unless that was done before."""
        key = (
            *(_signature(value) for value, user in zip(inputs, self.user_inputs, strict=True) if user),
            self._model(inputs),
        )
        with self._lock:
            if key not in self.by_shape:
                self.by_shape[key] = Specialization(self.gm, inputs, self.user_inputs, self.config, self.record)
                if len(self.by_shape) > _MOST_SHAPES:
                    self.by_shape.popitem(last=False)
            self.by_shape.move_to_end(key)
            return self.by_shape[key]

    def _model(self, inputs: Sequence[Any]) -> int:
        """Tells models apart that come to one graph as arguments of a function: where their first weight lies."""
        states = (v for v, user in zip(inputs, self.user_inputs, strict=True) if not user and isinstance(v, Tensor))
        first = next(states, None)
        return first.data_ptr() if first is not None else 0

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        if self.numbers:
            inputs = tuple(torch.tensor(v) if i in self.numbers else v for i, v in enumerate(inputs))
        shapes = self.prepare(inputs)
        if not shapes.caching:
            return self._uncached(shapes, inputs)
        with self._lock:
            position, fresh = shapes.enter(inputs)
        try:
            return self._run(shapes, fresh, position, inputs)
        except BaseException:
            shapes.sessions.interrupted(position)
            raise

    def _uncached(self, shapes: Specialization, inputs: Sequence[Any]) -> tuple[Any, ...]:
        clock = shapes.clock([[0.0, 0.0], [0.0, 0.0]])
        outputs = shapes.run(StepKind(), shapes.stateless, shapes.placed(inputs), clock).outputs
        shapes.tally(StepKind(), None)
        return shapes.settle(inputs, outputs)

    def _run(
        self, shapes: Specialization, fresh: Fresh, position: Position, inputs: Sequence[Any]
    ) -> tuple[Any, ...]:
        placed = shapes.placed(inputs)
        stream, kind = position.stream, shapes.kind(fresh, position, placed)
        clock = shapes.clock(stream.clock(position.place))
        result = shapes.run(kind, stream, placed, clock)
        stream.state.update(result.updates)
        stream.passed(fresh, position.number, position.place)
        shapes.tally(kind, result.counts)
        if result.counts is not None:
            shapes.promote(stream, result.counts)
        return shapes.settle(inputs, result.outputs)

    def reset(self) -> None:
        """Drop all caches."""
        for shapes in self.by_shape.values():
            shapes.sessions.reset()


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device, value.stride()
    return value
