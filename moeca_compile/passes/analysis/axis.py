"""Which tokens a value holds, and in which of its dims.

An axis is a sequence of spans; a span is a range of the tokens of one source node. Image and text have an axis each.
Where a model joins the two, the joint axis is the image's spans followed by the text's; a slice that cuts the image
off again has the image's axis. So tokens can be identified, whatever they are joined with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import fx


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of `source`, which is None where a graph has only one."""

    source: fx.Node | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Axis = tuple[Span, ...]


def count(axis: Axis) -> int:
    """How many tokens the axis holds."""
    return sum(map(len, axis))


def join(axes: Iterable[Axis]) -> Axis:
    """The axes one after another; adjacent spans are merged."""
    spans: list[Span] = []
    for span in (span for axis in axes for span in axis):
        if spans and (spans[-1].source, spans[-1].stop) == (span.source, span.start):
            span = Span(span.source, spans.pop().start, span.stop)
        spans.append(span)
    return tuple(spans)


def cut(axis: Axis, start: int, stop: int) -> Axis:
    """Positions `start` to `stop` (exclusive) of the axis."""
    spans, position = [], 0
    for span in axis:
        first, last = max(start - position, 0), min(stop - position, len(span))
        if first < last:
            spans.append(Span(span.source, span.start + first, span.start + last))
        position += len(span)
    return tuple(spans)


def offset_in(axis: Axis, part: Axis) -> int | None:
    """The position in `axis` where the tokens of `part` begin; None where it does not hold them all, in order."""
    position = 0
    for span in axis:
        if span.source is part[0].source and span.start <= part[0].start < span.stop:
            start = position + part[0].start - span.start
            return start if cut(axis, start, start + count(part)) == part else None
        position += len(span)
    return None


def overlap(one: Axis, other: Axis) -> bool:
    """Whether the axes share any token."""
    return any(a.source is b.source and a.start < b.stop and b.start < a.stop for a in one for b in other)


@dataclass(frozen=True)
class Layout:
    """The dims of a value that index samples and tokens; equal where the two are merged, samples outermost.

    Attributes:
        batch, token: the two dims.
        samples, tokens: their sizes; the product is the size of a merged dim.
        axis: which tokens they are, by default all those of a graph's only stream.
        inner: consecutive entries of the batch dim per sample, where heads are merged into that dim.
    """

    batch: int
    token: int
    samples: int
    tokens: int
    axis: Axis = ()
    inner: int = 1

    def __post_init__(self) -> None:
        if not self.axis:
            object.__setattr__(self, "axis", (Span(None, 0, self.tokens),))

    def along(self, axis: Axis) -> Layout:
        """The same dims with the tokens of another axis."""
        return replace(self, tokens=count(axis), axis=axis)

    def shifted(self, by: int) -> Layout:
        """The same layout after `by` dims were inserted in front."""
        return replace(self, batch=self.batch + by, token=self.token + by)

    def moved(self, move: Callable[[int], int]) -> Layout:
        """The same layout after each dim d became dim move(d)."""
        return replace(self, batch=move(self.batch), token=move(self.token))

    @property
    def merged(self) -> bool:
        return self.batch == self.token
