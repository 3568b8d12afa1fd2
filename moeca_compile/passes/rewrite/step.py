"""One step of a generation as a policy sees it: values of the graph and cached tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil
from typing import Any, Protocol

from torch import Tensor, fx

from moeca_compile.passes.analysis.axis import Layout
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Compute, Evaluation
from moeca_compile.passes.rewrite.kinds import Part, StepKind
from moeca_compile.passes.rewrite.rows import Rows, RunRows, put_rows, take_rows


class Observer(Protocol):
    """Sees what a step that runs eagerly computes and decides. It must change none of it."""

    @property
    def watched(self) -> Mapping[fx.Node, Sequence[fx.Node]]:
        """By node, the nodes whose values are shown to it as soon as that node is computed.

        They must be among those that the step computes by then.
        """

    def see(self, node: fx.Node, value: Tensor) -> None:
        """The value of a watched node."""

    def recomputed(self, marker: fx.Node, tokens: Tensor, routed: Tensor) -> None:
        """What an MoE layer does on a cache step: which tokens (B, N) it recomputes, and which experts each token is
        routed to, (B, N, E), both bool."""


class Step:
    """Values of the graph and caches at one step: what a policy reads and writes.

    Args:
        graph, regions: the exported graph and what was matched in it.
        kind: what this step computes.
        inputs: one value per placeholder.
        state: cached tensors by name, as the last step left them.
        weights: (2, K, K) float32, the forecast weights of attention and experts (policies.forecast). Row h - 1 is
            for a value that the last h full steps computed: the weight of each of its K slots.
        replacements: functions that give a node's value in place of its op.
        reads: values that these functions read, besides those that the node's op is computed from, by node.
        kept: nodes whose values are read after the graph's outputs are there.

    Attributes:
        updates: new values of the caches, by name; by that of a ring, the value that goes to its oldest slot.
        counts: what each MoE layer counted (COUNTERS).
        memo: values that the replacements of one step share.
        observer: who watches this step; nobody where it is traced or compiled.
    """

    def __init__(
        self,
        graph: fx.Graph,
        regions: Regions,
        kind: StepKind,
        inputs: Sequence[Any],
        state: Mapping[str, Tensor],
        weights: Tensor,
        replacements: Mapping[fx.Node, Compute],
        reads: Mapping[fx.Node, Iterable[fx.Node]] | None = None,
        kept: Iterable[fx.Node] = (),
    ) -> None:
        self.regions, self.kind, self.state, self.weights = regions, kind, state, weights
        self.updates: dict[str, Tensor] = {}
        self.counts: list[Tensor] = []
        self.memo: dict[Any, Any] = {}
        self.observer: Observer | None = None
        boundaries = {residual.add for residual in regions.residuals}
        boundaries |= {residual.stream for residual in regions.residuals[:1]}
        self.values = Evaluation(graph, inputs, replacements, boundaries, reads, kept)

    def run(self, after: Callable[[fx.Node], None] | None = None) -> Any:
        """Evaluate the graph's outputs; replacements are called in graph order, `after` when a node is computed."""
        return self.values.run(after)

    def evaluate_with(self, known: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> list[Any]:
        """Values of `wanted` if the nodes of `known` had the given values; the step itself does not change."""
        return self.values.evaluate_with(known, wanted)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.values[node]

    def current(self, name: str) -> Tensor:
        """A cached tensor, as this step has updated it so far."""
        return self.updates[name] if name in self.updates else self.state[name]

    def forecast_weights(self, part: Part) -> Tensor:
        """(K, K) the weights of the part's slots, by the number of full steps that computed a value."""
        return self.weights[part.row]

    def layout(self, node: fx.Node) -> Layout:
        return self.regions.layouts[node]

    def rows(
        self, chosen: Tensor, source: fx.Node, output: fx.Node, layers: Mapping[fx.Node, RunRows] | None = None
    ) -> Rows:
        """The graph's values on the tokens `chosen` (B, C) of `output`, computed from the rows of `source`.

        `layers` run the MoE layers in between; without, there must be none.
        """
        regions, axis = self.regions, self.regions.axis(output)
        return Rows(chosen, regions.layouts, self.values.__getitem__, [source], axis, regions.mixed, layers)

    def capacity_for(self, tokens: int) -> int:
        """The capacity of a stream of `tokens` tokens: the same fraction as the kind has in the main stream."""
        main = self.regions.main
        assert main is not None
        return ceil(self.kind.capacity * tokens / main.tokens)

    def put(self, node: fx.Node, value: Tensor, chosen: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        return put_rows(value, self.layout(node), chosen, rows, valid)

    def take(self, node: fx.Node, value: Tensor, chosen: Tensor) -> Tensor:
        return take_rows(value, self.layout(node), chosen)
