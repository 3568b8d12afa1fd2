"""Regions, the result of matching: frozen records of routers, experts, attentions and feed-forwards in a graph."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import fx

from moeca_compile.passes.analysis.axis import Axis, Layout, offset_in
from moeca_compile.passes.analysis.graph import ancestors, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts

aten = torch.ops.aten


@dataclass(frozen=True)
class Residual:
    """A residual branch: `add = stream + gate * output`, where `output` is computed from `stream`.

    `output` is the branch's value before its gate: caches hold that, and the adaLN gate is the current step's.
    """

    stream: fx.Node
    output: fx.Node
    add: fx.Node


@dataclass(frozen=True)
class Attention:
    """An attention whose queries come from `residual.stream`: one scaled-dot-product node.

    A joint attention is one region for each token stream. These regions share its node, and `query` holds the
    queries of them all. `by_token`: keys and values hold the tokens of all these streams. Other keys and values (of
    a text alone, of pooled tokens) are computed whole, as in the model.
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

    `key` is its name in the registry of `ops.bodies`; `rows` are the values that enter it row by row; `branches` is
    the number of (token, expert) pairs in a call, 0 where that depends on the data. `experts` are those of all ranks
    that hold some, and `parameters` those of this one's.
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

    `choice` holds the expert ids, (rows, k) integer; where tokens have no fixed number of experts (`variable_k`), it
    is the mask of routed (token, expert) pairs, (rows, experts) bool. `weight` has the same shape.
    """

    name: str
    residual: Residual
    marker: fx.Node
    choice: fx.Node
    weight: fx.Node
    body: ExpertBody
    shared: tuple[FeedForward, ...]
    probe: Attention | None
    """The attention right before the router, with only row-wise work between; None where there is none."""

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
    """A part that looks like a region and is none, with the reason in the user's terms.

    It runs as in the model, unless its `node` lies in a branch, or in blocks, that are cached as a whole.
    """

    kind: str
    name: str
    reason: str
    node: fx.Node | None = None


@dataclass(frozen=True)
class Regions:
    """All regions of one graph, in graph order."""

    residuals: tuple[Residual, ...] = ()
    attentions: tuple[Attention, ...] = ()
    experts: tuple[Experts, ...] = ()
    feedforwards: tuple[FeedForward, ...] = ()
    bodies: dict[fx.Node, ExpertBody] = field(default_factory=dict)
    """The expert body behind every MoE marker of the graph, matched or not."""
    layouts: Layouts = field(default_factory=dict)
    mixed: frozenset[fx.Node] = frozenset()
    """Values that mix tokens yet have a row for each token: computed whole, then their rows are gathered."""
    timesteps: tuple[fx.Node, ...] = ()
    """The inputs that may be the timestep; the calls show which one is."""
    guessed: bool = False
    """Whether these are guesses by their form, since no sines are taken of any input."""
    skipped: tuple[Skipped, ...] = ()
    finite: bool = True
    """Whether the model's outputs were finite when the rewrite was to be validated; else it was not."""
    unproven: tuple[str, ...] = ()
    """What was constant then, so that comparing it says nothing: names of regions and of caches."""

    @property
    def proven(self) -> bool:
        return self.finite and not self.unproven

    def axis(self, node: fx.Node) -> Axis:
        """The tokens of a node's value."""
        return self.layouts[node].axis

    @property
    def parts(self) -> list[Attention | Experts | FeedForward]:
        """All attentions, MoE layers and feed-forwards."""
        return [*self.attentions, *self.experts, *self.feedforwards]

    def only(self, parts: Container[Attention | Experts | FeedForward]) -> Regions:
        """Only the regions in `parts`, with their residual branches."""
        attentions = tuple(a for a in self.attentions if a in parts)
        experts = tuple(e for e in self.experts if e in parts)
        feedforwards = tuple(f for f in self.feedforwards if f in parts)
        own = {a.residual for a in attentions} | {e.residual for e in experts}
        outputs = {f.output for f in feedforwards}
        residuals = tuple(r for r in self.residuals if r in own or r.output in outputs)
        return replace(self, attentions=attentions, experts=experts, feedforwards=feedforwards, residuals=residuals)

    def without(self, reasons: Mapping[Attention | Experts | FeedForward, str]) -> Regions:
        """Without these regions, which become skipped ones with the reason."""
        skipped = tuple(
            Skipped(type(part).__name__.lower(), part.name, why, _end_of(part)) for part, why in reasons.items()
        )
        left = self.only([part for part in self.parts if part not in reasons])
        return replace(left, skipped=(*self.skipped, *skipped))

    @cached_property
    def token_dtypes(self) -> frozenset[torch.dtype]:
        """The floating-point dtypes of the values that have tokens."""
        values = (node.meta["val"] for node in self.layouts)
        return frozenset(v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())

    @property
    def main(self) -> Layout | None:
        """The layout of the stream whose tokens are chosen: that of the first MoE layer, else of the first branch."""
        nodes = [layer.marker for layer in self.experts] + [residual.output for residual in self.residuals]
        return self.layouts[nodes[0]] if nodes else None

    @property
    def stacks(self) -> tuple[tuple[fx.Node, fx.Node], ...]:
        """The streams that the output is computed from: each as (before its first block, after its last).

        The latter may hold fewer tokens, where a model cuts off those that it no longer needs.
        """
        read = ancestors(residual.output for residual in self.residuals)
        adds = {residual.add for residual in self.residuals}
        cuts = {node for node in self.layouts if node.target is aten.slice.Tensor and adds and node > min(adds)}
        starts = {end: start for end in (adds | cuts) - read if (start := self._before(end)) is not None}
        output = next(iter(reversed(min(adds).graph.nodes))) if adds else None
        reached = ancestors([output], stop=starts) if output is not None else set()
        return tuple((starts[end], end) for end in sorted(starts.keys() & reached))

    @property
    def main_stack(self) -> tuple[fx.Node, fx.Node]:
        """That of the `stacks` with the most values: the picture's, where there are several."""
        return max(self.stacks, key=lambda stack: prod(shape_of(stack[0])))

    def _before(self, end: fx.Node) -> fx.Node | None:
        """The first stream that holds the tokens of `end` in the same layout and width."""
        layout, (*_, width) = self.layouts.get(end), shape_of(end)
        for stream in (residual.stream for residual in self.residuals):
            form = self.layouts[stream]
            holds = layout is not None and offset_in(form.axis, layout.axis) is not None
            if holds and form.along(layout.axis) == layout and shape_of(stream)[-1] == width:  # type: ignore[union-attr]
                return stream
        return None


def _end_of(part: Attention | Experts | FeedForward) -> fx.Node:
    if isinstance(part, FeedForward):
        return part.output
    return part.sdpa if isinstance(part, Attention) else part.marker
