"""Scores by which tokens are chosen to be recomputed (ToCa, DuCa), and the statistics of attention that they use.

    S = s_1 [+ s_2] + 0.25 age / N                   + 0.6 max S in the best token of each patch of 2 x 2
    s_1 = normalized(sum of a[:, i] over queries)    a: the mean attention map of all heads
    s_2 = normalized(entropy of c[i, :])             c: the same of a cross-attention, where there is one
    s_1 = normalized(sum over heads of 1 - |v_i|)    with DuCa's values in place of maps

Each is normalized by its L2 norm over the tokens. Shapes: B samples, N tokens.

Sources: ToCa (Zou et al., ICLR 2025, arXiv 2410.05317), with the weights of its code for DiT; DuCa (Zou et al. 2024,
arXiv 2412.18911), for values and chance. Where a block has both s_1 and s_2, they count alike here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.passes.analysis.axis import Layout, offset_in
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.attention import sdpa_options
from moeca_compile.passes.match.regions import Attention
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, Role
from moeca_compile.passes.rewrite.step import Step

AGE = 0.25
"""The weight of age / N: lambda_3."""
BONUS = 0.6
"""The bonus for the best token of a patch, relative to its score: lambda_4."""
PATCH = 2
"""The side of a patch, in tokens."""


# --- statistics of attention, from full steps -------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """What may be known of the tokens of an attention.

    Attributes:
        compute: (step, attention) -> (B, N) float32, a number for each token of the attention's output.
        inputs: the values of the graph that this reads.
        flops: what it costs.
    """

    compute: Callable[[Step, Attention], Tensor]
    inputs: Callable[[Attention], tuple[fx.Node, ...]]
    flops: Callable[[Attention], int]


@dataclass(frozen=True)
class TokenStatistic:
    """(B, N) a measure of an attention's tokens, from the last full step.

    Attributes:
        name: of the cached tensor.
        layout: of the attention's output.
    """

    name: str
    attention: Attention
    measure: Measure
    layout: Layout

    def specs(self) -> list[CacheSpec]:
        shape = (self.layout.samples, self.layout.tokens)
        return [CacheSpec(self.name, shape, torch.float32, Role.STATISTIC, Part.ATTENTION, self.name)]

    def reads(self) -> list[fx.Node]:
        return list(self.measure.inputs(self.attention))

    def store(self, step: Step) -> None:
        # Under the user's autocast, products of float32 values would be computed in 16 bits.
        with _without_autocast(step.weights.device.type):
            step.updates[self.name] = self.measure.compute(step, self.attention).contiguous()


@contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    """`torch.autocast(device, enabled=False)`, but for tracing, which would take that for an op of the step."""
    enabled = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, enabled)


def received(step: Step, attention: Attention) -> Tensor:
    """(B, N) the attention that each token gets from all queries: a column of the map, summed."""
    memo = (received, attention.sdpa)
    if memo not in step.memo:  # the streams of a joint attention share its map
        step.memo[memo] = attention_map(step, attention).sum(1)
    return _own(step, attention, attention.key, step.memo[memo])


def spread(step: Step, attention: Attention) -> Tensor:
    """(B, N) the entropy of each token's attention to the keys of a cross-attention, in nats."""
    return _own(step, attention, attention.query, torch.special.entr(attention_map(step, attention)).sum(-1))


def smallness(step: Step, attention: Attention) -> Tensor:
    """(B, N) the sum over heads of 1 - |v|: tokens with small values get much attention, as a rule."""
    norms = step[attention.value].to(torch.float32).norm(dim=-1)  # (..., heads, keys)
    samples = step.layout(attention.query).samples
    return _own(step, attention, attention.value, (1 - norms).reshape(samples, -1, norms.shape[-1]).sum(1))


