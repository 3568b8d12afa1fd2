"""Layers that exchange rows with other ranks are found by what they do, in one process that talks to no other.

The process group is a fake of four ranks, which moves nothing: whoever talked to another would get wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moeca_compile
from examples import families
from examples.families.expert_parallel import CountedLayer, PaddedLayer, divided
from moeca_compile._torch_private.collectives import _PLAYS
from moeca_compile.ops import exchange
from tests.capture import exchange_layers as layers

pytestmark = pytest.mark.skipif(not (dist.is_available() and _PLAYS), reason="torch that plays no exchange")
RANKS = 4


@pytest.fixture(scope="module", autouse=True)
def four_ranks() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def whole(experts: int) -> nn.Module:
    family = families.FAMILIES["DiT-MoE"]
    return families.assemble(family, replace(family.reduced, depth=1, experts=experts))


def report_of(layer: type, experts: int = 8, group: object = None) -> moeca_compile.Report:
    model = divided(whole(experts), layer, group)
    torch._dynamo.reset()
    options = {"recipe": "moeca", "budget": 0.0, "lowering": "eager", "disk_cache": False}
    fast = torch.compile(model, backend="moeca", options=options)
    with torch.no_grad():
        fast(*families.inputs_for(model))
    return moeca_compile.report(fast)


FOUND = [
    *((layer, 8) for layer in (CountedLayer, PaddedLayer, layers.Functional, layers.FunctionalWithGradients)),
    *((layer, 8) for layer in (layers.WaitedFor, layers.Gated, layers.GatedWithRoom)),
    *((layer, 4) for layer in (CountedLayer, PaddedLayer)),  # one expert a rank
]


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer, experts", FOUND)
def test_it_is_found_however_it_is_written(layer, experts):
    report = report_of(layer, experts, dist.group.WORLD)
    assert ("experts", "cached") in {(region.kind, region.status) for region in report.regions}, report.warnings
    assert report.warnings == ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layer, reason",
    [
        (layers.OutputsOfAnotherRank, "no sum of its experts' weighted outputs was found"),
        (layers.SummedOverRanks, "it calls c10d.allreduce_.default"),
        (layers.InLists, "it calls c10d.alltoall_.default"),
        (layers.MixedOnArrival, ""),
    ],
)
def test_a_near_miss_is_left_as_it_is_and_the_report_says_why(layer, reason):
    report = report_of(layer)
    assert not any(region.kind == "experts" and region.status == "cached" for region in report.regions)
    assert any(reason in warning for warning in report.warnings) and report.warnings


def test_alone_the_experts_of_all_ranks_are_played_by_this_ones():
    """Expert e is number e % 2 of rank e // 2, on rows that are multiplied by the rank's factor, there and back."""
    own = [torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    counts = torch.tensor([2, 0, 1, 3, 0, 0, 4, 1])
    rows = torch.randn(11, 3)
    number = torch.arange(8).repeat_interleave(counts)

    def run(arrived: list[Tensor], offsets: Tensor) -> Tensor:
        parts = zip(arrived[0][: offsets[-1]].split(offsets.diff().tolist()), own, strict=True)
        return torch.cat([part @ weight for part, weight in parts])

    factors = exchange.factors("0")
    assert len({*factors}) == RANKS and min(factors) > 0
    want = torch.stack([factors[e // 2] ** 2 * (row @ own[e % 2]) for row, e in zip(rows, number, strict=True)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    with exchange.alone():
        for most in (0, 11):
            torch.testing.assert_close(exchange.run_on_ranks("0", [rows], offsets, run, most), want)


@pytest.mark.parametrize(
    "places, rows, k, own, want", [(0, 9, 2, 4, 0), (9, 9, 2, 4, 18), (3, 9, 2, 4, 12), (9, 9, 2, 1, 9)]
)
def test_a_block_has_room_for_all_that_a_rank_can_have_for_another(places, rows, k, own, want):
    assert exchange.room(places, rows, k, own) == want


def test_other_sizes_there_than_here_are_refused():
    with pytest.raises(ValueError, match="takes parts of sizes"):
        exchange.exchange_alone(torch.randn(4, 2), [1, 1, 1, 1], [2, 2, 0, 0], "0")
