"""Evaluate the graph with some of its values replaced. Tracing this evaluation gives the rewritten graph.

A value is dropped after its last reader, so that an eager evaluation needs no more memory than the model. Fake values
hold no memory and are never dropped: nothing can appear twice in a traced graph.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moeca_compile._torch_private import is_fake
from moeca_compile.ops.body_run import call
from moeca_compile.passes.analysis.graph import ancestors, placeholders
from moeca_compile.passes.rewrite.readers import Readers

Compute = Callable[[], Any]


class DroppedError(LookupError):
    """A replacement's value was asked for after its last reader. It cannot be computed again."""


class Evaluation:
    """Values of the graph's nodes, computed on demand.

    `run` drops values that nobody is known to read any more (readers.py). Who asks for such a value after all gets it
    computed anew: the ops of the graph are pure. A replacement is no op, and may change caches, so it is not called
    twice: its value stays for whoever can be known to ask.

    Args:
        graph: the exported graph.
        inputs: one value per placeholder, in order.
        replacements: functions that give a node's value in place of its op; each is called at most once.
        boundaries: nodes whose values become aliases, where `lower.partition` can cut the traced evaluation.
        reads: values that a replacement reads, besides those that its node's op is computed from, by node. What the
            replacement of a node that is not among them gives is never dropped.
        kept: nodes whose values are read after `run`.

    Attributes:
        repeatable: whether replacements change nothing, and so may be called again where their value was dropped.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[Any],
        replacements: Mapping[fx.Node, Compute],
        boundaries: Container[fx.Node] = (),
        reads: Mapping[fx.Node, Iterable[fx.Node]] | None = None,
        kept: Iterable[fx.Node] = (),
    ) -> None:
        self.values: dict[fx.Node, Any] = dict(zip(placeholders(graph), inputs, strict=True))
        self.graph = graph
        self.replacements, self.boundaries = replacements, boundaries
        self.repeatable = False
        self.replacing: set[fx.Node] = set()
        self.reads, self.kept = reads or {}, tuple(kept)
        self.readers: Readers | None = None
        """None where nothing is dropped."""
        self.dropped: set[fx.Node] = set()

    def __getitem__(self, node: fx.Node) -> Any:
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [arg for arg in self._inputs(current) if arg not in self.values]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if current not in self.values:
                self.values[current] = self._compute(current)
                self._drop_read_by(current)
        return self.values[node]

    def run(self, after: Callable[[fx.Node], None] | None = None) -> Any:
        """The graph's outputs. Needed nodes, and with them the replacements, are computed in graph order.

        `after` is called with each of them when it has been computed.
        """
        output = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        needed = self._needed(output.all_input_nodes)
        if not self.tracing:
            kept = (*output.all_input_nodes, *self.kept)
            self.readers = Readers(needed, self.replacements.keys(), self.reads, kept)
        for node in self.graph.nodes:
            if node in needed and node not in self.dropped:
                self[node]
                if after is not None:
                    after(node)
        return fx.map_arg(output.args[0], lambda node: self.values[node])

    def evaluate_with(self, known: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> list[Any]:
        """Values of `wanted` if the nodes of `known` had the given values; the values stored here do not change."""
        changed, first = dict(known), min(known, default=None)
        for node in sorted(ancestors(wanted, stop=known, since=first)):
            if node not in known and any(arg in changed for arg in node.all_input_nodes):
                changed[node] = call(node, lambda n: changed[n] if n in changed else self[n])
        return [changed[node] if node in changed else self[node] for node in wanted]

    @property
    def tracing(self) -> bool:
        """Whether values are fake."""
        return any(map(is_fake, self.values.values()))

    def release(self, kept: Iterable[fx.Node]) -> None:
        """Values of nodes that were `kept` have been read."""
        if self.readers is not None:
            self._drop(self.readers.done_with(kept))

    def _drop_read_by(self, node: fx.Node) -> None:
        if self.readers is not None:
            self._drop(self.readers.computed(node))

    def _drop(self, nodes: Iterable[fx.Node]) -> None:
        for unread in nodes:
            if unread in self.values:
                del self.values[unread]
                self.dropped.add(unread)

    def _inputs(self, node: fx.Node) -> Iterable[fx.Node]:
        return () if node in self.values or self._replaced(node) else node.all_input_nodes

    def _replaced(self, node: fx.Node) -> bool:
        """Whether a replacement gives the node's value. Within the replacement itself, the node's op does."""
        return node in self.replacements and node not in self.replacing

    def _compute(self, node: fx.Node) -> Any:
        if node in self.replacements and node in self.dropped and not self.repeatable:
            raise DroppedError(
                f"the value of {node.name}, which a replacement gives, was dropped before its last reader. Declare "
                "what a replacement and its caches read as docs/extending/policy.md says"
            )
        if self._replaced(node):
            self.replacing.add(node)
            try:
                return self.replacements[node]()
            finally:
                self.replacing.discard(node)
        if node.op == "get_attr":  # a constant that tracing lifted from the model's code
            return getattr(self.graph.owning_module, str(node.target))
        value = call(node, self.values.__getitem__)
        return torch.ops.aten.alias(value) if node in self.boundaries else value

    def _needed(self, outputs: Iterable[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(self._inputs(node))
        return needed
