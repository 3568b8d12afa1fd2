"""Modules that are handed rows sorted by expert: their callers' dispatch is captured, and they stay what they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeca_compile import capture
from moeca_compile.capture.idioms import bank
from moeca_compile.capture.idioms.held import ExpertOf
from moeca_compile.capture.source import innermost, read_method
from tests.capture.layers import WIDTH, stack, tokens
from tests.capture.pair_layers import EXPERTS
from tests.capture.test_pairs import captured_pairs
from tests.harness import RecordingBackend, nodes_of


class Segments(nn.Module):
    """Packed SwiGLU experts on sorted rows, split by counts that the host reads."""

    def __init__(self, experts: int = EXPERTS, hidden: int = 16) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, WIDTH, 2 * hidden) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, WIDTH) * hidden**-0.5)

    def forward(self, rows, counts):
        outputs = []
        for e, part in enumerate(rows.split(counts.tolist())):
            gate, up = (part @ self.gate_up[e]).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ self.down[e])
        return torch.cat(outputs)


class Slices(Segments):
    """The same into one tensor, slice by slice, through a method of its own."""

    def forward(self, rows, counts):
        return self.run_sorted(counts, rows)

    def run_sorted(self, sizes, x):
        out, start = torch.empty_like(x), 0
        for e, size in enumerate(sizes.tolist()):
            gate, up = torch.matmul(x[start : start + size], self.gate_up[e]).chunk(2, dim=-1)
            out[start : start + size] = torch.matmul(F.silu(gate) * up, self.down[e])
            start = start + size
        return out


class Grouped(Segments):
    """Grouped matmuls."""

    def forward(self, rows, counts):
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)


class Caller(nn.Module):
    """Expert choice by sample, rows sorted by expert through the batch."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.mlp = experts

    def forward(self, x):
        b, n, d = x.shape
        gating, index = self.router(x).softmax(-1).transpose(1, 2).topk(4, dim=-1)
        token = (index + torch.arange(b).view(b, 1, 1) * n).transpose(0, 1).reshape(-1)
        weight = gating.transpose(0, 1).reshape(-1, 1)
        counts = torch.full((EXPERTS,), b * 4)
        y = self.mlp(x.reshape(b * n, d)[token], counts) * weight
        return torch.zeros(b * n, d).index_add(0, token, y).view(b, n, d)


@pytest.mark.smoke
@pytest.mark.parametrize("experts", [Segments, Slices, Grouped])
def test_the_callers_dispatch_is_captured(experts):
    (marker,) = captured_pairs(stack(Caller(experts())), tokens())
    assert marker.args[5:] == (EXPERTS, 2 * 4 * 4, False)
    assert len(marker.args[4]) == 2 * EXPERTS


@pytest.mark.parametrize("experts", [Segments, Grouped])
def test_one_expert_is_run_on_all_rows_for_who_asks(experts):
    module, rows = experts().eval(), torch.randn(5, WIDTH)
    asked = ExpertOf(module, 2)
    with torch.no_grad():
        got = asked(rows, asked)
        want = module(rows, torch.tensor([0, 0, 5, 0]))
    torch.testing.assert_close(got, want)
    assert asked.items == [module.gate_up, module.down]
    assert torch.equal(asked.own[1], module.down[2])


class TwoInOne(Segments):
    """Not one expert's code: the rows of the segment before are used too."""

    def forward(self, rows, counts):
        outputs, last = [], rows.new_zeros(1, WIDTH)
        for e, part in enumerate(rows.split(counts.tolist())):
            outputs.append(torch.relu((part + last.mean(0)) @ self.gate_up[e])[:, :WIDTH])
            last = part
        return torch.cat(outputs)


class InPairs(Segments):
    """Two experts a turn, in a loop that no idiom knows."""

    def forward(self, rows, counts):
        sizes, start, outputs = counts.tolist(), 0, []
        while sizes:
            gate, up = (rows[start : start + sizes[0]] @ self.gate_up[-len(sizes)]).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ self.down[-len(sizes)])
            start += sizes.pop(0)
        return torch.cat(outputs)


@pytest.mark.parametrize("experts", [TwoInOne, InPairs])
def test_what_is_not_understood_runs_as_it_is_with_one_warning(experts):
    model, backend = stack(Caller(experts())), RecordingBackend()
    with torch.no_grad(), pytest.warns(capture.CaptureWarning, match="Caller.forward") as caught:
        got = torch.compile(model, backend=backend)(tokens())
        torch.testing.assert_close(got, model(tokens()))
    assert len([each for each in caught if each.category is capture.CaptureWarning]) == 1
    assert not any(nodes_of(gm, torch.ops.moeca.experts_variable_k) for gm in backend.graphs)
    assert len(capture.refusals()) == 1


def recognize(function):
    method = read_method(innermost(function))
    return bank.recognize(method) if bank.plausible(method.function.__code__) else None


def sizes_of_patches(self, x, sizes):
    """A loop over sizes that the host reads: no packed experts."""
    out = []
    for e, (height, width) in enumerate(sizes.tolist()):
        out.append(x[e][:height, :width] * self.scale[e])
    return torch.cat(out)


def one_network(self, x, counts):
    """The same parameters for every segment."""
    return torch.cat([part @ self.weight for part in x.split(counts.tolist())])


@pytest.mark.parametrize("near_miss", [sizes_of_patches, one_network])
def test_near_misses_are_no_bank(near_miss):
    assert recognize(near_miss) is None
