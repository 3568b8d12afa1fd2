"""What MoECa caches of a model, and which attention's cached output each router is probed on."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, fx

from moeca_compile.options import Options
from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward, Regions
from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, ring_specs
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.expert_cache import ExpertCache
from moeca_compile.policies.fixed_k_cache import FixedKCache
from moeca_compile.policies.forecast import slots_of
from moeca_compile.policies.variable_k_cache import VariableKCache


class KeysValues(NamedTuple):
    """The caches of an attention's keys and values, shared by the streams that it joins."""

    name: str
    attention: Attention
    samples: int
    dtype: torch.dtype | None

    def specs(self) -> list[CacheSpec]:
        """Keys and values, each (B, N, H, d): the heads of a token are contiguous, so writing a token is one copy."""
        return [
            spec
            for kind, node in (("keys", self.attention.key), ("values", self.attention.value))
            for spec in ring_specs(
                f"{self.name}.{kind}",
                1,
                _cache_shape(node, self.samples),
                self.dtype or node.meta["val"].dtype,
                Part.ATTENTION,
            )
        ]

    def reads(self) -> list[fx.Node]:
        return [self.attention.key, self.attention.value]

    def store(self, step: Step) -> None:
        for spec, node in zip(self.specs(), self.reads(), strict=True):
            heads = by_head(step[node], spec.shape[0])
            step.updates[spec.name] = heads.transpose(1, 2).to(spec.dtype).contiguous()


class MoecaCaches:
    """The caches of one graph, by region.

    Attributes:
        attention, feedforward, shared, experts: the cache of each region's output.
        joint: the attention regions that share one attention op (one region a token stream), by that op.
        keys_values: the cache of each attention op's keys and values; None where a cache step takes them all from
            the model.
        probes: for the first attention before a router, the MoE layer and all attentions between it and the router.
    """

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
        self.probes = {
            attentions[0]: (e, attentions) for e in nearest_last if (attentions := _attentions_before(e, regions))
        }
        shared = [(i, e, s) for i, e in enumerate(regions.experts) for s in e.shared if options.shared != "always"]
        self.shared = {(e, s): self._cached(f"shared.{i}.{j}", s, "shared") for j, (i, e, s) in enumerate(shared)}

    def _cached(self, name: str, region: Attention | FeedForward, forecast: str) -> Cached:
        part = Part.ATTENTION if isinstance(region, Attention) else Part.EXPERTS
        node = region.residual.output if isinstance(region, Attention) else region.output
        return Cached(name, node, part, slots_of(self.options, forecast), self.options.cache_dtype)

    def _keys_values(self, attention: Attention) -> KeysValues | None:
        """None where a cache step computes the keys and values of all tokens."""
        if self.options.keys_values == "all" or not attention.by_token:
            return None
        samples = self.regions.layouts[attention.key].samples
        return KeysValues(self.attention[attention].name, attention, samples, self.options.cache_dtype)


def _attentions_before(layer: Experts, regions: Regions) -> list[Attention]:
    """All attentions between the last feed-forward and the layer's router, in order.

    Parallel ones add to the stream at the same point; sequential ones follow each other (self- and cross-attention).
    """
    attentions: list[Attention] = []
    add = layer.probe.residual.add if layer.probe is not None else None
    while found := [attention for attention in regions.attentions if attention.residual.add is add]:
        attentions, add = [*found, *attentions], found[0].residual.stream
    return attentions


def _cache_shape(node: fx.Node, samples: int) -> tuple[int, ...]:
    """The shape (B, N, H, d) of the cache for keys or values (B, H, N, d)."""
    *_, tokens, width = shape = shape_of(node)
    return samples, tokens, prod(shape[:-2]) // samples, width


def by_head(value: Tensor, samples: int) -> Tensor:
    """`value` as (B, H, rows, width), also where its heads are part of the batch dim or spread over several dims."""
    return value if value.ndim == 4 else value.reshape(samples, -1, *value.shape[-2:])


def _layer_cache(name: str, layer: Experts, regions: Regions, options: Options) -> ExpertCache:
    return (VariableKCache if layer.variable_k else FixedKCache)(name, layer, regions, options)
