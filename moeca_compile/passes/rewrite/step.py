"""One step of a generation as a policy sees it: values of the graph, cached tensors, and what it may replace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.axis import Layout
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Regions
from moeca_compile.passes.rewrite.evaluate import Evaluation, Replacement
from moeca_compile.passes.rewrite.rows import Rows, put_rows, take_rows

ATTENTION, EXPERTS = 0, 1
"""The two parts of a model that may have refresh intervals of their own; they index the clock."""


COUNTERS = ("branches", "matched", "recomputed", "dropped", "needed")
"""What a layer counts on a cache step: its branches, those matched, those recomputed, tokens dropped past the
capacity, and tokens that needed recomputation."""


@dataclass(frozen=True)
class StepKind:
    """What a step computes anew. One compiled graph serves all steps of a kind.

    Attributes:
        attention, experts: whether that part runs as the model has it (and fills its caches).
        capacity: chosen tokens per sample of a cache step, at most; 0 where nothing is recomputed. It counts in the
            main stream; other streams have the same share of theirs.
        forced: recompute everything through the cache's own path (validation only).
    """

    attention: bool = True
    experts: bool = True
    capacity: int = 0
    forced: bool = False

    @property
    def full(self) -> bool:
        return self.attention and self.experts

    @property
    def name(self) -> str:
        if self.full:
            return "full"
        fresh = "+attention" if self.attention else "+experts" if self.experts else ""
        return f"cache{fresh}" + (f"[{self.capacity}]" if self.capacity else "")


@dataclass(frozen=True)
class CacheSpec:
    """One cached tensor: its name, shape and dtype. Its bytes are known before anything runs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Step:
    """Values of the graph at one step, on demand; what a policy reads from and writes to.

    Args:
        graph, regions: the exported graph and what was matched in it.
        kind: what this step computes anew.
        inputs: one value per placeholder.
        state: cached tensors by name, as the last step left them.
        clock: (2, 2) float: for each part (attention, experts) how far a forecast reaches, in units of the
            interval between the last two full steps, and 1 where a full step has been (else 0).
    """

    def __init__(
        self,
        graph: fx.Graph,
        regions: Regions,
        kind: StepKind,
        inputs: Sequence[Any],
        state: Mapping[str, Tensor],
        clock: Tensor,
    ) -> None:
        self.regions, self.kind, self.state, self.clock = regions, kind, state, clock
        self.updates: dict[str, Tensor] = {}
        self.counts: list[Tensor] = []
        self.memo: dict[str, Tensor] = {}
        self.replacements: dict[fx.Node, Replacement] = {}
        boundaries = {residual.add for residual in regions.residuals}
        boundaries |= {residual.stream for residual in regions.residuals[:1]}
        self.values = Evaluation(graph, inputs, self.replacements, boundaries)

    def run(self) -> Any:
        """Evaluate the graph's outputs; replacements are called in graph order."""
        return self.values.run()

    def instead(self, known: Mapping[fx.Node, Any], wanted: Sequence[fx.Node]) -> list[Any]:
        """Values of `wanted` were the nodes of `known` to have these values; the step itself is unchanged."""
        return self.values.instead(known, wanted)

    def __getitem__(self, node: fx.Node) -> Any:
        return self.values[node]

    def current(self, name: str) -> Tensor:
        """A cached tensor, as this step has updated it so far."""
        return self.updates.get(name, self.state[name])

    def layout(self, node: fx.Node) -> Layout:
        return self.regions.layouts[node]

    def rows(self, chosen: Tensor, source: fx.Node, output: fx.Node) -> Rows:
        """The graph's values on the tokens `chosen` (B, C) of `output`, starting from the rows of `source`."""
        regions, axis = self.regions, self.regions.axis(output)
        return Rows(chosen, regions.layouts, self.values.__getitem__, [source], axis, regions.mixed)

    def room(self, tokens: int) -> int:
        """How many of so many tokens may be chosen: the same share as the kind's capacity has of the main stream."""
        main = self.regions.main
        assert main is not None
        return ceil(self.kind.capacity * tokens / main.tokens)

    def put(self, node: fx.Node, value: Tensor, chosen: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
        return put_rows(value, self.layout(node), chosen, rows, valid)

    def take(self, node: fx.Node, value: Tensor, chosen: Tensor) -> Tensor:
        return take_rows(value, self.layout(node), chosen)


def run_experts(step: Step, marker: fx.Node) -> Tensor:
    """All branches of an MoE layer whose tokens have k experts each: (T, k, width), before weighting."""
    body = step.regions.bodies[marker]
    return torch.ops.moeca.fixed_k_outputs(
        [step[node] for node in body.rows],
        step[marker.args[1]],  # type: ignore[index]
        [step[node] for node in body.parameters],
        body.experts,
        body.key,
        shape_of(marker)[-1],
    )


def combine(branches: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight * output over a token's branches (paper, eq. 6): (..., k, width), (..., k) -> (..., width)."""
    return (branches * weight.to(branches.dtype)[..., None]).sum(-2)
