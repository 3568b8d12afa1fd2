"""MoECa: reuse (token, expert) branches whose routing hardly changed (the paper, section 4).

Full step: the model as it is; its attention outputs, branch outputs and shared outputs are kept.
Cache step, block by block:
  1. probe: the router on x + gate * cached attention output                          (design: the mask comes first)
  2. decide: match branches, score them, compare with the experts' thresholds          (eqs. 7, 9 to 12)
  3. attention anew for tokens with a recomputed branch, cached output for the others  (section 4.1)
  4. recomputed branches on the refreshed input, cached outputs for the others         (eq. 8)
Dense feed-forwards, shared experts and attentions without a router of their own follow the tokens of the
nearest MoE layer before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops.attention import attend
from moeca_compile.options import Options
from moeca_compile.passes.analysis.axis import Axis, count, offset_in
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.attention import sdpa_options
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part
from moeca_compile.passes.rewrite.replacement import Cache, Replacement
from moeca_compile.passes.rewrite.rows import Rows
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.expert_cache import ExpertCache
from moeca_compile.policies.fixed_k_cache import FixedKCache
from moeca_compile.policies.policy import CACHING, Policy, replaced_schedule
from moeca_compile.policies.variable_k_cache import VariableKCache

Tokens = tuple[Tensor, Tensor]
"""Chosen tokens (B, C), counted on the axis of some stream, and which of them are valid."""


class Stream(NamedTuple):
    """What one stream brings to an attention on a cache step: its chosen tokens and their rows."""

    attention: Attention
    chosen: Tensor
    valid: Tensor
    rows: Rows


class KeysValues(NamedTuple):
    """The caches of an attention's keys and values, shared by the streams that it joins."""

    name: str
    attention: Attention
    samples: int
    dtype: torch.dtype | None

    def specs(self) -> list[CacheSpec]:
        """Keys and values (B, N, H, d): a token's heads lie together, so that its row is one copy."""
        return [
            CacheSpec(f"{self.name}.{kind}", _row_major(node, self.samples), self.dtype or node.meta["val"].dtype)
            for kind, node in (("keys", self.attention.key), ("values", self.attention.value))
        ]

    def store(self, step: Step) -> None:
        for spec, node in zip(self.specs(), (self.attention.key, self.attention.value), strict=True):
            by_head = _by_head(step[node], spec.shape[0])
            step.updates[spec.name] = by_head.transpose(1, 2).to(spec.dtype).contiguous()


