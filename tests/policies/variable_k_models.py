"""DiT-MoEs in which tokens have no fixed number of experts, for tests of what `moeca::experts_variable_k` marks.

`PairsMoE.marked` switches between the plain loop and the marker that capture would put in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.dit import SwiGLU
from tests.models import Sizes, TinyDiTMoE

SIZES = Sizes(side=6, depth=4, width=16, heads=2, experts=4, expert_width=8)


class ExpertChoice(nn.Module):
    """Every expert takes its `capacity` best tokens of each sample. (B, N, D) -> routed and weight (B, N, E)."""

    capacity = 4
    coupled = False

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(x).softmax(-1)
        tokens = scores.topk(self.capacity, dim=1).indices
        routed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, tokens, True)
        return routed, torch.where(routed, scores, 0)

    def branches(self, x: Tensor) -> int:
        return x.shape[0] * self.score.out_features * self.capacity


class Threshold(ExpertChoice):
    """A token takes every expert whose score is over the mean of the batch, which samples share."""

    coupled = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(x).sigmoid()
        return scores > scores.mean((0, 1)), scores

    def branches(self, x: Tensor) -> int:
        return 0


class PairsMoE(nn.Module):
    marked = False

    def __init__(self, router: type[ExpertChoice], sizes: Sizes) -> None:
        super().__init__()
        self.router = router(sizes.width, sizes.experts)
        self.experts = nn.ModuleList(SwiGLU(sizes.width, sizes.expert_width) for _ in range(sizes.experts))
        self.shared_expert = SwiGLU(sizes.width, 2 * sizes.expert_width)

    def forward(self, x: Tensor) -> Tensor:
        routed, weight = self.router(x)
        dispatch = self.with_marker if self.marked else self.with_loop
        out = dispatch(x.flatten(0, 1), routed.flatten(0, 1), weight.flatten(0, 1), self.router.branches(x))
        return out.view_as(x) + self.shared_expert(x)

    def with_loop(self, x: Tensor, routed: Tensor, weight: Tensor, branches: int) -> Tensor:
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out[routed[:, e]] += weight[routed[:, e], e, None] * expert(x[routed[:, e]])
        return out

    def with_marker(self, x: Tensor, routed: Tensor, weight: Tensor, branches: int) -> Tensor:
        body = self.experts[0](torch.ops.moeca.expert_rows(x))
        params = [parameter for expert in self.experts for parameter in expert.parameters()]
        experts, coupled = len(self.experts), self.router.coupled
        return torch.ops.moeca.experts_variable_k(x, routed, weight, body, params, experts, branches, coupled)


def make_pairs_model(router: type[ExpertChoice], seed: int = 0) -> TinyDiTMoE:
    """The small DiT-MoE with this router in every second block, in eval mode."""
    torch.manual_seed(seed)
    model = TinyDiTMoE(SIZES)
    for block in model.blocks[1::2]:
        block.mlp = PairsMoE(router, SIZES)
    return model.eval().requires_grad_(False)


def mark(model: TinyDiTMoE, marked: bool) -> TinyDiTMoE:
    """Let the model's layers run as markers, or as loops."""
    for module in model.modules():
        if isinstance(module, PairsMoE):
            module.marked = marked
    return model
