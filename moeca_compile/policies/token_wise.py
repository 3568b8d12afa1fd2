"""Token-wise caching: attention from the cache, feed-forwards recomputed on the tokens of the highest score.

What ToCa does at its cache steps (toca.py), and DuCa at every second one (duca.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil, isqrt
from typing import TypeVar

import torch
from torch import Tensor

from moeca_compile.options import Options
from moeca_compile.passes.analysis.axis import Layout, offset_in
from moeca_compile.passes.analysis.graph import ancestors, shape_of
from moeca_compile.passes.match.regions import Attention, Regions, Residual
from moeca_compile.passes.rewrite.kinds import STEP_SCALARS, Part
from moeca_compile.passes.rewrite.layers import rows_through_layers
from moeca_compile.passes.rewrite.replacement import Cache, Replacement
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies import token_scores as score
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.depth import depths_among
from moeca_compile.policies.token_layer import StepScalars, TokenLayer
from moeca_compile.policies.token_scores import Measure, TokenStatistic

Tokens = tuple[Tensor, Tensor]
"""Chosen tokens (B, C) of a layer, and (B, C) which of them are valid."""

Depth = TypeVar("Depth", float, Tensor)

FIRST, LAST = 1.8, 0.2
"""The factors of the first and last layers."""


class TokenWise:
    """The replacements for one graph's regions.

    Args:
        largest: the largest share of the tokens that a step has (Policy.share_at), before the factor of the layer.
        group: that of the cache steps which recompute tokens.
    """

    def __init__(self, options: Options, regions: Regions, largest: float, group: str = "") -> None:
        self.options, self.regions, self.largest, self.group = options, regions, largest, group
        residuals = _layers_of(regions)
        depths = depths_among([residual.output for residual in residuals])
        self.depths = max(depths.values(), default=0) + 1
        self.statistics: dict[Attention, list[TokenStatistic]] = {}
        self.layers = [self._layer(i, residual, depths[residual.output]) for i, residual in enumerate(residuals)]

    # --- what is cached -------------------------------------------------------------------------------------

    def _layer(self, number: int, residual: Residual, depth: int) -> TokenLayer:
        output, name = residual.output, f"tokens.{number}"
        cached = Cached(name, output, Part.EXPERTS, 1, self.options.cache_dtype)
        experts = next((layer for layer in self.regions.experts if layer.residual == residual), None)
        layout, statistics = self.regions.layouts[output], tuple(self._statistics_before(residual))
        return TokenLayer(residual, layout, cached, f"{name}.age", statistics, depth, self._side(layout), experts)

    def _side(self, layout: Layout) -> int:
        """The side of the square that these tokens fill in the picture; 0 where they do not.

        The inputs that hold rows and columns say whether the picture is square. Where a model gets it as tokens,
        their number must do: 64 x 36 are taken for 48 x 48.
        """
        side = isqrt(layout.tokens)
        if not self.regions.stacks or side * side != layout.tokens:
            return 0
        start, _ = self.regions.main_stack
        inputs = [node for node in ancestors([start]) if node.op == "placeholder"]
        square = all(map(_is_square, (shape_of(node) for node in inputs)))
        return side if square and offset_in(self.regions.axis(start), layout.axis) is not None else 0

    def _statistics_before(self, residual: Residual) -> Iterator[tuple[TokenStatistic, int]]:
        """Of the nearest attention among tokens before a layer, and of the nearest cross-attention, what
        `token_score` asks for; with the offset of the layer's tokens in it."""
        axis = self.regions.axis(residual.output)
        for wanted, measures in ((_is_among_tokens, score.AMONG), (_is_cross_attention, score.ACROSS)):
            measure = measures.get(self.options.token_score)
            nearest = next(filter(wanted, self._before(residual)), None)
            if measure is not None and nearest is not None:
                statistic = self._statistic(nearest, measure)
                offset = offset_in(statistic.layout.axis, axis)
                assert offset is not None, "an attention before a layer holds the layer's tokens"
                yield statistic, offset

    def _before(self, residual: Residual) -> Iterator[Attention]:
        """The attentions before a layer whose outputs hold its tokens, the last first."""
        axis = self.regions.axis(residual.output)
        for attention in reversed(self.regions.attentions):
            output = attention.residual.output
            if output < residual.output and offset_in(self.regions.axis(output), axis) is not None:
                yield attention

    def _statistic(self, attention: Attention, measure: Measure) -> TokenStatistic:
        known = self.statistics.setdefault(attention, [])
        found = next((each for each in known if each.measure is measure), None)
        if found is None:
            number = self.regions.attentions.index(attention)
            layout = self.regions.layouts[attention.residual.output]
            found = TokenStatistic(f"statistic.{number}", attention, measure, layout)
            known.append(found)
        return found

    # --- replacements ---------------------------------------------------------------------------------------

    def replacements(self) -> list[Replacement]:
        """None where no layer could run on chosen tokens: other recipes cache attention alone."""
        if not self.layers:
            return []
        attentions = (self._attention(i, attention) for i, attention in enumerate(self.regions.attentions))
        return [*attentions, *map(self._feedforward, self.layers)]

    def _attention(self, number: int, attention: Attention) -> Replacement:
        output, stream = attention.residual.output, attention.residual.stream
        cached = Cached(f"attention.{number}", output, Part.ATTENTION, 1, self.options.cache_dtype)
        own = self.statistics.get(attention, [])
        # The streams of a joint attention share what is computed of it.
        first = next((each for each in self.statistics if each.sdpa is attention.sdpa), None)
        flops = sum(each.measure.flops(attention) for each in own) if first == attention else 0
        return Replacement(
            output,
            stream,
            Part.ATTENTION,
            (cached, *own),
            cached.read,
            always_cached=True,
            store_flops=flops,
            group=self.group,
        )

    def _feedforward(self, layer: TokenLayer) -> Replacement:
        output = layer.residual.output
        scalars: list[Cache] = [StepScalars(output)] if layer is self.layers[0] else []
        return Replacement(
            output,
            layer.residual.stream,
            Part.EXPERTS,
            (layer, *scalars),
            partial(self._reuse, layer),
            recomputes_rows=True,
            chosen=output,
            shares=tuple(self._shares(layer)),
            group=self.group,
        )

    # --- a cache step ---------------------------------------------------------------------------------------

    def _reuse(self, layer: TokenLayer, step: Step) -> Tensor:
        """The layer's output: recomputed on the chosen tokens, cached for all others."""
        tokens = self._tokens(layer, step)
        if tokens is not None:
            chosen, valid = tokens
            rows = rows_through_layers(step, chosen, layer.residual.stream, layer.residual.output)
            layer.cached.refresh(step, chosen, rows[layer.residual.output], valid)
        if not step.kind.forced:
            recomputed = torch.zeros_like(step.state[layer.age], dtype=torch.bool)
            layer.grow_older(step, recomputed if tokens is None else recomputed.scatter(1, *tokens))
        return layer.cached.read(step)

    def _tokens(self, layer: TokenLayer, step: Step) -> Tokens | None:
        """The tokens to recompute, the highest score first. Ties go to the lower index. None where there are none."""
        samples, tokens = layer.layout.samples, layer.layout.tokens
        if step.kind.forced:
            return decide.forced_tokens(samples, tokens, step.capacity_for(tokens), step.weights.device)
        capacity = self._capacity(layer, step.kind.capacity / self._main_tokens)
        if not capacity:
            return None
        ratio, depth, number = (each[layer.depth] for each in self._ratios(step))
        scores = layer.scores(step, self.options)
        if self.options.token_score == "random":
            scores = scores + score.by_chance(number, depth, samples, tokens)
        if layer.side:
            scores = score.with_bonus(scores, layer.side)
        chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
        fresh = (ratio * tokens).to(torch.int64)
        return chosen, (torch.arange(capacity, device=fresh.device) < fresh).expand_as(chosen)

    def _capacity(self, layer: TokenLayer, share: float) -> int:
        """The most tokens that a step with capacity for `share` of all recomputes in a layer.

        It is one of few sizes, so that layers are alike.

        The last bucket is for all steps beyond the one before it, up to the largest share, which may be beyond 1.
        """
        last = max([self.largest, *self.options.capacities[-2:-1]])
        tokens, bound = layer.layout.tokens, share if share < 1 else last
        most = min(tokens, ceil(bound * layer_factor(layer.depth, self.depths) * tokens))
        sizes = (ceil(fraction * tokens) for fraction in self.options.capacities)
        return next(size for size in sizes if size >= most) if most else 0

    def _shares(self, layer: TokenLayer) -> Iterator[tuple[float, float]]:
        """The share that runs in a layer, by that of each bucket (Replacement.shares)."""
        for fraction in self.options.capacities:
            share = ceil(fraction * self._main_tokens) / self._main_tokens
            yield share, self._capacity(layer, share) / layer.layout.tokens

    @property
    def _main_tokens(self) -> int:
        """The tokens of the stream in which capacities are counted."""
        assert self.regions.main is not None
        return self.regions.main.tokens

    def _ratios(self, step: Step) -> tuple[Sequence[Tensor], ...]:
        """By the depth of a layer: the ratio of fresh tokens in float64, the depth, and the step's number."""
        if self not in step.memo:
            scalars = step.state[STEP_SCALARS.name]
            depth = torch.arange(self.depths, device=scalars.device)
            factors = layer_factor(depth.to(scalars.dtype), self.depths)
            ratio, number = (scalars[0] * factors).clamp(0, 1), scalars[1].to(torch.int64).expand(self.depths)
            # Taken apart here, so that layers do not differ in which element they take.
            step.memo[self] = tuple(each.unbind() for each in (ratio, depth, number))
        found: tuple[Sequence[Tensor], ...] = step.memo[self]
        return found


