"""Models of other forms: what is cached of them, and that forced recomputation is the model all the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import Block, modulate
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.runtime.loop import StepLoop
from tests.harness import caches_of, captured
from tests.models import MoE, Sizes, TinyDiTMoE, make_inputs

SIZES = Sizes(depth=2, width=16, heads=2, experts=4, expert_width=8)
pytestmark = pytest.mark.usefixtures("eager_steps")


class Variant(TinyDiTMoE):
    """`block` takes the place of every block's forward."""

    def __init__(self, sizes: Sizes = SIZES) -> None:
        torch.manual_seed(0)
        super().__init__(sizes)
        self.extra = nn.Linear(16, 16)
        self.text = nn.Parameter(torch.randn(1, 5, 16))
        self.kernel = nn.Parameter(torch.randn(16, 1, 3) / 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        for block in self.blocks:
            h = self.block(block, h, block.modulation(c))
        return self.finish(h, c)

    def block(self, block: Block, h: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        h = h + m[2].unsqueeze(1) * self.attend(block, modulate(block.norm1(h), m[0], m[1]))
        return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))

    def attend(self, block: Block, z: Tensor) -> Tensor:
        return block.attn(z)

    def qkv(self, block: Block, z: Tensor) -> tuple[Tensor, ...]:
        return block.attn.split_heads(z)

    @staticmethod
    def project(block: Block, out: Tensor) -> Tensor:
        return block.attn.proj(out.transpose(1, 2).flatten(2))


class Parallel(Variant):
    """Attention and feed-forward beside each other."""

    def block(self, block, h, m):
        z = modulate(block.norm1(h), m[0], m[1])
        return h + m[2].unsqueeze(1) * (self.attend(block, z) + block.mlp(z))


class Ungated(Variant):
    """Pre-norm without modulation or gates."""

    def block(self, block, h, m):
        h = h + self.attend(block, block.norm1(h))
        return block.mlp(block.norm2(h)) + h


class TanhGates(Variant):
    """Gates squashed, output normed after the branch, as sandwich norms do."""

    def block(self, block, h, m):
        h = h + m[2].tanh().unsqueeze(1) * block.norm1(self.attend(block, block.norm1(h) * (1 + m[1][:, None])))
        return h + m[5].tanh().unsqueeze(1) * block.norm2(block.mlp(block.norm2(h) * (1 + m[4][:, None])))


class LongSkip(Variant):
    """The last block's input joined with the first one's output, as in U-ViT."""

    def forward(self, x, t, y):
        h, c = self.embed_inputs(x, t, y)
        first = self.block(self.blocks[0], h, self.blocks[0].modulation(c))
        h = self.extra(first) + h
        h = self.block(self.blocks[1], h, self.blocks[1].modulation(c))
        return self.finish(h + first, c)


class CrossAttention(Variant):
    """To a text, between self-attention and feed-forward."""

    def block(self, block, h, m):
        h = h + m[2].unsqueeze(1) * self.attend(block, modulate(block.norm1(h), m[0], m[1]))
        q = self.extra(h).unflatten(-1, (2, 8)).transpose(1, 2)
        k = self.text.expand(len(h), -1, -1).unflatten(-1, (2, 8)).transpose(1, 2)
        h = h + F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
        return h + m[5].unsqueeze(1) * block.mlp(modulate(block.norm2(h), m[3], m[4]))


class TextTokens(Variant):
    """Keys and values of text and picture together."""

    def attend(self, block, z):
        q, k, v = self.qkv(block, z)
        text = self.text.expand(len(z), -1, -1).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = torch.cat([k, text], 2), torch.cat([v, text], 2)
        return self.project(block, F.scaled_dot_product_attention(q, k, v))


