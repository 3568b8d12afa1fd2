"""A trace as plain values: what each step of a generation did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TracedStep:
    """All calls with one step number, over streams and generations.

    Attributes:
        number: counts from 0 in each generation.
        time: of the last call.
        kinds: the number of calls by step kind.
        seconds: the fewest that a call of the kind of most took, compilation left out; None where that is not
            measured.
        match: for each MoE layer, the share of branches that were in the cache (the paper, eq. 7).
        reuse: for each MoE layer, the share of branches whose cached output was used.
        recomputed: for each MoE layer, the tokens recomputed in a sample, on average.
        tokens: for each token of the main stream, the share of samples and MoE layers in which it was recomputed;
            empty where none could be.
        routing: for each MoE layer, the branches by expert; empty where its router has not run.
        drift: for each region, how far its output has moved since the step that computed it last,
            |new - old| / |new|.

    Values that no call has given are None.
    """

    number: int
    time: float
    kinds: Mapping[str, int]
    seconds: float | None = None
    match: tuple[float | None, ...] = ()
    reuse: tuple[float | None, ...] = ()
    recomputed: tuple[float | None, ...] = ()
    tokens: tuple[float, ...] = ()
    routing: tuple[tuple[int, ...], ...] = ()
    drift: tuple[float | None, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of most of its calls."""
        return max(self.kinds, key=lambda kind: self.kinds[kind], default="")

    @property
    def full(self) -> bool:
        return self.kind == "full"


@dataclass(frozen=True)
class KindCost:
    """What steps of one kind cost.

    Attributes:
        name: of the kind.
        steps: how many were traced.
        seconds: the fewest that one took, compilation left out; None where that is not measured.
        flops: floating-point operations of one, on average.
    """

    name: str
    steps: int
    seconds: float | None
    flops: float | None


@dataclass(frozen=True)
class Trace:
    """What was traced of one graph at one set of input shapes.

    Attributes:
        samples, tokens: sizes of the main stream.
        grid: rows and columns in which its tokens lie over the picture; None where that is not known.
        layers: names of the MoE layers.
        regions: kind and name of each region whose drift is known.
        steps: in order.
        kinds: what each kind of step cost.
        mapped_layer: name of the MoE layer of `activation`: the middle one of those on the main stream; empty where
            there is none or `grid` is None.
        activation: (E, N), for each of its experts how often the token at each place was routed to it, over all
            samples and traced steps (the paper, figure 2 b); empty where its router has not run.
    """

    samples: int
    tokens: int
    grid: tuple[int, int] | None = None
    layers: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    steps: tuple[TracedStep, ...] = field(default=())
    kinds: tuple[KindCost, ...] = ()
    mapped_layer: str = ""
    activation: tuple[tuple[int, ...], ...] = ()

    def by_layer(self, ratio: str) -> list[list[float | None]]:
        """A ratio of the steps, "match" or "reuse", by layer and step; empty where no step has any."""
        columns = [getattr(step, ratio) for step in self.steps]
        rows = [[column[i] if column else None for column in columns] for i in range(len(self.layers))]
        return rows if any(columns) else []

    @property
    def with_drift(self) -> list[TracedStep]:
        """The steps of which the drift of some region is known."""
        return [step for step in self.steps if any(value is not None for value in step.drift)]


def trace_from(values: Mapping[str, Any]) -> Trace:
    """The trace of which these are the plain values. Raises KeyError or TypeError where they are of no trace."""
    known = dict(values)
    known["steps"] = tuple(TracedStep(**_tuples(step)) for step in known["steps"])
    known["kinds"] = tuple(KindCost(**kind) for kind in known["kinds"])
    return Trace(**_tuples(known))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _tuple(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(value) if isinstance(value, list) else value for value in values)
