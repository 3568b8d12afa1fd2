"""Running slices of a graph on chosen tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile.passes.analysis.token_axis import Layout, token_layouts
from moeca_compile.passes.rewrite.evaluate import Evaluation
from moeca_compile.passes.rewrite.rows import NotRowWiseError, Rows, put_rows, take_rows
from tests.harness import exported, outputs, placeholders

B, N, D = 2, 5, 4
CHOSEN = torch.tensor([[3, 0, 4], [1, 4, 2]])

# The same values laid out in every way: by layout, how to bring (B, N, D) into it and back.
LAYOUTS = {
    Layout(0, 1, B, N): (lambda v: v, lambda v: v),
    Layout(1, 0, B, N): (lambda v: v.transpose(0, 1), lambda v: v.transpose(0, 1)),
    Layout(0, 0, B, N): (lambda v: v.reshape(-1, D), lambda v: v.view(B, -1, D)),
    Layout(0, 2, B, N): (lambda v: v.unsqueeze(1), lambda v: v.squeeze(1)),
    Layout(1, 1, B, N): (lambda v: v.reshape(-1, D).t(), lambda v: v.t().reshape(B, -1, D)),
    Layout(1, 2, B, N): (lambda v: v.permute(2, 0, 1), lambda v: v.permute(1, 2, 0)),
    Layout(0, 1, B, N, inner=2): (
        lambda v: v.unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1),
        lambda v: v.unflatten(0, (B, 2)).transpose(1, 2).flatten(2),
    ),
    Layout(1, 0, B, N, inner=2): (
        lambda v: v.transpose(0, 1).reshape(-1, 2 * B, 2),
        lambda v: v.reshape(-1, B, D).transpose(0, 1),
    ),
}


def value() -> Tensor:
    return torch.arange(B * N * D).float().view(B, N, D)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_take(layout):
    to, back = LAYOUTS[layout]
    rows = back(take_rows(to(value()), layout, CHOSEN))
    assert torch.equal(rows, torch.stack([value()[b, CHOSEN[b]] for b in range(B)]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_put_writes_the_valid_rows(layout):
    to, back = LAYOUTS[layout]
    rows, valid = (
        -torch.arange(1.0, B * 3 * D + 1).view(B, 3, D),
        torch.tensor([[True, False, True], [False] * 3]),
    )
    expected = value()
    expected[0, 3], expected[0, 4] = rows[0, 0], rows[0, 2]
    assert torch.equal(back(put_rows(to(value()), layout, CHOSEN, to(rows), valid)), expected)


def evaluate(function, *inputs: Tensor) -> tuple[fx.GraphModule, Evaluation, dict[fx.Node, Layout]]:
    gm = exported(function, *inputs)
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, B, N)})
    return gm, Evaluation(gm.graph, inputs, {}), layouts


def assert_rows(function, *inputs: Tensor, source: int = 0) -> None:
    """Rows of the output from rows of the node number `source` on chosen tokens are those of the whole."""
    gm, evaluation, layouts = evaluate(function, *inputs)
    (node,), sources = outputs(gm), [list(gm.graph.nodes)[source]]
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, sources)
    torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], CHOSEN), atol=1e-6, rtol=1e-6)


X = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("function", "table"),
    [
        (lambda x, t: x * t, (N, D)),
        (lambda x, t: x * t, (1, N, D)),
        (lambda x, t: x * t, (B, N, D)),
        (lambda x, t: t + x, (N, 1)),
        (lambda x, t: x.view(B, N, 2, 2).transpose(1, 2) * t, (N, 2)),
        (lambda x, t: x.view(B, N, 2, 2).transpose(1, 2) * t, (1, 2, N, 2)),
        (lambda x, t: x.reshape(B * N, D) * t, (B * N, D)),
        (lambda x, t: x.transpose(0, 1) * t, (N, 1, D)),
        (lambda x, t: torch.cat([x, t], -1), (B, N, 3)),
        (lambda x, t: torch.cat([t.expand(B, N, 3), x], -1), (1, N, 3)),
        (lambda x, t: torch.where(t > 0, x, -x), (N, D)),
        (lambda x, t: torch.stack([x, t], 1), (B, N, D)),
        (lambda x, t: torch.stack([x, t], -1), (B, N, D)),
    ],
)
def test_tables_by_position_are_gathered_sample_by_sample(function, table):
    assert_rows(function, X, r(*table))


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (lambda x, c: x * c.unsqueeze(1), (B, D)),
        (lambda x, w: F.linear(x, w), (N, D)),
        (lambda x, w: F.linear(x, w), (3, D)),
        (lambda x, w: x @ w, (D, N)),
        (lambda x, s: x * s, ()),
        (lambda x, s: x * s, (1, 1, D)),
        (lambda x, w: F.layer_norm(x, (D,), w), (D,)),
    ],
)
def test_what_holds_no_tokens_is_taken_as_it_is(function, other):
    """Also where a size of it happens to be the number of tokens."""
    assert_rows(function, X, r(*other))


def test_a_rotary_embedding():
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = x.view(B, N, 2, 2).transpose(1, 2)
        first, second = q.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    assert_rows(rotate, X, r(N, 1), r(1, 1, N, 1))


def test_a_slice_from_the_middle_reads_its_source_only():
    """The upstream, here a mean over tokens, is taken whole."""
    gm, evaluation, layouts = evaluate(lambda x: F.silu(x + x.mean(1, keepdim=True)) * 3, X)
    add = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, [add])
    (node,) = outputs(gm)
    torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], CHOSEN))
    assert placeholders(gm)[0] not in rows.values


def test_an_activation_from_before_the_slice_is_gathered_not_computed():
    """A long skip: what lies before the source is known for all tokens, through whatever it went."""

    def skip(x: Tensor) -> Tensor:
        early = F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1)
        stream = early + x
        return torch.cat([stream.sigmoid(), early], -1) * 2

    gm, evaluation, layouts = evaluate(skip, X)
    stream = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, [stream])
    (node,) = outputs(gm)
    torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], CHOSEN))


def test_rows_that_are_given_are_used():
    gm, evaluation, layouts = evaluate(lambda x: F.silu(x * 2) + 1, X)
    silu = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.silu.default)
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, placeholders(gm))
    rows.set(silu, torch.zeros(B, 3, D))
    assert torch.equal(rows[outputs(gm)[0]], torch.ones(B, 3, D))


def test_what_mixes_tokens_is_refused():
    gm, evaluation, layouts = evaluate(lambda x: x.softmax(1) * 2, X)
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, placeholders(gm))
    with pytest.raises(NotRowWiseError, match="mul"):
        _ = rows[outputs(gm)[0]]


def test_an_attention_whose_keys_are_rows_is_refused():
    """Chosen queries need the keys of all tokens; whoever runs the slice has to give the attention's rows."""
    gm, evaluation, layouts = evaluate(lambda x: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3) * 2, X)
    rows = Rows(CHOSEN, layouts, evaluation.__getitem__, placeholders(gm))
    with pytest.raises(NotRowWiseError, match="scaled_dot_product_attention"):
        _ = rows[outputs(gm)[0]]