class SpelledOut(Variant):
    """Attention as products and a softmax."""

    def attend(self, block, z):
        q, k, v = self.qkv(block, z)
        return self.project(block, (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v)


class Capped(Variant):
    """Attention whose scores are squashed: no attention op can say that."""

    def attend(self, block, z):
        q, k, v = self.qkv(block, z)
        return self.project(block, (5 * (q @ k.transpose(-1, -2) / 40).tanh()).softmax(-1) @ v)


class Causal(Variant):
    def attend(self, block, z):
        return self.project(block, F.scaled_dot_product_attention(*self.qkv(block, z), is_causal=True))


class ConvolvedRouter(Variant):
    """A depthwise convolution over tokens before the MoE layer."""

    def block(self, block, h, m):
        h = h + m[2].unsqueeze(1) * self.attend(block, modulate(block.norm1(h), m[0], m[1]))
        z = F.conv1d(block.norm2(h).transpose(1, 2), self.kernel, padding=1, groups=16).transpose(1, 2)
        return h + m[5].unsqueeze(1) * block.mlp(z)


class TwoExperts(Variant):
    """Two MoE layers in a block, the second without an attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.second = MoE(SIZES)

    def block(self, block, h, m):
        h = super().block(block, h, m)
        return h + m[5].unsqueeze(1) * self.second(block.norm2(h)) if isinstance(block.mlp, MoE) else h


class ConditionedRouter(Variant):
    """The router reads the timestep embedding beside the token."""

    def block(self, block, h, m):
        h = h + m[2].unsqueeze(1) * self.attend(block, modulate(block.norm1(h), m[0], m[1]))
        z = block.norm2(h)
        z = torch.cat([z[..., :8], m[3][:, None, :8].expand(-1, z.shape[1], -1)], -1)
        return h + m[5].unsqueeze(1) * block.mlp(z)


class RegisterToken(Variant):
    """A learned token before the picture's."""

    def embed_inputs(self, x, t, y):
        h, c = super().embed_inputs(x, t, y)
        return torch.cat([self.text[:, :1].expand(len(h), -1, -1), h], 1), c

    def finish(self, h, c):
        return super().finish(h[:, 1:], c)

    def attend(self, block, z):
        batch, tokens, width = z.shape
        q, k, v = block.attn.qkv(z).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(block, F.scaled_dot_product_attention(q, k, v))


class OfSamples(nn.Module):
    """Experts chosen for whole samples."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)) for _ in range(4))

    def forward(self, x, c):
        weight, index = self.router(c).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            sample, slot = torch.where(index == e)
            out.index_add_(0, sample, expert(x[sample]) * weight[sample, slot, None, None])
        return out


class RoutedByTime(Variant):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = OfSamples() if isinstance(block.mlp, MoE) else block.mlp

    def block(self, block, h, m):
        h = h + m[2].unsqueeze(1) * self.attend(block, modulate(block.norm1(h), m[0], m[1]))
        z = modulate(block.norm2(h), m[3], m[4])
        return h + m[5].unsqueeze(1) * (block.mlp(z, m[3]) if isinstance(block.mlp, OfSamples) else block.mlp(z))


class InAGrid(Variant):
    """(batch, height, width, channels) all the way, with a convolution between the blocks."""

    def embed_inputs(self, x, t, y):
        h, c = super().embed_inputs(x, t, y)
        return h.unflatten(1, (4, -1)), c

    def finish(self, h, c):
        return super().finish(h.flatten(1, 2), c)

    def block(self, block, h, m):
        m = [each[:, None, None] for each in m]
        h = h + F.conv2d(h.permute(0, 3, 1, 2), self.kernel[..., None], padding=(1, 0), groups=16).permute(0, 2, 3, 1)
        z = block.norm1(h) * (1 + m[1]) + m[0]
        h = h + m[2] * self.attend(block, z.flatten(1, 2)).view_as(h)
        z = block.norm2(h) * (1 + m[4]) + m[3]
        return h + m[5] * block.mlp(z.flatten(1, 2)).view_as(h)


def cached(*counts: int) -> dict[str, int]:
    return {name: n for name, n in zip(("attention", "experts", "feedforward"), counts, strict=True) if n}


# What is cached; what is kept as it is, by kind.
VARIANTS: dict[type[Variant], tuple[dict[str, int], dict[str, int]]] = {
    Variant: (cached(2, 1, 1), {}),
    Ungated: (cached(2, 1, 1), {}),
    TanhGates: (cached(2, 1, 1), {}),
    LongSkip: (cached(2, 1, 1), {}),
    TwoExperts: (cached(2, 2, 1), {}),
    RegisterToken: (cached(2, 1, 1), {}),
    ConditionedRouter: (cached(2, 1, 1), {}),
    CrossAttention: (cached(4, 1, 1), {}),
    TextTokens: (cached(2, 1, 1), {}),
    SpelledOut: (cached(2, 1, 1), {}),
    Causal: (cached(2, 1, 1), {}),
    RoutedByTime: (cached(2, 1, 1), {}),
    InAGrid: (cached(2, 1, 1), {}),
    ConvolvedRouter: (cached(2, 1, 1), {}),
    Parallel: (cached(2, 1, 0), {}),
    Capped: (cached(0, 1, 1), {"attention": 2}),
}


def prepared(variant: type[Variant], **options: Any) -> tuple[Variant, Any, StepLoop]:
    model = variant().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(2), labels)
    return model, graph, graph.loop(**options)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
def test_what_is_cached_and_forced_recomputation_is_the_model(variant, recwarn):
    model, graph, loop = prepared(variant, keys_values="chosen", shared="any")
    regions = loop.compiled.regions
    expected, kept = VARIANTS[variant]
    assert cached(len(regions.attentions), len(regions.experts), len(regions.feedforwards)) == expected
    assert Counter(k.kind for k in regions.skipped) == kept
    assert not [w for w in recwarn if "moeca" in str(w.message)]
    assert all(error < 1e-5 for error in loop.notes.errors.values())
    assert_forced_is_the_model(model, graph, loop)


def assert_forced_is_the_model(model: Variant, graph: Any, loop: StepLoop) -> None:
    """A cache step on another picture with everything recomputed."""
    (x, y), (other, _) = make_inputs(model), make_inputs(model, seed=2)
    state, weights = caches_of(loop)
    full = loop.eager(StepKind(), graph.arguments(x=x, t=torch.ones(2), y=y), state, weights)
    state.store(full.updates)
    torch.testing.assert_close(full.outputs[0], model(x, torch.ones(2), y), atol=1e-5, rtol=0)
    forced = StepKind(False, False, loop.compiled.plan.sizes[1], forced=True)
    t = torch.full((2,), 0.7)
    again = loop.eager(forced, graph.arguments(x=other, t=t, y=y), state, weights)
    torch.testing.assert_close(again.outputs[0], model(other, t, y), atol=1e-5, rtol=0)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("variant", [Parallel, Capped], ids=lambda variant: variant.__name__)
@pytest.mark.parametrize("recipe", ["moeca", "fora", "stack"])
@pytest.mark.filterwarnings("ignore:moeca")
def test_what_is_not_understood_runs_right(variant, recipe):
    """Skipped with a reason, or cached in a way that is the model when recomputed."""
    model, graph, loop = prepared(variant, recipe=recipe)
    engine = graph.engine(recipe=recipe, full_every=1)
    x, y = make_inputs(model)
    for time in (1.0, 0.7):
        (found,) = engine(*graph.arguments(x=x, t=torch.full((2,), time), y=y))
        torch.testing.assert_close(found, model(x, torch.full((2,), time), y), atol=1e-5, rtol=0)
    if recipe == "moeca" and loop.compiled.caching:
        assert_forced_is_the_model(model, graph, loop)


def test_attention_and_experts_in_one_branch_are_cached_apart():
    _, _, loop = prepared(Parallel)
    attention, layer = loop.compiled.regions.attentions[1], loop.compiled.regions.experts[0]
    assert attention.residual.add is layer.residual.add
    assert attention.residual.output is not layer.residual.output
    assert attention.name == "blocks.1.attn"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "stack-forecast"])
def test_other_precisions(dtype, bound, recipe, recwarn):
    """Caches are in the model's dtype, and validation holds what the dtype can give."""
    torch.manual_seed(0)
    model = TinyDiTMoE(SIZES).eval().requires_grad_(False).to(dtype)
    noise, labels = make_inputs(model)
    graph = captured(model, noise.to(dtype), torch.ones(2, dtype=dtype), labels)
    engine = graph.engine(recipe=recipe, full_every=3)
    x = noise.to(dtype)
    for number in range(5):
        (out,) = engine(*graph.arguments(x=x, t=torch.full((2,), 1 - number / 5, dtype=dtype), y=labels))
        assert out.dtype == dtype
        assert out.isfinite().all()
        x = x - out / 5
    assert all(error < bound for error in engine.notes.errors.values())
    assert not [w for w in recwarn if "moeca" in str(w.message)]
    loop = engine.loop_for(graph.inputs)
    by_name = {spec.name: spec.dtype for spec in loop.compiled.plan.caches}
    name = "stack" if recipe.startswith("stack") else "attention.0"
    assert by_name[f"{name}.0" if recipe.endswith("forecast") else name] == dtype
