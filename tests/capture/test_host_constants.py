"""What the host reads of tensors that are made of constants and sizes is known while Dynamo traces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.harness import RecordingBackend


class Unpatched(nn.Module):
    """The picture's size is put into a tensor and read from it."""

    def forward(self, x):
        sizes = torch.tensor([x.shape[1] // 4, 4]).repeat(len(x), 1)
        return torch.stack([x[i, : h * w].reshape(h, w, -1).sum(-1) for i, (h, w) in enumerate(sizes)])


class FarthestPlace(nn.Module):
    def forward(self, x):
        return x * 2 if torch.arange(x.shape[1]).max().item() >= 7 else x


class Spread(nn.Module):
    def forward(self, x):
        return x.sum(-1).expand(torch.tensor(2) * 3, *x.shape[:2])


def graphs_of(model: nn.Module, *inputs: torch.Tensor, ours: bool = True) -> int:
    backend = RecordingBackend(ours=ours)
    compiled = torch.compile(model, backend=backend)
    for x in inputs:
        torch.testing.assert_close(compiled(x), model(x))
    return len(backend.graphs)


@pytest.mark.parametrize("model", [Unpatched, FarthestPlace, Spread])
def test_one_graph_for_each_size(model):
    small, large = torch.randn(2, 8, 4), torch.randn(2, 16, 4)
    assert graphs_of(model(), small, small, large, small, large) == 2


def test_other_backends_trace_as_they_did():
    assert graphs_of(FarthestPlace(), torch.randn(2, 8, 4), ours=False) > 1


class OfTheData(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


class Written(nn.Module):
    def forward(self, x):
        count = torch.zeros(2)
        count[0] += x.sum()
        return x * 2 if count.max().item() > 0 else x


class WrittenThroughAView(nn.Module):
    def forward(self, x):
        count = torch.zeros(2)
        count.view(-1).add_(x.sum())
        return x * 2 if count.max().item() > 0 else x


class Drawn(nn.Module):
    def forward(self, x):
        return x * 2 if torch.rand(1).item() >= 0 else x


class OfABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.ones(()))

    def forward(self, x):
        return x * 2 if self.on.item() > 0 else x


@pytest.mark.parametrize("model", [OfTheData, Written, WrittenThroughAView, Drawn, OfABuffer])
def test_what_may_be_another_number_breaks_the_graph(model):
    made, backend = model(), RecordingBackend()
    compiled = torch.compile(made, backend=backend)
    for x in (torch.ones(2, 2), -torch.ones(2, 2)):
        torch.testing.assert_close(compiled(x), made(x))
    if model is OfABuffer:
        made.on.zero_()
        torch.testing.assert_close(compiled(x), x)
    assert len(backend.graphs) > 1
