"""Attention as two products and a softmax, in many spellings, against the one op."""

from __future__ import annotations

from math import inf

import pytest
import torch
import torch.nn.functional as F

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.normalize.fuse_attention import fuse_attention, unclear_attentions
from moeca_compile.passes.runner import normalize
from tests.harness import exported, nodes_of, ops, outputs

B, H, N, M, D, E = 2, 3, 5, 7, 4, 6
Q, K, V = (
    torch.randn(B, H, *sizes, generator=torch.Generator().manual_seed(i))
    for i, sizes in enumerate([(N, D), (M, D), (M, E)])
)
DRAWN = torch.Generator().manual_seed(0)
BIAS, BIAS_BY_HEAD = (torch.randn(*sizes, generator=DRAWN) for sizes in ((N, M), (H, N, M)))
KEEP = (torch.rand(N, M, generator=DRAWN) < 0.5).index_fill(1, torch.tensor(0), True)
KEEP[N - 1, 1:] = False  # the last query has one key
TEMPERATURE = torch.rand(H, 1, 1, generator=DRAWN) + 0.5
INPUTS = (Q, K, V, BIAS, BIAS_BY_HEAD, KEEP, TEMPERATURE)
aten = torch.ops.aten


def over(scores):
    """Attention with these scores, the usual way."""
    return lambda q, k, v, m, h, keep, t: scores(q, k, m, h, keep, t).softmax(-1) @ v


def by_rows(function):
    """The same on tensors (batch, tokens, heads, width)."""
    return lambda q, k, v, *rest: function(*(x.transpose(1, 2) for x in (q, k, v)), *rest).transpose(1, 2)


def merged(function):
    """The same on tensors (batch * heads, tokens, width)."""
    return lambda q, k, v, *rest: function(*(x.flatten(0, 1) for x in (q, k, v)), *rest).unflatten(0, (B, H))


def with_empty_bias(q, k, v, *_):
    scores = torch.baddbmm(torch.empty(B * H, N, M), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v)


def with_added_bias(q, k, v, m, *_):
    return torch.bmm(torch.baddbmm(m.expand(B * H, N, M), q, k.mT, beta=2, alpha=0.5).softmax(-1), v)


def with_regrouped_heads(q, k, v, m, h, *_):
    scores = torch.bmm(q, k.mT).view(B, H, N, M) + h
    return torch.bmm(scores.softmax(-1).view(B * H, N, M), v)


def with_values_first(q, k, v, *_):
    return torch.bmm(v.mT.contiguous(), torch.bmm(q, k.mT).softmax(2).permute(0, 2, 1)).mT


def with_channels_first(q, k, v, *_):
    weights = torch.einsum("bct,bcs->bts", q.mT * 0.7, k.mT * 0.7).softmax(-1)
    return torch.einsum("bts,bcs->bct", weights, v.mT).mT


