"""One step of a generation as a policy sees it: values of the graph, cached tensors, and what it may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from torch import Tensor, fx

from moeca_compile.passes.analysis.axis import Layout
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Compute, Evaluation
from moeca_compile.passes.rewrite.kinds import Part, StepKind
from moeca_compile.passes.rewrite.rows import Rows, put_rows, take_rows


class Step:
    """Values of the graph at one step, on demand; what a policy reads from and writes to.

    Args:
        graph, regions: the exported graph and what was matched in it.
        kind: what this step computes anew.
        inputs: one value per placeholder.
        state: cached tensors by name, as the last step left them.
        coefficients: (2, 2) float, the forecast coefficients: for attention and experts how far this step lies from
            the last full one, in intervals between the last two, and 1 where a full step has been (else 0).
        replacements: nodes whose values are computed in another way than by their op.

    updates holds the caches' new values, counts what each MoE layer counted (COUNTERS), and memo whatever the
    replacements of one step have to tell each other.
    """

    def __init__(
        self,
        graph: fx.Graph,
        regions: Regions,
        kind: StepKind,
        inputs: Sequence[Any],
        state: Mapping[str, Tensor],
        coefficients: Tensor,
        replacements: Mapping[fx.Node, Compute],
    ) -> None:
        self.regions, self.kind, self.state, self.coefficients = regions, kind, state, coefficients
        self.updates: dict[str, Tensor] = {}
        self.counts: list[Tensor] = []
        self.memo: dict[Any, Any] = {}
        boundaries = {residual.add for residual in regions.residuals}
        boundaries |= {residual.stream for residual in regions.residuals[:1]}
        self.values = Evaluation(graph, inputs, replacements, boundaries)

    def run(self) -> Any:
        """Evaluate the graph's outputs; replacements are called in graph order."""
        return self.values.run()

    def evaluate_with(self, known: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> list[Any]:
        """Values of `wanted` were the nodes of `known` to have these values; the step itself is unchanged."""
        return self.values.evaluate_with(known, wanted)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.values[node]

    def current(self, name: str) -> Tensor:
        """A cached tensor, as this step has updated it so far."""
        return self.updates.get(name, self.state[name])

    def forecast_distance(self, part: Part) -> Tensor:
        """() how far a forecast of the part's caches reaches, in intervals between full steps."""
        return self.coefficients[part.row, 0]

    def had_full_step(self, part: Part) -> Tensor:
        """() 1 where the part's caches hold the values of a full step, else 0."""
        return self.coefficients[part.row, 1]

    def layout(self, node: fx.Node) -> Layout:
        return self.regions.layouts[node]

    def rows(self, chosen: Tensor, source: fx.Node, output: fx.Node) -> Rows:
        """The graph's values on the tokens `chosen` (B, C) of `output`, starting from the rows of `source`."""
        regions, axis = self.regions, self.regions.axis(output)
        return Rows(chosen, regions.layouts, self.values.__getitem__, [source], axis, regions.mixed)

    def capacity_for(self, tokens: int) -> int:
        """How many of so many tokens may be chosen: the same share as the kind's capacity has of the main stream."""
        main = self.regions.main
        assert main is not None
        return ceil(self.kind.capacity * tokens / main.tokens)

    def put(self, node: fx.Node, value: Tensor, chosen: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        return put_rows(value, self.layout(node), chosen, rows, valid)

    def take(self, node: fx.Node, value: Tensor, chosen: Tensor) -> Tensor:
        return take_rows(value, self.layout(node), chosen)
