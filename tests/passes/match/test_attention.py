"""Attention from a residual stream; what looks like it and stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.passes.analysis.token_axis import Layout, token_layouts
from moeca_compile.passes.match.attention import attention_nodes, match_attention, sdpa_options, work_between
from moeca_compile.passes.match.regions import Attention, Skipped
from moeca_compile.passes.runner import normalize
from tests.harness import exported, nodes_of, ops, placeholders

B, N, D, H = 2, 6, 8, 2
X, TABLE, TEXT = torch.randn(B, N, D), torch.randn(N, D // H), torch.randn(B, 7, D)
QKV, PROJ, MASK = torch.randn(3 * D, D), torch.randn(D, D), torch.ones(N, N, dtype=torch.bool)
INPUTS = (X, TABLE, TEXT, QKV, PROJ, MASK)


def heads(x: Tensor, count: int = H) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def fused(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, weight).view(B, N, 3, H, D // H).permute(2, 0, 3, 1, 4).unbind(0)


def with_options(**options):
    def block(x, table, text, qkv, proj, mask):
        q, k, v = fused(x, qkv)
        return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v, **options)), proj)

    return block


def rotary(x, table, text, qkv, proj, mask):
    q, k, v = fused(F.layer_norm(x, (D,)), qkv)
    return x + F.linear(flat(F.scaled_dot_product_attention(q * table, k * table, v)), proj)


def three_projections(x, table, text, qkv, proj, mask):
    q, k, v = (heads(F.linear(x, w)) for w in qkv.chunk(3))
    return F.linear(flat(F.scaled_dot_product_attention(q, k, v)), proj) + x


def grouped_queries(x, table, text, qkv, proj, mask):
    q = heads(F.linear(x, proj))
    k, v = (heads(F.linear(x, w), 1) for w in qkv[: D * 2].view(-1, D)[:D].chunk(2))
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), proj)


def masked(x, table, text, qkv, proj, mask):
    q, k, v = fused(x, qkv)
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v, mask)), proj)


def across(x, table, text, qkv, proj, mask):
    k, v = (heads(F.linear(text, w)) for w in qkv[: 2 * D].chunk(2))
    return x + F.linear(flat(F.scaled_dot_product_attention(heads(F.linear(x, proj)), k, v)), proj)


def joint(x, table, text, qkv, proj, mask):
    """Keys and values of picture and text together."""
    q, k, v = fused(x, qkv)
    k, v = (torch.cat([value, heads(text)], 2) for value in (k, v))
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v)), proj)


def spelled_out(x, table, text, qkv, proj, mask):
    q, k, v = fused(x, qkv)
    return x + F.linear(flat((q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v), proj)


def merged_heads(x, table, text, qkv, proj, mask):
    q, k, v = (value.reshape(B * H, N, D // H) for value in fused(x, qkv))
    out = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)
    return x + F.linear(flat(out.view(B, H, N, D // H)), proj)


def pooled_keys(x, table, text, qkv, proj, mask):
    q, k, v = fused(x, qkv)
    k, v = (F.avg_pool1d(value.flatten(0, 1).mT, 2).mT.unflatten(0, (B, H)) for value in (k, v))
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v)), proj)


MATCHES = {
    "fused": with_options(),
    "scaled": with_options(scale=0.1),
    "rotary": rotary,
    "three projections": three_projections,
    "grouped queries": grouped_queries,
    "causal": with_options(is_causal=True),
    "a mask": masked,
    "keys of another stream": across,
    "keys of two streams": joint,
    "spelled out": spelled_out,
    "heads merged into the batch": merged_heads,
    "keys that mix tokens": pooled_keys,
}
NOT_BY_TOKEN = {"keys of another stream", "keys that mix tokens"}


def matched(block) -> tuple[list[Attention | Skipped], object]:
    gm = exported(block, *INPUTS)
    normalize(gm.graph)
    before, mixed = ops(gm), set()
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, B, N)}, mixed)
    found = [part for node in attention_nodes(gm.graph) for part in match_attention(node, layouts, mixed)]
    assert ops(gm) == before, "matching never edits"
    return found, gm


@pytest.mark.parametrize("name", MATCHES)
def test_match(name):
    (attention,), gm = matched(MATCHES[name])
    assert isinstance(attention, Attention)
    (sdpa,) = nodes_of(gm, torch.ops.aten.scaled_dot_product_attention)
    assert attention.sdpa is sdpa
    assert (attention.query, attention.key, attention.value) == sdpa.args[:3]
    assert attention.residual.stream is placeholders(gm)[0]
    assert attention.residual.output is nodes_of(gm, torch.ops.aten.linear)[-1]
    assert attention.by_token == (name not in NOT_BY_TOKEN)


def of_query_dtype(x, table, text, qkv, proj, mask):
    """Query and output hold the same tokens in different dims."""
    q, k, v = fused(x, qkv)
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v)).type_as(q), proj)


def into_new_memory(x, table, text, qkv, proj, mask):
    q, k, v = fused(x, qkv)
    out = F.scaled_dot_product_attention(q, k, v)
    return x + F.linear(out.new_zeros(B, N, D) + flat(out), proj)


@pytest.mark.parametrize("block", [of_query_dtype, into_new_memory])
def test_a_value_whose_dtype_is_read_is_not_read(block):
    (attention,), gm = matched(block)
    assert isinstance(attention, Attention)
    assert attention.residual.output is nodes_of(gm, torch.ops.aten.linear)[-1]


def test_options_are_given_by_name_with_defaults():
    (attention,), _ = matched(MATCHES["scaled"])
    expected = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": 0.1, "enable_gqa": False}
    assert sdpa_options(attention.sdpa) == expected
    (attention,), _ = matched(MATCHES["grouped queries"])
    assert sdpa_options(attention.sdpa)["enable_gqa"] is True


def no_residual(x, table, text, qkv, proj, mask):
    return F.linear(flat(F.scaled_dot_product_attention(*fused(x, qkv))), proj) * 2


def mixed_output(x, table, text, qkv, proj, mask):
    out = flat(F.scaled_dot_product_attention(*fused(x, qkv)))
    return x + F.linear(out.softmax(1), proj)


def squeezed_output(x, table, text, qkv, proj, mask):
    """Channels weighted by their mean over the tokens."""
    out = F.linear(flat(F.scaled_dot_product_attention(*fused(x, qkv))), proj)
    return x + out * out.mean(1, keepdim=True).sigmoid()


def over_heads(x, table, text, qkv, proj, mask):
    """Attention among the heads of a token."""
    q, k, v = F.linear(x, qkv).view(B, N, 3, H, D // H).unbind(2)
    return x + F.linear(F.scaled_dot_product_attention(q, k, v).reshape(B, N, D), proj)


def over_rows(x, table, text, qkv, proj, mask):
    """One attention over the tokens of all samples, without a batch dim."""
    q, k, v = F.linear(x, qkv).view(B * N, 3, H, D // H).permute(1, 2, 0, 3).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(B, N, D)
    return x + F.linear(out, proj)


def from_text(x, table, text, qkv, proj, mask):
    """A text asks, the picture answers; what comes of it is added to the picture."""
    q, (k, v) = heads(F.linear(text, proj)), (heads(F.linear(x, w)) for w in qkv[: 2 * D].chunk(2))
    return x + F.linear(flat(F.scaled_dot_product_attention(q, k, v)), proj)[:, :N]


NEAR_MISSES = {
    "queries of another stream": (from_text, "queries are not computed"),
    "no residual": (no_residual, "no residual addition"),
    "an output that mixes tokens": (mixed_output, "not computed token by token"),
    "an output that is scaled by a mean over tokens": (squeezed_output, "not computed token by token"),
    "attention over heads": (over_heads, ""),
    "attention over all samples": (over_rows, ""),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    block, reason = NEAR_MISSES[name]
    (kept,), _ = matched(block)
    assert isinstance(kept, Skipped)
    assert kept.kind == "attention"
    assert reason in kept.reason


def test_work_between():
    gm = exported(lambda x, w: (F.linear(x, w).relu(), x.relu() * 2), X, PROJ)
    heavy, light = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    x = placeholders(gm)[0]
    assert work_between(x, heavy)
    assert not work_between(x, light)
    assert not work_between(heavy, light)