def test_cross_attention_on_rows_keeps_keys_and_values_whole():
    assert_rows(lambda x, k: F.scaled_dot_product_attention(x.unsqueeze(1), k, k), X, r(B, 1, N, D))


def heads(x: Tensor) -> Tensor:
    return x.view(B, N, 2, 2).transpose(1, 2)


@pytest.mark.parametrize(
    ("attend", "shape"),
    [
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, is_causal=True), (1,)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m), (N, 6)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m, scale=0.2), (2, N, 6)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m > 0), (B, 1, N, 6)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m), (B, 1, 1, 6)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=m), (1, 6)),
        (lambda q, k, m: F.scaled_dot_product_attention(q, k, k, attn_mask=q @ m), (2, 6)),
        (
            lambda q, k, m: F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, k)), attn_mask=m),
            (2 * B, N, 6),
        ),
        (
            lambda q, k, m: F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, k)), is_causal=True),
            (1,),
        ),
    ],
)
def test_the_mask_of_the_chosen_queries(attend, shape):
    """Six keys that hold no tokens; masks with and without queries in them, by sample or for all."""
    assert_rows(lambda x, k, m: attend(heads(x), k, m) * 1, X, r(B, 2, 6, 2), r(*shape))


def test_a_mask_as_long_as_the_tokens_belongs_to_the_keys():
    keys, mask = r(B, 2, N, 2), r(1, N)
    assert_rows(lambda x, k, m: F.scaled_dot_product_attention(heads(x), k, k, attn_mask=m), X, keys, mask)


def test_rows_of_a_stream_within_a_longer_one():
    """Tables of the joint length are read where the stream's tokens lie in it."""

    def joint(x: Tensor, text: Tensor, table: Tensor) -> Tensor:
        return (torch.cat([text, x], 1) * table).sigmoid()[:, 3:] + 1

    gm, evaluation, layouts = evaluate(joint, X, r(B, 3, D), r(N + 3, D))
    rows, (node,) = Rows(CHOSEN, layouts, evaluation.__getitem__, placeholders(gm)[:1]), outputs(gm)
    torch.testing.assert_close(rows[node], take_rows(evaluation[node], layouts[node], CHOSEN))
    assert placeholders(gm)[1] not in rows.values


def test_a_branch_that_joins_its_tokens_from_parts_is_refused():
    gm, evaluation, layouts = evaluate(lambda x: torch.cat([x[:, :2] * 2, x[:, 2:]], 1), X)
    (node,) = outputs(gm)
    assert layouts[node].axis == layouts[placeholders(gm)[0]].axis
    with pytest.raises(NotRowWiseError, match="joins"):
        _ = Rows(CHOSEN, layouts, evaluation.__getitem__, placeholders(gm))[node]


def test_many_nodes_in_a_row_need_no_recursion():
    def deep(x: Tensor) -> Tensor:
        for _ in range(1200):
            x = x + 1
        return x

    assert_rows(deep, X)
