"""Find all regions of one graph, by structure and never by names. Nothing here edits the graph."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import fx

from moeca_compile.passes.analysis.graph import ancestors, between, draws_random_numbers, module_path, shape_of
from moeca_compile.passes.analysis.token_axis import Layouts, stream_layout, token_layouts
from moeca_compile.passes.match.attention import attention_nodes, match_attention, work_between
from moeca_compile.passes.match.experts import MARKER, expert_body, expert_nodes, match_experts
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions, Residual, Skipped
from moeca_compile.passes.match.residuals import residual_at, residuals_around
from moeca_compile.passes.match.timestep import find_timesteps, guess_timesteps
from moeca_compile.passes.normalize.fuse_attention import unclear_attentions

_log = logging.getLogger(__name__)


def match_regions(graph: fx.Graph, user_inputs: set[fx.Node]) -> Regions:
    """Match attentions, MoE layers, feed-forwards and the residual chain that they form.

    `user_inputs` are the placeholders that are arguments of the model, as opposed to its parameters and buffers.
    """
    timesteps = find_timesteps(user_inputs)
    bodies = {node: expert_body(node) for node in expert_nodes(graph)}
    layouts, mixed = _layouts(graph)
    _take_whole_routings(graph, layouts, mixed)
    if not layouts:
        return Regions(bodies=bodies, timesteps=timesteps, skipped=_everything_skipped(graph))
    matched = [part for node in attention_nodes(graph) for part in match_attention(node, layouts, mixed)]
    attentions = tuple(a for a in matched if isinstance(a, Attention))
    layers = [match_experts(node, body, layouts, attentions) for node, body in bodies.items()]
    experts = tuple(e for e in layers if isinstance(e, Experts))
    residuals = _residual_chain(graph, layouts, [a.residual for a in attentions] + [e.residual for e in experts])
    feedforwards = _feedforwards(graph, residuals)
    skipped = tuple(s for s in (*matched, *_unclear(graph), *layers) if isinstance(s, Skipped))
    regions = (residuals, attentions, experts, feedforwards)
    _log.debug(
        "%d attentions, %d MoE layers, %d feed-forwards, %d skipped",
        *map(len, (attentions, experts, feedforwards, skipped)),
    )
    found = Regions(*regions, bodies, layouts, frozenset(mixed), timesteps, skipped=skipped)
    return _repeatable(found if timesteps else _with_guesses(found, user_inputs))


def _with_guesses(regions: Regions, user_inputs: set[fx.Node]) -> Regions:
    """With the inputs that have the form of a timestep, where no sines say which it is."""
    guesses = guess_timesteps(user_inputs, regions.main.samples) if regions.main else ()
    return replace(regions, timesteps=guesses, guessed=bool(guesses))


def _repeatable(regions: Regions) -> Regions:
    """Without the regions that drop out even in eval mode: their values differ from call to call in any case."""
    random = [part for part in regions.parts if any(map(draws_random_numbers, _branch(part)))]
    return regions.without(dict.fromkeys(random, "it draws random numbers")) if random else regions


def _branch(part: Attention | Experts | FeedForward) -> set[fx.Node]:
    """All that the part computes of its stream, and of nothing (noise has no inputs)."""
    ends = part if isinstance(part, FeedForward) else part.residual
    return ancestors([ends.output], stop=(ends.stream,), since=ends.stream) - {ends.stream}


def _layouts(graph: fx.Graph) -> tuple[Layouts, set[fx.Node]]:
    """The layouts of all values that have tokens, and which of them mix tokens.

    Each residual stream is found at the first attention or MoE layer that is added to it. A value that is joined or
    cut from known streams is not a stream of its own.
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


def _take_whole_routings(graph: fx.Graph, layouts: Layouts, mixed: set[fx.Node]) -> None:
    """Give ids and weights that are not computed from a stream, but from the time or a label, the layout of the rows
    that they belong to. The routing of chosen tokens is gathered from them."""
    for marker in graph.find_nodes(op="call_function", target=MARKER):
        rows, *routing = marker.args[:3]
        layout = layouts.get(rows)
        for node in routing:
            if (
                node not in layouts
                and layout is not None
                and layout.merged
                and shape_of(node)[0] == shape_of(rows)[0]
            ):
                layouts[node] = layout
                mixed.add(node)


def _anchors(graph: fx.Graph) -> set[fx.Node]:
    """Attentions and MoE layers: a residual branch that runs through one is no plain feed-forward."""
    return {*attention_nodes(graph), *expert_nodes(graph), *(node for node, _ in unclear_attentions(graph))}


def _unclear(graph: fx.Graph) -> list[Skipped]:
    """Unfused attentions that could not be fused."""
    return [Skipped("attention", module_path(node), reason, node) for node, reason in unclear_attentions(graph)]


def _everything_skipped(graph: fx.Graph) -> tuple[Skipped, ...]:
    reason = "no residual stream of shape (batch, tokens, width) runs around it"
    nodes = [("attention", n) for n in attention_nodes(graph)] + [("experts", n) for n in expert_nodes(graph)]
    return (*(Skipped(kind, module_path(node), reason, node) for kind, node in nodes), *_unclear(graph))


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
    # Sorted by output too: attention and experts side by side end in the same addition.
    return tuple(sorted({*chain.values(), *known}, key=lambda residual: (residual.add, residual.output)))


def _within(residual: Residual, chain: dict[fx.Node, Residual]) -> list[Residual]:
    """The residual branches of `chain` inside this one. A skip over whole blocks contains a region, or a branch of
    the same stream; any other inner branch is a detail of this feed-forward."""
    inner = between(residual.stream, [residual.output])
    return [chain[add] for add in chain if add in inner]


def _feedforwards(graph: fx.Graph, residuals: tuple[Residual, ...]) -> tuple[FeedForward, ...]:
    """Residual branches without attention or experts inside."""
    anchors = _anchors(graph)
    return tuple(
        FeedForward(module_path(r.output), r.stream, r.output)
        for r in residuals
        if not anchors & between(r.stream, [r.output])
    )
