"""Find all regions of one graph. Structure decides, never names; nothing here edits the graph."""

from __future__ import annotations

import logging

from torch import fx

from moeca_compile.passes.analysis.graph import between, module_path, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, stream_layout, token_layouts
from moeca_compile.passes.match.attention import attention_nodes, match_attention, work_between
from moeca_compile.passes.match.experts import expert_body, expert_nodes, match_experts
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions, Residual, Skipped
from moeca_compile.passes.match.residuals import residual_at, residuals_around
from moeca_compile.passes.match.timestep import find_timesteps
from moeca_compile.passes.normalize.fuse_attention import unclear_attentions

_log = logging.getLogger(__name__)


def match_regions(graph: fx.Graph, user_inputs: set[fx.Node]) -> Regions:
    """Match attentions, MoE layers, feed-forwards and the residual chain that they form.

    `user_inputs` are the placeholders that are arguments of the model (not its parameters and buffers).
    """
    timesteps = find_timesteps(user_inputs)
    bodies = {node: expert_body(node) for node in expert_nodes(graph)}
    layouts, mixed = _layouts(graph)
    if not layouts:
        return Regions(bodies=bodies, timesteps=timesteps, skipped=_everything_skipped(graph))
    found = [part for node in attention_nodes(graph) for part in match_attention(node, layouts, mixed)]
    attentions = tuple(a for a in found if isinstance(a, Attention))
    layers = [match_experts(node, body, layouts, attentions) for node, body in bodies.items()]
    experts = tuple(e for e in layers if isinstance(e, Experts))
    residuals = _residual_chain(graph, layouts, [a.residual for a in attentions] + [e.residual for e in experts])
    feedforwards = _feedforwards(graph, residuals)
    skipped = tuple(k for k in (*found, *_unclear(graph), *layers) if isinstance(k, Skipped))
    regions = (residuals, attentions, experts, feedforwards)
    _log.debug(
        "%d attentions, %d MoE layers, %d feed-forwards, %d skipped",
        *map(len, (attentions, experts, feedforwards, skipped)),
    )
    return Regions(*regions, bodies, layouts, frozenset(mixed), timesteps, skipped)


def _layouts(graph: fx.Graph) -> tuple[Layouts, set[fx.Node]]:
    """The token axes of all residual streams, each found in front of the first attention or MoE layer added to it.

    What is computed from known streams, joined or cut, is none of its own. Also the values that mix tokens and
    have rows all the same.
    """
    layouts: Layouts = {}
    seeds: Layouts = {}
    mixed: set[fx.Node] = set()
    for anchor in sorted(_anchors(graph)):
        streams = [residual.stream for residual in residuals_around(anchor)]
        new = [stream for stream in streams if stream not in layouts and len(shape_of(stream)) == 3]
        if new:
            seeds |= {stream: stream_layout(stream) for stream in new}
            mixed = set()
            layouts = token_layouts(graph, seeds, mixed)
    return layouts, mixed


def _anchors(graph: fx.Graph) -> set[fx.Node]:
    """What a residual branch that is no plain feed-forward runs through."""
    return {*attention_nodes(graph), *expert_nodes(graph), *(node for node, _ in unclear_attentions(graph))}


def _unclear(graph: fx.Graph) -> list[Skipped]:
    """Attention in products and a softmax that could not be normalized."""
    return [Skipped("attention", module_path(node), reason) for node, reason in unclear_attentions(graph)]


def _everything_skipped(graph: fx.Graph) -> tuple[Skipped, ...]:
    reason = "no residual stream of shape (batch, tokens, width) runs around it"
    nodes = [("attention", n) for n in attention_nodes(graph)] + [("experts", n) for n in expert_nodes(graph)]
    return (*(Skipped(kind, module_path(node), reason) for kind, node in nodes), *_unclear(graph))


def _residual_chain(graph: fx.Graph, layouts: Layouts, known: list[Residual]) -> tuple[Residual, ...]:
    """The known residual branches and the plain feed-forwards between them, in graph order."""
    chain = {residual.add: residual for residual in known}
    inside = {node for r in known for node in between(r.stream, [r.add])} - set(chain)
    for add in graph.nodes:
        if add in chain or add in inside or add not in layouts:
            continue
        residual = residual_at(add, layouts)
        if residual and work_between(residual.stream, residual.output):
            within = _within(residual, chain)
            if not any(inner in known or inner.stream is residual.stream for inner in within):
                chain = {end: r for end, r in chain.items() if r not in within} | {add: residual}
    # Attention and experts side by side end in one addition.
    return tuple(sorted({*chain.values(), *known}, key=lambda residual: (residual.add, residual.output)))


def _within(residual: Residual, chain: dict[fx.Node, Residual]) -> list[Residual]:
    """What was found inside the branch. A skip over whole blocks holds a region, or a branch of the same stream;
    anything else is a detail of this feed-forward."""
    inner = between(residual.stream, [residual.output])
    return [chain[add] for add in chain if add in inner]


def _feedforwards(graph: fx.Graph, residuals: tuple[Residual, ...]) -> tuple[FeedForward, ...]:
    """Residual branches without attention or experts of their own."""
    anchors = _anchors(graph)
    return tuple(
        FeedForward(module_path(r.output), r.stream, r.output)
        for r in residuals
        if not anchors & between(r.stream, [r.output])
    )
