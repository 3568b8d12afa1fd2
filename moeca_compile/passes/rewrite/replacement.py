"""What a policy declares: which value of the graph comes from which caches, and what refreshes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx

from moeca_compile.passes.rewrite.kinds import CacheSpec, Part, StepKind
from moeca_compile.passes.rewrite.step import Step


class Cache(Protocol):
    """Cached tensors that are filled together."""

    def specs(self) -> Sequence[CacheSpec]:
        """The tensors, which `step.state` holds by name."""

    def reads(self) -> Sequence[fx.Node]:
        """The nodes whose values `store` reads. They are kept for it; others may have to be computed again."""

    def store(self, step: Step) -> None:
        """Store the values of a step that computed their part, in `step.updates`."""


@dataclass(frozen=True, eq=False)
class Replacement:
    """One value of the graph that steps take from caches. Steps, costs, schedule and validation follow from it.

    Attributes:
        node: the node whose value is replaced.
        source: the residual stream that it is computed from; the work between the two need not run.
        part: the part of the schedule that refreshes it. A step that computes the part runs the model's work and
            fills the caches; at other steps `reuse` gives the value.
        caches: what `reuse` reads.
        reuse: the value at a step that does not compute the part.
        fresh: the value at a step that does; None where it is that of the node's op.
        reads: values of the graph that `reuse` reads for all tokens. Any other that it reads must be among those that
            `node` is computed from in the graph.
        recomputes_rows: whether `reuse` runs the work between source and node on chosen tokens.
        chosen: the value among whose tokens these are chosen; None where only validation chooses any.
        shares: how many of them a step runs, padding included: (the share of all tokens up to which its kind has
            capacity, the share that runs), in ascending order. Where empty, what its kind has capacity for.
        recomputes_branches: whether `reuse` runs chosen branches of the MoE layer whose marker `node` is.
        always_cached: whether `reuse` reads the cache alone, also where everything is recomputed (StepKind.forced).
        store_flops: what filling the caches costs beyond the model's own work, in FLOPs.
        group: which cache steps use it (StepKind.group), where those of a generation do not all use the same; "" for
            all of them. Other cache steps run the model's work there.
        filled_by: the groups whose cache steps fill the caches too, from the values that they have computed.
    """

    node: fx.Node
    source: fx.Node
    part: Part
    caches: tuple[Cache, ...]
    reuse: Callable[[Step], Tensor]
    fresh: Callable[[Step], Tensor] | None = None
    reads: tuple[fx.Node, ...] = ()
    recomputes_rows: bool = False
    chosen: fx.Node | None = None
    shares: tuple[tuple[float, float], ...] = ()
    recomputes_branches: bool = False
    always_cached: bool = False
    store_flops: int = 0
    group: str = ""
    filled_by: tuple[str, ...] = ()

    def reused_at(self, kind: StepKind) -> bool:
        """Whether a step of this kind takes the value from the caches."""
        return not kind.computes(self.part) and self.group in ("", kind.group)

    def filled_at(self, kind: StepKind) -> bool:
        """Whether a step of this kind fills the caches."""
        return kind.computes(self.part) or bool(kind.group and kind.group in self.filled_by)

    def share_at(self, share: float) -> float:
        """The share of the tokens that a step runs whose kind has capacity for `share` of them."""
        return next(run for largest, run in self.shares if share <= largest) if self.shares and share else share

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        return tuple(spec for cache in self.caches for spec in cache.specs())

    @property
    def stored(self) -> tuple[fx.Node, ...]:
        """The nodes whose values the caches read when they are filled."""
        return tuple(node for cache in self.caches for node in cache.reads())

    @property
    def recomputes(self) -> bool:
        return self.recomputes_rows or self.recomputes_branches
