"""What the mask-loop idiom takes for dispatch, and near misses that it must not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeca_compile.capture.idioms import mask_loop
from moeca_compile.capture.idioms.inline import Inline
from moeca_compile.capture.numerics import UntrustedError
from moeca_compile.capture.source import innermost, read_method
from moeca_compile.capture.trust import vouch
from tests.capture.inline_layers import BooleanMask, OneHotHit, WithTimestep
from tests.capture.layers import MoE, tokens


def recognize(function) -> Inline | None:
    method = read_method(innermost(function))
    return mask_loop.recognize(method) if mask_loop.plausible(method.function.__code__) else None


def checked(layer: nn.Module, *args: torch.Tensor) -> torch.dtype:
    """The verdict of the check on random numbers. Raises UntrustedError."""
    layer.eval()
    found = recognize(type(layer).forward)
    assert found is not None
    return vouch(found, innermost(type(layer).forward), layer, found.facts(args, {}))[1]


@pytest.mark.parametrize("layer", [OneHotHit, BooleanMask, WithTimestep])
def test_the_experts_are_found(layer):
    found = recognize(layer.forward)
    assert found.method.items == ("experts",) and found.method.shared == ()


def on_top_of_the_input(self, x):
    weight, index = self.router(x).topk(2)
    out = x.clone()
    for e, expert in enumerate(self.experts):
        token, slot = torch.where(index == e)
        out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
    return out


def weights_of_the_rows(self, x):
    weight, index = self.router(x).topk(2)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        token, slot = torch.where(index == e)
        out.index_add_(0, token, expert(x[token] * weight[token, slot, None]))
    return out


def other_masks(self, x):
    """No expert ids: thresholds on the router's scores."""
    scores = self.router(x).softmax(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        token = torch.where(scores[:, e] > 0.3)[0]
        out.index_add_(0, token, expert(x[token]) * scores[token, e, None])
    return out


def no_experts(self, x):
    """A loop over classes that is no MoE."""
    label = x.argmax(-1)
    out = torch.zeros_like(x)
    for number in range(4):
        out[label == number] = x[label == number] * self.scale
    return out


def keeps_its_load(self, x):
    """Right but for the state that it keeps in the loop."""
    weight, index = self.router(x).topk(2)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        token, slot = torch.where(index == e)
        self.load[e] = len(token)
        out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
    return out


def reads_the_last_rows(self, x):
    """Something else that the loop leaves behind is used."""
    weight, index = self.router(x).topk(2)
    out = torch.zeros_like(x)
    for e, expert in enumerate(self.experts):
        token, slot = torch.where(index == e)
        out.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
    return out * len(token)


@pytest.mark.parametrize(
    "near_miss",
    [on_top_of_the_input, weights_of_the_rows, other_masks, no_experts, keeps_its_load, reads_the_last_rows],
)
def test_near_misses_are_not_recognized(near_miss):
    assert recognize(near_miss) is None


class SquaredWeights(MoE):
    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            scale = weight[token, slot, None]
            out.index_add_(0, token, expert(x[token]) * scale * scale)
        return out


class Transposed(MoE):
    """The slots before the tokens, taken for one another."""

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        ids = index.t().reshape(-1)
        rows = x.repeat(self.top_k, 1)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            y[ids == e] = expert(rows[ids == e])
        return (y.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(1)


class WithContext(MoE):
    """The experts read a tensor that is made in forward and belongs to no token."""

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        mean = x.mean(0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, (expert(x[token]) - mean) * weight[token, slot, None])
        return out


class OverTokens(MoE):
    """What an expert makes of a token depends on the others that it was given."""

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, expert(F.softmax(x[token], dim=0)) * weight[token, slot, None])
        return out


class LateExpert(MoE):
    """Another expert than the one whose tokens they are, for one of them."""

    def forward(self, x):
        weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        out = torch.zeros_like(x)
        for e in range(len(self.experts)):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, self.experts[max(e, 1)](x[token]) * weight[token, slot, None])
        return out


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (SquaredWeights, "trying it on random rows raised"),
        (Transposed, "not the sum of its experts' weighted outputs"),
        (WithContext, "neither theirs nor one of rows"),
        (OverTokens, "depends on the other tokens"),
        (LateExpert, "not the sum of its experts' weighted outputs"),
    ],
)
def test_what_numbers_do_not_confirm_is_refused(layer, reason):
    with pytest.raises(UntrustedError, match=reason):
        checked(layer(), tokens()[0])


def test_experts_that_hardly_matter_are_checked_with_other_parameters():
    layer = OneHotHit()
    with torch.no_grad():
        for expert in layer.experts:
            expert.down_proj.weight.zero_()
    assert checked(layer, tokens()) is torch.float32


def test_a_wrong_meaning_is_told_beside_a_large_shared_part():
    class Shared(LateExpert):
        def forward(self, x):
            weight, index = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
            out = torch.zeros_like(x)
            for e in range(len(self.experts)):
                token, slot = torch.where(index == e)
                out.index_add_(0, token, self.experts[max(e, 1)](x[token]) * weight[token, slot, None])
            return out + 30 * x

    with pytest.raises(UntrustedError):
        checked(Shared().bfloat16(), tokens(torch.bfloat16)[0])
