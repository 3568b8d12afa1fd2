"""One cache step of MoECa: what its MoE layers decide, and what the regions around them recompute accordingly."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.ops.attention import attend
from moeca_compile.passes.analysis.axis import Axis, count, offset_in
from moeca_compile.passes.match.attention import sdpa_options
from moeca_compile.passes.match.regions import Attention, Experts, FeedForward
from moeca_compile.passes.rewrite.rows import Rows
from moeca_compile.passes.rewrite.step import Step
from moeca_compile.policies import decision as decide
from moeca_compile.policies.cached import Cached
from moeca_compile.policies.decision import Decision
from moeca_compile.policies.moeca_caches import MoecaCaches, by_head

Tokens = tuple[Tensor, Tensor]
"""Chosen tokens (B, C) as indices on some token axis, and (B, C) which of them are valid."""


class TokenStream(NamedTuple):
    """One token stream of an attention on a cache step: its chosen tokens and their rows."""

    attention: Attention
    chosen: Tensor
    valid: Tensor
    rows: Rows


class CacheStep:
    """One cache step.

    Each MoE layer decides which branches and tokens are recomputed; the attentions, feed-forwards and shared experts
    near it recompute the same tokens.
    """

    def __init__(self, caches: MoecaCaches, step: Step) -> None:
        self.caches, self.step, self.options = caches, step, caches.options
        self.decisions: dict[Experts, Decision] = {}
        self.chosen: dict[Axis, Tokens] = {}
        self.attended: set[fx.Node] = set()

    def attention(self, attention: Attention) -> Tensor:
        """The attention's output: recomputed for the chosen tokens, cached for all others (section 4.1)."""
        if attention.sdpa not in self.attended:
            self.attended.add(attention.sdpa)
            self._refresh_attention(self.caches.joint[attention.sdpa])
        return self.caches.attention[attention].read(self.step)

    def _refresh_attention(self, joint: list[Attention]) -> None:
        """Recompute attention for the chosen tokens of all token streams that share an attention op."""
        step, parts = self.step, []
        for attention in joint:
            self._probe(attention)
            output = attention.residual.output
            if (tokens := self._tokens(output)) is not None:
                parts.append(TokenStream(attention, *tokens, step.rows(tokens[0], attention.residual.stream, output)))
        if not parts:
            return
        outputs = self._attend(parts).split([part.chosen.shape[1] for part in parts], dim=-2)
        for part, rows in zip(parts, outputs, strict=True):
            attention = part.attention
            part.rows.set(attention.sdpa, rows)
            fresh = part.rows[attention.residual.output]
            self.caches.attention[attention].refresh(step, part.chosen, fresh, part.valid)

    def _probe(self, attention: Attention) -> None:
        """Decide for the MoE layer after the attention, from cached outputs of the attentions before its router."""
        layer, before = self.caches.probes.get(attention, (None, ()))
        if layer is not None and not self.step.kind.experts and self._decided_by_probe(layer):
            stale = {a.residual.output: self.caches.attention[a].read(self.step) for a in before}
            self._decide(layer, *self.step.evaluate_with(stale, [layer.choice, layer.weight]))

    def _decided_by_probe(self, layer: Experts) -> bool:
        return self.options.mask_source == "probe" or self._decided(layer.marker) is None

    def _tokens(self, output: fx.Node) -> Tokens | None:
        """The tokens to recompute, on the token axis of `output`; None where all of it comes from the cache."""
        if not self.step.kind.capacity:
            return None
        return _forced_tokens(self.step, output) if self.step.kind.forced else self._decided(output)

    def _decided(self, output: fx.Node) -> Tokens | None:
        """The tokens that the nearest MoE layer before chose, on the token axis of `output`, if it has them."""
        axis = self.step.regions.axis(output)
        for decided, (chosen, valid) in reversed(self.chosen.items()):
            offset = offset_in(axis, decided)
            if offset is not None:
                return chosen + offset if offset else chosen, valid
        return None

    def _attend(self, parts: list[TokenStream]) -> Tensor:
        """Attention of the chosen queries to all keys and values.

        By the option `keys_values`, these are recomputed for all tokens, for the chosen ones, or for none.
        """
        attention, step, fresh = parts[0].attention, self.step, self.options.keys_values
        options = sdpa_options(attention.sdpa)
        scale, gqa = options["scale"], options["enable_gqa"]
        whole = fresh == "all" or not attention.by_token
        from_cache = fresh == "none" and not step.kind.forced
        if not whole and not from_cache:
            for part in parts:  # together, since they come from the same products
                part.rows.of(attention.query, attention.key, attention.value)
        query = torch.cat([part.rows[attention.query] for part in parts], dim=-2)
        mask = _joined_masks(parts)
        if whole:
            keys, values = step[attention.key], step[attention.value]
            return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=gqa)
        cached = self.caches.keys_values[attention.sdpa]
        assert cached is not None, "keys and values are cached unless every cache step computes them for all tokens"
        keys, values = (step.state[spec.name] for spec in cached.specs())
        queries = by_head(query, len(keys))
        if mask is not None and query.ndim != queries.ndim:
            mask = by_head(mask.expand(*query.shape[:-2], -1, -1), len(keys))
        if from_cache:
            out = attend(queries, keys, values, mask, scale, gqa)
        else:
            key, value, chosen, valid = self._fresh_keys_values(parts)
            out = torch.ops.moeca.attend_rows(keys, values, queries, key, value, chosen, valid, mask, scale, gqa)
        return out.reshape(*query.shape[:-1], out.shape[-1])

    def _fresh_keys_values(self, parts: list[TokenStream]) -> list[Tensor]:
        """Keys, values, chosen tokens (indices along the keys) and their validity, concatenated over the streams."""
        key, value = parts[0].attention.key, parts[0].attention.value
        layout, rest = self.step.layout(key), set(range(self.step.layout(key).tokens))
        fresh: list[tuple[Tensor, ...]] = []
        for part in parts:
            offset = offset_in(layout.axis, part.rows.axis)
            assert offset is not None, "the axis of cached keys and values contains the tokens of every stream"
            rest -= set(range(offset, offset + count(part.rows.axis)))
            rows = (by_head(part.rows[node], layout.samples) for node in (key, value))
            fresh.append((*rows, part.chosen + offset, part.valid))
        if self.step.kind.forced and rest:
            fresh.append(self._keys_values_at(key, value, sorted(rest)))
        return [
            torch.cat(tensors, dim=dim) for dim, tensors in zip((2, 2, 1, 1), zip(*fresh, strict=True), strict=True)
        ]

    def _keys_values_at(self, key: fx.Node, value: fx.Node, tokens: list[int]) -> tuple[Tensor, ...]:
        """Freshly computed keys and values of tokens that belong to no stream, such as pooled ones."""
        at = torch.tensor(tokens, device=self.step.weights.device)
        chosen = at.expand(self.step.layout(key).samples, -1)
        keys, values = (by_head(self.step[node], len(chosen))[:, :, at] for node in (key, value))
        return keys, values, chosen, torch.ones_like(chosen, dtype=torch.bool)

    def _decide(self, layer: Experts, choice: Tensor, weight: Tensor) -> Decision:
        """Decide which branches and tokens of a layer to recompute, from its current routing (eqs. 7, 9 to 12)."""
        decision = self.caches.experts[layer].decide(self.step, choice, weight)
        axis = self.step.regions.axis(layer.marker)
        self.chosen.pop(axis, None)  # so that the latest choice is the last entry
        self.chosen[axis] = decision.chosen, decision.valid
        self.decisions[layer] = decision
        return decision

    def _decision(self, layer: Experts) -> Decision:
        """The layer's decision. Without a probe it is made here, from the layer's own routing."""
        if layer not in self.decisions:
            self._decide(layer, self.step[layer.choice], self.step[layer.weight])
        return self.decisions[layer]

    def experts(self, layer: Experts) -> Tensor:
        """The MoE layer's output: recomputed and cached branches, summed with the current weights (eq. 8)."""
        return self.caches.experts[layer].run_chosen(self.step, self._decision(layer))

    def row_wise(self, region: FeedForward, cached: Cached, layer: Experts | None) -> Tensor:
        """A feed-forward's output: recomputed for the chosen tokens, cached for all others.

        For a shared expert, `layer` is its MoE layer, and the option `shared` says whether it is recomputed at all.
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


def _joined_masks(parts: list[TokenStream]) -> Tensor | None:
    """The attention masks of all streams' queries, concatenated."""
    masks = [part.rows.attention_mask(part.attention.sdpa) for part in parts]
    first = masks[0]
    if first is None or len(masks) == 1 or first.shape[-2] == 1:
        return first
    return torch.cat(masks, dim=-2)  # type: ignore[arg-type]


def _forced_tokens(step: Step, output: fx.Node) -> Tokens:
    layout = step.layout(output)
    return decide.forced_tokens(layout.samples, layout.tokens, step.capacity_for(layout.tokens), step.weights.device)
