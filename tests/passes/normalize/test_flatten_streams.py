"""A stream with its tokens in a grid becomes one of (batch, tokens, channels), with equal values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moeca_compile.passes.analysis.graph import shape_of
from moeca_compile.passes.match.residuals import residuals_around
from moeca_compile.passes.normalize.flatten_streams import flatten_streams
from moeca_compile.passes.runner import normalize, run_passes
from tests.harness import exported, nodes_of, ops

X = torch.randn(2, 3, 4, 8)
C = torch.randn(2, 8)
W = torch.randn(8, 8, 3, 3)


def attention(h):
    rows = h.flatten(1, -2).unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).flatten(2).view_as(h)


def plain(x, c, w):
    return x + attention(F.layer_norm(x, (8,)))


def gated(x, c, w):
    shift, gate = F.linear(c, w[:, :, 0].reshape(24, 8))[:, None, None].split([8, 16], -1)
    return x + gate[..., :8] * attention(F.layer_norm(x, (8,)) + shift)


def with_product(x, c, w):
    return x + attention(x * (x * x).mean(-1, keepdim=True).rsqrt()) @ w[:, :, 0, 0] + F.linear(x, w[:, :, 1, 1])


def with_tables(x, c, w):
    """Of rows, of columns, of both, and of channels alone."""
    h = x + torch.ones(3, 1, 8) + torch.arange(4.0)[:, None] + torch.ones(3, 4, 8) * c.mean() + c[0]
    return h + attention(h.softmax(-1)[..., :8])


def with_convolution(x, c, w):
    h = x + attention(x)
    return h + F.conv2d(h.permute(0, 3, 1, 2), w, padding=1).permute(0, 2, 3, 1) * c[:, None, None]


def of_a_video(x, c, w):
    x = x.unflatten(1, (3, 1))
    return x + c[:, None, None, None] * attention(F.layer_norm(x, (8,)))


def along_rows(x, c, w):
    """A softmax and a sum over a dim of the grid are not computed token by token."""
    h = x + attention(x)
    return h + h.softmax(2) + h.sum(1, keepdim=True)


FUNCTIONS = [plain, gated, with_product, with_tables, with_convolution, of_a_video, along_rows]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_stream_is_flat(function):
    gm = exported(function, X, C, W)
    normalize(gm.graph)
    gm.recompile()
    assert torch.allclose(gm(X, C, W)[0], function(X, C, W), atol=1e-5)
    (sdpa,) = nodes_of(gm, torch.ops.aten.scaled_dot_product_attention)
    (residual,) = residuals_around(sdpa)
    assert shape_of(residual.stream) == shape_of(residual.add) == (2, 12, 8)


def test_near_misses_stay():
    """A stream of tokens; a grid without attention or experts; channels before the grid, which is another stream."""
    for function, x in (
        (plain, X.flatten(1, 2)),
        (lambda x, c, w: x + F.layer_norm(x, (8,)).relu(), X),
        (lambda x, c, w: F.scaled_dot_product_attention(x, x, x) + 1, X),
    ):
        gm = exported(function, x, C, W)
        before = ops(gm)
        (result,) = run_passes(gm.graph, [flatten_streams])
        assert result.matches == 0
        assert ops(gm) == before
