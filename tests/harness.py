"""A backend that keeps the graphs it was given and runs them as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


class RecordingBackend:
    """Pass it as `torch.compile(model, backend=RecordingBackend())`.

    graphs, inputs: Dynamo's graphs and their example inputs, in the order in which they came
    ours: whether capture takes it for a backend of this package
    run: what to execute a graph with; as it is, if None
    """

    __name__ = "recording"

    def __init__(
        self, ours: bool = True, run: Callable[[fx.GraphModule], Callable[..., Any]] | None = None
    ) -> None:
        self._moeca_backend = ours
        self.run = run
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[Sequence[Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.inputs.append(list(example_inputs))
        return self.run(gm) if self.run else gm.forward


def nodes_of(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    """The nodes that call `target`: a function, an op packet (any overload of it) or the name of a method."""
    return [node for node in gm.graph.nodes if _packet(node.target) == target]


def _packet(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)
