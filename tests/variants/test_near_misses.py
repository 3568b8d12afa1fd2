"""Models that look like others: what must not be taken for experts, a router or a plain attention, and what may.

Each test names the reason that the report must give, allows one warning at most, and compares numbers with eager.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeca_compile
from examples.dit import Mlp, SwiGLU
from moeca_compile.capture.refusals import CaptureWarning
from tests.harness import eager_backend
from tests.variants.blocks import Block, Blocking, Model, Modelling, make_inputs, make_model, moving, timestep
from tests.variants.check import relative_error
from tests.variants.dispatch import Layering

WIDTH, EXPERTS, STEPS = 16, 4, 6
DENSE = Modelling((Blocking(feedforward="mlp"), Blocking(feedforward=Layering())))
"""A dense block, which each test changes, and one with experts, which must stay cached."""


class MoE(nn.Module):
    """Mask loops over `experts`, softmax top-2."""

    def __init__(self, *experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weight, index = self.gate(rows).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
        return out.view(x.shape)


def with_mlp(mlp: nn.Module, how: Modelling = DENSE) -> Model:
    """The model with `mlp` in place of the first block's feed-forward."""
    model = make_model(how)
    model.blocks[0].mlp = mlp.eval().requires_grad_(False)
    return model


class Run:
    """A model compiled, called for some steps; the last output beside eager's, report, and warnings."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.model = model
        compiled = torch.compile(
            model, backend=eager_backend, options={"recipe": "moeca", **options, "lowering": "eager"}
        )
        noise, inputs = make_inputs(model.how)
        self.errors = []
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            for step in range(STEPS):
                x, t = moving(noise, step), timestep(model.how, step, STEPS)
                torch.manual_seed(step)
                found = compiled(x, t, *inputs)
                torch.manual_seed(step)
                self.errors.append(relative_error(found, model(x, t, *inputs)))
        self.warnings = [str(w.message) for w in caught if ours(w)]
        self.report = moeca_compile.report(compiled)

    def reasons(self, kind: str) -> list[str | None]:
        """Why each region of a kind is kept, None for those that are cached, in the order of their names."""
        regions = sorted((region for region in self.report.regions if region.kind == kind), key=lambda r: r.name)
        return [None if region.status == "cached" else region.reason for region in regions]


def ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, CaptureWarning) or str(warning.message).startswith("moeca")


def right(model: Model) -> Run:
    """Its run, every other step full, where all full steps must be the model's and some cache step must not be."""
    run = Run(model, full_every=2)
    assert max(run.errors[::2]) < 1e-5
    assert 1e-5 < max(run.errors[1::2]) < 1
    assert len(run.warnings) <= 1
    return run


def refused(model: Model, reason: str) -> Run:
    """Its run, where the reason must be in one warning and in the report, and every step must be the model's."""
    run = Run(model)
    assert max(run.errors) < 1e-5
    assert len(run.warnings) == 1, run.warnings
    assert reason in run.warnings[0]
    assert reason in str(run.report)
    return run


# A top-k that is no router


class Pruned(nn.Module):
    """Only the tokens with the highest scores go through the network (a mixture of depths)."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.body = nn.Linear(WIDTH, 1), Mlp(WIDTH, 24)

    def forward(self, x):
        score, kept = self.score(x).squeeze(-1).topk(4, dim=1)
        index = kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        rows = self.body(x.gather(1, index)) * score.sigmoid().unsqueeze(-1)
        return torch.zeros_like(x).scatter(1, index, rows)


class Sparsified(nn.Module):
    """Each token keeps its largest hidden values: a top-k over features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        hidden = self.up(x)
        value, index = hidden.topk(8, dim=-1)
        return self.down(torch.zeros_like(hidden).scatter(-1, index, value.relu()))


def test_token_pruning_is_no_router():
    run = right(with_mlp(Pruned()))
    assert run.reasons("experts") == [None]
    assert run.warnings == []


def test_a_top_k_of_features_is_no_router():
    run = right(with_mlp(Sparsified()))
    assert run.reasons("experts") == [None]
    assert run.warnings == []


# Experts that cannot stand for each other or for a row alone


class NormOverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = SwiGLU(WIDTH, 12)

    def forward(self, x):
        return self.body((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-5))


class ConvolutionOverTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x):
        padded = F.pad(x.t()[None], (2, 2))  # torch refuses to pad within the convolution where there are no tokens
        return self.conv(padded)[0].t()[: len(x)]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = SwiGLU(WIDTH, 12)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


class RunningMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = SwiGLU(WIDTH, 12)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.body(x)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = SwiGLU(WIDTH, 12)

    def forward(self, x):
        return self.body(x + 0.1 * torch.randn_like(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("expert", "reason"),
    [
        (NormOverTokens, "an expert's output for a token depends on the other tokens"),
        (ConvolutionOverTokens, "an expert's output for a token depends on the other tokens"),
        (Counting, "changes its own"),
        (RunningMean, "changes its own"),
        (Noisy, "random"),
    ],
)
def test_experts_of_more_than_their_rows_are_refused(expert, reason):
    refused(with_mlp(MoE(*(expert() for _ in range(EXPERTS)))), reason)


def test_experts_of_different_shapes_are_refused():
    refused(
        with_mlp(MoE(*(SwiGLU(WIDTH, 8 + e) for e in range(EXPERTS)))), "expert 1 is built differently from expert 0"
    )


@pytest.mark.slow  # 5 s: of different shapes, above, are refused alike
def test_experts_of_different_kinds_are_refused():
    refused(with_mlp(MoE(SwiGLU(WIDTH, 8), Mlp(WIDTH, 8))), "expert 1 is built differently from expert 0")


def test_experts_that_share_a_module_are_cached():
    first, second = SwiGLU(WIDTH, 12), SwiGLU(WIDTH, 12)
    run = right(with_mlp(MoE(first, second, first, second)))
    assert run.reasons("experts") == [None, None]
    assert run.warnings == []


def test_experts_that_share_a_weight_are_cached():
    experts = [SwiGLU(WIDTH, 12) for _ in range(EXPERTS)]
    for expert in experts:
        expert.gate_proj = experts[0].gate_proj
    run = right(with_mlp(MoE(*experts)))
    assert run.reasons("experts") == [None, None]


# Attention and streams


class WithDropout(nn.Module):
    """Forgets that it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *_):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v, dropout_p=0.2).transpose(1, 2).flatten(2))


def test_attention_with_live_dropout_is_kept():
    model = make_model(DENSE)
    model.blocks[0].attn = WithDropout().requires_grad_(False).eval()
    run = right(model)
    assert run.reasons("attention") == ["it draws random numbers", None]
    assert run.reasons("experts") == [None]
    assert run.warnings == []


class DropsOut(nn.Module):
    """A dense feed-forward that forgets so too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x):
        return self.down(F.dropout(F.gelu(self.up(x)), 0.2, training=True))


class Jitters(DropsOut):
    """Adds noise that is computed from no other value."""

    def forward(self, x):
        return self.down(F.gelu(self.up(x) + 0.1 * torch.randn(24)))


@pytest.mark.parametrize("mlp", [DropsOut, Jitters])
def test_what_draws_random_numbers_is_kept_and_draws_the_models_own(mlp):
    run = right(with_mlp(mlp()))
    assert run.reasons("feedforward") == ["it draws random numbers"]
    assert run.reasons("experts") == [None]
    assert run.warnings == []


class WithoutResidual(Block):
    def forward(self, h, context):
        parts = self.modulations(context)
        h = self.join(h, self.attn(self.attention_input(h, parts), context.rope, None, None), parts[0])
        return self.mlp(self.mlp_input(h, parts)), None


def test_experts_without_residual_are_kept():
    model = make_model(DENSE)
    model.blocks[0] = WithoutResidual(DENSE.blocks[0], DENSE)
    model.blocks[0].mlp = MoE(*(SwiGLU(WIDTH, 12) for _ in range(EXPERTS)))
    run = right(model.eval().requires_grad_(False))
    assert run.reasons("experts") == [
        "its output reaches no residual addition with the stream that it reads",
        None,
    ]


class Narrow(nn.Module):
    """Experts on a residual stream of their own, of half the width."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(WIDTH, WIDTH // 2), nn.LayerNorm(WIDTH // 2)
        self.moe, self.up = MoE(*(SwiGLU(WIDTH // 2, 12) for _ in range(EXPERTS))), nn.Linear(WIDTH // 2, WIDTH)
        self.moe.gate = nn.Linear(WIDTH // 2, EXPERTS, bias=False)

    def forward(self, x):
        h = self.down(x)
        return self.up(h + self.moe(self.norm(h)))


class Pooled(nn.Module):
    """Experts on a stream of fewer tokens: their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), MoE(*(SwiGLU(WIDTH, 12) for _ in range(EXPERTS)))

    def forward(self, x):
        h = x.mean(dim=1, keepdim=True)
        return (h + self.moe(self.norm(h))).expand_as(x)


def test_experts_on_a_narrower_stream_are_cached():
    run = right(with_mlp(Narrow()))
    assert run.reasons("experts") == [None, None]
    assert run.warnings == []


def test_experts_on_fewer_tokens_are_right():
    right(with_mlp(Pooled()))


# An idiom that nobody knows


class Membership(MoE):
    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, index = self.gate(rows).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.isin(index, e).nonzero(as_tuple=True)
            out.index_add_(0, token, (expert(rows[token]) * weight[token, slot, None]).tanh())
        return out.view_as(x)


def test_an_unknown_idiom_is_told_with_its_place_and_what_to_do():
    run = refused(with_mlp(Membership(*(SwiGLU(WIDTH, 12) for _ in range(EXPERTS)))), "no idiom matches it")
    _, line = inspect.getsourcelines(Membership.forward)
    assert f"{__file__}:{line}: Membership.forward" in run.warnings[0]
    assert "docs/extending/idiom.md" in run.warnings[0]
