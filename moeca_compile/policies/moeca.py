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

from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.ops.attention import attend
from moeca_compile.passes.analysis.axis import Axis, count, place_in
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.attention import sdpa_options
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions
from moeca_compile.passes.rewrite.rows import Rows
from moeca_compile.passes.rewrite.step import ATTENTION, EXPERTS, CacheSpec, Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.fixed_k_cache import FixedKCache
from moeca_compile.policies.plain import run_layers
from moeca_compile.policies.variable_k_cache import VariableKCache

Tokens = tuple[Tensor, Tensor]
"""Chosen tokens (B, C), counted on the axis of some stream, and which of them are valid."""


class Part(NamedTuple):
    """What one stream brings to an attention on a cache step: its chosen tokens and their rows."""

    attention: Attention
    chosen: Tensor
    valid: Tensor
    rows: Rows


class Moeca:
    """The policy over one graph's regions. It holds what is cached where; a step's state is in `MoecaStep`."""

    def __init__(self, config: MoecaConfig, regions: Regions) -> None:
        self.config, self.regions = config, regions
        self.attention = {a: self._cached(f"attention.{i}", a, "attention") for i, a in enumerate(regions.attentions)}
        self.joint: dict[fx.Node, list[Attention]] = {}
        for attention in regions.attentions:
            self.joint.setdefault(attention.sdpa, []).append(attention)
        self.feedforward = {
            f: self._cached(f"feedforward.{i}", f, "experts") for i, f in enumerate(regions.feedforwards)
        }
        self.branches = {e: _layer_cache(f"experts.{i}", e, regions, config) for i, e in enumerate(regions.experts)}
        nearest_last = reversed(regions.experts)
        self.probes = {chain[0]: (e, chain) for e in nearest_last if (chain := _probe_chain(e, regions))}
        shared = [(i, s) for i, e in enumerate(regions.experts) for s in e.shared if config.shared != "always"]
        self.shared = {s: self._cached(f"shared.{i}.{j}", s, "shared") for j, (i, s) in enumerate(shared)}

    def _cached(self, name: str, region: Attention | FeedForward, forecast: str) -> Cached:
        part = ATTENTION if isinstance(region, Attention) else EXPERTS
        node = region.residual.output if isinstance(region, Attention) else region.output
        return Cached(name, node, part, forecast in self.config.forecast, self.config.cache_dtype)

    def specs(self) -> list[CacheSpec]:
        """All cached tensors."""
        singles = [*self.attention.values(), *self.feedforward.values(), *self.shared.values()]
        specs = [spec for cached in singles for spec in cached.specs()]
        specs += [spec for branches in self.branches.values() for spec in branches.specs()]
        return specs + [spec for sdpa in self.joint for spec in self.key_value_specs(sdpa)]

    def key_value_specs(self, sdpa: fx.Node) -> list[CacheSpec]:
        """The caches of an attention's keys and values, shared by the streams that it joins."""
        if self.config.keys_values == "all" or not self.joint[sdpa][0].by_token:
            return []
        attention = self.joint[sdpa][0]
        name, dtype = self.attention[attention].name, self.config.cache_dtype
        pairs = (("keys", attention.key), ("values", attention.value))
        return [
            CacheSpec(f"{name}.{n}", _row_major(v, self.regions.layouts[v].samples), dtype or v.meta["val"].dtype)
            for n, v in pairs
        ]

    def install(self, step: Step) -> MoecaStep:
        """Replace, for this step, the values that come from the cache. Call `finish` after it has run."""
        return MoecaStep(self, step)