def _is_among_tokens(attention: Attention) -> bool:
    return attention.by_token


def _is_cross_attention(attention: Attention) -> bool:
    """Whether its keys are not computed from the stream. Where they are pooled from its tokens, no measure fits."""
    stream = attention.residual.stream
    return not attention.by_token and stream not in ancestors([attention.key], since=stream)


def _is_square(shape: Sequence[int]) -> bool:
    """Whether an input may belong to a square picture: only pictures, their channels first or last, and kernels of
    convolutions have four dims. A video has five."""
    return len(shape) < 4 or (len(shape) == 4 and shape[2] in (shape[1], shape[3]))


def _layers_of(regions: Regions) -> list[Residual]:
    """The residual branches that are feed-forwards or MoE layers.

    Around attention that was skipped there are branches too: rows of these cannot be computed by themselves, so they
    run as in the model.
    """
    attended = {attention.residual for attention in regions.attentions}
    own = {feedforward.output for feedforward in regions.feedforwards}
    own |= {layer.residual.output for layer in regions.experts}
    return [each for each in regions.residuals if each.output in own and each not in attended]


def layer_factor(depth: Depth, depths: int) -> Depth:
    """The factor of a layer, from the first to the last of `depths`."""
    return FIRST - (FIRST - LAST) * (depth / max(1, depths - 1))