class Moeca:
    """The policy over one graph's regions. It holds what is cached where; what a step decides is in `CacheStep`."""

    def __init__(self, options: Options, regions: Regions) -> None:
        self.options, self.regions = options, regions
        self.attention = {a: self._cached(f"attention.{i}", a, "attention") for i, a in enumerate(regions.attentions)}
        self.joint: dict[fx.Node, list[Attention]] = {}
        for attention in regions.attentions:
            self.joint.setdefault(attention.sdpa, []).append(attention)
        self.keys_values = {sdpa: self._keys_values(parts[0]) for sdpa, parts in self.joint.items()}
        self.feedforward = {
            f: self._cached(f"feedforward.{i}", f, "experts") for i, f in enumerate(regions.feedforwards)
        }
        self.experts = {e: _layer_cache(f"experts.{i}", e, regions, options) for i, e in enumerate(regions.experts)}
        nearest_last = reversed(regions.experts)
        self.probes = {chain[0]: (e, chain) for e in nearest_last if (chain := _probe_chain(e, regions))}
        shared = [(i, e, s) for i, e in enumerate(regions.experts) for s in e.shared if options.shared != "always"]
        self.shared = {(e, s): self._cached(f"shared.{i}.{j}", s, "shared") for j, (i, e, s) in enumerate(shared)}

    def _cached(self, name: str, region: Attention | FeedForward, forecast: str) -> Cached:
        part = Part.ATTENTION if isinstance(region, Attention) else Part.EXPERTS
        node = region.residual.output if isinstance(region, Attention) else region.output
        return Cached(name, node, part, forecast in self.options.forecast, self.options.cache_dtype)

    def _keys_values(self, attention: Attention) -> KeysValues | None:
        """None where a cache step takes the keys and values of all tokens as the model computes them."""
        if self.options.keys_values == "all" or not attention.by_token:
            return None
        samples = self.regions.layouts[attention.key].samples
        return KeysValues(self.attention[attention].name, attention, samples, self.options.cache_dtype)

    # --- what it declares ----------------------------------------------------------------------------------

    def replacements(self) -> list[Replacement]:
        return [
            *map(self._attention_replacement, self.attention),
            *map(self._feedforward_replacement, self.feedforward),
            *(self._shared_replacement(layer, shared) for layer, shared in self.shared),
            *map(self._experts_replacement, self.experts),
        ]

    def _attention_replacement(self, attention: Attention) -> Replacement:
        caches: list[Cache] = [self.attention[attention]]
        keys_values = self.keys_values[attention.sdpa]
        if keys_values is not None and keys_values.attention is attention:
            caches.append(keys_values)
        return Replacement(
            attention.residual.output,
            attention.residual.stream,
            Part.ATTENTION,
            tuple(caches),
            lambda step: self._at(step).attention(attention),
            reads=() if keys_values is not None else (attention.key, attention.value),
            recomputes_rows=True,
        )

    def _feedforward_replacement(self, feedforward: FeedForward) -> Replacement:
        cached, ends = self.feedforward[feedforward], (feedforward.output, feedforward.stream)
        reuse = partial(self._reuse_rows, feedforward, cached, None)
        return Replacement(*ends, Part.EXPERTS, (cached,), reuse, recomputes_rows=True)

    def _shared_replacement(self, layer: Experts, shared: FeedForward) -> Replacement:
        cached, ends = self.shared[layer, shared], (shared.output, shared.stream)
        reuse = partial(self._reuse_rows, shared, cached, layer)
        return Replacement(*ends, Part.EXPERTS, (cached,), reuse, recomputes_rows=self.options.shared == "any")

    def _experts_replacement(self, layer: Experts) -> Replacement:
        cache = self.experts[layer]
        return Replacement(
            layer.marker,
            layer.residual.stream,
            Part.EXPERTS,
            (cache,),
            lambda step: self._at(step).experts(layer),
            fresh=cache.run_all,
            reads=(layer.choice, layer.weight),
            recomputes_branches=True,
        )

    def _reuse_rows(self, region: FeedForward, cached: Cached, layer: Experts | None, step: Step) -> Tensor:
        return self._at(step).row_wise(region, cached, layer)

    def _at(self, step: Step) -> CacheStep:
        """The policy at a step that is under way."""
        if self not in step.memo:
            step.memo[self] = CacheStep(self, step)
        found: CacheStep = step.memo[self]
        return found


