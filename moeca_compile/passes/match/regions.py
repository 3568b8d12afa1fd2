"""What matching finds: frozen descriptions of routers, experts, attentions and feed-forwards in a graph."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from moeca_compile.passes.analysis.axis import Axis, Layout, place_in
from moeca_compile.passes.analysis.graph import ancestors, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts

aten = torch.ops.aten


@dataclass(frozen=True)
class Residual:
    """A residual branch: `add = stream + gate * output`, where `output` is computed from `stream`.

    `output` is the branch's value before its gate (the adaLN gate of the current step stays fresh).
    """

    stream: fx.Node
    output: fx.Node
    add: fx.Node


@dataclass(frozen=True)
class Attention:
    """An attention whose queries come from `residual.stream`: one scaled-dot-product node.

    A joint attention is one region a stream: all have its node, and the queries of the region's own tokens are
    among those of `query`. `by_token` says that the tokens of all these streams are among the keys and values. All
    others (of a text alone, of pooled tokens) are taken whole, as the model computes them.
    """

    name: str
    residual: Residual
    sdpa: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    by_token: bool


@dataclass(frozen=True)
class ExpertBody:
    """One expert as a function of rows and its parameters, shared by all experts of a layer.

    `key` names it in the registry of `ops.bodies`; `rows` are the values that enter it row by row; `branches` is
    how many (token, expert) pairs there are in a call, 0 where only the data tell.
    """

    key: str
    rows: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    experts: int
    flops_per_row: int
    branches: int


@dataclass(frozen=True)
class FeedForward:
    """A row-wise network from `stream` to `output`: a dense feed-forward or an MoE layer's shared expert."""

    name: str
    stream: fx.Node
    output: fx.Node


@dataclass(frozen=True)
class Experts:
    """A mixture-of-experts layer: router choice and weights, body, combined output.

    `choice` is the expert ids (rows, k); where tokens have no fixed number of experts (`variable_k`), it is which
    (token, expert) pairs are routed, (rows, experts) bool. `weight` has its shape.
    """

    name: str
    residual: Residual
    marker: fx.Node
    choice: fx.Node
    weight: fx.Node
    body: ExpertBody
    shared: tuple[FeedForward, ...]
    probe: Attention | None
    """The attention whose output the router reads with nothing but row-wise work between, if there is one."""

    @property
    def variable_k(self) -> bool:
        """Whether tokens have no fixed number of experts."""
        return self.marker.target is torch.ops.moeca.experts_variable_k.default

    @property
    def coupled(self) -> bool:
        """Whether the routing of a sample depends on the others of its batch."""
        return self.variable_k and bool(self.marker.args[7])


@dataclass(frozen=True)
class Skipped:
    """Something that looks like a region and stays as it was, with the reason in the user's terms."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True)
class Regions:
    """Everything that was understood of one graph, in graph order."""

    residuals: tuple[Residual, ...] = ()
    attentions: tuple[Attention, ...] = ()
    experts: tuple[Experts, ...] = ()
    feedforwards: tuple[FeedForward, ...] = ()
    bodies: dict[fx.Node, ExpertBody] = field(default_factory=dict)
    """The expert body behind every MoE marker of the graph, matched or not."""
    layouts: Layouts = field(default_factory=dict)
    mixed: frozenset[fx.Node] = frozenset()
    """Values that mix tokens and have a row a token all the same: computed whole, their rows are gathered."""
    timesteps: tuple[fx.Node, ...] = ()
    """The inputs that may be the timestep."""
    skipped: tuple[Skipped, ...] = ()

    def axis(self, node: fx.Node) -> Axis:
        """The tokens of a node's value."""
        return self.layouts[node].axis

    @property
    def parts(self) -> list[Attention | Experts | FeedForward]:
        """The regions one by one."""
        return [*self.attentions, *self.experts, *self.feedforwards]

    def only(self, parts: Container[Attention | Experts | FeedForward]) -> Regions:
        """Without all regions but `parts`; residual branches go with the region that they belong to."""
        attentions = tuple(a for a in self.attentions if a in parts)
        experts = tuple(e for e in self.experts if e in parts)
        feedforwards = tuple(f for f in self.feedforwards if f in parts)
        own = {a.residual for a in attentions} | {e.residual for e in experts}
        outputs = {f.output for f in feedforwards}
        residuals = tuple(r for r in self.residuals if r in own or r.output in outputs)
        return replace(self, attentions=attentions, experts=experts, feedforwards=feedforwards, residuals=residuals)

    def without(self, reasons: Mapping[Attention | Experts | FeedForward, str]) -> Regions:
        """Without some regions, which are noted as skipped with the reason."""
        skipped = tuple(Skipped(type(part).__name__.lower(), part.name, why) for part, why in reasons.items())
        left = self.only([part for part in self.parts if part not in reasons])
        return replace(left, skipped=(*self.skipped, *skipped))

    @property
    def token_dtypes(self) -> set[torch.dtype]:
        """The floating point types that tokens are computed in."""
        values = (node.meta["val"] for node in self.layouts)
        return {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}

    @property
    def main(self) -> Layout | None:
        """The layout of the stream whose tokens are chosen: that of the first MoE layer, else of the first branch."""
        nodes = [layer.marker for layer in self.experts] + [residual.output for residual in self.residuals]
        return self.layouts[nodes[0]] if nodes else None

    @property
    def stacks(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """The streams that the output comes from: each before its first block, and after the last.

        What comes after may be a part of the tokens, where a model cuts off those that it does not need anymore.
        """
        read = ancestors(residual.output for residual in self.residuals)
        adds = {residual.add for residual in self.residuals}
        cuts = {node for node in self.layouts if node.target is aten.slice.Tensor and adds and node > min(adds)}
        starts = {end: start for end in (adds | cuts) - read if (start := self._before(end)) is not None}
        output = next(iter(reversed(min(adds).graph.nodes))) if adds else None
        reached = ancestors([output], stop=starts) if output is not None else set()
        return tuple((starts[end], end) for end in sorted(starts.keys() & reached))

    def _before(self, end: fx.Node) -> fx.Node | None:
        """The first stream that holds the tokens of `end` in the same form."""
        layout, (*_, width) = self.layouts.get(end), shape_of(end)
        for stream in (residual.stream for residual in self.residuals):
            form = self.layouts[stream]
            holds = layout is not None and place_in(form.axis, layout.axis) is not None
            if holds and form.along(layout.axis) == layout and shape_of(stream)[-1] == width:  # type: ignore[union-attr]
                return stream
        return None