SPELLINGS = {
    "plain": over(lambda q, k, *_: q @ k.transpose(-2, -1)),
    "scaled before": over(lambda q, k, *_: (q * 0.5) @ k.mT),
    "scaled after": over(lambda q, k, *_: q @ k.mT / 3),
    "permuted keys": over(lambda q, k, *_: torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.3),
    "a bias": over(lambda q, k, m, *_: q @ k.mT * 0.3 + m),
    "a scaled bias": over(lambda q, k, m, *_: torch.add(q @ k.mT, m, alpha=0.3)),
    "a bias before the scale": over(lambda q, k, m, h, *_: (h + q @ k.mT) * 0.3),
    "two biases": over(lambda q, k, m, h, *_: (h + q @ k.mT) * 0.3 - m),
    "a bias of keys": over(lambda q, k, m, *_: q @ k.mT * 0.3 + m[0]),
    "in place": over(lambda q, k, m, *_: (q @ k.mT).mul_(0.3).add_(m)),
    "filled": over(lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep, -inf)),
    "filled with the least number": over(
        lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep, torch.finfo(q.dtype).min)
    ),
    "where": over(lambda q, k, m, h, keep, t: torch.where(keep, q @ k.mT, -1e9)),
    "where a tensor": over(lambda q, k, m, h, keep, t: torch.where(keep, q @ k.mT, torch.full((), -inf))),
    "where the other way": over(lambda q, k, m, h, keep, t: torch.where(~keep, -inf, q @ k.mT)),
    "a mask and a bias": over(lambda q, k, m, h, keep, t: torch.where(keep, q @ k.mT * 0.3, -inf) + m),
    "two masks": over(
        lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep, -inf).masked_fill(h[:, :1] > 1, -1e9)
    ),
    "a finite mask that leaves a query no key": over(
        lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep & (m < 0) | (m > m[-1:].amin()), -1e9)
    ),
    "a scaled finite mask, then a bias": over(
        lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(m < m.amax(-1, keepdim=True) + 1, -1e9) * 0.5 + h
    ),
    "a finite mask over what another has dropped": over(
        lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep, -inf).masked_fill(keep, -1e9)
    ),
    "a temperature a head": over(lambda q, k, m, h, keep, t: (q @ k.mT) * t + m),
    "a scale that is a tensor": over(lambda q, k, *_: (q @ k.mT) / torch.tensor(8.0).sqrt()),
    "less the greatest": over(lambda q, k, *_: (s := q @ k.mT) - s.amax(-1, keepdim=True).detach()),
    "less the maximum": over(lambda q, k, *_: (s := q @ k.mT) - s.max(-1, keepdim=True)[0]),
    "upcast": lambda q, k, v, *_: F.softmax((q @ k.mT / 2).double(), -1).to(q.dtype) @ v,
    "softmax in another dtype": lambda q, k, v, *_: F.softmax(q @ k.mT, -1, dtype=torch.float64).type_as(q) @ v,
    "products in another dtype": lambda q, k, v, *_: (q.double() @ k.double().mT).softmax(-1).float() @ v,
    "dropout that is off": lambda q, k, v, *_: F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v,
    "einsum": lambda q, k, v, *_: torch.einsum(
        "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v
    ),
    "einsum, heads behind": by_rows(
        lambda q, k, v, m, *_: torch.einsum(
            "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5 + m).softmax(-1), v
        )
    ),
    "einsum, heads in the middle": by_rows(
        lambda q, k, v, m, *_: torch.einsum(
            "bqhk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bqhk", q, k) + m[:, None]).softmax(-1), v
        )
    ),
    "einsum, keys before queries": lambda q, k, v, m, *_: torch.einsum(
        "bhkq,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhkq", q, k) + m.t()).softmax(-2), v
    ),
    "one head of keys": lambda q, k, v, *_: (q @ k[:, :1].mT).softmax(-1) @ v[:, :1],
    "one head of keys, einsum": lambda q, k, v, *_: torch.einsum(
        "bhqk,bkd->bhqd", torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).softmax(-1), v[:, 0]
    ),
    "baddbmm": merged(with_empty_bias),
    "baddbmm with a bias": merged(with_added_bias),
    "heads regrouped for a bias": merged(with_regrouped_heads),
    "values first": merged(with_values_first),
    "channels first": merged(with_channels_first),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_becomes_one_op_with_the_same_numbers(name):
    function = SPELLINGS[name]
    gm = exported(function, *INPUTS)
    assert "scaled_dot_product_attention" not in ops(gm)
    normalize(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found = ops(gm)
    assert found["scaled_dot_product_attention"] == 1
    assert not {"softmax", "matmul", "bmm", "baddbmm", "einsum"} & set(found)
    torch.testing.assert_close(gm(*INPUTS)[0], function(*INPUTS), atol=1e-6, rtol=1e-5)
    assert shape_of(outputs(gm)[0]) == (B, H, N, E)
    assert unclear_attentions(gm.graph) == []
    assert fuse_attention(gm.graph) == 0, "done once, nothing is left to do"


def test_one_attention_on_the_result_of_another():
    def twice(q, k, *_):
        out = (q @ k.mT).softmax(-1) @ k
        return (out @ k.mT).softmax(-1) @ k

    gm = exported(twice, *INPUTS)
    assert fuse_attention(gm.graph) == 2
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(*INPUTS)[0], twice(*INPUTS), atol=1e-6, rtol=1e-5)