class CacheStep:
    """One cache step: what its layers decide, which the attentions and feed-forwards around them go by."""

    def __init__(self, policy: Moeca, step: Step) -> None:
        self.policy, self.step, self.options = policy, step, policy.options
        self.decisions: dict[Experts, Decision] = {}
        self.chosen: dict[Axis, Tokens] = {}
        self.attended: set[fx.Node] = set()

    def attention(self, attention: Attention) -> Tensor:
        """Attention output: cached, anew for the tokens that are to be recomputed (section 4.1)."""
        if attention.sdpa not in self.attended:
            self.attended.add(attention.sdpa)
            self._refresh_attention(self.policy.joint[attention.sdpa])
        return self.policy.attention[attention].read(self.step)

    def _refresh_attention(self, joint: list[Attention]) -> None:
        """Attend anew from the chosen tokens of all streams that an attention joins."""
        step, parts = self.step, []
        for attention in joint:
            self._probe(attention)
            output = attention.residual.output
            if (tokens := self._tokens(output)) is not None:
                parts.append(Stream(attention, *tokens, step.rows(tokens[0], attention.residual.stream, output)))
        if not parts:
            return
        outputs = self._attend(parts).split([part.chosen.shape[1] for part in parts], dim=-2)
        for part, rows in zip(parts, outputs, strict=True):
            attention = part.attention
            part.rows.set(attention.sdpa, rows)
            fresh = part.rows[attention.residual.output]
            self.policy.attention[attention].refresh(step, part.chosen, fresh, part.valid)

    def _probe(self, attention: Attention) -> None:
        """Decide for the MoE layer behind the attention, on the cached output of all attentions on the way to it."""
        layer, chain = self.policy.probes.get(attention, (None, ()))
        if layer is not None and not self.step.kind.experts and self._masked_by_probe(layer):
            stale = {a.residual.output: self.policy.attention[a].read(self.step) for a in chain}
            self._decide(layer, *self.step.evaluate_with(stale, [layer.choice, layer.weight]))

    def _masked_by_probe(self, layer: Experts) -> bool:
        return self.options.mask_source == "probe" or self._decided(layer.marker) is None

    def _tokens(self, output: fx.Node) -> Tokens | None:
        """The tokens on the axis of `output` that are computed anew, None where it all comes from the cache."""
        if not self.step.kind.capacity:
            return None
        return _forced_tokens(self.step, output) if self.step.kind.forced else self._decided(output)

    def _decided(self, output: fx.Node) -> Tokens | None:
        """The tokens that the nearest MoE layer before chose, counted on the axis of `output`, if it holds them."""
        axis = self.step.regions.axis(output)
        for decided, (chosen, valid) in reversed(self.chosen.items()):
            place = offset_in(axis, decided)
            if place is not None:
                return chosen + place if place else chosen, valid
        return None

    def _attend(self, parts: list[Stream]) -> Tensor:
        """Chosen queries against all keys and values, which are fresh for all, for the chosen, or for none."""
        attention, step, fresh = parts[0].attention, self.step, self.options.keys_values
        options = sdpa_options(attention.sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        query = torch.cat([part.rows[attention.query] for part in parts], dim=-2)
        mask = _joined_masks(parts)
        if fresh == "all" or not attention.by_token:
            keys, values = step[attention.key], step[attention.value]
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=gqa)
        cached = self.policy.keys_values[attention.sdpa]
        assert cached is not None, "keys and values that are not taken whole are cached"
        keys, values = (step.state[spec.name] for spec in cached.specs())
        by_head = _by_head(query, len(keys))
        if mask is not None and query.ndim != by_head.ndim:
            mask = _by_head(mask.expand(*query.shape[:-2], -1, -1), len(keys))
        if fresh == "none" and not step.kind.forced:
            out = attend(by_head, keys, values, mask, scale, gqa)
        else:
            key, value, chosen, valid = self._fresh_keys_values(parts)
            out = torch.ops.moeca.attend_rows(keys, values, by_head, key, value, chosen, valid, mask, scale, gqa)
        return out.reshape(*query.shape[:-1], out.shape[-1])

    def _fresh_keys_values(self, parts: list[Stream]) -> list[Tensor]:
        """Keys and values of the chosen tokens, these counted along the keys, and which of them are valid."""
        key, value = parts[0].attention.key, parts[0].attention.value
        layout, rest = self.step.layout(key), set(range(self.step.layout(key).tokens))
        fresh: list[tuple[Tensor, ...]] = []
        for part in parts:
            place = offset_in(layout.axis, part.rows.axis)
            assert place is not None, "keys and values that are cached have these tokens among theirs"
            rest -= set(range(place, place + count(part.rows.axis)))
            rows = (_by_head(part.rows[node], layout.samples) for node in (key, value))
            fresh.append((*rows, part.chosen + place, part.valid))
        if self.step.kind.forced and rest:
            fresh.append(self._keys_values_at(key, value, sorted(rest)))
        return [
            torch.cat(tensors, dim=dim) for dim, tensors in zip((2, 2, 1, 1), zip(*fresh, strict=True), strict=True)
        ]

    def _keys_values_at(self, key: fx.Node, value: fx.Node, places: list[int]) -> tuple[Tensor, ...]:
        """Keys and values as the model computes them, of tokens whose queries nobody reads."""
        at = torch.tensor(places, device=self.step.coefficients.device)
        chosen = at.expand(self.step.layout(key).samples, -1)
        keys, values = (_by_head(self.step[node], len(chosen))[:, :, at] for node in (key, value))
        return keys, values, chosen, torch.ones_like(chosen, dtype=torch.bool)

    def _decide(self, layer: Experts, choice: Tensor, weight: Tensor) -> Decision:
        """Which branches and tokens of this layer are recomputed, from its current routing (eqs. 7, 9 to 12)."""
        decision = self.policy.experts[layer].decide(self.step, choice, weight)
        axis = self.step.regions.axis(layer.marker)
        self.chosen.pop(axis, None)  # the latest choice comes last
        self.chosen[axis] = decision.chosen, decision.valid
        self.decisions[layer] = decision
        return decision

    def _decision(self, layer: Experts) -> Decision:
        """The layer's decision; where no probe took it, it is taken on the routing itself."""
        if layer not in self.decisions:
            self._decide(layer, self.step[layer.choice], self.step[layer.weight])
        return self.decisions[layer]

    def experts(self, layer: Experts) -> Tensor:
        """MoE output from recomputed and cached branches, all with current weights (eq. 8)."""
        return self.policy.experts[layer].run_chosen(self.step, self._decision(layer))

    def row_wise(self, region: FeedForward, cached: Cached, layer: Experts | None) -> Tensor:
        """A feed-forward's output: cached, anew for the tokens that are to be recomputed.

        `layer` is the MoE layer beside which it is a shared expert; then the option `shared` tells whether it runs.
        """
        if layer is not None:
            self._decision(layer)
        tokens = self._tokens(region.output)
        runs = layer is None or self.options.shared != "never" or self.step.kind.forced
        if runs and tokens is not None:
            chosen, valid = tokens
            rows = self.step.rows(chosen, region.stream, region.output)
            cached.refresh(self.step, chosen, rows[region.output], valid)
        return cached.read(self.step)


