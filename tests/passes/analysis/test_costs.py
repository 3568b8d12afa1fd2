"""FLOPs of single nodes against torch's counter, and as expressions in batch and tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moeca_compile.passes.analysis.costs import BATCH, TOKENS, node_flops, symbolic_flops
from moeca_compile.passes.analysis.token_axis import Layout, token_layouts
from tests.harness import exported, placeholders

B, N, D = 2, 6, 8
X, W, BIAS = torch.randn(B, N, D), torch.randn(5, D), torch.randn(5)

FUNCTIONS = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear with bias": lambda x, w, b: F.linear(x, w, b),
    "matmul": lambda x, w, b: x @ w.t(),
    "mm": lambda x, w, b: torch.mm(x.view(-1, D), w.t()),
    "bmm": lambda x, w, b: torch.bmm(x, x.transpose(1, 2)),
    "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, D), w.t()),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(*[x.view(B, N, 2, 4).transpose(1, 2)] * 3),
    "attention to fewer keys": lambda x, w, b: F.scaled_dot_product_attention(
        x.unsqueeze(1), x[:, None, :4], x[:, None, :4, :3]
    ),
    "convolution": lambda x, w, b: F.conv2d(x.view(B, 1, N, D), w.view(5, 1, 4, 2), stride=2),
    "grouped convolution": lambda x, w, b: F.conv1d(x.transpose(1, 2), w.view(D, 1, 5), padding=2, groups=D),
    "pointwise": lambda x, w, b: F.gelu(x) * 2 + F.layer_norm(x, (D,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_node_flops(name):
    gm = exported(FUNCTIONS[name], X, W, BIAS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        FUNCTIONS[name](X, W, BIAS)
    assert sum(node_flops(node) for node in gm.graph.nodes) == counter.get_total_flops()


def flops(function, batch: int, tokens: int) -> object:
    gm = exported(function, torch.randn(batch, tokens, D), W)
    layouts = token_layouts(gm.graph, {placeholders(gm)[0]: Layout(0, 1, batch, tokens)})
    return symbolic_flops(gm.graph.nodes, layouts)


def test_work_by_token_grows_with_both():
    assert flops(lambda x, w: F.linear(x, w), 2, 6) == 2 * D * 5 * BATCH * TOKENS


def test_attention_grows_with_the_square_of_the_tokens():
    attend = lambda x, w: F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3)  # noqa: E731
    assert flops(attend, 2, 6) == 4 * D * BATCH * TOKENS**2


def test_expressions_do_not_depend_on_the_sizes_traced():
    def block(x, w):
        return F.linear(x + F.scaled_dot_product_attention(*[x.unsqueeze(1)] * 3).squeeze(1), w)

    assert flops(block, 2, 6) == flops(block, 3, 10)


def test_work_without_tokens_is_constant():
    assert flops(lambda x, w: x * F.linear(w, w)[0, 0], 2, 6) == 2 * 5 * 5 * D
