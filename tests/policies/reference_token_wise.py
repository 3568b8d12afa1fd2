"""ToCa and DuCa as their code for DiT has them, in loops over layers, samples and tokens.

The sampler's view: steps count down from T - 1. Nothing here is shared with the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each (B, heads, tokens, d)."""


class TokenWise:
    """One generation of `steps` steps; `dual` is DuCa. `score` ranks tokens, by the name of the option."""

    def __init__(
        self, steps: int, every: int = 4, ratio: float = 0.07, score: str = "attention", dual: bool = False
    ) -> None:
        self.steps, self.every, self.ratio, self.score, self.dual = steps, every, ratio, score, dual
        self.step, self.interval, self.since, self.kind = steps, 1, 0, "full"
        self.kinds: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        self.measures: dict[str, list[list[float]]] = {}
        self.ages: dict[str, list[list[int]]] = {}
        self.fresh: list[int] = []
        """The number of tokens that each layer recomputed in one sample, layer after layer."""

    def next_step(self) -> None:
        self.step -= 1
        if self.step == self.steps - 1 or self.step % self.interval == 0:
            sensitive = 0.2 * self.steps <= self.step < 0.4 * self.steps
            self.interval = 2 if sensitive else max(1, round(self.every / (1.4 - 0.8 * self.step / self.steps)))
            self.kind, self.since = "full", 0
        else:
            self.since += 1
            self.kind = "aggressive" if self.dual and self.since % 2 == 1 else "toca"
        self.kinds.append(self.kind)

    def stack(self, blocks: Callable[[], Tensor]) -> Tensor:
        """The stream after all blocks."""
        if self.kind != "aggressive":
            self.outputs["stack"] = blocks()
        return self.outputs["stack"]

    def attention(self, name: str, output: Callable[[], Tensor], heads: Callable[[], Heads]) -> Tensor:
        if self.kind == "full":
            self.outputs[name] = output()
            query, key, value = heads()
            if self.score == "attention":
                self.measures[name] = [column_sums(q, k) for q, k in zip(query, key, strict=True)]
            elif self.score == "value_norm":
                self.measures[name] = [smallness(v) for v in value]
        return self.outputs[name]

    def cross_attention(self, name: str, output: Callable[[], Tensor], heads: Callable[[], Heads]) -> Tensor:
        if self.kind == "full":
            self.outputs[name] = output()
            query, key, _ = heads()
            if self.score == "attention":
                self.measures[name] = [entropies(q, k) for q, k in zip(query, key, strict=True)]
        return self.outputs[name]

    def feedforward(
        self,
        name: str,
        depth: int,
        depths: int,
        x: Tensor,
        layer: Callable[[Tensor], Tensor],
        attentions: Sequence[tuple[str, int]] = (),
        side: int = 0,
        among_all: bool = False,
    ) -> Tensor:
        """A feed-forward of x (B, N, D), as the `depth`-th of `depths`.

        attentions: those whose measures rank the tokens, with the offset of the tokens in each.
        among_all: whether the layer needs all tokens, since experts choose among them.
        """
        samples, tokens = x.shape[:2]
        if self.kind == "full":
            self.outputs[name], self.ages[name] = layer(x), [[0] * tokens for _ in range(samples)]
            return self.outputs[name]
        out, whole = self.outputs[name].clone(), layer(x) if among_all else None
        for b in range(samples):
            scores = self.scores(name, b, depth, tokens, attentions, side)
            chosen = sorted(range(tokens), key=lambda i: (-scores[i], i))[: self.count(depth, depths, tokens)]
            for i in chosen:
                out[b, i] = layer(x[b, i][None, None])[0, 0] if whole is None else whole[b, i]
            self.ages[name][b] = [0 if i in chosen else age + 1 for i, age in enumerate(self.ages[name][b])]
        self.fresh.append(len(chosen))
        self.outputs[name] = out
        return out

    def count(self, depth: int, depths: int, tokens: int) -> int:
        step_factor = 1.4 - 0.8 * self.step / self.steps
        layer_factor = 1.8 - 1.6 * depth / max(1, depths - 1)
        return int(min(1.0, self.ratio * 2.5 * step_factor * layer_factor) * tokens)

    def scores(
        self, name: str, b: int, depth: int, tokens: int, attentions: Sequence[tuple[str, int]], side: int
    ) -> list[float]:
        found = [0.25 * age / self.every for age in self.ages[name][b]]
        for attention, start in attentions if self.score != "random" else ():
            own = self.measures[attention][b][start : start + tokens]
            length = math.sqrt(sum(value**2 for value in own))
            found = [score + value / length for score, value in zip(found, own, strict=True)]
        if self.score == "random":
            found = [score + chance(i, self.steps - 1 - self.step, depth) for i, score in enumerate(found)]
        for top in range(0, side, 2):
            for left in range(0, side, 2):
                square = [(row, column) for row in (top, top + 1) for column in (left, left + 1)]
                patch = [row * side + column for row, column in square if row < side and column < side]
                best = max(patch, key=lambda i: (found[i], -i))
                found[best] += 0.6 * abs(found[best])
        return found


def column_sums(query: Tensor, key: Tensor) -> list[float]:
    """What each key gets from all queries of one sample, mean over heads: (heads, tokens, d) each."""
    total = torch.zeros(key.shape[1])
    for q, k in zip(query, key, strict=True):
        for row in q:
            total += torch.stack([row @ other for other in k]).div(math.sqrt(len(row))).softmax(0) / len(query)
    return total.tolist()


def entropies(query: Tensor, key: Tensor) -> list[float]:
    """The entropy of each query's attention, mean over heads, in one sample."""
    found = []
    for i in range(query.shape[1]):
        maps = [(k @ q[i] / math.sqrt(len(q[i]))).softmax(0) for q, k in zip(query, key, strict=True)]
        mean = torch.stack(maps).mean(0)
        found.append(float(-sum(p * p.log() for p in mean)))
    return found


def smallness(value: Tensor) -> list[float]:
    """Sum over heads of 1 - |v|: value (heads, tokens, d)."""
    return [sum(1 - float(v[i].square().sum().sqrt()) for v in value) for i in range(value.shape[1])]


def chance(token: int, number: int, layer: int) -> float:
    value = token + 7919 * number + 104729 * layer
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        value = ((value ^ (value >> shift)) * factor) % 2**32
    return ((value ^ (value >> 15)) >> 8) / 2**24