def _probe_chain(layer: Experts, regions: Regions) -> list[Attention]:
    """The attentions right before the layer's router, side by side or one after the other, as to picture and text."""
    chain: list[Attention] = []
    add = layer.probe.residual.add if layer.probe is not None else None
    while found := [attention for attention in regions.attentions if attention.residual.add is add]:
        chain, add = [*found, *chain], found[0].residual.stream
    return chain


def _joined_masks(parts: list[Stream]) -> Tensor | None:
    """The masks of the queries of all parts, one after the other."""
    masks = [part.rows.attention_mask(part.attention.sdpa) for part in parts]
    first = masks[0]
    if first is None or len(masks) == 1 or first.shape[-2] == 1:
        return first
    return torch.cat(masks, dim=-2)  # type: ignore[arg-type]


def _by_head(value: Tensor, samples: int) -> Tensor:
    """(B, H, rows, width) of a value whose heads are merged into the batch dim, or spread over several."""
    return value if value.ndim == 4 else value.reshape(samples, -1, *value.shape[-2:])


def _row_major(node: fx.Node, samples: int) -> tuple[int, ...]:
    """Shape of a cache of keys or values (B, H, N, d), kept as (B, N, H, d)."""
    *_, tokens, width = shape = shape_of(node)
    return samples, tokens, prod(shape[:-2]) // samples, width


def _layer_cache(name: str, layer: Experts, regions: Regions, options: Options) -> ExpertCache:
    return (VariableKCache if layer.variable_k else FixedKCache)(name, layer, regions, options)


def _forced_tokens(step: Step, output: fx.Node) -> Tokens:
    layout = step.layout(output)
    return decide.forced_tokens(
        layout.samples, layout.tokens, step.capacity_for(layout.tokens), step.coefficients.device
    )


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Attention outputs, keys and values, feed-forwards, shared experts and branches."""
    return Moeca(options, regions).replacements()


def ignored(options: Options) -> Mapping[str, str]:
    """Options without effect beside the values of others."""
    found = dict(replaced_schedule(options)) if options.score != "staleness" else {}
    if options.budget is not None:
        names = ("tau0", "alpha", "beta", "entropy", "statistic", "capacities")
        found |= dict.fromkeys(names, "a budget takes the place of the threshold, so it has no effect")
    if options.score == "drift":
        found |= dict.fromkeys(("lambda1", "lambda2"), "the score is the drift alone, so it has no effect")
    return found


POLICY = Policy(
    reuses="branches whose routing hardly changed, and attention of tokens without a recomputed branch (the paper); "
    "with forecast every branch, attention and shared expert, extrapolated",
    recipes={
        "moeca": {},
        # Recomputing branches bought nothing beside the forecast (docs/performance.md).
        "moeca-forecast": {"forecast": ("attention", "experts", "shared"), "budget": 0.0},
    },
    options=CACHING
    | {"attention_every", "experts_every"}
    | {"tau0", "alpha", "beta", "entropy", "statistic"}
    | {"lambda1", "lambda2", "score", "score_weights", "budget"}
    | {"keys_values", "mask_source", "shared", "overwrite"}
    | {"capacities", "branches_per_token"},
    declare=declare,
    forecasts=("attention", "experts", "shared"),
    needs="MoE layers",
    applies=lambda regions: bool(regions.experts),
    ignored=ignored,
)
