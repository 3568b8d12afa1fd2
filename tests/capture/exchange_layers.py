"""Layers that exchange rows with other ranks, in the ways in which people write it, and near misses."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import all_to_all_single

from examples.families.dit_moe import DiTMoELayer
from examples.families.expert_parallel import CountedLayer, PaddedLayer


class Functional(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        return functional.all_to_all_single(blocks, None, None, dist.group.WORLD)


class FunctionalWithGradients(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        sizes = [len(blocks) // self.ranks] * self.ranks
        return functional.wait_tensor(functional.all_to_all_single_autograd(blocks, sizes, sizes, dist.group.WORLD))


class WaitedFor(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        found = torch.empty_like(blocks)
        all_to_all_single(found, blocks, group=self.group, async_op=True).wait()
        return found


# As DeepSpeed writes it: top-2 gating with a capacity, masks (tokens, experts, places), and an autograd function.


class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, rows: Tensor) -> Tensor:
        ctx.group, rows = group, rows.contiguous()
        found = torch.empty_like(rows)
        dist.all_to_all_single(found, rows, group=group)
        return found


class LocalExperts(nn.Module):
    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, rows: Tensor) -> Tensor:
        chunks = rows.chunk(len(self.experts), dim=1)
        return torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)], dim=1)


def top_two(logits: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """(weights, mask), each (T, E, places): a token that finds no place goes without that expert."""
    gates, experts = logits.softmax(dim=1), logits.shape[1]
    first = F.one_hot(gates.argmax(dim=1), experts)
    second = F.one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(dim=1), experts)
    place1 = first.cumsum(0) - 1
    place2 = second.cumsum(0) - 1 + first.sum(0, keepdim=True)
    first, second = first * torch.lt(place1, places), second * torch.lt(place2, places)
    gate1, gate2 = (gates * first).sum(1), (gates * second).sum(1)
    total = (gate1 + gate2).clamp(min=torch.finfo(gates.dtype).eps)
    parts = []
    for gate, mask, place in ((gate1, first, place1), (gate2, second, place2)):
        at = F.one_hot((place * mask).sum(1), places).float()
        parts.append(torch.einsum("se,sc->sec", (gate / total).unsqueeze(1) * mask, at))
    weights = parts[0] + parts[1]
    return weights, weights.bool()


class Gated(nn.Module):
    """places: how many rows of a rank an expert takes, as a share of those that it gets on average."""

    places = 1.0

    def __init__(self, whole: DiTMoELayer, group: Any = None) -> None:
        super().__init__()
        self.ep_group, self.ep_size = group, dist.get_world_size(group)
        own = len(whole.experts) // self.ep_size
        first = own * dist.get_rank(group)
        self.wg, self.num_local_experts = whole.router, own
        self.experts = LocalExperts(whole.experts[first : first + own])
        self.shared = whole.shared

    def forward(self, *given: Tensor) -> Tensor:
        rows = given[0].reshape(-1, given[0].shape[-1])
        logits = self.wg(rows.float())
        weights, mask = top_two(logits, int(self.places * 2 * len(rows) / logits.shape[1]))
        sent = AllToAll.apply(self.ep_group, torch.einsum("sec,sm->ecm", mask.type_as(rows), rows))
        inbox = sent.reshape(self.ep_size, self.num_local_experts, -1, rows.shape[1])
        outputs = self.experts(inbox).reshape(self.ep_size * self.num_local_experts, -1, rows.shape[1])
        back = AllToAll.apply(self.ep_group, outputs)
        return torch.einsum("sec,ecm->sm", weights.type_as(rows), back).reshape(given[0].shape) + self.shared(
            given[0]
        )


class GatedWithRoom(Gated):
    places = 4.0


# near misses


class OutputsOfAnotherRank(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        return super().exchanged(blocks).roll(len(self.experts), 0)


class SummedOverRanks(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        found = super().exchanged(blocks)
        dist.all_reduce(found)
        return found


class InLists(PaddedLayer):
    def exchanged(self, blocks: Tensor) -> Tensor:
        found = [torch.empty_like(each) for each in blocks.chunk(self.ranks)]
        dist.all_to_all(found, list(blocks.chunk(self.ranks)), group=self.group)
        return torch.cat(found)


class MixedOnArrival(CountedLayer):
    """Adds the mean of all rows that arrived: what a token gets depends on the others of this rank and of all."""

    def exchanged(self, rows: Tensor, taken: list[int], sent: list[int]) -> Tensor:
        found = super().exchanged(rows, taken, sent)
        return found + found.mean(0)