class MoecaStep:
    """One step under the policy: the replacements it makes, and what they tell each other."""

    def __init__(self, policy: Moeca, step: Step) -> None:
        self.policy, self.step, self.config = policy, step, policy.config
        self.decisions: dict[Experts, Decision] = {}
        self.chosen: dict[Axis, Tokens] = {}
        self.attended: set[fx.Node] = set()
        kind, replace = step.kind, step.replacements
        for layer, cache in policy.branches.items():
            replace[layer.marker] = partial(cache.run_all, step) if kind.experts else partial(self._experts, layer)
        if not kind.experts:
            for feedforward in policy.feedforward:
                replace[feedforward.output] = partial(self._feedforward, feedforward)
            for layer in policy.branches:
                for shared in layer.shared:
                    if shared in policy.shared:
                        replace[shared.output] = partial(self._shared, layer, shared)
        if not kind.attention:
            for attention in policy.attention:
                replace[attention.residual.output] = partial(self._attention, attention)
        run_layers(step)

    def finish(self) -> None:
        """Keep what this step computed as the model has it."""
        step, policy = self.step, self.policy
        if step.kind.attention:
            for attention, cached in policy.attention.items():
                cached.store(step, step[attention.residual.output])
            for sdpa, (attention, *_) in policy.joint.items():
                for spec, node in zip(policy.key_value_specs(sdpa), (attention.key, attention.value), strict=False):
                    by_head = _by_head(step[node], spec.shape[0])
                    step.updates[spec.name] = by_head.transpose(1, 2).to(spec.dtype).contiguous()
        if step.kind.experts:
            for region, cached in (*policy.feedforward.items(), *policy.shared.items()):
                cached.store(step, step[region.output])
            for cache in policy.branches.values():
                cache.store(step)

    # --- cache steps, in the order in which a block meets them -------------------------------------------

    def _attention(self, attention: Attention) -> Tensor:
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
                parts.append(Part(attention, *tokens, step.rows(tokens[0], attention.residual.stream, output)))
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
            self._decide(layer, *self.step.instead(stale, [layer.choice, layer.weight]))

    def _masked_by_probe(self, layer: Experts) -> bool:
        return self.config.mask_source == "probe" or self._decided(layer.marker) is None

    def _tokens(self, output: fx.Node) -> Tokens | None:
        """The tokens on the axis of `output` that are computed anew, None where it all comes from the cache."""
        if not self.step.kind.capacity:
            return None
        return _forced_tokens(self.step, output) if self.step.kind.forced else self._decided(output)

    def _decided(self, output: fx.Node) -> Tokens | None:
        """The tokens that the nearest MoE layer before chose, counted on the axis of `output`, if it holds them."""
        axis = self.step.regions.axis(output)
        for decided, (chosen, valid) in reversed(self.chosen.items()):
            place = place_in(axis, decided)
            if place is not None:
                return chosen + place if place else chosen, valid
        return None

    def _attend(self, parts: list[Part]) -> Tensor:
        """Chosen queries against all keys and values, which are fresh for all, for the chosen, or for none."""
        attention, step, fresh = parts[0].attention, self.step, self.config.keys_values
        options = sdpa_options(attention.sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        query = torch.cat([part.rows[attention.query] for part in parts], dim=-2)
        mask = _joined_masks(parts)
        if fresh == "all" or not attention.by_token:
            keys, values = step[attention.key], step[attention.value]
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=gqa)
        keys, values = (step.state[spec.name] for spec in self.policy.key_value_specs(attention.sdpa))
        by_head = _by_head(query, len(keys))
        if mask is not None and query.ndim != by_head.ndim:
            mask = _by_head(mask.expand(*query.shape[:-2], -1, -1), len(keys))
        if fresh == "none" and not step.kind.forced:
            out = attend(by_head, keys, values, mask, scale, gqa)
        else:
            key, value, chosen, valid = self._fresh_keys_values(parts)
            out = torch.ops.moeca.attend_rows(keys, values, by_head, key, value, chosen, valid, mask, scale, gqa)
        return out.reshape(*query.shape[:-1], out.shape[-1])

    def _fresh_keys_values(self, parts: list[Part]) -> list[Tensor]:
        """Keys and values of the chosen tokens, these counted along the keys, and which of them are valid."""
        key, value = parts[0].attention.key, parts[0].attention.value
        layout, rest = self.step.layout(key), set(range(self.step.layout(key).tokens))
        fresh: list[tuple[Tensor, ...]] = []
        for part in parts:
            place = place_in(layout.axis, part.rows.axis)
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
        at = torch.tensor(places, device=self.step.clock.device)
        chosen = at.expand(self.step.layout(key).samples, -1)
        keys, values = (_by_head(self.step[node], len(chosen))[:, :, at] for node in (key, value))
        return keys, values, chosen, torch.ones_like(chosen, dtype=torch.bool)

    def _decide(self, layer: Experts, choice: Tensor, weight: Tensor) -> Decision:
        """Which branches and tokens of this layer are recomputed, from its current routing (eqs. 7, 9 to 12)."""
        decision = self.policy.branches[layer].decide(self.step, choice, weight)
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

    def _experts(self, layer: Experts) -> Tensor:
        """MoE output from recomputed and cached branches, all with current weights (eq. 8)."""
        return self.policy.branches[layer].run_chosen(self.step, self._decision(layer))  # type: ignore[arg-type]

    def _shared(self, layer: Experts, shared: FeedForward) -> Tensor:
        self._decision(layer)
        fresh = self.config.shared != "never" or self.step.kind.forced
        return self._row_wise(shared, self.policy.shared[shared], fresh)

    def _feedforward(self, feedforward: FeedForward) -> Tensor:
        return self._row_wise(feedforward, self.policy.feedforward[feedforward], True)

    def _row_wise(self, region: FeedForward, cached: Cached, fresh: bool) -> Tensor:
        tokens = self._tokens(region.output)
        if fresh and tokens is not None:
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


def _joined_masks(parts: list[Part]) -> Tensor | None:
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


def _layer_cache(name: str, layer: Experts, regions: Regions, config: MoecaConfig) -> FixedKCache | VariableKCache:
    return (VariableKCache if layer.variable_k else FixedKCache)(name, layer, regions, config)


def _forced_tokens(step: Step, output: fx.Node) -> Tokens:
    layout = step.layout(output)
    return decide.forced_tokens(layout.samples, layout.tokens, step.room(layout.tokens), step.clock.device)
