"""The registry of expert bodies."""

from __future__ import annotations

import torch
from torch import fx

from moeca_compile.ops import bodies


def test_equal_bodies_share_a_key_and_others_do_not():
    one, same, other = (
        fx.symbolic_trace(body) for body in (lambda x, w: x @ w, lambda x, w: x @ w, lambda x, w: (x @ w).relu())
    )
    assert bodies.register(one) == bodies.register(same) != bodies.register(other)


def test_a_body_runs_on_rows_and_parameters():
    key = bodies.register(fx.symbolic_trace(lambda x, y, w, b: (x + y) @ w + b))
    x, y, w, b = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4, 2), torch.randn(2)
    torch.testing.assert_close(bodies.run(key, [x, y], [w, b]), (x + y) @ w + b)


def test_no_rows_give_no_outputs():
    key = bodies.register(fx.symbolic_trace(lambda x, w: x @ w))
    assert bodies.run(key, [torch.randn(0, 4)], [torch.randn(4, 2)]).shape == (0, 2)
