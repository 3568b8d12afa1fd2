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

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.config import MoecaConfig
from moeca_compile.ops.attention import attend
from moeca_compile.passes.attention import sdpa_options
from moeca_compile.passes.regions import Attention, Experts, FeedForward, Regions
from moeca_compile.passes.rows import Rows
from moeca_compile.passes.token_axis import shape_of
from moeca_compile.policies import decision as decide
from moeca_compile.policies.branch_cache import BranchCache
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.pair_cache import PairCache
from moeca_compile.policies.plain import run_layers
from moeca_compile.policies.step import ATTENTION, EXPERTS, CacheSpec, Step, samples_and_tokens


class Moeca:
    """The policy over one graph's regions. It holds what is cached where; a step's state is in `MoecaStep`."""

    def __init__(self, config: MoecaConfig, regions: Regions) -> None:
        self.config, self.regions = config, regions
        self.attention = {a: self._cached(f"attention.{i}", a, "attention") for i, a in enumerate(regions.attentions)}
        self.feedforward = {
            f: self._cached(f"feedforward.{i}", f, "experts") for i, f in enumerate(regions.feedforwards)
        }
        self.branches = {e: _layer_cache(f"experts.{i}", e, regions, config) for i, e in enumerate(regions.experts)}
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
        return specs + [spec for i, a in enumerate(self.attention) for spec in self._key_value_specs(i, a)]

    def _key_value_specs(self, i: int, attention: Attention) -> list[CacheSpec]:
        if self.config.keys_values == "all":
            return []
        dtype = self.config.cache_dtype
        pairs = (("keys", attention.key), ("values", attention.value))
        return [CacheSpec(f"attention.{i}.{n}", _row_major(v), dtype or v.meta["val"].dtype) for n, v in pairs]

    def install(self, step: Step) -> MoecaStep:
        """Replace, for this step, the values that come from the cache. Call `finish` after it has run."""
        return MoecaStep(self, step)


class MoecaStep:
    """One step under the policy: the replacements it makes, and what they tell each other."""

    def __init__(self, policy: Moeca, step: Step) -> None:
        self.policy, self.step, self.config = policy, step, policy.config
        self.decisions: dict[Experts, Decision] = {}
        self.tokens = _forced_tokens(step) if step.kind.forced else None
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
            for i, (attention, cached) in enumerate(policy.attention.items()):
                cached.store(step, step[attention.residual.output])
                for spec, node in zip(
                    policy._key_value_specs(i, attention), (attention.key, attention.value), strict=False
                ):
                    step.updates[spec.name] = step[node].transpose(1, 2).to(spec.dtype).contiguous()
        if step.kind.experts:
            for region, cached in (*policy.feedforward.items(), *policy.shared.items()):
                cached.store(step, step[region.output])
            for cache in policy.branches.values():
                cache.store(step)

    # --- cache steps, in the order in which a block meets them -------------------------------------------

    def _attention(self, attention: Attention) -> Tensor:
        """Attention output: cached, anew for the tokens that are to be recomputed (section 4.1)."""
        cached, step = self.policy.attention[attention], self.step
        layer = next((e for e in self.policy.branches if e.probe is attention), None)
        if layer is not None and not step.kind.experts and self._masked_by_probe():
            index, weight = step.instead({attention.residual.output: cached.read(step)}, [layer.choice, layer.weight])
            self._decide(layer, index, weight)
        if self.tokens is not None and step.kind.capacity:
            chosen, valid = self.tokens
            rows = step.rows(chosen, attention.residual.stream)
            rows.set(attention.sdpa, self._attend(attention, rows, chosen, valid))
            cached.refresh(step, chosen, rows[attention.residual.output], valid)
        return cached.read(step)

    def _masked_by_probe(self) -> bool:
        return self.config.mask_source == "probe" or self.tokens is None

    def _attend(self, attention: Attention, rows: Rows, chosen: Tensor, valid: Tensor) -> Tensor:
        """Chosen queries against all keys and values, which are fresh for all, for the chosen, or for none."""
        options = sdpa_options(attention.sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        query, step = rows[attention.query], self.step
        fresh = self.config.keys_values
        if fresh == "all":
            return F.scaled_dot_product_attention(
                query,
                step[attention.key],
                step[attention.value],
                scale=scale,
                enable_gqa=gqa,
            )
        i = list(self.policy.attention).index(attention)
        keys, values = step.state[f"attention.{i}.keys"], step.state[f"attention.{i}.values"]
        if fresh == "none" and not step.kind.forced:
            return attend(query, keys, values, scale, gqa)
        return torch.ops.moeca.attend_rows(
            keys, values, query, rows[attention.key], rows[attention.value], chosen, valid, scale, gqa
        )

    def _decide(self, layer: Experts, choice: Tensor, weight: Tensor) -> Decision:
        """Which branches and tokens of this layer are recomputed, from its current routing (eqs. 7, 9 to 12)."""
        decision = self.policy.branches[layer].decide(self.step, choice, weight)
        self.tokens = (decision.chosen, decision.valid)
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
        if fresh and self.tokens is not None and self.step.kind.capacity:
            chosen, valid = self.tokens
            rows = self.step.rows(chosen, region.stream)
            cached.refresh(self.step, chosen, rows[region.output], valid)
        return cached.read(self.step)


def _row_major(node: fx.Node) -> tuple[int, ...]:
    """Shape of a cache of keys or values (B, H, N, d), kept as (B, N, H, d)."""
    samples, heads, tokens, width = shape_of(node)
    return samples, tokens, heads, width


def _layer_cache(name: str, layer: Experts, regions: Regions, config: MoecaConfig) -> BranchCache | PairCache:
    return (PairCache if layer.by_pair else BranchCache)(name, layer, regions, config)


def _forced_tokens(step: Step) -> tuple[Tensor, Tensor]:
    return decide.forced_tokens(step.kind, *samples_and_tokens(step.regions), step.clock.device)
