"""DiT-MoE with its experts divided over processes: each rank holds some of them, and has samples of its own.

    whole = families.reduced("DiT-MoE")
    model = expert_parallel.divided(whole, CountedLayer)      # in each process, after dist.init_process_group

Rows of tokens go to the ranks that hold their experts, by `all_to_all_single`, and come back. Expert e is number
e % L of rank e // L, where each rank holds L experts. Two ways of writing it:

    CountedLayer   sends as many rows as there are, after counts that tell how many (FastMoE, Megatron)
    PaddedLayer    sends blocks of one size, with a place for each row that an expert can get (GShard, DeepSpeed,
                   Tutel)

Shapes: T rows of tokens, D width, E experts, k experts a token, R ranks, L = E / R.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.families.dit_moe import DiTMoE, DiTMoELayer

Group = Any
"""A process group, or None for all ranks."""


class DividedLayer(nn.Module):
    """A DiT-MoE layer of which this rank holds its share of experts: (B, N, D) -> (B, N, D).

    Raises ValueError where the ranks cannot hold equally many.
    """

    def __init__(self, whole: DiTMoELayer, group: Group = None) -> None:
        super().__init__()
        self.ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        experts = len(whole.experts)
        if experts % self.ranks:
            raise ValueError(f"{experts} experts cannot be divided over {self.ranks} ranks")
        own = experts // self.ranks
        self.group, self.top_k = group, whole.top_k
        self.router, self.shared = whole.router, whole.shared
        self.experts = nn.ModuleList(whole.experts[rank * own : (rank + 1) * own])

    def forward(self, x: Tensor) -> Tensor:
        shape, rows = x.shape, x.reshape(-1, x.shape[-1])
        weights, ids = self.router(rows).softmax(dim=-1).topk(self.top_k, dim=-1, sorted=False)
        return self.routed(rows, ids, weights).view(shape) + self.shared(x)

    def routed(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Rows (T, D), ids and weights (T, k) -> (T, D)."""
        raise NotImplementedError


class CountedLayer(DividedLayer):
    def routed(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        counts = ids.flatten().bincount(minlength=self.ranks * len(self.experts))
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent = counts.view(self.ranks, -1).sum(1).tolist()
        taken = arriving.view(self.ranks, -1).sum(1).tolist()
        inbox = self.exchanged(rows[order // self.top_k], taken, sent)
        mine = torch.arange(len(self.experts), device=rows.device).repeat(self.ranks).repeat_interleave(arriving)
        outputs = torch.zeros_like(inbox)
        for number, expert in enumerate(self.experts):
            at = (mine == number).nonzero().squeeze(1)
            outputs[at] = expert(inbox[at])
        back = self.exchanged(outputs, sent, taken)
        weighted = back * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(rows).index_add(0, order // self.top_k, weighted)

    def exchanged(self, rows: Tensor, taken: list[int], sent: list[int]) -> Tensor:
        found = rows.new_empty(sum(taken), rows.shape[1])
        dist.all_to_all_single(found, rows, taken, sent, group=self.group)
        return found


class PaddedLayer(DividedLayer):
    def routed(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        experts, places = self.ranks * len(self.experts), len(rows)
        chosen = F.one_hot(ids, experts)  # (T, k, E)
        place = (chosen.sum(1).cumsum(0) - 1).gather(1, ids)  # (T, k): the how many-th row of its expert
        at = chosen.unsqueeze(3) * F.one_hot(place, places).unsqueeze(2)  # (T, k, E, T)
        blocks = torch.einsum("tkec,td->ecd", at.to(rows.dtype), rows)
        inbox = self.exchanged(blocks).view(self.ranks, len(self.experts), places, -1)
        outputs = torch.stack([expert(inbox[:, number]) for number, expert in enumerate(self.experts)], dim=1)
        back = self.exchanged(outputs.reshape(experts, places, -1))
        return torch.einsum("tkec,tk,ecd->td", at.to(rows.dtype), weights, back)

    def exchanged(self, blocks: Tensor) -> Tensor:
        found = torch.empty_like(blocks)
        dist.all_to_all_single(found, blocks, group=self.group)
        return found


def divided(whole: DiTMoE, layer: type[DividedLayer], group: Group = None) -> DiTMoE:
    """A copy of a model in which this rank holds its experts alone."""
    model = copy.deepcopy(whole)
    for block in model.blocks:
        block.mlp = layer(block.mlp, group)
    return model.train(whole.training)
