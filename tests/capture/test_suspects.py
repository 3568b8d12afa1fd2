"""Dispatch that no idiom knows runs as torch.compile would run it, and one warning says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moeca_compile
from moeca_compile import capture
from tests.capture.layers import WIDTH, MoE, NumpyEnds, stack, tokens
from tests.harness import RecordingBackend


class OneHotLoop(MoE):
    """The loop over experts that were hit, but what it adds is no multiple of an expert's output."""

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        mask = nn.functional.one_hot(index, len(self.experts)).permute(2, 1, 0)
        for e in mask.sum(dim=(1, 2)).nonzero():
            slot, token = torch.where(mask[e.item()])
            out.index_add_(0, token, (self.experts[e.item()](rows[token]) * weight[token, slot, None]).tanh())
        return out


class MaskLoop(MoE):
    """Masks, but the largest branch is kept in place of the sum."""

    def route_to_experts(self, rows, index, weight):
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            for slot in range(self.top_k):
                chosen = index[:, slot] == e
                if chosen.any():
                    y, w = expert(rows[chosen]), weight[chosen, slot, None]
                    out[chosen] = torch.maximum(out[chosen], y * w)
        return out


class UNet(nn.Module):
    """A loop over blocks, skips picked from a list, a one-hot label: no dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.embed = nn.Linear(3, WIDTH)

    def forward(self, x, label):
        x = x + self.embed(nn.functional.one_hot(label, 3).to(x.dtype))[:, None]
        skips = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            skips.append(x)
            if number > 1:
                x = self.blocks[number](x + skips[number - 1])
        return torch.where(x > 0, x, 0.1 * x).sum(-1)


def captured(model, *inputs, ours=True, run=None):
    backend = RecordingBackend(ours, run)
    with torch.no_grad():
        return torch.compile(model, backend=backend)(*inputs), backend


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layer", [OneHotLoop, MaskLoop])
def test_a_suspect_that_is_met_is_warned_of_once(layer):
    model, x = stack(layer(), layer()), tokens()
    with pytest.warns(capture.CaptureWarning, match="docs/extending/idiom.md") as caught:
        got, backend = captured(model, x)
    assert len([each for each in caught if each.category is capture.CaptureWarning]) == 1
    (refusal,) = capture.refusals()
    assert refusal.method == f"{layer.__name__}.route_to_experts"
    assert refusal.where.endswith(f".py:{layer.route_to_experts.__wrapped__.__code__.co_firstlineno}")
    assert "no idiom" in refusal.reason
    assert len(backend.graphs) > 1
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))


@pytest.mark.filterwarnings("error::moeca_compile.capture.CaptureWarning")
def test_other_backends_and_training_do_not_warn():
    captured(stack(OneHotLoop()), tokens(), ours=False)
    captured(stack(OneHotLoop()).train(), tokens())
    stack(OneHotLoop())(tokens())
    assert capture.refusals() == ()


@pytest.mark.filterwarnings("error::moeca_compile.capture.CaptureWarning")
def test_a_loop_over_blocks_is_no_suspect():
    captured(UNet().eval(), tokens(), torch.tensor([0, 2]))
    assert capture.refusals() == ()


@pytest.mark.filterwarnings("error::moeca_compile.capture.CaptureWarning")
def test_a_list_that_holds_no_modules_is_no_suspect():
    class Functions(OneHotLoop):
        def __init__(self) -> None:
            super().__init__()
            del self.experts
            self.experts = [torch.sin] * 5

    captured(stack(Functions()), tokens())
    assert capture.refusals() == ()


@pytest.mark.filterwarnings("error::moeca_compile.capture.CaptureWarning")
def test_dispatch_for_training_alone_is_no_suspect():
    class Both(NumpyEnds):
        def route_to_experts(self, rows, index, weight):
            if self.training:
                out = torch.zeros_like(rows)
                for e, expert in enumerate(self.experts):
                    token, slot = torch.where(index == e)
                    out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
            else:
                out = self.moe_infer(rows, index.view(-1), weight.view(-1, 1))
            return out

    _, backend = captured(stack(Both()), tokens(), run=lambda gm: lambda *inputs: (tokens(),))
    assert len(backend.graphs) == 1
    assert capture.refusals() == ()


@pytest.mark.filterwarnings("error::moeca_compile.capture.CaptureWarning")
def test_the_same_rows_for_every_block_are_no_suspect():
    class Masked(UNet):
        def forward(self, x, label):
            kept = (label > 0).nonzero().flatten()
            for block in self.blocks:
                x = x.index_add(0, kept, block(x[kept]))
            return x

    captured(Masked().eval(), tokens(), torch.tensor([0, 2]))
    assert capture.refusals() == ()


class Reads(nn.Module):
    """A block without experts whose Python asks for a value, so the graph breaks."""

    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


@pytest.mark.filterwarnings("ignore::moeca_compile.capture.CaptureWarning")
def test_what_was_left_alone_in_one_model_says_nothing_about_another():
    """Neither in its report, nor in place of the warning about a break of its own in the same file."""
    options = {"lowering": "eager"}
    models = stack(OneHotLoop()), Reads().eval()
    refused, other = (torch.compile(model, backend="moeca", options=options) for model in models)
    with torch.no_grad():
        refused(tokens())
        with pytest.warns(UserWarning, match="the graph breaks here"):
            other(tokens())
    assert any("OneHotLoop.route_to_experts" in text for text in moeca_compile.report(refused).warnings)
    assert not any("OneHotLoop" in text for text in moeca_compile.report(other).warnings)
    assert [refusal.method for refusal in capture.refusals(refused._orig_mod)] == ["OneHotLoop.route_to_experts"]
    assert capture.refusals(other._orig_mod) == ()
