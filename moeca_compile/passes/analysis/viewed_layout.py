"""The layout after a reshape, from the sizes of the dims before and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from moeca_compile.passes.analysis.axis import Layout


def viewed_layout(layout: Layout, before: Sequence[int], after: Sequence[int]) -> Layout | None:
    """Follow the batch and token dims through a reshape, which may merge or split them; None where they are lost."""
    if layout.merged:
        return _split(layout, before, after) or _merge(layout, before, after)
    token = _dim_spanning(before, after, layout.token, layout.token)
    batch = _dim_spanning(before, after, layout.batch, layout.batch)
    if token is not None and batch is not None:
        return replace(layout, batch=batch, token=token)
    merged = _merge(layout, before, after) if layout.token == layout.batch + 1 else None
    return merged or (_regroup(layout, token, before, after) if token is not None else None)


def _regroup(layout: Layout, token: int, before: Sequence[int], after: Sequence[int]) -> Layout | None:
    """Heads merge into the batch dim or split from it; samples are outermost in it."""
    outer = prod(before[: layout.batch])
    end = token if layout.batch < layout.token else len(after)
    for dim in range(0 if layout.batch < layout.token else token + 1, end):
        if prod(after[:dim]) == outer and after[dim] % layout.samples == 0 and after[dim] > 1:
            return replace(layout, batch=dim, token=token, inner=after[dim] // layout.samples)
    return None


def _merge(layout: Layout, before: Sequence[int], after: Sequence[int]) -> Layout | None:
    if layout.inner != 1:
        return None
    both = _dim_spanning(before, after, layout.batch, layout.token)
    return replace(layout, batch=both, token=both) if both is not None else None


def _split(layout: Layout, before: Sequence[int], after: Sequence[int]) -> Layout | None:
    outer = prod(before[: layout.token])
    for dim in range(len(after) - 1):
        if prod(after[:dim]) == outer and tuple(after[dim : dim + 2]) == (layout.samples, layout.tokens):
            return replace(layout, batch=dim, token=dim + 1)
    return None


def _dim_spanning(before: Sequence[int], after: Sequence[int], first: int, last: int) -> int | None:
    """The output dim that covers exactly the input dims first..last, if there is one."""
    outer, size, inner = prod(before[:first]), prod(before[first : last + 1]), prod(before[last + 1 :])
    for dim, extent in enumerate(after):
        if extent == size and prod(after[:dim]) == outer and prod(after[dim + 1 :]) == inner:
            return dim
    return None
