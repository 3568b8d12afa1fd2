"""MoECa: reuse (token, expert) branches whose routing hardly changed (the paper, section 4).

Full step: the model runs as it is; attention outputs, branch outputs and shared experts' outputs are cached.
Cache step, block by block (moeca_step.py):
  1. probe: the router on x + gate * cached attention output, so that the mask is known before attention runs
  2. decide: match branches, score them, compare with the experts' thresholds   (eqs. 7, 9 to 12; decision.py)
  3. attention: recomputed for tokens with a recomputed branch, else cached     (section 4.1)
  4. experts: recomputed branches on the refreshed input, else cached outputs   (eq. 8; fixed_k_cache.py,
                                                                                 variable_k_cache.py)
Dense feed-forwards, shared experts, and attentions without a router behind them follow the tokens of the nearest
MoE layer before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.axis import offset_in
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions
from moeca_compile.passes.rewrite.kinds import Part
from moeca_compile.passes.rewrite.replacement import Cache, Replacement
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.moeca_caches import MoecaCaches
from moeca_compile.policies.moeca_step import CacheStep
from moeca_compile.policies.policy import CACHING, Policy


class Moeca:
    """The replacements for one graph's regions: each takes its value from a cache, by what `CacheStep` decides."""

    def __init__(self, options: Options, regions: Regions) -> None:
        self.caches = MoecaCaches(options, regions)

    def replacements(self) -> list[Replacement]:
        return [
            *map(self._attention_replacement, self.caches.attention),
            *map(self._feedforward_replacement, self.caches.feedforward),
            *(self._shared_replacement(layer, shared) for layer, shared in self.caches.shared),
            *map(self._experts_replacement, self.caches.experts),
        ]

    def _attention_replacement(self, attention: Attention) -> Replacement:
        caches: list[Cache] = [self.caches.attention[attention]]
        keys_values = self.caches.keys_values[attention.sdpa]
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
            chosen=self._chosen_on(attention.residual.output),
        )

    def _feedforward_replacement(self, feedforward: FeedForward) -> Replacement:
        cached, ends = self.caches.feedforward[feedforward], (feedforward.output, feedforward.stream)
        reuse = partial(self._reuse_rows, feedforward, cached, None)
        chosen = self._chosen_on(feedforward.output)
        return Replacement(*ends, Part.EXPERTS, (cached,), reuse, recomputes_rows=True, chosen=chosen)

    def _shared_replacement(self, layer: Experts, shared: FeedForward) -> Replacement:
        cached, ends = self.caches.shared[layer, shared], (shared.output, shared.stream)
        reuse = partial(self._reuse_rows, shared, cached, layer)
        runs, chosen = self.caches.options.shared == "any", self._chosen_on(shared.output)
        return Replacement(*ends, Part.EXPERTS, (cached,), reuse, recomputes_rows=runs, chosen=chosen)

    def _experts_replacement(self, layer: Experts) -> Replacement:
        cache = self.caches.experts[layer]
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

    def _chosen_on(self, output: fx.Node) -> fx.Node | None:
        """The first MoE layer that chooses among the tokens of `output`."""
        axis, markers = self.caches.regions.axis(output), [layer.marker for layer in self.caches.experts]
        on_axis = (m for m in markers if offset_in(axis, self.caches.regions.axis(m)) is not None)
        return next(on_axis, None)

    def _reuse_rows(self, region: FeedForward, cached: Cached, layer: Experts | None, step: Step) -> Tensor:
        return self._at(step).row_wise(region, cached, layer)

    def _at(self, step: Step) -> CacheStep:
        """The cache step under way, which all replacements of a step share."""
        if self not in step.memo:
            step.memo[self] = CacheStep(self.caches, step)
        found: CacheStep = step.memo[self]
        return found


def declare(options: Options, regions: Regions) -> Sequence[Replacement]:
    """Attention outputs, keys and values, feed-forwards, shared experts and branches."""
    return Moeca(options, regions).replacements()


def ignored(options: Options) -> Mapping[str, str]:
    """Options that have no effect because of another option's value, each with the reason."""
    found: dict[str, str] = {}
    if options.budget is not None:
        names = ("tau0", "alpha", "beta", "entropy", "statistic", "capacities")
        found |= dict.fromkeys(names, "a budget takes the place of the threshold, so it has no effect")
    if options.budget != 0:
        reason = "it needs cache steps that recompute nothing: set budget to 0, or take another recipe"
        found |= dict.fromkeys(("corrector", "max_error"), reason)
    if options.budget == 0:
        unranked = ("lambda1", "lambda2", "score", "score_weights")
        found |= dict.fromkeys(unranked, "with a budget of 0 nothing is ranked, so it has no effect")
        found |= _ignored_without_recomputed_branches(options)
    if options.score == "drift":
        found |= dict.fromkeys(("lambda1", "lambda2"), "the score is the drift alone, so it has no effect")
    return found


def _ignored_without_recomputed_branches(options: Options) -> Mapping[str, str]:
    """Where no token is chosen for its branches. keys_values="all" still saves the memory of keys and values."""
    reason = "with a budget of 0 no token is chosen, so it has no effect"
    values = {"mask_source": options.mask_source, "keys_values": options.keys_values, "shared": options.shared}
    without_effect = {"mask_source": ("previous",), "keys_values": ("none",), "shared": ("any",)}
    return {name: reason for name, value in values.items() if value in without_effect[name]}


POLICY = Policy(
    reuses="branches whose routing hardly changed, and attention of tokens without a recomputed branch (the paper); "
    "with forecast every branch, attention and shared expert, extrapolated",
    recipes={
        "moeca": {},
        # With a forecast, recomputing branches gained nothing (docs/policies.md).
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
