"""Each rule: evaluated on chosen tokens it gives rows of the whole; what mixes tokens has no layout."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, fx

from moeca_compile.passes.analysis.axis import Layout, Span, offset_in
from moeca_compile.passes.analysis.token_axis import stream_layout, token_layouts
from moeca_compile.passes.rewrite.evaluate import Evaluation
from moeca_compile.passes.rewrite.rows import Rows, take_rows
from tests.harness import exported, outputs, placeholders

B, N, D = 2, 5, 8

Function = Callable[..., Tensor]


def layouts_of(gm: fx.GraphModule, batch: int = B, tokens: int = N) -> dict[fx.Node, Layout]:
    """Layouts from the first placeholder, (batch, tokens, ...)."""
    return token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, batch, tokens)})


def choose(batch: int, tokens: int) -> Tensor:
    """Other tokens in each sample, in no order; all but one where there are several."""
    return torch.rand(batch, tokens).argsort(-1)[:, : max(1, tokens - 1)]


def assert_row_wise(function: Function, *inputs: Tensor, batch: int = B, tokens: int = N) -> list[Layout]:
    """Every output of `function` has a layout, by which its rows on chosen tokens are rows of the whole."""
    gm = exported(function, *inputs)
    layouts = layouts_of(gm, batch, tokens)
    evaluation = Evaluation(gm.graph, inputs, {})
    chosen = choose(batch, tokens)
    rows = Rows(chosen, layouts, evaluation.__getitem__, [placeholders(gm)[0]])
    for node in outputs(gm):
        assert node in layouts, f"{node.target} has no layout"
        expected = take_rows(evaluation[node], layouts[node], chosen)
        torch.testing.assert_close(rows[node], expected, atol=1e-5, rtol=1e-5)
    return [layouts[node] for node in outputs(gm)]


def assert_no_layout(function: Function, *inputs: Tensor) -> None:
    gm = exported(function, *inputs)
    (node,) = outputs(gm)
    assert node not in layouts_of(gm)
    source = placeholders(gm)[0]
    assert source in layouts_of(gm)


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (B, N, D), generator=torch.Generator().manual_seed(0))


def table(*shape: int) -> Tensor:
    """Some values, computed in the graph."""
    return torch.arange(prod(shape)).reshape(shape).sin()


SPLIT, MERGED = Layout(0, 1, B, N), Layout(0, 0, B, N)

RULES: dict[str, tuple[Function, Layout]] = {
    "linear": (lambda h: F.linear(h, table(6, D), table(6)), SPLIT),
    "matmul": (lambda h: h @ table(D, 6), SPLIT),
    "mm": (lambda h: torch.mm(h.reshape(B * N, D), table(D, 6)), MERGED),
    "pointwise": (lambda h: F.silu(h) * 2 + h.clamp(-1, 1), SPLIT),
    "cast": (lambda h: h.double(), SPLIT),
    "contiguous": (lambda h: h.transpose(0, 1).contiguous(), Layout(1, 0, B, N)),
    "zeros_like": (lambda h: torch.zeros_like(h), SPLIT),
    "ones_like": (lambda h: torch.ones_like(h), SPLIT),
    "full_like": (lambda h: torch.full_like(h, 2.0), SPLIT),
    "layer_norm": (lambda h: F.layer_norm(h, (D,)), SPLIT),
    "native_layer_norm": (lambda h: torch.native_layer_norm(h, (D,), None, None, 1e-6)[0], SPLIT),
    "rms_norm": (lambda h: F.rms_norm(h, (D,)), SPLIT),
    "softmax": (lambda h: h.softmax(-1), SPLIT),
    "log_softmax": (lambda h: h.log_softmax(2), SPLIT),
    "topk": (lambda h: h.topk(3, dim=-1)[0], SPLIT),
    "sort": (lambda h: h.sort(-1)[0], SPLIT),
    "cumsum": (lambda h: h.cumsum(-1), SPLIT),
    "sum": (lambda h: h.sum(-1), SPLIT),
    "sum, keepdim": (lambda h: h.sum(-1, keepdim=True), SPLIT),
    "sum before the tokens": (lambda h: h.view(B, N, 2, 4).permute(2, 0, 1, 3).sum(0), SPLIT),
    "mean": (lambda h: h.mean(-1), SPLIT),
    "amax": (lambda h: h.amax(-1, keepdim=True), SPLIT),
    "amin": (lambda h: h.amin(-1), SPLIT),
    "norm": (lambda h: torch.linalg.vector_norm(h, dim=-1), SPLIT),
    "heads": (lambda h: h.view(B, N, 2, 4).transpose(1, 2), Layout(0, 2, B, N)),
    "merge": (lambda h: h.reshape(B * N, D), MERGED),
    "split": (lambda h: (h.reshape(B * N, D) * 2).view(B, N, D), SPLIT),
    "flatten": (lambda h: h.flatten(0, 1), MERGED),
    "unflatten": (lambda h: h.unflatten(-1, (2, 4)), SPLIT),
    "permute": (lambda h: h.view(B, N, 2, 4).permute(2, 0, 3, 1), Layout(1, 3, B, N)),
    "t": (lambda h: h.reshape(B * N, D).t(), Layout(1, 1, B, N)),
    "unsqueeze": (lambda h: h.unsqueeze(1), Layout(0, 2, B, N)),
    "squeeze": (lambda h: h.unsqueeze(1).squeeze(1), SPLIT),
    "squeeze of no 1": (lambda h: h.squeeze(-1), SPLIT),
    "select": (lambda h: h[..., 3], SPLIT),
    "select before the tokens": (lambda h: h.view(B, N, 2, 4).permute(2, 0, 1, 3)[1], SPLIT),
    "unbind": (lambda h: h.view(B, N, 2, 4).unbind(2)[1], SPLIT),
    "slice": (lambda h: h[..., 2:5], SPLIT),
    "split in parts": (lambda h: h.split(4, dim=-1)[1], SPLIT),
    "split with sizes": (lambda h: h.split([3, 5], dim=-1)[1], SPLIT),
    "chunk": (lambda h: h.chunk(2, dim=-1)[1], SPLIT),
    "expand": (lambda h: h.unsqueeze(2).expand(B, N, 3, D), SPLIT),
    "expand by a new dim": (lambda h: h.expand(3, B, N, D), Layout(1, 2, B, N)),
    "cat": (lambda h: torch.cat([h, h * 2], -1), SPLIT),
    "stack": (lambda h: torch.stack([h, h * 2], 1), Layout(0, 2, B, N)),
    "gather": (lambda h: h.gather(-1, h.argsort(-1)[..., :2] * 0 + h.topk(2)[1]), SPLIT),
    "marks": (lambda h: torch.zeros_like(h).scatter(-1, h.topk(2, dim=-1)[1], 1.0), SPLIT),
    "values in their columns": (lambda h: torch.zeros_like(h).scatter(-1, *h.topk(2, dim=-1)[::-1]), SPLIT),
    "gather by topk": (lambda h: h.sigmoid().gather(-1, h.topk(2, dim=-1)[1]), SPLIT),
    "einsum that turns": (lambda h: torch.einsum("de,bsd->ebs", table(D, 6), h), Layout(1, 2, B, N)),
    "einsum of rows": (lambda h: torch.einsum("sd, de -> se", h.reshape(B * N, D), table(D, 6)), MERGED),
    "repeat": (lambda h: h.repeat(1, 1, 3), SPLIT),
    "repeat by a new dim": (lambda h: h.repeat(3, 1, 1, 2), Layout(1, 2, B, N)),
    "tile": (lambda h: torch.tile(h, (2,)), SPLIT),
    "repeat_interleave": (lambda h: h.view(B, N, 2, 4).transpose(1, 2).repeat_interleave(3, 1), Layout(0, 2, B, N)),
    "complex and real": (
        lambda h: torch.view_as_real(torch.view_as_complex(h.view(B, N, 4, 2)) * torch.polar(table(4), table(4))),
        SPLIT,
    ),
    "einsum": (lambda h: torch.einsum("bnd,dhe->bhne", h, table(D, 2, 3)), Layout(0, 2, B, N)),
    "einsum with samples": (lambda h: torch.einsum("bnd,bde->bne", h, table(B, D, 3)), SPLIT),
    "einsum of merged rows": (lambda h: torch.einsum("td,de->te", h.view(B * N, D), table(D, 3)), MERGED),
    "matmul by head": (lambda h: h.view(B, N, 2, 4).transpose(1, 2) @ table(2, 4, 3), Layout(0, 2, B, N)),
    "heads merged into samples": (
        lambda h: h.view(B, N, 2, 4).transpose(1, 2).reshape(B * 2, N, 4) * 2,
        Layout(0, 1, B, N, inner=2),
    ),
    "heads merged into samples, tokens first": (
        lambda h: h.transpose(0, 1).reshape(N, B * 2, 4).transpose(0, 1) * table(N, 1),
        Layout(0, 1, B, N, inner=2),
    ),
    "heads out of samples again": (
        lambda h: (h.view(B, N, 4, 2).transpose(1, 2).reshape(B * 4, N, 2) * 2).view(B, 2, 2, N, 2),
        Layout(0, 3, B, N),
    ),
    "some heads out of samples": (
        lambda h: (h.view(B, N, 4, 2).transpose(1, 2).reshape(B * 4, N, 2) * 2).view(B * 2, 2, N, 2),
        Layout(0, 2, B, N, inner=2),
    ),
    "attention": (
        lambda h: F.scaled_dot_product_attention(h.unsqueeze(1), table(B, 1, 7, D), table(B, 1, 7, D)),
        Layout(0, 2, B, N),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    function, expected = RULES[name]
    assert assert_row_wise(function, x()) == [expected]


def test_self_attention_keeps_keys_and_values_whole():
    """The queries are rows; on chosen tokens keys and values must come from outside, whole."""
    gm = exported(lambda h: F.scaled_dot_product_attention(*[h.view(B, N, 2, 4).transpose(1, 2)] * 3), x())
    (node,) = outputs(gm)
    assert layouts_of(gm)[node] == Layout(0, 2, B, N)


def test_marker_carries_its_rows():
    def layer(h: Tensor) -> Tensor:
        rows = h.reshape(B * N, D)
        weight, index = rows.softmax(-1).topk(2)
        entry = torch.ops.moeca.expert_rows(rows)
        return torch.ops.moeca.experts_fixed_k(rows, index, weight, entry @ table(D, D), [table(D, D)] * 3, 3)

    gm = exported(layer, x())
    (node,) = outputs(gm)
    assert layouts_of(gm)[node] == MERGED


NEAR_MISSES: dict[str, Function] = {
    "convolution over tokens": lambda h: F.conv1d(h.transpose(1, 2), table(D, 1, 3), padding=1, groups=D),
    "layer norm over tokens": lambda h: F.layer_norm(h, (N, D)),
    "softmax over tokens": lambda h: h.softmax(1),
    "softmax over samples": lambda h: h.softmax(0),
    "topk over tokens (expert choice)": lambda h: h.topk(2, dim=1)[0],
    "sort over tokens": lambda h: h.sort(1)[0],
    "cumsum over tokens": lambda h: h.cumsum(1),
    "mean over tokens": lambda h: h.mean(1),
    "sum over everything": lambda h: h.sum(),
    "sum over an empty list of dims, which is everything": lambda h: torch.ops.aten.sum.dim_IntList(h, []),
    "norm over everything": lambda h: torch.linalg.vector_norm(h),
    "linear over tokens": lambda h: F.linear(h.transpose(1, 2), table(6, N)),
    "matmul over tokens": lambda h: h.transpose(1, 2) @ table(N, 6),
    "matrix times tokens": lambda h: table(6, N) @ h,
    "scores of queries and keys": lambda h: h @ h.transpose(1, 2),
    "einsum over tokens": lambda h: torch.einsum("bsd,sd->bd", h, table(N, D)),
    "einsum that picks tokens": lambda h: torch.einsum("bcs,bsd->bcd", table(B, 2, N), h),
    "einsum with another matrix a token": lambda h: torch.einsum("bsd,sde->bse", h, table(N, D, 6)),
    "tokens against tokens": lambda h: h.unsqueeze(1) + h.unsqueeze(2),
    "select of a token": lambda h: h[:, 0],
    "select of a sample": lambda h: h[0],
    "split of tokens": lambda h: h.split(2, dim=1)[0],
    "unbind of tokens": lambda h: h.unbind(1)[0],
    "the same tokens twice": lambda h: torch.cat([h, h], 1),
    "tokens beside those before them": lambda h: h[:, 1:] + h[:, :-1],
    "flip of tokens": lambda h: h.flip(1),
    "roll of tokens": lambda h: h.roll(1, 1),
    "expand of a mean": lambda h: h.mean(1, keepdim=True).expand(B, N, D),
    "tokens and width in one dim": lambda h: h.reshape(B, N * D),
    "a view across tokens": lambda h: h.reshape(B, 2 * N, D // 2),
    "samples and tokens merged the other way": lambda h: h.transpose(0, 1).reshape(B * N, D),
    "gather along tokens": lambda h: h.gather(1, h.argsort(1)),
    "marks along tokens": lambda h: torch.zeros_like(h).scatter(1, h.argsort(1), 1.0),
    "marks at an index without tokens": lambda h: h.scatter(-1, torch.zeros(B, N, 1, dtype=torch.long), 1.0),
    "values without tokens": lambda h: h.scatter(-1, h.topk(2)[1], torch.ones(B, N, 2)),
    "gather by an index without tokens": lambda h: h.gather(-1, torch.zeros(B, N, 1, dtype=torch.long)),
    "index that picks tokens": lambda h: h[:, torch.arange(0, N, 2)],
    "repeated tokens": lambda h: h.repeat(1, 2, 1),
    "repeated samples": lambda h: h.repeat(2, 1, 1),
    "tokens repeated one by one": lambda h: h.repeat_interleave(2, 1),
    "everything repeated": lambda h: h.repeat_interleave(2),
    "einsum with weights by token": lambda h: torch.einsum("bnd,nde->bne", h, table(N, D, 3)),
    "einsum of two values with tokens": lambda h: torch.einsum("bnd,bmd->bnm", h, h),
    "matmul by token": lambda h: h.transpose(0, 1) @ table(N, D, 3),
    "tokens merged into samples by head": lambda h: h.view(B, N, 2, 4).reshape(B, N * 2, 4),
    "samples merged into heads": lambda h: h.view(B, N, 2, 4).permute(2, 0, 1, 3).reshape(2 * B, N, 4),
    "attention of more samples": lambda h: F.scaled_dot_product_attention(
        h[:, None], *[table(3 * B, 1, 7, D).view(3, B, 1, 7, D)] * 2
    ),
    "attention whose tokens are heads": lambda h: F.scaled_dot_product_attention(*[h.unsqueeze(2)] * 3),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    assert_no_layout(NEAR_MISSES[name], x())


def test_a_layout_that_was_lost_stays_lost():
    """A value computed from what mixed tokens must not get its layout back by its shape."""
    mixing = lambda h: F.linear(h.softmax(1) + 1, table(6, D))  # noqa: E731
    assert_no_layout(mixing, x())


MIXING: dict[str, tuple[Function, int]] = {
    "a convolution": (lambda h: F.conv1d(h.mT, table(D, 1, 3), padding=1, groups=D).mT * 2 + h, 1),
    "a convolution over a grid": (
        lambda h: F.conv2d(h.mT.reshape(B, D, 1, N), table(D, 1, 1, 3), groups=D, padding=(0, 1)).flatten(2).mT.exp(),
        1,
    ),
    "a softmax over tokens": (lambda h: h.softmax(1).sum(-1), 1),
    "rows as tokens, then mixed twice": (lambda h: F.linear(h.flip(1).roll(1, 1), table(6, D)), 2),
    "flat rows": (lambda h: h.flip(1).mT.reshape(B, -1).view(B * N, D).relu(), 2),
    "sorted along tokens": (lambda h: h.sort(1)[0] * 2, 1),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("width", [D, N])
def test_what_mixed_tokens_has_rows_again_that_are_gathered(name, width, monkeypatch):
    """Also where there are as many tokens as channels."""
    function, count = MIXING[name]
    monkeypatch.setitem(globals(), "D", width)
    gm = exported(function, x(B, N, width))
    mixed: set[fx.Node] = set()
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, B, N)}, mixed)
    assert len(mixed) == count
    assert not mixed & set(layouts_of(gm)), "without the set, they have no layout"
    (node,) = outputs(gm)
    evaluation = Evaluation(gm.graph, [x(B, N, width)], {})
    chosen = choose(B, N)
    rows = Rows(chosen, layouts, evaluation.__getitem__, [placeholders(gm)[0]], mixed=mixed)
    torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], chosen), atol=1e-5, rtol=1e-5)


def test_keys_of_an_attention_are_no_rows():
    def attend(h: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(table(B, 1, 3, D), h.unsqueeze(1), h.unsqueeze(1))

    assert_no_layout(attend, x())


# Several streams: picture (B, N, D) and text (B, M, D), the first two inputs.

M = 3
PICTURE_AND_TEXT: dict[str, tuple[Function, list[tuple[str, int, int]]]] = {
    "picture and text": (lambda h, t: torch.cat([h, t], 1), [("h", 0, N), ("t", 0, M)]),
    "text and picture": (lambda h, t: torch.cat([t, h], 1), [("t", 0, M), ("h", 0, N)]),
    "a part": (lambda h, t: h[:, 1:4], [("h", 1, 4)]),
    "the picture, cut off again": (lambda h, t: torch.cat([t, h], 1)[:, M:], [("h", 0, N)]),
    "heads, joined and cut": (
        lambda h, t: torch.cat([z.view(B, -1, 2, 4).transpose(1, 2) for z in (h, t)], 2)[:, :, :N] * 2,
        [("h", 0, N)],
    ),
    "the picture beside a text of its length": (lambda h, t: h[:, :M] + t, [("h", 0, M)]),
    "a picture that attends to the text": (
        lambda h, t: F.scaled_dot_product_attention(h[:, None], t[:, None], t[:, None])[:, 0],
        [("h", 0, N)],
    ),
}


@pytest.mark.parametrize("name", PICTURE_AND_TEXT)
def test_tokens_of_two_streams(name):
    """Rows that are chosen among the picture's are rows of the whole, wherever the picture lies in it."""
    function, expected = PICTURE_AND_TEXT[name]
    gm = exported(function, x(), x(B, M, D))
    (node,), (picture, text) = outputs(gm), placeholders(gm)[:2]
    layouts = token_layouts(gm.graph, {s: stream_layout(s) for s in (picture, text)})
    sources = {"h": picture, "t": text}
    assert layouts[node].axis == tuple(Span(sources[s], start, stop) for s, start, stop in expected)
    evaluation = Evaluation(gm.graph, (x(), x(B, M, D)), {})
    for span in layouts[node].axis:
        chosen = choose(B, len(span))
        rows = Rows(chosen, layouts, evaluation.__getitem__, [span.source], (span,))
        place = offset_in(layouts[node].axis, (span,))
        torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], chosen + place))


