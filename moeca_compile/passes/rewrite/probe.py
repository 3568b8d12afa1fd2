"""A probe: the small part of a step that says how far the model has moved on, so that the host decides on the rest.

It is a graph of its own, which runs before the step. What it has computed may be handed on to the step:

    probe(inputs, caches)            step(inputs, caches)
        h_1 = block_0(embed(x))          h_1 = caches[handed on]
        caches[handed on] = h_1          ... the other blocks, or their cached change
        return |h_1 - caches[before]|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.rewrite.kinds import CacheSpec, Role
from moeca_compile.passes.rewrite.step import Step

EPS = 1e-6
"""Added to what a change is divided by: that of MoECa's comparison with TeaCache."""


@dataclass(frozen=True, eq=False)
class Probe:
    """What a policy computes to decide whether a step is full.

    Attributes:
        signal: computes one number, float32 without dims, and stores what later ones compare with in `step.updates`.
        specs: the tensors that it stores there.
        reads: the values of the graph that `signal` reads.
        handed_on: values of the graph that it stores for the step, which then does not compute them.
        after: whether it runs after each full step, and reads what that has cached; else it runs before every step.
    """

    signal: Callable[[Step], Tensor]
    specs: tuple[CacheSpec, ...] = ()
    reads: tuple[fx.Node, ...] = ()
    handed_on: tuple[fx.Node, ...] = ()
    after: bool = False

    @cached_property
    def names(self) -> Mapping[fx.Node, str]:
        """The cached tensors that hold what is handed on."""
        return {node: f"handed_on.{number}" for number, node in enumerate(self.handed_on)}

    @property
    def caches(self) -> tuple[CacheSpec, ...]:
        """All tensors that it stores."""
        handed = [CacheSpec(name, shape_of(node), node.meta["val"].dtype) for node, name in self.names.items()]
        return (*self.specs, *handed)

    def run(self, step: Step) -> Tensor:
        """The signal. New values of caches are in `step.updates`."""
        signal = self.signal(step)
        step.updates |= {name: step[node].contiguous() for node, name in self.names.items()}
        return signal


def stored_before(name: str, node: fx.Node) -> CacheSpec:
    """The tensor in which a probe keeps a value like that of `node`, to compare the next one with."""
    return CacheSpec(name, shape_of(node), node.meta["val"].dtype, Role.STATISTIC)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """mean |now - before| / mean |before| over all elements, and so over the whole batch, as in the papers."""
    now, before = now.to(torch.float32), before.to(torch.float32)
    return (now - before).abs().mean() / (before.abs().mean() + EPS)
