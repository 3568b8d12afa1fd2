"""Experts on other ranks: rows go to the ranks that hold their experts, and come back as outputs.

    run_on_ranks(group, rows, offsets, run) -> outputs

The ranks of a group hold equally many experts, L each: expert e is number e % L of rank e // L. All ranks must call
it together. First each tells each other how many rows come for each of its experts, 8 bytes an expert. Rows follow in
one of two ways, that of the layer's own code:

    by counts   as many as there are; both sides know the sizes, which the host reads
    in blocks   of a size that the shapes tell, the same on all ranks: as many rows as one can have for another

`alone()` is for checks: inside, no rank talks to another. This rank's experts play those of all: rows for those of
another are multiplied by a factor, there and back, so that numbers tell which rank of which group a row went to.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moeca_compile._torch_private import exchanges_played, group_by_name

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define("exchange_alone(Tensor sent, int[] taken_sizes, int[] sent_sizes, str group) -> Tensor")

Run = Callable[[list[Tensor], Tensor], Tensor]
"""Runs this rank's experts: rows (M, ...) sorted by expert, offsets (L + 1,) -> outputs (M, width)."""


class _Alone(threading.local):
    entered = 0
    noted: list[list[int]] | None = None


_alone = _Alone()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank's experts play those of all ranks."""
    _alone.entered += 1
    try:
        yield
    finally:
        _alone.entered -= 1


@contextmanager
def layers_alone(error: type[Exception]) -> Iterator[None]:
    """`alone`, also for the code of layers that calls all_to_all_single itself. Other collectives raise `error`."""
    with alone(), exchanges_played(torch.ops.moeca.exchange_alone, error):
        yield


@contextmanager
def sizes_noted() -> Iterator[list[list[int]]]:
    """Yields a list to which each exchange that is played adds the sizes of the parts that it sends."""
    noted: list[list[int]] = []
    before, _alone.noted = _alone.noted, noted
    try:
        yield noted
    finally:
        _alone.noted = before


def is_alone() -> bool:
    """Whether this thread is inside of `alone`."""
    return _alone.entered > 0


def count_of(group: str) -> int:
    """How many ranks a group has; 1 for no group."""
    return int(group_by_name(group).size()) if group else 1


def factors(group: str) -> list[float]:
    """By what rows for each rank are multiplied where it is played; [1.0] for no group."""
    ranks, part = count_of(group), zlib.crc32(group.encode()) / 2**32
    return [1 + (rank + part) / ranks for rank in range(ranks)] if group else [1.0]


def room(places: int, rows: int, k: int, own: int) -> int:
    """How many rows a rank can have for another one, where they are sent in blocks of that size; 0 by counts.

    Args:
        places: how many rows of a rank an expert has room for; 0 where rows are sent by counts.
        rows: how many there are.
        k: the most experts that a row has.
        own: how many experts a rank holds.
    """
    return min(rows * min(k, own), places * own)


def exchange_alone(sent: Tensor, taken_sizes: list[int], sent_sizes: list[int], group: str) -> Tensor:
    """What `all_to_all_single` would give if each rank sent this one what this one sends it: numbers with a fraction
    are multiplied by the rank's factor. Raises ValueError where it takes other sizes than it sends."""
    if taken_sizes != sent_sizes:
        raise ValueError(f"it takes parts of sizes {taken_sizes} where it sends {sent_sizes}")
    if not sent.is_floating_point():
        return sent.clone()
    if _alone.noted is not None:
        _alone.noted.append(sent_sizes)
    parts = sent.split(sent_sizes) if sent_sizes else sent.chunk(count_of(group))
    return torch.cat([part * factor for part, factor in zip(parts, factors(group), strict=True)])


def run_on_ranks(group: str, rows: Sequence[Tensor], offsets: Tensor, run: Run, most: int = 0) -> Tensor:
    """Run each expert on its rows, wherever it is.

    Args:
        group: the name of the process group.
        rows: each (M, ...), sorted by expert.
        offsets: (E + 1,) int64, where the rows of each expert begin; the last is M.
        run: runs this rank's experts.
        most: how many rows are in a block (`room`); 0 to send by counts.

    Returns:
        (M, width) outputs, in the order of the rows.
    """
    ranks = count_of(group)
    going = offsets.diff().view(ranks, -1)
    coming = _exchanged(going.flatten(), group).view(ranks, -1)
    if most:
        place: Tensor | None = _places_in_blocks(going, most)
        sizes: tuple[list[int], list[int]] = ([], [])
        own = torch.searchsorted(coming.cumsum(1), _in_each(ranks, most, coming.device), right=True).flatten()
    else:
        place, sizes = None, (coming.sum(1).tolist(), going.sum(1).tolist())
        own = torch.arange(coming.shape[1], device=coming.device).repeat(ranks).repeat_interleave(coming.flatten())
    arrived = [_exchanged(_placed(value, place, ranks * most), group, *sizes) for value in rows]
    order = own.argsort(stable=True)  # what fills up a block comes last, and is not run
    outputs = run([value[order] for value in arrived], F.pad(coming.sum(0).cumsum(0), (1, 0)))
    back = _exchanged(_placed(outputs, order[: len(outputs)], len(order)), group, *reversed(sizes))
    return back if place is None else back[place]


def _places_in_blocks(going: Tensor, most: int) -> Tensor:
    """(M,) where rows that are sorted by expert lie in blocks of `most` rows, one for each rank."""
    each = going.sum(1)
    rank = torch.arange(len(each), device=each.device).repeat_interleave(each)
    begins = each.cumsum(0) - each
    return torch.arange(len(rank), device=rank.device) - begins[rank] + most * rank


def _in_each(ranks: int, most: int, device: torch.device) -> Tensor:
    """(ranks, most) the places in each block."""
    return torch.arange(most, device=device).expand(ranks, most).contiguous()


def _placed(rows: Tensor, places: Tensor | None, count: int) -> Tensor:
    """Rows at their places among `count`, with zeros at the others; as they are without places."""
    return rows if places is None else rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)


def _exchanged(sent: Tensor, group: str, taken: Sequence[int] = (), given: Sequence[int] = ()) -> Tensor:
    """all_to_all_single of rows: `given` go to each rank, `taken` come; as many to each without both."""
    taken, given = list(taken), list(given)
    if is_alone():
        return exchange_alone(sent, taken, given, group)
    arrived = sent.new_empty(sum(taken) if taken else len(sent), *sent.shape[1:])
    dist.all_to_all_single(arrived, sent.contiguous(), taken or None, given or None, group=group_by_name(group))
    return arrived


_library.impl("exchange_alone", exchange_alone, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::exchange_alone", lib=_library)
def _(sent, taken_sizes, sent_sizes, group):  # type: ignore[no-untyped-def]
    return torch.empty_like(sent)
