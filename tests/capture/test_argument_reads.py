"""What the host reads of an integer argument is known while Dynamo traces, for calls in which it is the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.harness import RecordingBackend

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
OTHER = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
X = torch.randn(2, 5, 3)


class Zeroed(nn.Module):
    def forward(self, x, mask):
        x = x * mask[..., None]
        for i, length in enumerate(mask.sum(-1).to(torch.int64)):
            x[i, length:] = 1
        return x


class AsAList(nn.Module):
    def forward(self, x, mask):
        lengths = [int(n) for n in (mask != 0).sum(-1).tolist()]
        return torch.stack([F.pad(x[i, :n], (0, 0, 0, 5 - n)) for i, n in enumerate(lengths)])


class Nested(nn.Module):
    def forward(self, x, mask):
        return x * sum(sum(row) for row in mask.tolist())


class If(nn.Module):
    def forward(self, x, mask):
        if (mask.sum(-1) < 2).any():
            x = x + 1
        return x * 2 if not mask.bool().all() else x


class WhileCompared(nn.Module):
    def forward(self, x, mask):
        return x * 2 if int(mask.sum().item()) > 6 and mask.any() else x


READS = [Zeroed, AsAList, Nested, If, WhileCompared]


def graphs_of(model, *calls, **how):
    backend = RecordingBackend(**how)
    compiled = torch.compile(model, backend=backend)
    for given in calls:
        torch.testing.assert_close(compiled(*given), model(*given))
    return len(backend.graphs)


@pytest.mark.parametrize("model", READS)
def test_one_graph_for_each_value_that_is_read(model):
    again = [(X, MASK.clone()), (X, MASK), (X, OTHER), (X, MASK), (X, OTHER)]
    assert graphs_of(model(), (X, MASK), *again) == 2


def test_what_reads_the_same_is_the_same():
    assert graphs_of(If(), (X, MASK), (X, MASK.flip(0)), (X, MASK.flip(1))) == 1


def test_a_tensor_that_is_written_to_is_read_again():
    mask, model = MASK.clone(), AsAList()
    compiled = torch.compile(model, backend=RecordingBackend())
    for _ in range(4):
        torch.testing.assert_close(compiled(X, mask), model(X, mask))
        mask[0, int(mask[0].sum()) - 1] = 0


def test_other_backends_trace_as_they_did():
    assert graphs_of(If(), (X, MASK), ours=False) > 1


class OfFractions(nn.Module):
    def forward(self, x, mask):
        return x * 2 if x.sum() > 0 else x


class OfTwo(nn.Module):
    def forward(self, x, mask):
        return x * 2 if (mask.sum() > mask.shape[1]) & (x > 0).any() else x


class WrittenFirst(nn.Module):
    def forward(self, x, mask):
        mask = mask.view(-1)
        mask[3:] = x.flatten()[: len(mask) - 3] > 0
        return x * 2 if mask.sum() > 4 else x


class MadeWithin(nn.Module):
    """The function after a break has what is made of the data as its arguments."""

    def forward(self, x, mask):
        index = x.sum(-1).argmax(-1)
        torch._dynamo.graph_break()
        return x * 2 if index.sum() > 3 else x


@pytest.mark.parametrize("model", [OfFractions, OfTwo, WrittenFirst, MadeWithin])
def test_what_is_made_of_other_things_breaks_the_graph(model):
    calls = [(X, MASK.clone()), (-X, MASK.clone()), (X.flip(0, 1), OTHER.clone()), (-X, OTHER.clone())]
    backend = RecordingBackend()
    made, compiled = model(), torch.compile(model(), backend=backend)
    for x, mask in calls:
        torch.testing.assert_close(compiled(x, mask.clone()), made(x, mask.clone()))
    assert len(backend.graphs) > 1


class OfTheTime(nn.Module):
    def forward(self, x, t):
        return x * int(t[0])


def test_an_argument_that_always_changes_breaks_the_graph_after_two_values():
    """A timestep: 2 graphs for values, one before the break, and after it one for a number and one for all."""
    calls = [(X, torch.full((2,), 1000 - 50 * step)) for step in range(12)]
    assert graphs_of(OfTheTime(), *calls) == 5


def test_lengths_of_many_texts_break_the_graph_after_some():
    masks = [F.pad(torch.ones(2, n, dtype=torch.long), (0, 5 - n)) for n in (1, 2, 3, 4, 5)]
    assert 4 < graphs_of(AsAList(), *[(X, mask) for mask in masks for _ in range(3)]) < 9