def test_scale_and_operands():
    gm = exported(over(lambda q, k, *_: q @ k.mT * 0.25), *INPUTS)
    assert fuse_attention(gm.graph) == 1
    (sdpa,) = nodes_of(gm, aten.scaled_dot_product_attention)
    assert [node.name for node in sdpa.args] == ["arg0_1", "arg1_1", "arg2_1"]
    assert sdpa.kwargs == {"scale": 0.25}


def test_low_precision_is_summed_in_full():
    """bfloat16 with a softmax in float32, as models write it, stays that close to it."""
    low = [x.bfloat16() for x in (Q, K, V)]

    def function(q, k, v):
        return F.softmax((q @ k.mT).float() * 0.5, dim=-1).to(q.dtype) @ v

    gm = exported(function, *low)
    assert fuse_attention(gm.graph) == 1
    gm.recompile()
    (out,) = gm(*low)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, function(*low), atol=3e-2, rtol=3e-2)


UNCLEAR = {
    "capped scores": (over(lambda q, k, *_: (q @ k.mT).tanh() * 3), "scales, biases and masks only"),
    "a mask that leaves some": (
        over(lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(~keep, -10.0)),
        "not minus infinity",
    ),
    "masked scores of the other sign": (
        over(lambda q, k, m, h, keep, t: (q @ k.mT).masked_fill(keep, -inf) * -1),
        "change their sign",
    ),
    "a tensor scales a bias too": (over(lambda q, k, m, h, keep, t: (q @ k.mT + m) * t), "scaled by a tensor"),
    "dropout": (lambda q, k, v, *_: F.dropout((q @ k.mT).softmax(-1), 0.1, True) @ v, "draws random numbers"),
    "a softmax over queries": (lambda q, k, v, *_: (q @ k.mT).softmax(-2) @ v, "not over the keys"),
    "weights that are returned": (
        lambda q, k, v, *_: ((w := (q @ k.mT).softmax(-1)) @ v) * w.sum(),
        "used by something else",
    ),
    "weights that are changed": (
        lambda q, k, v, m, h, keep, t: ((q @ k.mT).softmax(-1) * keep) @ v,
        "changed before they meet the values",
    ),
    "a sink": (
        lambda q, k, v, m, h, *_: torch.cat([q @ k.mT, h[:, :, :1].expand(B, H, N, 1)], -1).softmax(-1)[..., :-1] @ v,
        "changed before they meet the values",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_what_the_op_cannot_say_stays_with_a_reason(name):
    function, reason = UNCLEAR[name]
    gm = exported(function, *INPUTS)
    before = ops(gm)
    normalize(gm.graph)
    assert ops(gm) == before
    ((_, why),) = unclear_attentions(gm.graph)
    assert reason in why


OTHERS = {
    "a router": lambda q, k, v, *_: (q @ k[0, 0].mT).softmax(-1) @ v[0, 0],
    "a softmax alone": lambda q, k, v, *_: (q @ k.mT).softmax(-1),
    "linear attention": lambda q, k, v, *_: q.softmax(-1) @ (k.softmax(-2).mT @ v),
    "linear attention behind an attention": lambda q, k, v, *_: (
        F.linear((q @ k.mT) @ k, k[0, 0, :D]).softmax(-1) @ (k.softmax(-2).mT @ v)
    ),
    "two products": lambda q, k, v, *_: (q @ k.mT) @ v,
    "a softmax of no product": lambda q, k, v, m, *_: m.softmax(-1) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_is_not_spoken_of(name):
    gm = exported(OTHERS[name], *INPUTS)
    before = ops(gm)
    normalize(gm.graph)
    assert ops(gm) == before
    assert unclear_attentions(gm.graph) == []


def test_arguments_are_named_alike():
    """Queries, keys, values by position; of the rest, what is not the default."""
    gm = exported(
        lambda q, k, v, m, *_: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m), *INPUTS
    )
    (sdpa,) = nodes_of(gm, aten.scaled_dot_product_attention)
    normalize(gm.graph)
    assert len(sdpa.args) == 3
    assert set(sdpa.kwargs) == {"attn_mask"}