@pytest.mark.parametrize(
    "function",
    [
        lambda h, t: torch.cat([h.reshape(B * N, D), t.reshape(B * M, D)]),
        lambda h, t: torch.cat([h, t[:, :N].repeat(1, 2, 1)[:, :N]], 0),
        lambda h, t: torch.cat([h[:, 1:], h[:, :2]], 1),
        lambda h, t: h[:, ::2],
        lambda h, t: h[:1],
    ],
    ids=["samples and tokens merged", "samples joined", "a token twice", "every second token", "one sample"],
)
def test_near_miss_of_two_streams(function):
    gm = exported(function, x(), x(B, M, D))
    layouts = token_layouts(gm.graph, {s: stream_layout(s) for s in placeholders(gm)[:2]})
    assert outputs(gm)[0] not in layouts


# Shapes drawn at random: what a view does to batch and tokens depends on the sizes alone.

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 2, 4, 6, 12]))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.data())
def test_views_and_merges_of_any_shape(sizes, data):
    batch, tokens, width = sizes
    heads = data.draw(st.sampled_from([h for h in (1, 2, 3) if width % h == 0]))
    chain = data.draw(st.lists(st.sampled_from(sorted(MOVES)), min_size=1, max_size=4))

    def function(h: Tensor) -> Tensor:
        shape = (batch, tokens, heads, width // heads)
        for name in chain:
            h = MOVES[name](h.reshape(shape), shape) * 2
        return h

    assert_row_wise(function, x(batch, tokens, width), batch=batch, tokens=tokens)


MOVES: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "apart": lambda h, s: h,
    "together": lambda h, s: h.reshape(s[0], s[1], s[2] * s[3]),
    "rows": lambda h, s: h.reshape(s[0] * s[1], s[2] * s[3]),
    "rows of heads": lambda h, s: h.reshape(s[0] * s[1], s[2], s[3]),
    "with a 1": lambda h, s: h.reshape(s[0], 1, s[1], s[2] * s[3]),
    "with a 1 behind": lambda h, s: h.reshape(s[0], s[1], 1, s[2], s[3]),
    "one sample's": lambda h, s: h.reshape(1, s[0], s[1], s[2] * s[3]),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.permutations(range(4)))
def test_permutes_of_any_order(batch, tokens, heads, order):
    (layout,) = assert_row_wise(
        lambda h: h.view(batch, tokens, heads, 2).permute(order),
        x(batch, tokens, 2 * heads),
        batch=batch,
        tokens=tokens,
    )
    if tokens > 1:  # else the dim could be any of those of size 1
        assert (layout.batch, layout.token) == (order.index(0), order.index(1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([4, 6]), st.data())
def test_a_view_has_a_layout_only_where_rows_agree(batch, tokens, width, data):
    """Whatever a value is viewed as: if it keeps a layout at all, its rows are those of the whole."""
    total = batch * tokens * width
    shape = data.draw(factorisations(total))
    gm = exported(lambda h: h.reshape(shape) * 1, x(batch, tokens, width))
    if outputs(gm)[0] in layouts_of(gm, batch, tokens):
        assert_row_wise(lambda h: h.reshape(shape) * 1, x(batch, tokens, width), batch=batch, tokens=tokens)


@st.composite
def factorisations(draw: Callable[..., int], total: int) -> tuple[int, ...]:
    shape = []
    while total > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0])))
        total //= shape[-1]
    return (*shape, total) if total > 1 or not shape else tuple(shape)