def attention_map(step: Step, attention: Attention) -> Tensor:
    """(B, queries, keys) the mean over heads of softmax(query @ key^T * scale + mask), in float32."""
    options, samples = sdpa_options(attention.sdpa), step.layout(attention.query).samples
    query, key = (step[node].to(torch.float32) for node in (attention.query, attention.key))
    if options["enable_gqa"]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = options["scale"] if options["scale"] is not None else 1 / math.sqrt(query.shape[-1])
    logits = query @ key.transpose(-1, -2) * scale
    mask = options["attn_mask"]
    if options["is_causal"]:
        rows, keys = (torch.arange(size, device=logits.device) for size in logits.shape[-2:])
        logits = logits.masked_fill(rows[:, None] < keys, -math.inf)
    elif mask is not None:
        allowed = step[mask]
        masked = allowed.dtype == torch.bool
        logits = logits.masked_fill(~allowed, -math.inf) if masked else logits + allowed.to(torch.float32)
    # A query that may attend to nothing has NaN.
    return logits.softmax(-1).nan_to_num(0.0).reshape(samples, -1, *logits.shape[-2:]).mean(1)


def map_inputs(attention: Attention) -> tuple[fx.Node, ...]:
    """What `attention_map` reads of the graph."""
    mask = sdpa_options(attention.sdpa)["attn_mask"]
    return (attention.query, attention.key, *([mask] if isinstance(mask, fx.Node) else []))


def map_flops(attention: Attention) -> int:
    """FLOPs of `attention_map`: those of its product."""
    *rows, width = shape_of(attention.query)
    return 2 * prod(rows) * shape_of(attention.key)[-2] * width


def _own(step: Step, attention: Attention, node: fx.Node, values: Tensor) -> Tensor:
    """Of values by token of `node` (B, tokens), those of the tokens of the attention's own stream."""
    layout = step.layout(attention.residual.output)
    offset = offset_in(step.layout(node).axis, layout.axis)
    assert offset is not None, "the attention's own tokens are among those that it is asked about"
    return values[:, offset : offset + layout.tokens]


RECEIVED = Measure(received, map_inputs, map_flops)
SPREAD = Measure(spread, map_inputs, map_flops)
SMALLNESS = Measure(smallness, lambda attention: (attention.value,), lambda attention: 0)
AMONG = {"attention": RECEIVED, "value_norm": SMALLNESS}
"""By `token_score`, the measure of an attention among tokens."""
ACROSS = {"attention": SPREAD}
"""And that of a cross-attention."""


# --- scores -----------------------------------------------------------------------------------------------------


def normalized(values: Tensor) -> Tensor:
    """(B, N) divided by their L2 norm over the tokens."""
    return F.normalize(values, dim=1)


def by_chance(number: Tensor, layer: Tensor, samples: int, tokens: int) -> Tensor:
    """(B, N) numbers in [0, 1), the same for all samples, other ones at each step and in each layer.

    They are hashed from the integers `number` and `layer` (0-dim), and so take nothing from the random numbers that a
    sampler draws. For guidance, whose passes are joined in a batch, both passes need the same tokens.
    """
    value = torch.arange(tokens, device=number.device) + 7919 * number + 104729 * layer
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        value = ((value ^ (value >> shift)) * factor) & 0xFFFFFFFF  # below 2^62 before it is cut to 32 bits
    bits = (value ^ (value >> 15)) >> 8  # 24 of them, which float32 holds exactly
    return (bits.to(torch.float32) / 2**24).expand(samples, -1)


def with_bonus(scores: Tensor, side: int) -> Tensor:
    """Scores (B, side^2) with a bonus for the best token of each patch, so that chosen tokens lie all over the
    picture. Where all scores of a patch are negative, the bonus is of their size."""
    odd = -side % PATCH
    grid = F.pad(scores.unflatten(1, (side, side)), (0, odd, 0, odd), value=-math.inf)
    across = (side + odd) // PATCH
    patches = grid.unflatten(2, (across, PATCH)).unflatten(1, (across, PATCH)).transpose(2, 3).flatten(3)
    best, index = patches.max(dim=-1, keepdim=True)
    first = torch.arange(PATCH * PATCH, device=scores.device) == index
    patches = torch.where(first, patches + BONUS * best.abs(), patches)
    grid = patches.unflatten(3, (PATCH, PATCH)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return grid[:, :side, :side].flatten(1)
